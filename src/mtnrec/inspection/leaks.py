"""Suspected leaks: features that alone predict a label almost without error.

Such a feature is often known only after the label, and so not available when a model ranks. Each
feature is judged by the AUC of its own scores, learnt on one half of a sample of the training rows
and measured on the other:

* a numerical feature by its values, ascending or descending, or by the label rates of 64 quantile
  bins, where a value that many rows share (e.g. a fill value) has its own bin;
* a categorical field by the label rate of each index; index 0 reveals a leak by absence;
* a multi-valued field by the mean of its tokens' label rates; an empty bag has its own rate.

Values not in the first half get the rate of all its rows. The first half is every other row (in a
sample of a larger set: every other run of rows) or, where rows have groups (users, searches), every
other group, so that a value that merely identifies a group is not mistaken for a leak because it
was memorised.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtnrec.arrays import BoolArray, Float32Array, Float64Array, Int64Array, IntArray, UInt8Array
from mtnrec.data.batches import RowIndices, gather_bags
from mtnrec.data.prepared.store import Arrays
from mtnrec.inspection.statistics import task_rows
from mtnrec.metric.ranking import weighted_auc
from mtnrec.schema import CategoricalField, Schema, Task

THRESHOLD = 0.99
FEWEST = 20
_SAMPLE = 1 << 18
_RUN = 1 << 6  # contiguous rows; single rows would each read a disk page
_QUANTILES = 64
_BAGS_PER_PIECE = 1 << 13

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leak:
    """A feature that alone predicts the label of a task.

    Args:
        feature: Name of the feature.
        task: Name of the task.
        definition: The task in words.
        auc: AUC of the feature alone.
    """

    feature: str
    task: str
    definition: str
    auc: float

    def __str__(self) -> str:
        return (
            f"{self.feature} alone predicts {self.definition} with AUC {self.auc:.4f}: is it "
            "known before the label?"
        )


@dataclass(frozen=True)
class LeakCheck:
    """AUC of each feature alone, and the suspected leaks.

    Args:
        rows: Training rows in the sample, both halves.
        aucs: AUC of each feature, by task; None for a task that is not judged because the second
            half has fewer than 20 positives or fewer than 20 negatives.
        leaks: The features with an AUC above 0.99.
    """

    rows: int
    aucs: dict[str, dict[str, float] | None]
    leaks: list[Leak]

    @property
    def not_judged(self) -> list[str]:
        """Names of the tasks that are not judged."""
        return [task for task, values in self.aucs.items() if values is None]

    def warn(self) -> None:
        """Log a warning for each suspected leak."""
        for leak in self.leaks:
            _logger.warning("%s", leak)


class _Outcome(NamedTuple):
    """Rows of a half that a task is measured on, and the positive ones; masks, ``(n,)``."""

    measured: BoolArray
    positive: BoolArray

    @classmethod
    def of(cls, task: Task, labels: UInt8Array) -> "_Outcome":
        measured = task_rows(task, labels)
        return cls(measured, measured & (labels[:, task.label] == 1))

    def in_order(self, order: IntArray) -> "_Outcome":
        return _Outcome(self.measured[order], self.positive[order])

    @property
    def can_judge(self) -> bool:
        positives = int(np.count_nonzero(self.positive))
        return min(positives, int(np.count_nonzero(self.measured)) - positives) >= FEWEST


# For each judged task: on the half that is learnt from, and on the half that is scored.
Outcomes = list[tuple[_Outcome, _Outcome]]


def check_leaks(arrays: Arrays, rows: RowIndices, schema: Schema) -> LeakCheck:
    """Judge every feature on at most 262,144 training rows, in evenly spaced runs of 64.

    Args:
        arrays: Arrays of the training split.
        rows: Indices of the rows used for training.
        schema: Features and tasks.
    """
    rows, run = _sample(rows)
    halves = _halve(rows, run, arrays.get("group"))
    labels = [arrays["labels"][half] for half in halves]
    judged = {}
    for task in schema.tasks:
        first, second = (_Outcome.of(task, part) for part in labels)
        if second.can_judge:
            judged[task] = first, second
    outcomes = list(judged.values())
    found = dict(_feature_aucs(arrays, schema, halves, outcomes)) if outcomes else {}
    aucs = {
        task: {feature: values[column] for feature, values in found.items()}
        for column, task in enumerate(judged)
    }
    leaks = [
        Leak(feature, task.name, schema.definition(task), value)
        for task, values in aucs.items()
        for feature, value in values.items()
        if value > THRESHOLD
    ]
    return LeakCheck(len(rows), {task.name: aucs.get(task) for task in schema.tasks}, leaks)


def _sample(rows: RowIndices) -> tuple[RowIndices, IntArray]:
    """Return the sampled rows, and the number of the run that each belongs to."""
    if len(rows) <= _SAMPLE:
        return rows, np.arange(len(rows))
    runs = _SAMPLE // _RUN
    starts = np.arange(runs) * (len(rows) - _RUN) // (runs - 1)
    return rows[np.add.outer(starts, np.arange(_RUN)).ravel()], np.arange(runs).repeat(_RUN)


def _halve(
    rows: RowIndices, run: IntArray, group: Int64Array | None
) -> tuple[RowIndices, RowIndices]:
    number = run
    if group is not None:
        number = np.unique(group[rows], return_inverse=True)[1]
    return rows[number % 2 == 0], rows[number % 2 == 1]


def _feature_aucs(
    arrays: Arrays, schema: Schema, halves: tuple[RowIndices, RowIndices], outcomes: Outcomes
) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each feature and its AUCs, one per judged task."""
    learnt, scored = (arrays["categorical"][rows] for rows in halves)
    for column, field in enumerate(schema.categorical):
        indices = learnt[:, column], scored[:, column]
        yield field.name, _index_aucs(*indices, field.vocabulary_size, outcomes)
    learnt, scored = (arrays["numerical"][rows] for rows in halves)
    for column, name in enumerate(schema.numerical):
        yield name, _numerical_aucs(learnt[:, column], scored[:, column], outcomes)
    for column, field in enumerate(schema.multivalued):
        yield field.name, _bag_aucs(arrays, column, field, halves, outcomes)


