"""Names of files, and files that are there whole or not at all."""

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
    """Yield the name of a file to write; it takes the place of ``path`` if the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file, whole or not at all; text is UTF-8."""
    with atomic_replace(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of a file; no other may be writing it."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; NaN becomes null, keys become text."""
    text = json.dumps(_for_json(content), indent=2, sort_keys=True, allow_nan=False)
    write_atomic(path, text + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if there is no such file.

    Raises:
        InputError: If it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}): remove it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object: remove it")
    return content


def slug(*parts: str) -> str:
    """Return a file name: parts joined by ``-``, what is neither letter nor digit as ``_``.

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
