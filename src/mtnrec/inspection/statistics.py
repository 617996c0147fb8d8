"""Statistics of a prepared split, counted in one pass and in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnrec.arrays import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array, UInt8Array
from mtnrec.batch import Batch
from mtnrec.data.batches import RowGatherer, RowIndices
from mtnrec.data.prepared.layout import bag_stem
from mtnrec.data.prepared.store import Arrays
from mtnrec.schema import Schema, Task

SLICES = 10
_ROWS_PER_PIECE = 1 << 16
_ROWS_PER_COMPARISON = 1 << 13
_SAMPLE = 1 << 18

Counts = Int64Array


@dataclass(frozen=True)
class SplitStatistics:
    """Counts of one split.

    Args:
        rows: Number of rows.
        task_rows: Rows that each task is measured on, per tenth of the split in file order,
            ``(10, tasks)``.
        task_positives: Positives among ``task_rows``.
        zeros: Rows with index 0 (missing, rare or unseen) per categorical field, ``(F,)``.
        minimum: Minimum of each numerical feature as stored, ``(N,)``; NaN without rows.
        mean: Mean, likewise.
        maximum: Maximum, likewise.
        empty_bags: Rows with an empty bag per multi-valued field, ``(M,)``.
        tokens: Tokens of all rows; a bag counts once per row that has it.
        zero_tokens: Tokens with index 0.
        true_correlations: Correlations over rows of the labels' true logits, on a funnel given the
            label before, ``(T, T)``; None where the truth is unknown.
    """

    rows: int
    task_rows: Counts
    task_positives: Counts
    zeros: Counts
    minimum: Float64Array
    mean: Float64Array
    maximum: Float64Array
    empty_bags: Counts
    tokens: Counts
    zero_tokens: Counts
    true_correlations: Float64Array | None = None


@dataclass(frozen=True)
class Changes:
    """Changes that noise makes to a split.

    Args:
        rows: RowIndices compared.
        noisy_rows: Rows in which a feature changes.
        features: Rows in which each feature changes.
        labels: Rows in which each label changes.
    """

    rows: int
    noisy_rows: int
    features: dict[str, int]
    labels: dict[str, int]


def count_changes(
    arrays: Arrays, rows: RowIndices, schema: Schema, change: Callable[[RowIndices, Batch], None]
) -> Changes:
    """Count what noise changes in at most 262,144 evenly spaced rows.

    Args:
        arrays: Arrays that hold the split.
        rows: Indices of the split's rows in them.
        schema: Features and labels.
        change: Applies the noise to a batch.
    """
    count = min(_SAMPLE, len(rows))
    rows = rows[np.arange(count) * len(rows) // max(1, count)]
    gatherers = RowGatherer(arrays, rows, schema), RowGatherer(arrays, rows, schema, change)
    features = [field.name for field in (*schema.categorical, *schema.multivalued)]
    total = np.zeros(len(features) + len(schema.numerical), np.int64)
    flipped = np.zeros(len(schema.labels), np.int64)
    noisy_rows = 0
    for start in range(0, count, _ROWS_PER_COMPARISON):
        piece = np.arange(start, min(start + _ROWS_PER_COMPARISON, count))
        clean, noisy = (gatherer[piece] for gatherer in gatherers)
        changed = _compare(clean, noisy)
        noisy_rows += int(np.count_nonzero(changed.any(axis=1)))
        total += np.count_nonzero(changed, axis=0)
        if clean.labels is not None and noisy.labels is not None:
            flipped += (clean.labels != noisy.labels).sum(dim=0).numpy()
    names = [*features, *schema.numerical]
    return Changes(
        count,
        noisy_rows,
        dict(zip(names, total.tolist(), strict=True)),
        dict(zip(schema.labels, flipped.tolist(), strict=True)),
    )


def _compare(clean: Batch, noisy: Batch) -> BoolArray:
    """Return whether each feature of each row differs, ``(rows, F + M + N)``."""
    bags = []
    for before, after in zip(clean.bags, noisy.bags, strict=True):
        row = np.arange(len(clean)).repeat(before.offsets.diff().numpy())
        differing = row[(before.tokens != after.tokens).numpy()]
        bags.append(np.bincount(differing, minlength=len(clean)) > 0)
    return np.concatenate(
        [
            (clean.categorical != noisy.categorical).numpy(),
            np.array(bags, np.bool_).reshape(len(bags), len(clean)).T,
            (clean.numerical != noisy.numerical).numpy(),
        ],
        axis=1,
    )


def task_rows(task: Task, labels: UInt8Array) -> BoolArray:
    """Return whether a task is measured on each row of ``labels``, ``(n, T)``."""
    return np.ones(len(labels), np.bool_) if task.given is None else labels[:, task.given] == 1


def count_split(arrays: Arrays, schema: Schema) -> SplitStatistics:
    """Return the statistics of a split.

    Uses a few megabytes, and 24 bytes per bag of one multi-valued field at a time.
    """
    labels = arrays["labels"]
    task_rows, task_positives = _count_labels(labels, schema)
    minimum, mean, maximum = _summarise(arrays["numerical"])
    bags = [_count_tokens(arrays, column, f.name) for column, f in enumerate(schema.multivalued)]
    empty_bags, tokens, zero_tokens = np.array(bags, np.int64).reshape(-1, 3).T
    return SplitStatistics(
        rows=len(labels),
        task_rows=task_rows,
        task_positives=task_positives,
        zeros=_count_zeros(arrays["categorical"]),
        minimum=minimum,
        mean=mean,
        maximum=maximum,
        empty_bags=empty_bags,
        tokens=tokens,
        zero_tokens=zero_tokens,
        true_correlations=_correlate_truth(arrays["probabilities"], funnel=schema.funnel)
        if "probabilities" in arrays
        else None,
    )


def _correlate_truth(probabilities: Float64Array, *, funnel: bool) -> Float64Array:
    count, labels = probabilities.shape
    sums, products = np.zeros(labels), np.zeros((labels, labels))
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # NaN where the truth is certain or constant
        for _, piece in _pieces(probabilities):
            before = np.column_stack([np.ones(len(piece)), piece[:, :-1]]) if funnel else 1
            logits = np.log(piece) - np.log(before - piece)
            sums += logits.sum(axis=0)
            products += logits.T @ logits
        covariances = products / count - np.outer(sums, sums) / count**2
        deviations = np.sqrt(np.diag(covariances))
        return np.asarray(covariances / np.outer(deviations, deviations))


def _pieces(
    array: npt.NDArray[Any], first: int = 0, last: int | None = None
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield rows ``[first, last)`` in pieces, each after the number of its first row."""
    last = len(array) if last is None else last
    for start in range(first, last, _ROWS_PER_PIECE):
        piece = slice(start, min(start + _ROWS_PER_PIECE, last))
        if isinstance(array, np.memmap):
            # A new map for each piece, so that the pages of the last one are released.
            path, offset, shape = str(array.filename), array.offset, array.shape
            array = np.memmap(path, array.dtype, mode="r", offset=offset, shape=shape)
        yield start, array[piece]


