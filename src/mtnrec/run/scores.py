"""Kept scores of a run, ``scores/<test set>.parquet``: a row per test row, in the order of the set.

Any Parquet reader opens the file. Its columns are ``score/<task>``, the log-probability of the
task's label, ``label/<task>``, and ``group``, where the data has one; score and label are null on
rows that the task is not measured on. The file has its own labels and groups, since label noise and
batch limits change them, and a run's folder can be moved alone; they compress to a small part of
the scores.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mtnrec.arrays import BoolArray, Float32Array, Int64Array
from mtnrec.checks import InputError
from mtnrec.system.files import atomic_replace
from mtnrec.system.resources import memory_bytes

SCORES_FOLDER = "scores"  # in the folder of a run
_SCORE, _LABEL, _GROUP = "score/", "label/", "group"
_TYPES = {"score": pa.float32(), "label": pa.bool_(), _GROUP: pa.int64()}
_ROWS_PER_PART = 1 << 20  # of the file
_BYTES_PER_TASK = 5  # of a row in memory


@dataclass(frozen=True)
class Scores:
    """Scores, labels and groups of a test set, in its order.

    Args:
        scores: Log-probability of each task's label, float32 ``(n,)``; NaN where the task is not
            measured. The AUCs of the record are computed on float32; float16 moved one by 2e-6.
        labels: Whether the label is 1, ``(n,)``; False where the task is not measured.
        groups: Group of each row, ``(n,)``; None if the data has none.
    """

    scores: Mapping[str, Float32Array]
    labels: Mapping[str, BoolArray]
    groups: Int64Array | None


def scores_file(folder: Path, test_set: str) -> Path:
    """Return the file of a test set in the folder of a run."""
    return folder / SCORES_FOLDER / f"{test_set}.parquet"


def write_scores(folder: Path, test_set: str, found: Scores) -> str:
    """Write the scores of a test set atomically, and return the SHA-256 of the file."""
    columns, encodings = {}, {}
    for task, scores in found.scores.items():
        absent = np.isnan(scores)
        columns[_SCORE + task] = pa.array(scores, mask=absent)
        columns[_LABEL + task] = pa.array(found.labels[task], mask=absent)
        encodings[_SCORE + task] = "BYTE_STREAM_SPLIT"
    if found.groups is not None:
        columns[_GROUP] = pa.array(found.groups)
        encodings[_GROUP] = "DELTA_BINARY_PACKED"
    path = scores_file(folder, test_set)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(path) as temporary, temporary.open("w+b") as file:
        pq.write_table(
            pa.table(columns),
            file,
            row_group_size=_ROWS_PER_PART,
            compression="zstd",
            use_dictionary=False,
            column_encoding=encodings,
        )
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_scores(folder: Path, test_set: str, sha256: str) -> Scores:
    """Read the scores of a test set.

    Args:
        folder: Folder of the run.
        test_set: Name of the test set.
        sha256: SHA-256 of the file, from the record of the run.

    Raises:
        InputError: If the file is missing, is not the one that the run wrote, or is larger than the
            memory.
    """
    path = scores_file(folder, test_set)
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _is_odd(path, "its bytes are not those that the run wrote")
            parquet = pq.ParquetFile(file)
            tasks = _check_columns(path, parquet.schema_arrow)
            _check_size(path, parquet.metadata.num_rows, len(tasks))
            table = parquet.read()
    except (OSError, pa.ArrowException) as error:
        raise _is_odd(path, str(error)[:200]) from None
    groups = table[_GROUP] if _GROUP in table.column_names else None
    if groups is not None and groups.null_count:
        raise _is_odd(path, f"the column {_GROUP} has nulls")
    return Scores(
        {task: table[_SCORE + task].to_numpy() for task in tasks},
        {task: table[_LABEL + task].fill_null(fill_value=False).to_numpy() for task in tasks},
        None if groups is None else groups.to_numpy(),
    )


def _check_columns(path: Path, schema: pa.Schema) -> list[str]:
    """Return the tasks of a file with the right columns."""
    tasks = [name.removeprefix(_SCORE) for name in schema.names if name.startswith(_SCORE)]
    wanted = {
        name: _TYPES[name.partition("/")[0]] for t in tasks for name in (_SCORE + t, _LABEL + t)
    }
    wanted |= {_GROUP: _TYPES[_GROUP]} if _GROUP in schema.names else {}
    found = dict(zip(schema.names, schema.types, strict=True))
    if not tasks or found != wanted or len(schema.names) > len(wanted):
        raise _is_odd(path, f"its columns are {str(found)[:200]}")
    return tasks


def _check_size(path: Path, rows: int, tasks: int) -> None:
    size, memory = rows * (tasks * _BYTES_PER_TASK + 8), memory_bytes()
    if size > memory:
        raise InputError(
            f"{path} must fit in memory, got {rows:,} rows of {size / 1e9:.1f} GB and "
            f"{memory / 1e9:.1f} GB. Report on a larger machine, or set resamples=0."
        )


def _is_odd(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is not the file of scores that the run wrote ({reason}). Restore it, train "
        "again with resume=false, or report with resamples=0."
    )
