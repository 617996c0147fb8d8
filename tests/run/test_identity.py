"""Identity of a run: settings, arm and baseline."""

import re

import pytest
from omegaconf import OmegaConf

from mtnrec.command.config import resolve_settings, seed_keys
from mtnrec.run.identity import RunIdentity, folder_name


def run_id(config, checksum="abc"):
    return RunIdentity(config, checksum, ["seed"]).id


@pytest.fixture
def make_id(compose_config):
    config = compose_config("output_dir=run")

    def make(key=None, value=None, *, checksum="abc"):
        changed = config.copy()
        if key is not None:
            OmegaConf.update(changed, key, value)
        return run_id(OmegaConf.to_container(changed, resolve=True), checksum)

    return make


def test_the_id_does_not_depend_on_where_a_run_reads_and_writes(make_id):
    assert make_id("logger.csv.name", "other") == make_id()
    assert make_id("output_dir", "elsewhere") == make_id()
    assert make_id("data_root", "elsewhere") == make_id()
    assert make_id("data.dir", "elsewhere") == make_id()
    assert make_id("data.verify", value=False) == make_id()
    assert make_id("threads", 1) == make_id()
    assert make_id("resume", value=False) == make_id()
    assert make_id("keep_scores", value=True) == make_id()
    assert make_id("trainer.enable_model_summary", value=True) == make_id()
    assert make_id("trainer.checkpoint_every_n_steps", 5) == make_id()  # without MTN


def test_a_minimum_group_of_one_row_is_a_run_of_before_the_key_existed(make_id, compose_config):
    config = OmegaConf.to_container(compose_config("output_dir=run"), resolve=True)
    assert config.pop("min_group_rows") == 1

    assert run_id(config) == make_id()


def test_every_setting_and_the_checksum_of_the_data_change_the_id(make_id):
    ids = [
        make_id(),
        make_id("seed", 1),
        make_id("mtn.enabled", value=True),
        make_id("model.embedding_dim", 64),
        make_id("data.split_seed", 1),
        make_id("patience", 4),
        make_id("stop", "patience"),
        make_id("task_loss", "mean"),
        make_id("min_group_rows", 2),
        make_id(checksum="abd"),
    ]

    assert len(set(ids)) == len(ids)


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

    assert seed_keys(config) == sorted(["seed", *keys])
    assert config.seed == 3


def test_repeats_draw_only_the_seed_or_also_the_validation_rows_and_the_noise(compose_config):
    alone = compose_config("seed=3")
    all_drawn = compose_config("seed=3", "repeats=seed_split_noise")

    assert (alone.data.split_seed, alone.noise.seed) == (0, 0)
    assert (all_drawn.data.split_seed, all_drawn.noise.seed) == (3, 3)


def test_data_sets_that_the_seed_draws_are_those_of_one_arm(compose_config):
    def arm(checksum, *overrides, seed=0):
        config = compose_config(
            "data=synthetic_planted", f"seed={seed}", "output_dir=run", *overrides
        )
        return RunIdentity(resolve_settings(config), checksum, seed_keys(config))

    first, second = arm("a"), arm("b", seed=1)
    assert first.draws_data
    assert first.arm == second.arm
    assert first.id != second.id
    assert arm("a", "data.relatedness=0.5").arm != first.arm
    fixed = [arm("a", "data.generator_seed=3"), arm("b", "data.generator_seed=3")]
    assert not fixed[0].draws_data
    assert fixed[0].arm != fixed[1].arm
    assert not arm("a", "data=synthetic", "repeats=seed_split_noise").draws_data


def test_the_id_does_not_depend_on_the_order_of_the_keys(compose_config):
    config = resolve_settings(compose_config())
    backwards = {key: config[key] for key in reversed(config)}
    backwards["data"] = dict(reversed(config["data"].items()))

    assert run_id(backwards) == run_id(config)


def test_a_key_is_the_same_as_a_number_and_as_text(compose_config):
    widths = [{"default": 8, 101: 4, 99: 2}, {"99": 2, "101": 4, "default": 8}, {"default": 8}]
    configs = [resolve_settings(compose_config()) for _ in widths]
    for config, width in zip(configs, widths, strict=True):
        config["model"]["embedding_dim"] = width

    number, text, other = (run_id(config) for config in configs)

    assert number == text != other


def test_what_is_switched_off_is_one_run_at_all_settings(make_id):
    assert make_id("mtn.lam", 0.1) == make_id("mtn.target", "shared") == make_id()
    assert make_id("noise.seed", 5) == make_id()
    assert make_id("noise.proportion", 0.1) != make_id()


def test_a_run_without_a_test_is_another_run_than_a_tested_one(make_id):
    assert make_id("test", False) != make_id("test", True) == make_id()


def test_an_mtn_setting_changes_the_id_if_mtn_is_enabled(compose_config):
    configs = (
        resolve_settings(compose_config("mtn.enabled=true", f"mtn.lam={lam}"))
        for lam in (1e-5, 1e-4)
    )

    assert len({run_id(config) for config in configs}) == 2


def test_a_run_folder_is_named_after_its_settings(compose_config):
    names = {
        folder_name(resolve_settings(compose_config(f"seed={seed}", f"data_root={root}")))
        for seed in (0, 1)
        for root in ("here", "there")
    }

    assert len(names) == 2
    assert all(re.fullmatch("synthetic-esmm-seed[01]-[0-9a-f]{8}", name) for name in names)


