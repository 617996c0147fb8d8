"""Compose the config of a run from Python: choices, keys or objects per group."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from mtnrec.checks import InputError, check_choice
from mtnrec.command.config import CONF_DIR, Train

# Groups whose classes and partial calls need no more arguments.
_BUILT_WITHOUT_MORE = ("regularizer", "loss", "balance")
_PACKAGE = __name__.partition(".")[0]


def compose_run(groups: Mapping[str, Any], keys: Mapping[str, Any]) -> DictConfig:
    """Compose the config of ``conf/train.yaml`` as the command line does.

    Args:
        groups: Value of each group, as in :func:`group_config`; an omitted group has its default
            choice.
        keys: Values of keys outside the groups.
    """
    root = cast(DictConfig, OmegaConf.load(CONF_DIR / "train.yaml"))
    found: dict[str, Any] = {}
    for entry in root.pop("defaults"):
        if isinstance(entry, str):
            continue
        ((group, choice),) = entry.items()
        if group == "callbacks":
            found["callbacks"] = _callback_configs(groups.get("callbacks") or ())
        elif group == "metrics":
            found["metrics"] = _metric_configs(groups.get("metrics") or {})
        elif group in Train.__annotations__:
            value = groups.get(str(group), choice)
            found[group] = None if value is None else group_config(str(group), value, choice)
    del root["hydra"]
    return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Train), root, found, dict(keys)))


def group_config(group: str, value: Any, default: str | None) -> DictConfig:
    """Return the config of a group.

    Args:
        group: Name of the group, for example ``model``.
        value: Name of a choice (``"mmoe"``), a list of names, whose keys are merged, keys that
            replace those of the default choice (``{"lr": 0.01}``; with ``_target_``, all keys), or
            an object or partial call as in :func:`describe_call`.
        default: Name of the default choice; None if there is none.

    Raises:
        InputError: If the choice or a key does not exist.
    """
    if isinstance(value, str):
        choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        check_choice(group, value, choices)
        return _load(group, value)
    if isinstance(value, list | tuple):
        configs = [group_config(group, item, default) for item in value]
        return cast(DictConfig, OmegaConf.merge(*configs))
    if not isinstance(value, Mapping):
        describe = _describe_object if group in _BUILT_WITHOUT_MORE else describe_call
        return OmegaConf.create(describe(group, value))
    if "_target_" in value:
        return OmegaConf.create(dict(value))
    if default is None:
        raise InputError(
            f"{group} must be a choice, an object, or keys with their _target_, got keys "
            f"{', '.join(map(str, value))} without it."
        )
    base = _load(group, default)
    if unknown := sorted(set(value) - set(base)):
        raise InputError(
            f"{group} must have keys of its choice {default}, got {', '.join(unknown)}. Choose "
            f"from {', '.join(str(key) for key in base if not str(key).startswith('_'))}."
        )
    return cast(DictConfig, OmegaConf.merge(base, dict(value)))


def _callback_configs(callbacks: Sequence[Any]) -> list[Any] | None:
    """Return the config of each callback, in order; None without any."""
    found: list[Any] = []
    for value in callbacks:
        if isinstance(value, str):
            found += group_config("callbacks", value, value).values()
        else:
            found.append(_describe_object("callbacks", value))
    return found or None


def _metric_configs(metrics: Sequence[str] | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of each metric by name; None without any."""
    if isinstance(metrics, Mapping):
        found = {name: _describe_object(f"metrics.{name}", v) for name, v in metrics.items()}
    else:
        chosen = [metrics] if isinstance(metrics, str) else metrics
        configs = [group_config("metrics", name, name) for name in chosen]
        found = {str(key): node for config in configs for key, node in config.items()}
    return found or None


def _describe_object(name: str, value: Any) -> dict[str, Any]:
    """Return the config that builds an object.

    A class or partial call needs no more arguments, so it is described as the object it makes.
    """
    if isinstance(value, Mapping):
        return dict(value)
    described = describe_call(name, value)
    described.pop("_partial_", None)
    return described


def describe_call(name: str, value: Any) -> dict[str, Any]:
    """Return the config that rebuilds an object: ``_target_`` and the arguments.

    Args:
        name: Name of the argument, for messages.
        value: A class, a ``functools.partial`` of one with keywords only, or an object that stores
            each constructor argument under its name.

    Raises:
        InputError: If the arguments cannot be found or written to a config.

    >>> describe_call("optimizer", partial(int, base=2))
    {'_target_': 'builtins.int', '_partial_': True, 'base': 2}
    """
    if isinstance(value, partial):
        if value.args:
            raise InputError(f"{name} must be a partial call with keywords only, got {value}")
        return describe_config(name, value.func, {"_partial_": True, **value.keywords})
    if inspect.isclass(value):
        return describe_config(name, value, {"_partial_": True})
    return describe_config(name, type(value), _arguments(name, value))


def describe_config(
    name: str, target: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config of a call: ``_target_`` and the arguments, in plain values.

    Raises:
        InputError: If an argument cannot be written to a config.
    """
    plain = {key: _plain(f"{name}.{key}", value) for key, value in arguments.items()}
    return {"_target_": _public_path(target), **plain}


def _arguments(name: str, value: Any) -> dict[str, Any]:
    parameters = inspect.signature(type(value)).parameters
    if lacking := [key for key in parameters if not hasattr(value, key)]:
        raise InputError(
            f"{name} must be an object that stores the arguments of its constructor, got a "
            f"{type(value).__name__}, which lacks {', '.join(lacking)}. Pass the class, or "
            "functools.partial of it with keywords."
        )
    return {key: getattr(value, key) for key in parameters}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, partial):
        return describe_call(name, value)
    if hasattr(value, "__fspath__"):
        return str(value)
    raise InputError(f"{name} must be a number, a string, a list or a partial call, got {value!r}")


def _public_path(target: Callable[..., Any]) -> str:
    """Return the import path of a class; for other packages, the shortest that exports it."""
    module, name = target.__module__, target.__qualname__
    parts = module.split(".")
    if parts[0] == _PACKAGE:
        return f"{module}.{name}"
    for end in range(1, len(parts)):
        shorter = ".".join(parts[:end])
        if getattr(import_module(shorter), name, None) is target:
            return f"{shorter}.{name}"
    return f"{module}.{name}"


def _load(group: str, choice: str) -> DictConfig:
    config = cast(DictConfig, OmegaConf.load(CONF_DIR / group / f"{choice}.yaml"))
    bases = [base for base in config.pop("defaults", []) if base != "_self_"]
    folder = Path(group, choice).parent
    loaded = [_load(str(folder), base.removesuffix("@_here_")) for base in bases]
    return cast(DictConfig, OmegaConf.merge(*loaded, config))
