import re

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Adam

from mtnrec.checks import InputError
from mtnrec.command.config import CONF_DIR, lightning_keys, optimizer_keys
from mtnrec.command.errors import find_input_error
from mtnrec.data.datamodule import DataModule
from mtnrec.data.noise import Noise
from mtnrec.mtn.callback import MTN
from mtnrec.optimizer.scheduler import make_scheduler
from mtnrec.run.identity import RunIdentity
from mtnrec.schema import CategoricalField, Schema
from mtnrec.tracking.loggers import make_loggers


def choices(group):
    return [path.stem for path in sorted((CONF_DIR / group).glob("*.yaml"))]


def build_network(config, schema):
    return instantiate(config, _partial_=True, _convert_="all")(schema=schema)


def test_every_group_has_its_choices():
    countries = [f"aliexpress_{country}" for country in ("es", "fr", "nl", "ru", "us")]

    synthetic = ["synthetic", "synthetic_ali_ccp", "synthetic_planted"]
    assert choices("data") == [
        *("ali_ccp", *countries, "census_income", "kuairand", *synthetic, "table")
    ]
    assert choices("model") == [
        "adatt",
        "aitm",
        "aitm_10m",
        "aitm_mtreclib",
        "dcmt",
        "escm2",
        "esmm",
        "esmm_10m",
        "heac",
        "mmoe",
        "mmoe_cross",
        "naive_cvr",
        "omoe",
        "ple",
        "ple_mtreclib",
        "shared_bottom",
        "shared_bottom_10m",
        "single_task",
        "single_task_10m",
        "stem",
    ]
    assert choices("mtn") == ["capped", "gttn", "laf", "mtn", "nuclear", "tt", "tucker"]
    assert choices("regularizer") == ["frobenius", "group_lasso", "l2", "none", "soft_sharing"]
    assert choices("optimizer") == ["adam", "adamw", "lazy_adam"]
    assert choices("scheduler") == ["constant", "cosine", "one_cycle", "plateau"]
    assert choices("logger") == ["csv", "tensorboard", "wandb"]
    assert choices("callbacks") == ["learning_rate"]
    assert choices("metrics") == ["average_precision", "brier"]
    assert choices("debug") == ["fast", "limit", "overfit"]


@pytest.mark.parametrize("name", choices("data"))
def test_every_entry_point_builds_the_same_data_set_without_touching_the_disk(
    name, compose_config, tmp_path
):
    config, to_prepare, to_describe = (
        compose_config(f"data={name}", name=n) for n in ("train", "prepare", "describe")
    )

    datamodule = instantiate(config.data, _convert_="all")

    assert isinstance(datamodule, DataModule)
    assert datamodule.name == name
    assert str(datamodule.dir).startswith(str(tmp_path / "data" / name))
    assert config.data == to_prepare.data == to_describe.data
    assert to_describe.out == f"{datamodule.dir}.txt"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", choices("noise"))
def test_every_noise_is_built_switched_off_and_spares_the_test_set(name, compose_config, tmp_path):
    noise = instantiate(compose_config(f"noise={name}", "seed=3").noise, _convert_="all")

    assert isinstance(noise, Noise)
    assert (noise.proportion, noise.feature_probability) == (0, 0.2)
    assert (noise.sampling, noise.splits) == ("uniform", ["train", "val"])
    assert noise.seed == 0  # runs of different seeds are paired on the same noise
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_is_built_from_a_schema(name, compose_config, funnel_schema, tmp_path):
    network = build_network(compose_config(name=f"model/{name}").model, funnel_schema)

    assert isinstance(network, nn.Module)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_sets_widths_per_field(compose_config):
    fields = tuple(CategoricalField(name, 300) for name in ("101", "109_14", "205"))
    schema = Schema(fields, (), ("click", "conversion"), funnel=True)
    config = compose_config("model.embedding_dim={default:9,101:3,109_14:4}")

    network = build_network(config.model, schema)

    assert [table.embedding_dim for table in network.input.tables] == [3, 4, 9]


