"""Scores of many rows, written to a Parquet or csv file, and their calibration."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.csv  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import rich.table
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mtnrec.arrays import Float64Array
from mtnrec.checks import InputError, format_names
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.schema import Schema, Task
from mtnrec.serving.rows import Part, Rows
from mtnrec.serving.scorer import Scorer, warning_of_unseen
from mtnrec.system.files import atomic_replace, writable

FORMATS = (".parquet", ".csv")


class Rate(NamedTuple):
    """Mean prediction of a task and the rate to compare it with.

    Args:
        predicted: Mean probability.
        observed: Share of positives; NaN without rows.
        rows: Rows of both; for the training rate, those of ``predicted``.
    """

    predicted: float
    observed: float
    rows: int

    @property
    def calibration(self) -> float:
        """Predicted over observed; NaN if nothing was observed."""
        return self.predicted / self.observed if self.observed else math.nan


class Written(NamedTuple):
    """Summary of written scores.

    Args:
        rows: Number of scored rows.
        rates: Rates by task: on the rows that the task is measured on if the rows have labels;
            otherwise on all rows, with the rate of the training rows.
        has_labels: Whether the rows have labels.
    """

    rows: int
    rates: dict[str, Rate]
    has_labels: bool


class _Sums:
    """Sums of the scores of each task, and of its labels if there are any.

    Args:
        schema: The tasks.
        has_labels: Whether to sum over labelled rows that a task is measured on.
    """

    def __init__(self, schema: Schema, *, has_labels: bool) -> None:
        self._schema, self._has_labels = schema, has_labels
        self.rows = 0
        self._sums = np.zeros((len(schema.tasks), 3))  # of scores, labels and rows

    def add(self, scores: Float64Array, labels: Tensor | None) -> None:
        """Add rows: scores ``(rows, tasks)`` and labels ``(rows, T)``."""
        self.rows += len(scores)
        for number, task in enumerate(self._schema.tasks):
            column = scores[:, number]
            if labels is None or not self._has_labels:
                self._sums[number] += column.sum(), 0, len(column)
                continue
            label, measured = _measured(task, labels)
            self._sums[number] += column[measured].sum(), label[measured].sum(), measured.sum()

    def rates(self, manifest: Manifest) -> dict[str, Rate]:
        """Return the rates by task."""
        rates = {}
        for task, (score, label, rows) in zip(self._schema.tasks, self._sums, strict=True):
            observed = label / rows if rows else math.nan
            if not self._has_labels:
                observed = training_rate(manifest, task)
            rates[task.name] = Rate(score / rows if rows else math.nan, observed, int(rows))
        return rates


def _measured(task: Task, labels: Tensor) -> tuple[Float64Array, np.ndarray]:
    """Return the labels of a task and the rows it is measured on: valid and, for CVR, clicked."""
    columns = labels.numpy().astype(np.float64)
    label = columns[:, task.label]
    measured = np.isfinite(label)
    if task.given is not None:
        measured &= columns[:, task.given] == 1
    return label, measured


def training_rate(manifest: Manifest, task: Task) -> float:
    """Return the share of positives in the training rows that a task is measured on."""
    labels, positives = manifest.schema.labels, manifest.positives["train"]
    rows = manifest.rows["train"] if task.given is None else positives[labels[task.given]]
    return positives[labels[task.label]] / rows if rows else math.nan


def write_scores(scorer: Scorer, rows: Rows, out: Path) -> Written:
    """Write a row of probabilities per row, in order and atomically.

    Memory does not grow with the number of rows.

    Raises:
        InputError: If there are no rows, one cannot be scored, or the file cannot be written.
    """
    sums = _Sums(scorer.manifest.schema, has_labels=rows.has_labels)
    with (
        writable(out),
        atomic_replace(out) as temporary,
        warning_of_unseen(scorer.encoder),
        ExitStack() as stack,
    ):
        writer: pa.parquet.ParquetWriter | pa.csv.CSVWriter | None = None
        for part in progressing(rows, "scoring"):
            scores = scorer.score_batch(part.batch, part.place).numpy()
            columns = {name: part.kept[name] for name in part.kept.column_names}
            table = pa.table(columns | dict(zip(scorer.tasks, scores.T, strict=True)))
            writer = writer or stack.enter_context(_open(temporary, out.suffix, table.schema))
            writer.write_table(table)
            sums.add(scores.astype(np.float64), part.batch.labels)
        if writer is None:
            raise InputError("there are no rows to score")
    return Written(sums.rows, sums.rates(scorer.manifest), rows.has_labels)


def progressing(rows: Rows, what: str) -> Iterator[Part]:
    """Yield rows batch by batch, and show how many there were."""
    columns = (TextColumn(f"{what} {{task.completed:,}} rows"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=rows.total)
        for part in rows:
            yield part
            progress.advance(bar, len(part.batch))


def _open(
    path: Path, suffix: str, schema: pa.Schema
) -> "pa.parquet.ParquetWriter | pa.csv.CSVWriter":
    if suffix == ".parquet":
        return pa.parquet.ParquetWriter(path, schema)
    _check_csv(schema)
    return pa.csv.CSVWriter(path, schema, write_options=pa.csv.WriteOptions(quoting_style="needed"))


def _check_csv(schema: pa.Schema) -> None:
    unfit = [
        column.name
        for column in schema
        if pa.types.is_nested(column.type)
        or pa.types.is_binary(column.type)
        or pa.types.is_large_binary(column.type)
    ]
    if unfit:
        raise InputError(
            f"keep must name columns that a csv file can hold, got {format_names(unfit)}. Choose "
            "a .parquet file with out, or delete them from keep."
        )


def rates_table(scorer: Scorer, written: Written) -> rich.table.Table:
    """Lay out the rates of each task, and the number of values unknown to the model."""
    unseen = {name: count for name, count in scorer.encoder.unseen.items() if count}
    shown = ", ".join(f"{name} {count:,}" for name, count in unseen.items()) or "none"
    labels = format_names(scorer.manifest.schema.labels)
    compared = (
        "both on the labelled rows that a task is measured on"
        if written.has_labels
        else f"the rows lack the labels {labels}, so the rate is that of the training rows"
    )
    table = rich.table.Table(
        title=f"{written.rows:,} rows",
        caption=f"{compared}; values not in the training rows, scored as missing: {shown}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("task")
    rate = "observed rate" if written.has_labels else "training rate"
    for header in ("mean prediction", rate, "calibration", "rows"):
        table.add_column(header, justify="right")
    for task, found in written.rates.items():
        numbers = (found.predicted, found.observed, found.calibration)
        table.add_row(task, *map(_number, numbers), f"{found.rows:,}")
    return table


def _number(value: float) -> str:
    return f"{value:.6f}" if math.isfinite(value) else "—"
