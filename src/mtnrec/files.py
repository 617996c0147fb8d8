"""File names, atomic writes and JSON."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtnrec.checks import InputError


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and replace ``path`` with it if the block does not raise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Create the folder of a file, and turn an error from writing it into one that names it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"{path} could not be written ({error.strerror or error}). Choose another file with "
            "out, or delete other files."
        ) from error


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file atomically; text is UTF-8."""
    with atomic_replace(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed processes; no other process may be writing the file."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; NaN and infinities become null, keys become strings."""
    text = json.dumps(_for_json(content), indent=2, sort_keys=True, allow_nan=False)
    write_atomic(path, text + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if it does not exist.

    Raises:
        InputError: If it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Delete it and run again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object. Delete it and run again.")
    return content


def slug(*parts: str) -> str:
    """Return a file name: parts joined by ``-``, with ``_`` for anything but letters and digits.

    >>> slug("noise_curves", "ali_ccp", "Shared-bottom", "+MTN (lam=1e-05)")
    'noise_curves-ali_ccp-shared_bottom-mtn_lam_1e_05'
    """
    return "-".join(re.sub(r"[\W_]+", "_", part.lower()).strip("_") for part in parts)


def _for_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