@pytest.mark.parametrize("name", choices("mtn"))
def test_every_mtn_is_built_switched_off(name, compose_config, tmp_path):
    mtn = instantiate(compose_config(name=f"mtn/{name}").mtn, _convert_="all")

    assert isinstance(mtn, MTN)
    assert not mtn.enabled
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", choices("optimizer"))
def test_every_optimizer_waits_for_its_parameters(name, compose_config):
    optimizer = instantiate(optimizer_keys(compose_config(name=f"optimizer/{name}").optimizer))

    assert isinstance(optimizer(nn.Linear(1, 1).parameters()), Adam)


@pytest.mark.parametrize("name", choices("scheduler"))
def test_every_schedule_is_built(name, compose_config):
    build = instantiate(compose_config(name=f"scheduler/{name}").scheduler)
    optimizer = Adam(nn.Linear(1, 1).parameters())

    scheduler = make_scheduler(build, optimizer, steps=10, mode="max")

    assert scheduler.optimizer is optimizer


@pytest.mark.parametrize("name", choices("trainer"))
def test_every_trainer_is_built(name, compose_config, tmp_path):
    config = compose_config(f"trainer={name}", "trainer.accelerator=cpu").trainer

    trainer = instantiate(lightning_keys(config), logger=False, enable_checkpointing=False)

    assert isinstance(trainer, L.Trainer)
    assert list(tmp_path.iterdir()) == []


LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger}


@pytest.mark.parametrize(
    "names",
    [
        *([name] for name in LOGGERS),
        ["csv", "wandb"],
        ["csv", "tensorboard"],
        ["wandb", "tensorboard", "csv"],
    ],
    ids=",".join,
)
def test_every_logger_of_a_list_is_built_and_writes_to_the_folder_of_the_run(
    names, compose_config, tmp_path
):
    config = compose_config(f"logger=[{','.join(names)}]", f"output_dir={tmp_path}")

    loggers = make_loggers(config.logger, RunIdentity(as_plain(config), "1", ["seed"]))

    assert {type(logger) for logger in loggers} == {LOGGERS[name] for name in names}
    assert len(loggers) == len(names)
    assert {logger.save_dir for logger in loggers} == {str(tmp_path)}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_list_of_one_logger_is_that_logger(compose_config):
    for name in LOGGERS:
        assert compose_config(f"logger=[{name}]") == compose_config(f"logger={name}")


def test_keys_of_wandb_are_set_as_if_it_were_the_only_logger(compose_config, tmp_path):
    config = compose_config("logger=[csv,wandb]", "logger.offline=true", f"output_dir={tmp_path}")

    csv, wandb = make_loggers(config.logger, RunIdentity(as_plain(config), "1", ["seed"]))

    assert csv.name == "csv"
    assert wandb._offline
    assert wandb._wandb_init["name"].endswith(" seed=0")


def as_plain(config):
    return OmegaConf.to_container(config, resolve=True)


def test_the_defaults_are_esmm_without_mtn_on_a_synthetic_log(compose_config):
    config = compose_config()

    assert config.data.name == "synthetic"
    assert config.model._target_ == "mtnrec.model.esmm.ESMM"
    assert (config.mtn.enabled, config.mtn.lam) == (False, 1e-5)
    assert config.monitor == "val/cvr_auc"