def test_swept_settings_are_part_of_the_folder_name(compose_config):
    config = resolve_settings(
        compose_config("mtn.enabled=true", "mtn.lam=1e-3", "optimizer.lr=0.1")
    )
    swept = {
        "mtn.lam": 1e-3,
        "optimizer.lr": 0.1,
        "model.tower_widths": [64, 32],
        "optimizer": "adam",
        "seed": 0,  # named in any case
        "mtn.enabled": True,
        "threads": 2,  # do not change the result
        "experiment": "table_1",
    }

    name = folder_name(config, swept)

    words = "lam_0.001-lr_0.1-tower_widths_64_32-optimizer_adam"
    assert re.fullmatch(f"synthetic-esmm-mtn-{words}-seed0-[0-9a-f]{{8}}", name)
    assert name.endswith(folder_name(config)[-15:])


def test_settings_that_are_off_are_not_part_of_the_folder_name(compose_config):
    config = resolve_settings(compose_config())

    assert folder_name(config, {"mtn.lam": 0.1, "noise.seed": 3}) == folder_name(config)


def test_a_folder_name_is_short_and_of_safe_characters(compose_config):
    config = resolve_settings(compose_config())
    config["data"]["name"] = "a=b, 'c' é" * 30
    swept = {"model.tower_widths": list(range(90)), "model.dropout": "{a: [1]}\\", "patience": 2}

    name = folder_name(config, swept)

    assert re.fullmatch("[A-Za-z0-9._-]{1,120}", name)
    assert re.search("-seed0-[0-9a-f]{8}$", name)


def test_groups_that_add_nothing_are_not_settings(compose_config):
    config = OmegaConf.to_container(compose_config("output_dir=run"), resolve=True)
    groups = ("regularizer", "loss", "balance", "scheduler", "metrics", "callbacks")

    assert run_id({k: v for k, v in config.items() if k not in groups}) == run_id(config)
    assert run_id(config | {"balance": {"_target_": "my.Balance"}}) != run_id(config)


def test_a_constant_rate_and_a_regulariser_that_is_off_are_not_settings(compose_config):
    plain, other = (
        resolve_settings(compose_config(*overrides))
        for overrides in (
            [],
            ["scheduler=constant", "regularizer=l2", "regularizer.enabled=false"],
        )
    )

    assert run_id(other) == run_id(plain)


def test_a_regulariser_names_the_folder(compose_config):
    config = resolve_settings(compose_config("regularizer=soft_sharing", "mtn.enabled=true"))
    swept = {"regularizer": "soft_sharing", "regularizer.lam": 1e-3, "mtn": "gttn"}
    config["regularizer"]["lam"] = 1e-3

    name = folder_name(config, swept)

    assert re.fullmatch("synthetic-esmm-gttn-soft_sharing-lam_0.001-seed0-[0-9a-f]{8}", name)


def test_a_run_with_a_regulariser_is_tagged_with_its_norm(compose_config):
    config = resolve_settings(compose_config("regularizer=l2", "mtn.enabled=true"))
    identity = RunIdentity(config, "abc", ["seed"])

    assert identity.tags == ["synthetic", "esmm", "mtn+l2", "clean"]
    assert identity.group.startswith("synthetic esmm mtn+l2 lam=1e-05 lam=1e-05 clean ")


def noisy(compose_config, *overrides):
    return resolve_settings(compose_config(*overrides))


def test_label_noise_that_flips_nothing_is_not_a_setting(compose_config):
    plain, feature_noise = noisy(compose_config), noisy(compose_config, "noise.proportion=0.1")
    for config in (plain, feature_noise):
        before = {k: v for k, v in config["noise"].items() if k != "label_flip"}
        for flips in ({}, {"click": 0}, None):
            changed = config | {"noise": before | {"label_flip": flips}}
            assert run_id(changed) == run_id(config) == run_id(config | {"noise": before})
            assert folder_name(changed) == folder_name(config)


@pytest.mark.slow
def test_label_noise_is_a_setting_and_keys_of_feature_noise_do_not_count_without_it(compose_config):
    flip = "noise.label_flip={conversion:0.1}"
    one = noisy(compose_config, flip)

    assert run_id(one) != run_id(noisy(compose_config))
    assert run_id(one) != run_id(noisy(compose_config, "noise.label_flip={conversion:0.2}"))
    assert run_id(one) != run_id(noisy(compose_config, flip, "noise.seed=1"))
    assert run_id(one) != run_id(noisy(compose_config, flip, "noise.proportion=0.1"))
    assert run_id(one) == run_id(noisy(compose_config, flip, "noise.sampling=empirical"))


def test_label_noise_names_folder_and_run(compose_config):
    flip = "noise.label_flip={conversion:0.1}"
    both = noisy(compose_config, flip, "noise.proportion=0.2", "output_dir=run")
    alone = noisy(compose_config, flip, "output_dir=run")

    swept = {"noise.label_flip": {"conversion": 0.1}, "noise.proportion": 0.2}
    assert folder_name(both, swept).startswith("synthetic-esmm-noise0.2-flip_conversion_0.1-seed0-")
    tags = [RunIdentity(config, "abc", ["seed"]).tags for config in (both, alone)]
    assert tags[0] == ["synthetic", "esmm", "baseline", "noise_0.2", "flip_conversion_0.1"]
    assert tags[1] == ["synthetic", "esmm", "baseline", "flip_conversion_0.1"]
    assert RunIdentity(alone, "abc", ["seed"]).group.startswith(f"{' '.join(tags[1])} ")
