"""Defaults are equal in the constructors and in the YAML files.

Those of data sets and noise: ``tests/data/test_defaults.py``.
"""

import inspect

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from mtnrec.command.compose import group_config
from mtnrec.command.config import CONF_DIR
from mtnrec.training.api import fit
from mtnrec.training.module import MultiTaskModule

# In `conf` MTN is off unless asked for; a callback that is added is on.
DIFFERENT = {"mtn.enabled"}
CHOICES = [
    (path.parent.name, path.stem)
    for group in ("model", "mtn", "regularizer", "loss", "balance", "optimizer")
    for path in sorted((CONF_DIR / group).glob("*.yaml"))
    if "_target_: mtnrec." in path.read_text(encoding="utf-8")
]


def constants(config):
    """Yield the keys whose value is neither interpolated nor missing."""
    for key in config:
        if not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key):
            value = config[key]
            yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def as_plain(value):
    if callable(value):
        return {"_partial_": True, **value.keywords}
    if isinstance(value, dict):
        return dict(value)
    return [as_plain(item) for item in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_the_signature_has_the_defaults_of_the_file(group, choice):
    config = group_config(group, choice, choice)
    parameters = inspect.signature(get_object(config["_target_"])).parameters

    for key, value in constants(config):
        # Decay of the embeddings is a keyword of the module.
        if (
            key in ("_target_", "_partial_", "embedding_weight_decay")
            or f"{group}.{key}" in DIFFERENT
        ):
            continue
        if parameters[key].default is inspect.Parameter.empty:  # the choice is this value
            continue
        default = as_plain(parameters[key].default)
        if isinstance(value, dict):
            value.pop("_target_", None)
        assert default == value, key


def test_the_module_has_the_defaults_of_train(compose_config):
    config, parameters = compose_config(), inspect.signature(MultiTaskModule).parameters

    keys = ("scheduler", "monitor", "task_loss", "min_group_rows", "cuda_graphs", "keep_scores")
    for key in keys:
        assert parameters[key].default == config[key]
    optimizer = {k: v for k, v in config.optimizer.items() if not k.startswith("_")}
    decay = optimizer.pop("embedding_weight_decay")
    assert parameters["embedding_weight_decay"].default is decay is None
    assert parameters["optimizer"].default.keywords == optimizer


def test_fit_has_the_defaults_of_train(compose_config):
    config, parameters = compose_config(), inspect.signature(fit).parameters

    shared = set(parameters) & set(config) - {"data", "model", "mtn", "noise", "output_dir"}
    groups = {"regularizer": "none", "loss": "cross_entropy", "balance": "sum", "optimizer": "adam"}
    groups |= {"trainer": "default", "logger": "csv"}
    assert {key: parameters[key].default for key in shared} == {
        key: groups.get(key, config[key]) for key in shared
    }
    assert len(shared) == 19