@pytest.mark.parametrize(
    "override",
    [
        "sede=1",
        "seed=abc",
        "seed=null",
        "patience=soon",
        "mtn.lamda=1",
        "noise.share=0.1",
        "model.num_expert=3",
        "data.batchsize=3",
        "trainer.max_epoch=3",
        "optimizer.learning_rate=1",
        "logger.ofline=true",
        "model=esm",
    ],
)
def test_a_mistyped_key_is_refused_at_composition(override, compose_config):
    with pytest.raises(ConfigCompositionException, match=re.escape(override.split("=")[0])):
        compose_config("logger=wandb", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+data.colour=red", "unexpected keyword argument 'colour'"),
        ("data.name=${nothing}", "Interpolation key 'nothing' not found"),
        ("data.name=${data.name}", "Recursive interpolation"),
        ("data.batch_size=???", "Missing mandatory value: data.batch_size"),
        ("data._target_=mtnrec.nothing", "Error locating target 'mtnrec.nothing'"),
    ],
)
def test_an_error_of_hydra_about_a_value_is_one_message(override, message, compose_config):
    config = compose_config(override)

    with pytest.raises((InstantiationException, OmegaConfBaseException)) as error:
        instantiate(config.data, _convert_="all")

    known = find_input_error(error.value)
    assert message in str(known)
    assert "\n" not in str(known)


def test_a_program_error_is_not_an_input_error():
    assert find_input_error(IndexError("list index out of range")) is None


@pytest.fixture(scope="module")
def mmoe_config():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=["model=mmoe", "data.dir=nowhere"])


def change(config, key, value):
    changed = config.copy()
    OmegaConf.update(changed, key, value)
    return changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mtn.lam", -1, "mtn.lam must be a number in [0, inf), got -1"),
        ("mtn.lam", "big", "mtn.lam must be a number in [0, inf), got 'big'"),
        ("mtn.refresh_every", 0, "mtn.refresh_every must be an integer >= 1, got 0"),
        ("mtn.enabled", 1, "mtn.enabled must be true or false, got 1"),
        ("mtn.target", "tower", "mtn.target must be one of towers, shared; got 'tower'"),
        ("data.batch_size", 0, "data.batch_size must be an integer >= 1, got 0"),
        ("data.batch_size", "big", "data.batch_size must be an integer >= 1, got 'big'"),
        ("data.validation_share", 0, "data.validation_share must be above 0"),
        ("data.validation_share", 1, "data.validation_share must be a number in [0, 1), got 1"),
        ("noise.proportion", 1.5, "noise.proportion must be a number in [0, 1], got 1.5"),
        ("noise.splits", ["dev"], "noise.splits must be one of train, val, test; got 'dev'"),
        ("data.rows", 0, "data.rows must be an integer >= 1, got 0"),
    ],
)
def test_a_bad_value_is_refused_with_rule_and_value(key, value, message, mmoe_config):
    config = change(mmoe_config, key, value)

    with pytest.raises(InstantiationException, match=re.escape(message)) as error:
        instantiate(config[key.split(".")[0]], _convert_="all")

    assert isinstance(error.value.__cause__, InputError)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dropout", 1.5, "model.dropout must be a number in [0, 1), got 1.5"),
        ("tower_widths", [], "model.tower_widths must be a list of at least one width"),
        ("tower_widths", 64, "model.tower_widths must be a list of at least one width"),
        ("tower_widths", [64, 0], "model.tower_widths must be an integer >= 1, got 0"),
        ("embedding_dim", -1, "model.embedding_dim must be an integer >= 1, got -1"),
        ("embedding_dim", {"price": 4}, "model.embedding_dim must have a default"),
        ("experts", 0, "model.experts must be an integer from 1 to 10000, got 0"),
        ("batch_norm", 1, "model.batch_norm must be true or false, got 1"),
        ("cross_layers", -1, "model.cross_layers must be an integer from 0 to 100, got -1"),
        ("personal_fields", ["user"], "model.personal_fields must name fields of the data (categ"),
    ],
)
def test_a_bad_size_of_a_model_is_refused_with_rule_and_value(
    key, value, message, mmoe_config, funnel_schema
):
    config = change(mmoe_config, f"model.{key}", value)

    with pytest.raises(InputError, match=re.escape(message)):
        build_network(config.model, funnel_schema)


def test_nothing_is_missing_in_the_default_config(compose_config, tmp_path):
    config = compose_config(f"output_dir={tmp_path}", "seed=3")

    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)

    assert resolved["seed"] == 3
    assert resolved["logger"]["csv"]["save_dir"] == str(tmp_path)