def _count_labels(labels: UInt8Array, schema: Schema) -> tuple[Counts, Counts]:
    rows, positives = np.zeros((2, SLICES, len(schema.tasks)), np.int64)
    edges = [len(labels) * number // SLICES for number in range(SLICES + 1)]
    for number in range(SLICES):
        for _, piece in _pieces(labels, edges[number], edges[number + 1]):
            for column, task in enumerate(schema.tasks):
                measured = piece[task_rows(task, piece), task.label]
                rows[number, column] += len(measured)
                positives[number, column] += np.count_nonzero(measured)
    return rows, positives


def _count_zeros(categorical: Int32Array) -> Counts:
    zeros = np.zeros(categorical.shape[1], np.int64)
    for _, piece in _pieces(categorical):
        zeros += np.count_nonzero(piece == 0, axis=0)
    return zeros


def _summarise(numerical: Float32Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    rows, features = numerical.shape
    if not rows:
        unknown = np.full(features, np.nan)
        return unknown, unknown, unknown
    minimum, maximum = np.full(features, np.inf), np.full(features, -np.inf)
    total = np.zeros(features)
    for _, piece in _pieces(numerical):
        minimum = np.minimum(minimum, piece.min(axis=0))
        maximum = np.maximum(maximum, piece.max(axis=0))
        total += piece.sum(axis=0, dtype=np.float64)
    return minimum, total / rows, maximum


def _count_tokens(arrays: Arrays, column: int, field: str) -> tuple[int, int, int]:
    """Return empty bags, tokens and tokens with index 0 of one field, counted over rows."""
    offsets, tokens = (arrays[bag_stem(field, part)] for part in ("offsets", "tokens"))
    lengths = np.diff(offsets)
    rows_of_bag = np.zeros(len(lengths), np.int64)
    for _, piece in _pieces(arrays["bag"]):
        np.add.at(rows_of_bag, piece[:, column], 1)
    zero_tokens = 0
    for start, piece in _pieces(tokens):
        bags = np.searchsorted(offsets, start + np.flatnonzero(piece == 0), side="right") - 1
        zero_tokens += int(rows_of_bag[bags].sum())
    return int(rows_of_bag[lengths == 0].sum()), int(rows_of_bag @ lengths), zero_tokens
