"""Scoring of many rows, from a prepared data set or a table to a Parquet file."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import rich.table
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mtnrec.checks import InputError, check_choice, format_names
from mtnrec.data.batches import RowGatherer
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.tabular import FileSource
from mtnrec.files import atomic_replace
from mtnrec.serving.scorer import Scorer, shifted


class Means(NamedTuple):
    """Number of scored rows, and the mean probability of each task."""

    rows: int
    probabilities: dict[str, float]


class PreparedRows:
    """The rows of a prepared data set.

    Args:
        scorer: Scorer of a model trained on a set with the same fields and vocabularies.
        directory: Folder of the prepared data set.
        split: ``train`` or ``test``.
        batch_size: Rows scored at a time.

    Raises:
        InputError: If indices or scales of the set differ from those the model was trained with.
    """

    def __init__(self, scorer: Scorer, directory: Path, split: str, batch_size: int) -> None:
        manifest, arrays = open_prepared(directory)
        check_choice("split", split, sorted(arrays))
        known = scorer.manifest
        if manifest.schema != known.schema or manifest.transforms != known.transforms:
            what = "fields and scales"
        elif _vocabulary_checksums(manifest.checksums) != _vocabulary_checksums(known.checksums):
            what = "vocabularies"
        else:
            what = None
        if what is not None:
            raise InputError(
                f"{directory} must have the {what} of the data set that the model was trained on "
                f"({known.source}), got different ones. Choose table=FILE to score raw values, or "
                "prepare the set with the same training rows."
            )
        self.total: int | None = manifest.rows[split]
        self._gather = RowGatherer(arrays[split], np.arange(self.total), manifest.schema)
        self._batch_size = batch_size
        self._scorer = scorer
        self._place = lambda row: f"row {row} of {directory / split}"

    def __iter__(self) -> Iterator[pa.Table]:
        for start in range(0, len(self._gather), self._batch_size):
            end = min(start + self._batch_size, len(self._gather))
            rows = self._gather[np.arange(start, end)]
            scores = self._scorer.score_batch(rows, shifted(self._place, start)).numpy()
            yield pa.table(dict(zip(self._scorer.tasks, scores.T, strict=True)))


class TableRows:
    """The rows of a table of raw values.

    Args:
        scorer: The model.
        path: A ``.csv``, ``.csv.gz`` or ``.parquet`` file, or a folder of ``.parquet`` files;
            columns that the model does not need are ignored.
        keep: Columns copied to the scores unchanged, e.g. an id.
        batch_size: Rows scored at a time.
    """

    def __init__(self, scorer: Scorer, path: Path, keep: list[str], batch_size: int) -> None:
        self.total: int | None = None
        self._source = FileSource("table", path)
        self._source.require_columns("the model", scorer.encoder.columns)
        self._source.require_columns("keep", keep)
        if taken := [name for name in keep if name in scorer.tasks]:
            raise InputError(
                f"keep must not name columns of the scores, got {format_names(taken)}. Rename them."
            )
        self._keep, self._scorer, self._batch_size = keep, scorer, batch_size

    def __iter__(self) -> Iterator[pa.Table]:
        encoder = self._scorer.encoder
        needed = {*encoder.columns, *encoder.lists, *self._keep}
        columns = [name for name in self._source.columns if name in needed]
        for chunk in self._source.chunks(columns, BadRows("refuse"), lists=encoder.lists):
            kept = {name: chunk.frame[name].to_arrow() for name in self._keep}
            scores = self._scorer.score_raw(chunk.frame, chunk.place, self._batch_size)
            yield pa.table(kept | dict(zip(self._scorer.tasks, scores.T, strict=True)))


def write_scores(scorer: Scorer, rows: PreparedRows | TableRows, out: Path) -> Means:
    """Write a row of probabilities per row, in order and atomically.

    Memory does not grow with the number of rows.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("scoring {task.completed:,} rows"), BarColumn(), TimeElapsedColumn())
    count, sums = 0, np.zeros(len(scorer.tasks))
    with atomic_replace(out) as temporary, ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns))
        bar = progress.add_task("", total=rows.total)
        writer: pq.ParquetWriter | None = None
        for part in rows:
            writer = writer or stack.enter_context(pq.ParquetWriter(temporary, part.schema))
            writer.write_table(part)
            count += len(part)
            sums += [part[task].to_numpy().sum(dtype=np.float64) for task in scorer.tasks]
            progress.advance(bar, len(part))
        if writer is None:
            raise InputError("there are no rows to score")
    return Means(count, dict(zip(scorer.tasks, sums / count, strict=True)))


def means_table(scorer: Scorer, means: Means) -> rich.table.Table:
    """Lay out the mean of each task, and the number of values unknown to the model."""
    unseen = {name: count for name, count in scorer.encoder.unseen.items() if count}
    shown = ", ".join(f"{name} {count:,}" for name, count in unseen.items()) or "none"
    table = rich.table.Table(
        title=f"{means.rows:,} rows",
        caption=f"values not in the training rows, scored as missing: {shown}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("task")
    table.add_column("mean probability", justify="right")
    for task, mean in means.probabilities.items():
        table.add_row(task, f"{mean:.6f}")
    return table


def _vocabulary_checksums(checksums: dict[str, str]) -> dict[str, str]:
    return {name: sum_ for name, sum_ in checksums.items() if name.startswith("vocabulary/")}
