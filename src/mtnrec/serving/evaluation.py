"""Metrics of a trained model on labelled rows."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import rich.table
from rich import box
from torch import Tensor

from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.metric.catalogue import METRICS
from mtnrec.metric.task_metrics import TaskMetrics
from mtnrec.schema import Schema
from mtnrec.serving.prediction import progressing
from mtnrec.serving.rows import Part, Rows
from mtnrec.serving.scorer import Scorer, warning_of_unseen


class Evaluated(NamedTuple):
    """Metrics of labelled rows.

    Args:
        rows: Number of rows.
        metrics: Values by ``task_metric``, and the counts ``task_rows`` and ``task_positives``; NaN
            where undefined.
    """

    rows: int
    metrics: dict[str, float]


def evaluate(scorer: Scorer, rows: Rows, *, min_group_rows: int = 1) -> Evaluated:
    """Measure every task on all rows, with the metrics of the training's test.

    Keeps ``9 T + 8`` bytes per row in memory.

    Args:
        scorer: The model.
        rows: Labelled rows.
        min_group_rows: Minimum number of a task's rows that a group must have to count in its
            grouped AUC.

    Raises:
        InputError: If ``min_group_rows`` is below 1, there are no labels, one is missing or
            invalid, or a row cannot be scored.
    """
    schema = scorer.manifest.schema
    if not rows.has_labels:
        raise InputError(
            f"the table must have the labels {', '.join(schema.labels)} to be evaluated. Add "
            "them, or score it with `python -m mtnrec.predict`."
        )
    metrics, count = TaskMetrics(schema, min_group_rows=min_group_rows), 0
    with warning_of_unseen(scorer.encoder):
        for part in progressing(rows, "evaluating"):
            labels = _valid_labels(part, scorer.manifest)
            output = scorer.predict(part.batch, part.place).output
            metrics.update(output, labels, part.batch.group)
            count += len(part.batch)
    if not count:
        raise InputError("there are no rows to evaluate")
    return Evaluated(count, {name: value.item() for name, value in metrics.compute().items()})


def _valid_labels(part: Part, manifest: Manifest) -> Tensor:
    schema, labels = manifest.schema, part.batch.labels
    assert labels is not None
    wrong, rule = labels.isnan().any(dim=1), "a label must be 0 or 1"
    if (positive := manifest.parameters.get("positive")) is not None:
        rule = f"a label must be as in the training data, with data.positive={positive}"
    if schema.funnel and not wrong.any():
        wrong = (labels.diff(dim=1) > 0).any(dim=1)
        rule = "a conversion must have a click, each label of a funnel the one before it"
    if wrong.any():
        row = int(wrong.int().argmax())
        raise InputError(f"{part.place(row)}: {rule} ({', '.join(schema.labels)}). Correct it.")
    return labels


def metrics_table(schema: Schema, found: Evaluated) -> rich.table.Table:
    """Lay out the metrics, one row per task."""
    shown = [name for name in METRICS if f"{schema.tasks[0].name}_{name}" in found.metrics]
    table = rich.table.Table(title=f"{found.rows:,} rows", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("task")
    table.add_column("definition")
    for header in (
        "rows",
        "positives",
        *(METRICS[name].title.replace(" ", "\n") for name in shown),
    ):
        table.add_column(header, justify="right")
    for task in schema.tasks:
        table.add_row(
            schema.title(task),
            schema.definition(task),
            *(f"{found.metrics[f'{task.name}_{count}']:,}" for count in ("rows", "positives")),
            *(_number(found.metrics, f"{task.name}_{name}") for name in shown),
        )
    return table


def _number(metrics: Mapping[str, float], key: str) -> str:
    return f"{metrics[key]:.4f}" if math.isfinite(metrics[key]) else "—"
