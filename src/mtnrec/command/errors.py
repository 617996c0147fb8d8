"""Errors that the user can fix."""

import re
from typing import cast

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtnrec.checks import InputError
from mtnrec.command.config import CONF_DIR
from mtnrec.command.help import read_groups
from mtnrec.command.keys import explain_unknown

_UNKNOWN = re.compile(r"Could not override '(.+)'\.")
_NOT_A_CHOICE = "Config group override must be"  # Hydra's error about group=null or group=3
_IN_CALL = re.compile(r"Error in call to target '.*?(\w+)'.*?(?:full_key: (\S+))?$", re.DOTALL)


def find_input_error(error: BaseException, command: str = "train") -> InputError | None:
    """Return the input error behind an error, if there is one.

    Hydra wraps input errors. Errors of Hydra, Lightning or torch about a config value count too.

    Args:
        error: The raised error.
        command: Name of the command, whose groups a message about an unknown key suggests.
    """
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, InputError):
        error = error.__cause__
    if isinstance(error, InputError):
        return error
    if isinstance(error, ValueError) and str(error).startswith(_NOT_A_CHOICE):
        return InputError(
            "a config group must be one of its choices or a list of them, got "
            f"{str(error).rpartition(' ')[2]}. Choose one (--help lists them), or leave it out."
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        return InputError(_explain(error, command))
    return None


def unknown_key(error: BaseException) -> str | None:
    """Return the dotted key that a composition did not find, or None for another error."""
    found = _UNKNOWN.match(str(error))
    return None if found is None else found[1]


def _explain(error: HydraException | OmegaConfBaseException, command: str) -> str:
    if (key := unknown_key(error)) is not None:
        return _explain_unknown(key, error, command)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group} must be one of {', '.join(error.options)}; got {choice!r}"
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return (
            f"{error.override} is not in Hydra's grammar. Quote the value, and the argument for "
            f"the shell: \"{key}='{value}'\"."
        )
    if call := _IN_CALL.match(str(error)):
        return f"{call[2] or call[1]}: {_in_one_line(error.__cause__)}"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return ": ".join(filter(None, (_in_one_line(error), _in_one_line(cause.msg))))
    return _in_one_line(error)


def _explain_unknown(key: str, error: BaseException, command: str) -> str:
    """Explain an unknown key; OmegaConf's error names the node that lacks it."""
    node = getattr(error.__cause__, "parent_node", None)
    if not isinstance(node, DictConfig):
        return f"{key} is not a key of mtnrec {command}."
    place = str(node._get_full_key(None))
    names = [str(name) for name in node if name != "hydra"]
    known = [f"{place}.{name}" if place else name for name in names]
    if not place:
        known += read_groups((CONF_DIR / f"{command}.yaml").read_text(encoding="utf-8"))
    owner = OmegaConf.select(node, "_target_") or place or f"mtnrec {command}"
    return explain_unknown(key, sorted(set(known)), cast(DictConfig, node._get_root()), str(owner))


def _in_one_line(text: object) -> str:
    return " ".join(str(text).split())
