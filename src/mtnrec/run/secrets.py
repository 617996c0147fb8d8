"""Secrets of a config or the environment, hidden in everything that a run writes.

A secret is a string under a key named like one (``api_key``, ``token``, ``password``, ``secret``),
or the value of an environment variable with such a name, wherever an interpolation put it.
"""

import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mtnrec.system.files import write_atomic

HIDDEN = "<hidden>"
_SHORTEST = 8  # characters; a shorter value of a variable is too likely part of other words
_NAME = (
    r"(?:(?:secret|passw(?:or)?d|passphrase|credential)s?"
    r"|(?:api|access|auth|private)_?(?:key|token)|(?<![a-z])(?:key|token))"
)
_IS_SECRET = re.compile(rf"{_NAME}$", re.IGNORECASE)
# In overrides and messages: logger.settings.api_key=…, 'token': '…', but not a path a/token=1/b.
_ASSIGNED = re.compile(
    rf"""(?<![\w./-])((?:[\w.]*[._])?{_NAME}["']?\s*[=:]\s*)(?!["']?\$\{{)(?:"(?:\\.|[^"\\])+"|'(?:\\.|[^'\\])+'|[^\s,}}\]"']+)""",
    re.IGNORECASE,
)
_FORMATTER = logging.Formatter()
_found: set[str] = set()  # values that `redact` has hidden by their key


def redact(value: Any, name: str = "") -> Any:
    """Return a copy of nested settings without secrets; an interpolation is left as it is.

    >>> redact({"settings": {"api_key": "4f2a", "offline": True}})
    {'settings': {'api_key': '<hidden>', 'offline': True}}
    """
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if _IS_SECRET.search(name) and not value.startswith("${"):
        if value != HIDDEN and len(value) >= _SHORTEST:
            _found.add(value)
        return HIDDEN
    return _hide_values(value)


def redact_text(text: str) -> str:
    """Return a message, an override or a command without secrets.

    >>> redact_text("logger.settings.api_key=4f2a data.group=user")
    'logger.settings.api_key=<hidden> data.group=user'
    """
    return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", _hide_values(text))


@cache
def _names_secret(variable: str) -> bool:
    return _IS_SECRET.search(variable) is not None


def _hide_values(text: str) -> str:
    variables = {
        value
        for variable, value in os.environ.items()
        if len(value) >= _SHORTEST and _names_secret(variable)
    }
    for secret in sorted(variables | _found, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact_log(record: logging.LogRecord) -> bool:
    """Filter of a log handler that hides secrets; every line passes."""
    message = record.getMessage()
    hidden = redact_text(message)
    if hidden != message:
        record.msg, record.args = hidden, ()
    if record.exc_info and not record.exc_text:
        record.exc_text = redact_text(_FORMATTER.formatException(record.exc_info))
    return True


def redact_files(folder: Path) -> None:
    """Hide secrets in the YAML files of a folder, if it exists."""
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        hidden = redact_text(text)  # leaves interpolations, which Hydra writes unresolved
        if hidden != text:
            write_atomic(path, hidden)