def _index_aucs(learnt: IntArray, scored: IntArray, size: int, outcomes: Outcomes) -> list[float]:
    aucs = []
    for first, second in outcomes:
        rates = _rates(*(np.bincount(learnt[rows], minlength=size) for rows in first))
        aucs.append(_index_auc(rates, scored, second))
    return aucs


def _index_auc(scores: Float64Array, indices: IntArray, outcome: _Outcome) -> float:
    """Return the AUC if rows with index ``k`` have the score ``scores[k]``."""
    size = len(scores)
    measured, positives = (np.bincount(indices[rows], minlength=size) for rows in outcome)
    found = measured > 0
    parts = (scores[found], positives[found], (measured - positives)[found])
    return weighted_auc(*map(torch.from_numpy, parts)).item()


def _value_auc(ascending: npt.NDArray[np.floating[Any]], outcome: _Outcome) -> float:
    # Negatives between two positives share one entry: exact, and much faster than one per row.
    edges = np.unique(ascending[outcome.positive])
    return _index_auc(np.arange(2.0 * len(edges) + 1), _places(edges, ascending), outcome)


def _places(
    edges: npt.NDArray[np.floating[Any]], ascending: npt.NDArray[np.floating[Any]]
) -> IntArray:
    """Return the bin of each ascending value: odd on an edge, even between two edges."""
    bounds = [ascending.searchsorted(edges, side=side) for side in ("left", "right")]
    lengths = np.diff(np.stack(bounds, axis=1).ravel(), prepend=0, append=len(ascending))
    return np.arange(len(lengths)).repeat(lengths)


def _rates(rows: IntArray, positives: IntArray) -> Float64Array:
    overall = positives.sum() / max(1, rows.sum())
    return np.divide(positives, rows, out=np.full(len(rows), overall), where=rows > 0)


def _numerical_aucs(learnt: Float32Array, scored: Float32Array, outcomes: Outcomes) -> list[float]:
    orders = learnt.argsort(), scored.argsort()
    learnt, scored = learnt[orders[0]], scored[orders[1]]
    outcomes = [
        (first.in_order(orders[0]), second.in_order(orders[1])) for first, second in outcomes
    ]
    count = min(len(learnt), _QUANTILES + 1)
    edges = np.unique(learnt[np.linspace(0, len(learnt) - 1, count, dtype=np.int64)])
    places = _places(edges, learnt), _places(edges, scored)
    by_rate = _index_aucs(*places, 2 * len(edges) + 1, outcomes)
    aucs = []
    for (_, second), binned in zip(outcomes, by_rate, strict=True):
        upwards = _value_auc(scored, second)
        aucs.append(max(upwards, 1 - upwards, binned))
    return aucs


def _bag_aucs(
    arrays: Arrays,
    column: int,
    field: CategoricalField,
    halves: tuple[RowIndices, RowIndices],
    outcomes: Outcomes,
) -> list[float]:
    learnt, scored = halves
    size = field.vocabulary_size + 1
    counts = np.zeros((len(outcomes), 2, size), np.int64)
    for piece, tokens, row in _tokens(arrays, column, field, learnt):
        for table, (first, _) in zip(counts, outcomes, strict=True):
            for total, rows in zip(table, first, strict=True):
                total += np.bincount(tokens[rows[piece][row]], minlength=size)
    rates = [_rates(*table) for table in counts]
    scores = np.empty((len(rates), len(scored)))
    for piece, tokens, row in _tokens(arrays, column, field, scored):
        lengths = np.bincount(row)
        for score, rate in zip(scores, rates, strict=True):
            score[piece] = np.bincount(row, weights=rate[tokens]) / lengths
    aucs = []
    for score, (_, second) in zip(scores, outcomes, strict=True):
        order = score.argsort()
        aucs.append(_value_auc(score[order], second.in_order(order)))
    return aucs


def _tokens(
    arrays: Arrays, column: int, field: CategoricalField, rows: RowIndices
) -> Iterator[tuple[slice, IntArray, IntArray]]:
    """Yield a slice of rows, their tokens, and each token's row within the slice.

    An empty bag has a single token, ``vocabulary_size``.
    """
    for start in range(0, len(rows), _BAGS_PER_PIECE):
        piece = slice(start, start + _BAGS_PER_PIECE)
        bags = gather_bags(arrays, field.name, arrays["bag"][rows[piece], column])
        lengths = np.diff(bags.offsets.numpy())
        empty = np.flatnonzero(lengths == 0)
        tokens = np.concatenate([bags.tokens.numpy(), np.full(len(empty), field.vocabulary_size)])
        yield piece, tokens, np.concatenate([np.arange(len(lengths)).repeat(lengths), empty])
