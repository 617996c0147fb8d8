"""Verification of a prepared data set: checksums, value ranges and offsets of all files."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnrec.arrays import Int64Array
from mtnrec.checks import InputError
from mtnrec.data.prepared.layout import bag_stem
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.store import Arrays, open_prepared
from mtnrec.schema import Schema

_SETTLED_SECONDS = 2.0  # the coarsest timestamps of a file system
_ROWS_PER_CHECK = 1 << 16
# Parameters that identify raw files, by name, size and SHA-256: of a log, of a table, and of its
# further test tables by name.
IDENTITIES = ("raw", "train", "test", "tests")


def verify_prepared(directory: Path, manifest: Manifest) -> None:
    """Check every file: its SHA-256 against the manifest, its values against the schema.

    Raises:
        InputError: If a file differs or is missing, or a value is out of range.
    """
    for name, expected in manifest.checksums.items():
        path = directory / name
        if not path.is_file():
            raise InputError(f"{path} is missing. Prepare the data set again.")
        if (found := sha256(path)) != expected:
            raise InputError(
                f"{path} has SHA-256 {found[:12]}…, but its schema says {expected[:12]}…: it was "
                "changed or damaged after it was prepared. Prepare the data set again."
            )
    for split, arrays in open_prepared(directory)[1].items():
        for stem, most in _largest_values(arrays, manifest.schema).items():
            _check_range(directory / split / f"{stem}.npy", arrays[stem], np.array(most))
        for field in manifest.schema.multivalued:
            _check_order(directory / split / "bags" / field.name, arrays, field.name)


def _largest_values(arrays: Arrays, schema: Schema) -> dict[str, Sequence[int]]:
    """Return the largest valid values, by column, of the arrays that hold indices or labels."""
    largest: dict[str, Sequence[int]] = {
        "categorical": [field.vocabulary_size - 1 for field in schema.categorical],
        "labels": [1] * len(schema.labels),
    }
    for field in schema.multivalued:
        largest[bag_stem(field.name, "tokens")] = [field.vocabulary_size - 1]
    if schema.multivalued:
        stems = [bag_stem(field.name, "offsets") for field in schema.multivalued]
        largest["bag"] = [len(arrays[stem]) - 2 for stem in stems]
    return largest


def _check_range(path: Path, array: npt.NDArray[Any], most: Int64Array) -> None:
    unsigned = np.dtype(f"u{array.dtype.itemsize}")  # in which negative values become large ones
    columns = array.reshape(-1, len(most)) if len(most) else array
    for start in range(0, len(columns), _ROWS_PER_CHECK):
        chunk = np.asarray(columns[start : start + _ROWS_PER_CHECK]).view(unsigned)
        if (beyond := chunk.max(axis=0) > most).any():
            column = int(beyond.argmax())
            raise InputError(
                f"{path} has a value in column {column + 1} that is not from 0 to {most[column]}. "
                "Prepare the data set again."
            )


def _check_order(folder: Path, arrays: Arrays, field: str) -> None:
    offsets = arrays[bag_stem(field, "offsets")]
    for start in range(0, len(offsets), _ROWS_PER_CHECK):
        chunk = np.asarray(offsets[start : start + _ROWS_PER_CHECK + 1])
        if (np.diff(chunk, prepend=0 if start == 0 else chunk[0]) < 0).any() or offsets[0] != 0:
            raise InputError(f"{folder}: offsets do not ascend from 0. Prepare the data set again.")


def verify_once(directory: Path, manifest: Manifest) -> None:
    """Verify a prepared data set, unless its files are unchanged since they last passed.

    ``.<folder>.verified``, next to the folder, is a note of the last check: a hash of the manifest
    and of the files' sizes, inodes, and modification and change times. A file that changed less
    than 2 s before the note was written is verified again, since a file system may give two quick
    changes the same time.
    """
    directory = directory.resolve()
    note = directory.with_name(f".{directory.name}.verified")
    state, changed = _state(directory, manifest)
    with suppress(OSError):
        is_settled = note.is_file() and note.stat().st_mtime - changed >= _SETTLED_SECONDS
        if is_settled and note.read_bytes() == state.encode():
            return
    verify_prepared(directory, manifest)
    with suppress(OSError):  # without write permission, every call verifies
        note.unlink(missing_ok=True)  # writing to a pipe would block
        note.write_text(state, encoding="utf-8")


def _state(directory: Path, manifest: Manifest) -> tuple[str, float]:
    """Return a hash of the files' state, and the time of their last change."""
    found, changed = {}, 0.0
    for name in manifest.checksums:
        with suppress(OSError):  # verify_prepared reports missing files
            found[name], last = _file_state(directory / name)
            changed = max(changed, last)
    return hashlib.sha256(json.dumps([manifest.checksum, found]).encode()).hexdigest(), changed


def _file_state(path: Path) -> tuple[list[int], float]:
    """Return the numbers that change with a file's content, and the time of its last change."""
    file = path.stat()
    state = [file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns]
    return state, max(file.st_mtime, file.st_ctime)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}). Prepare the data set again.") from error


def noted_sha256(path: Path, note: Path) -> str:
    """Return the SHA-256 of a file, from a note if the file is unchanged since it was written.

    Args:
        path: The file.
        note: JSON file of checksums by size, inode, and modification and change times. It is
            written if its folder exists. A file that changed less than 2 s before is hashed again,
            as in :func:`verify_once`.

    Raises:
        InputError: If the file cannot be read.
    """
    path = path.resolve()
    state, changed = _file_state(path)
    known = _read_note(note)
    entry = known.get(str(path))
    if isinstance(entry, list) and len(entry) == 2 and entry[0] == state:
        return str(entry[1])
    checksum = sha256(path)
    is_settled = time.time() - changed >= _SETTLED_SECONDS
    if is_settled and note.parent.is_dir():
        with suppress(OSError):
            note.unlink(missing_ok=True)
            note.write_text(json.dumps({**known, str(path): [state, checksum]}), encoding="utf-8")
    return checksum


def find_changed(parameters: Mapping[str, Any], note: Path) -> list[Path]:
    """Return the raw files whose content is not that from which a data set was prepared.

    Files that were moved or deleted are not found.

    Args:
        parameters: Parameters of the prepared data set.
        note: Note of :func:`noted_sha256`, which says where the files are.
    """
    noted = [path for path in map(Path, _read_note(note)) if path.is_file()]
    changed = []
    more = parameters.get("tests")
    found = [parameters.get(key) for key in IDENTITIES]
    found += more.values() if isinstance(more, Mapping) else []
    for entry in chain.from_iterable(map(_as_list, found)):
        if len(file := _as_list(entry)) == 3:  # a frame has two entries
            paths = [path for path in noted if path.name == file[0]]
            if paths and all(noted_sha256(path, note) != file[2] for path in paths):
                changed.append(paths[-1])
    return changed


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_note(note: Path) -> dict[str, Any]:
    known: Any = {}
    with suppress(OSError, ValueError):
        known = json.loads(note.read_bytes()) if note.is_file() else {}
    return known if isinstance(known, dict) else {}
