"""Checks of config keys: each must be one of the command, or of the object built from its node."""

import difflib
import inspect
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from mtnrec.checks import InputError
from mtnrec.command.config import lightning_keys, optimizer_keys
from mtnrec.run.identity import flatten

_OF_HYDRA = "_target_"
_OWN_KEYS = {"trainer": lightning_keys, "optimizer": optimizer_keys}  # those of the built object
_ONE_CHOICE = (
    *("balance", "data", "experiment", "loss", "model", "mtn", "noise", "optimizer"),
    *("regularizer", "scheduler", "trainer"),
)


def check_keys(config: DictConfig, command: str) -> None:
    """Refuse keys that nothing reads, and texts where an object of another package takes a number.

    Constructors of this package check their values themselves.

    Args:
        config: Composed config of a command; Hydra's own keys are left alone.
        command: Name of the command.

    Raises:
        InputError: If there is such a key.
    """
    schema = ConfigStore.instance().load(f"{command}_schema.yaml").node
    known = [field.name for field in fields(cast(Any, OmegaConf.get_type(schema)))]
    if unknown := [str(key) for key in config if key not in (*known, "hydra")]:
        raise InputError(explain_unknown(unknown[0], known, config, f"mtnrec {command}"))
    if removed := [key for key in known if key not in config]:
        raise InputError(f"~{removed[0]} removes a key of mtnrec {command}. Leave it out.")
    for key in known:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            _check_node(_OWN_KEYS[key](node) if key in _OWN_KEYS else node, key, config)


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse several choices of a group that makes one object: the last would hide the others.

    Args:
        overrides: Overrides of a run.

    Raises:
        InputError: If there is such a choice.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, choice = override.key_or_group, override.value()
        if group in _ONE_CHOICE and isinstance(choice, list):
            names = ",".join(map(str, choice))
            raise InputError(
                f"{group} must be one choice, got [{names}]. Choose one, or sweep over them: "
                f"-m {group}={names}."
            )


def _check_node(node: DictConfig, name: str, root: DictConfig) -> None:
    if OmegaConf.select(node, _OF_HYDRA) is not None:
        parameters = _parameters(node[_OF_HYDRA])
        if parameters is not None:
            _check_arguments(node, name, parameters, root)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _check_node(child, f"{name}.{key!s}", root)


def _check_arguments(
    node: DictConfig, name: str, parameters: Mapping[str, inspect.Parameter], root: DictConfig
) -> None:
    target = str(node[_OF_HYDRA])
    for key in (str(key) for key in node if not str(key).startswith("_")):
        full = f"{name}.{key}"
        if key not in parameters:
            known = [f"{name}.{parameter}" for parameter in parameters]
            raise InputError(explain_unknown(full, known, root, target))
        if target.startswith("mtnrec.") or OmegaConf.is_interpolation(node, key):
            continue
        default = parameters[key].default
        takes_number = isinstance(default, numbers.Real) and not isinstance(default, bool)
        if takes_number and isinstance(node[key], str):
            raise InputError(f"{full} must be a number, got {node[key]!r}.")


@cache
def _parameters(target: str) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a target; None if it takes any keyword or cannot be inspected."""
    try:
        found = inspect.signature(get_object(target)).parameters
    except Exception:  # whatever its import raises; building it raises it again
        return None
    kinds = {parameter.kind for parameter in found.values()}
    return None if inspect.Parameter.VAR_KEYWORD in kinds else found


def explain_unknown(key: str, known: Sequence[str], root: DictConfig, owner: str) -> str:
    """Return the message about a key that nothing reads.

    Args:
        key: Dotted name of the key.
        known: Dotted names of the keys at its place.
        root: Config, in which a key of the same name is looked for elsewhere.
        owner: Command or class that lacks the key.
    """
    return f"{key} is not a key of {owner}. {_suggest(key, known, root)}"


def _suggest(key: str, known: Sequence[str], root: DictConfig) -> str:
    guesses = difflib.get_close_matches(key, known, n=1)
    if not guesses:
        last = key.rpartition(".")[2]
        guesses = [n for n in _names(root) if n != key and n.rpartition(".")[2] == last]
    if guesses:
        return f"Did you mean {guesses[0]}?"
    return f"Choose from {', '.join(known)}."


def _names(root: DictConfig) -> Iterator[str]:
    plain = cast(dict[str, Any], OmegaConf.to_container(root, resolve=False))
    plain.pop("hydra", None)
    return (name for name, _ in flatten(plain))
