"""What a run is: its settings, its arm and its baseline."""

import re

import pytest
from omegaconf import OmegaConf

from mtnrec.command.config import resolve_settings, seed_keys
from mtnrec.run.identity import RunIdentity, folder_name


def run_id(config, checksum="abc"):
    return RunIdentity(config, checksum, ["seed"]).id


@pytest.fixture
def cell(compose_config):
    config = compose_config("output_dir=run")

    def make(key=None, value=None, *, checksum="abc"):
        changed = config.copy()
        if key is not None:
            OmegaConf.update(changed, key, value)
        return run_id(OmegaConf.to_container(changed, resolve=True), checksum)

    return make


def test_a_cell_does_not_depend_on_where_a_run_reads_and_writes(cell):
    assert cell("logger.name", "other") == cell()
    assert cell("output_dir", "elsewhere") == cell()
    assert cell("data_root", "elsewhere") == cell()
    assert cell("data.dir", "elsewhere") == cell()
    assert cell("data.verify", value=False) == cell()
    assert cell("threads", 1) == cell()
    assert cell("resume", value=False) == cell()
    assert cell("trainer.enable_model_summary", value=True) == cell()
    assert cell("trainer.checkpoint_every_n_steps", 5) == cell()  # without MTN


def test_every_setting_and_content_of_the_data_set_makes_a_cell_of_its_own(cell):
    cells = [
        cell(),
        cell("seed", 1),
        cell("mtn.enabled", value=True),
        cell("model.embedding_dim", 64),
        cell("data.split_seed", 1),
        cell("patience", 4),
        cell("stop", "patience"),
        cell("task_loss", "mean"),
        cell(checksum="abd"),
    ]

    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], []),
        (["noise.seed=${seed}"], ["noise.seed"]),
        (["data.split_seed=${seed}"], ["data.split_seed"]),
        (["repeats=seed_split_noise"], ["data.split_seed", "noise.seed"]),
        (["repeats=seed_split_noise", "noise.seed=7"], ["data.split_seed"]),
    ],
)
def test_the_keys_that_change_with_the_seed_are_found(overrides, keys, compose_config):
    config = compose_config("seed=3", *overrides)

    assert seed_keys(config) == sorted(["seed", "data.seed", *keys])
    assert config.seed == 3


def test_repeats_draw_the_seed_alone_or_the_validation_rows_and_the_noise_as_well(compose_config):
    alone = compose_config("seed=3")
    all_drawn = compose_config("seed=3", "repeats=seed_split_noise")

    assert (alone.data.split_seed, alone.noise.seed) == (0, 0)
    assert (all_drawn.data.split_seed, all_drawn.noise.seed) == (3, 3)


def test_a_cell_does_not_depend_on_the_order_of_the_keys(compose_config):
    config = resolve_settings(compose_config())
    backwards = {key: config[key] for key in reversed(config)}
    backwards["data"] = dict(reversed(config["data"].items()))

    assert run_id(backwards) == run_id(config)


def test_a_cell_takes_a_key_for_the_same_as_a_number_and_as_text(compose_config):
    widths = [{"default": 8, 101: 4, 99: 2}, {"99": 2, "101": 4, "default": 8}, {"default": 8}]
    configs = [resolve_settings(compose_config()) for _ in widths]
    for config, width in zip(configs, widths, strict=True):
        config["model"]["embedding_dim"] = width

    number, text, other = (run_id(config) for config in configs)

    assert number == text != other


def test_what_is_switched_off_is_one_cell_whatever_its_settings(cell):
    assert cell("mtn.lam", 0.1) == cell("mtn.target", "shared") == cell()
    assert cell("noise.seed", 5) == cell()
    assert cell("noise.proportion", 0.1) != cell()


def test_an_mtn_setting_makes_a_cell_of_its_own_where_mtn_acts(compose_config):
    configs = (
        resolve_settings(compose_config("mtn.enabled=true", f"mtn.lam={lam}"))
        for lam in (1e-5, 1e-4)
    )

    assert len({run_id(config) for config in configs}) == 2


def test_the_folder_of_a_cell_is_named_after_its_settings(compose_config):
    names = {
        folder_name(resolve_settings(compose_config(f"seed={seed}", f"data_root={root}")))
        for seed in (0, 1)
        for root in ("here", "there")
    }

    assert len(names) == 2
    assert all(re.fullmatch("synthetic-esmm-seed[01]-[0-9a-f]{8}", name) for name in names)
