"""File names, atomic writes, JSON and locks."""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLease

from mtnrec.checks import InputError

HEARTBEAT = 15.0  # seconds between two signs of life
STALE = 120.0  # seconds without a sign of life after which a process counts as gone
_PATIENCE = 0.2  # seconds to wait for a lock, which `is_locked` briefly holds
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524)  # 524: ENOTSUPP of Linux
_LONGEST_SLUG = 120  # bytes; file systems take 255, of which temporary names need some

_logger = logging.getLogger(__name__)
_warned: set[int] = set()  # file systems, by device number


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

    A long one ends with a hash, so that any file system takes it with a suffix.

    >>> slug("noise_curves", "ali_ccp", "Shared-bottom", "+MTN (lam=1e-05)")
    'noise_curves-ali_ccp-shared_bottom-mtn_lam_1e_05'
    """
    name = "-".join(re.sub(r"[\W_]+", "_", part.lower()).strip("_") for part in parts)
    content = name.encode()
    if len(content) <= _LONGEST_SLUG:
        return name
    end = f"-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
    return content[: _LONGEST_SLUG - len(end)].decode(errors="ignore") + end


def remove_files(folder: Path, suffixes: Iterable[str]) -> None:
    """Remove the files in a folder that have one of the suffixes."""
    for suffix in suffixes:
        for path in folder.glob(f"*.{suffix}"):
            path.unlink()


def acquire_lock(path: Path, *, wait: bool = True) -> AbstractContextManager[Any]:
    """Acquire an exclusive lock on a file, and return the context that releases it.

    The operating system releases the lock however the process ends. On a file system without locks,
    a marker file next to ``path`` replaces it, which a thread touches every ``HEARTBEAT`` seconds:
    the marker of a killed process is taken over at once on the same machine, and after ``STALE``
    seconds on another one.

    Args:
        path: The lock file, which stays.
        wait: Whether to wait until a process that only looks is done or a marker is stale.

    Raises:
        Timeout: If another process holds the lock.
    """
    try:
        lock = FileLock(path, thread_local=False, fallback_to_soft=False)
        return lock.acquire(_PATIENCE if wait else 0, poll_interval=_PATIENCE / 10)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_of_missing_locks(path.parent, error)
    marker = SoftFileLease(
        path.with_name(f"{path.name}.marker"),
        lease_duration=STALE,
        heartbeat_interval=HEARTBEAT,
        thread_local=False,
    )
    return marker.acquire(STALE + 2 * HEARTBEAT if wait else 0, poll_interval=_PATIENCE)


def is_locked(path: Path) -> bool | None:
    """Return whether a lock is held; None if the file system has no locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, as others may look too
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _warn_of_missing_locks(folder: Path, error: OSError) -> None:
    device = folder.stat().st_dev
    if device not in _warned:
        _warned.add(device)
        _logger.warning(
            "the file system of %s has no locks (%s), so a marker file keeps other processes out, "
            "for up to %d s after its process was killed. Mount it with flock, or choose another "
            "folder.",
            folder,
            error.strerror,
            STALE,
        )


def _for_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
