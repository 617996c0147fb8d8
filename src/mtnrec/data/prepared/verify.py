"""Verification of a prepared data set: checksums, ranges and orders of all its files."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnrec.checks import InputError
from mtnrec.data.prepared.layout import bag_stem
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.store import Arrays, open_prepared
from mtnrec.schema import Schema

_CLOCK_TICK = 2_000_000_000  # ns; that of the coarsest file systems
_ROWS_PER_CHECK = 1 << 16


def verify_prepared(directory: Path, manifest: Manifest) -> None:
    """Read every file once: its SHA-256 is the manifest's, its values are those of the schema.

    Raises:
        InputError: If a file differs or is missing, or a value is out of its range.
    """
    for name, expected in manifest.checksums.items():
        path = directory / name
        if not path.is_file():
            raise InputError(f"{path} is missing: prepare the data set again")
        if (found := sha256(path)) != expected:
            raise InputError(
                f"{path} has SHA-256 {found[:12]}…, its schema says {expected[:12]}…: it was "
                "changed or damaged after it was prepared; prepare the data set again"
            )
    for split, arrays in open_prepared(directory)[1].items():
        for stem, most in _largest_values(arrays, manifest.schema).items():
            _check_range(directory / split / f"{stem}.npy", arrays[stem], np.array(most))
        for field in manifest.schema.multivalued:
            _check_order(directory / split / "bags" / field.name, arrays, field.name)


def _largest_values(arrays: Arrays, schema: Schema) -> dict[str, Sequence[int]]:
    """Return the largest value of each column of the arrays that hold indices or labels."""
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


def _check_range(path: Path, array: npt.NDArray[Any], most: npt.NDArray[np.int64]) -> None:
    unsigned = np.dtype(f"u{array.dtype.itemsize}")  # in which a negative value is a large one
    columns = array.reshape(-1, len(most)) if len(most) else array
    for start in range(0, len(columns), _ROWS_PER_CHECK):
        chunk = np.asarray(columns[start : start + _ROWS_PER_CHECK]).view(unsigned)
        if (beyond := chunk.max(axis=0) > most).any():
            column = int(beyond.argmax())
            raise InputError(
                f"{path} has a value in column {column + 1} that is not from 0 to {most[column]}: "
                "prepare the data set again"
            )


def _check_order(folder: Path, arrays: Arrays, field: str) -> None:
    offsets = arrays[bag_stem(field, "offsets")]
    for start in range(0, len(offsets), _ROWS_PER_CHECK):
        chunk = np.asarray(offsets[start : start + _ROWS_PER_CHECK + 1])
        if (np.diff(chunk, prepend=0 if start == 0 else chunk[0]) < 0).any() or offsets[0] != 0:
            raise InputError(f"{folder}: offsets do not ascend from 0: prepare the data set again")


def verify_once(directory: Path, manifest: Manifest) -> None:
    """Do what :func:`verify_prepared` does, unless the files are those that passed it before.

    ``.<folder>.verified``, beside the folder, is a hash of what the system says of the files: their
    sizes, inodes and times of change, which every write moves.
    """
    directory = directory.resolve()
    note = directory.with_name(f".{directory.name}.verified")
    started = time.time_ns()
    state, last_change = _state(directory, manifest)
    with suppress(OSError):
        if note.is_file() and note.read_bytes() == state.encode():
            return
    verify_prepared(directory, manifest)
    # A file that changes twice within a tick of the clock shows it once.
    if last_change < started - _CLOCK_TICK:
        with suppress(OSError):  # a folder that only others may write to: verified every time
            note.unlink(missing_ok=True)  # a pipe would wait for ever
            note.write_text(state, encoding="utf-8")


def _state(directory: Path, manifest: Manifest) -> tuple[str, int]:
    """Return a hash of what the system says of the files, and the last change of one, in ns."""
    found, last_change = {}, 0
    for name in manifest.checksums:
        with suppress(OSError):  # verify_prepared says what is missing
            file = (directory / name).stat()
            found[name] = (file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns)
            last_change = max(last_change, file.st_ctime_ns)
    text = json.dumps([manifest.checksum, found])
    return hashlib.sha256(text.encode()).hexdigest(), last_change


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the data set again") from error
