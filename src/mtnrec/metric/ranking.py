"""Exact AUCs over a whole split at once.

Only values are sorted, never row numbers: a binary search then finds the rank of each positive
among all rows, which is many times faster.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtnrec.arrays import Int64Array

Values = npt.NDArray[Any]

_PLACES = 1 << 32
_SIGN = np.int64(1) << 31
_MAGNITUDE = np.int32((1 << 31) - 1)


class SortedScores(NamedTuple):
    """Scores in ascending order, NaN last: all that an AUC and a calibration curve need.

    Args:
        rows: Scores of all rows, ``(n,)``.
        positives: Scores of the rows with label 1, ``(p,)``.
    """

    rows: Tensor
    positives: Tensor


def sort_scores(scores: Tensor, labels: Tensor) -> SortedScores:
    """Sort scores; ``labels`` are 0 or 1, both are ``(n,)``."""
    values = _values(scores)
    positives = values[_values(labels) > 0]
    return SortedScores(torch.from_numpy(np.sort(values)), torch.from_numpy(np.sort(positives)))


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the exact area under the ROC curve, ties counted half (Mann-Whitney).

    Args:
        scores: ``(n,)``; only their order matters.
        labels: 0 or 1, ``(n,)``.

    Returns:
        float64 scalar, the correctly rounded ratio of two integers for up to 10^9 rows; NaN if a
        class is absent or a score is NaN.

    >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    tensor(0.8750, dtype=torch.float64)
    """
    return auc_of_sorted(sort_scores(scores, labels))


def auc_of_sorted(scores: SortedScores) -> Tensor:
    """Return the :func:`auc` of sorted scores."""
    rows, positives = scores.rows.numpy(), scores.positives.numpy()
    negatives = len(rows) - len(positives)
    if not len(positives) or not negatives or np.isnan(rows[-1]):
        return torch.tensor(torch.nan, dtype=torch.float64)
    won_twice = int(_twice_the_ranks(positives, rows).sum()) - len(positives) ** 2
    return torch.tensor(won_twice / (2 * len(positives) * negatives), dtype=torch.float64)


def weighted_auc(scores: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return the AUC of rows that each carry a weight as a positive and one as a negative.

    Args:
        scores: ``(n,)``; only their order matters.
        positives: Weight of each row as a positive, ``(n,)``. Integers are summed exactly.
        negatives: Weight of each row as a negative, ``(n,)``.

    Returns:
        float64 scalar; NaN if a class has no weight or a score is NaN.
    """
    values = _values(scores)
    order = values.argsort()
    values = values[order]
    if not len(values) or np.isnan(values[-1]):  # sorting puts NaN last
        return torch.tensor(torch.nan, dtype=torch.float64)
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    inexact = positives.is_floating_point() or negatives.is_floating_point()
    dtype = np.float64 if inexact else np.int64
    positive_sums, negative_sums = (
        _values(weights)[order].cumsum(dtype=dtype)[last] for weights in (positives, negatives)
    )
    # Twice the (positive, negative) pairs that the positives of each tie win; ties count half.
    tied_negatives = np.diff(negative_sums, prepend=0)
    pairs = np.diff(positive_sums, prepend=0) * (2 * negative_sums - tied_negatives)
    possible = 2 * float(positive_sums[-1]) * float(negative_sums[-1])
    return torch.tensor(pairs.sum() / possible if possible else torch.nan, dtype=torch.float64)


class GroupedAUC(NamedTuple):
    """Mean AUC of groups, and the share of the rows that are in one of them; float64 scalars."""

    mean: Tensor
    share: Tensor

    @classmethod
    def of(cls, mean: float, share: float) -> "GroupedAUC":
        """Return both as tensors."""
        return cls(*(torch.tensor(value, dtype=torch.float64) for value in (mean, share)))


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor, *, min_rows: int = 1) -> GroupedAUC:
    """Return the mean AUC of the groups, weighted by their rows (GAUC; Zhou et al., KDD 2018).

    Groups with one class have no AUC and are left out, as are those with too few rows.

    Args:
        scores: ``(n,)``.
        labels: 0 or 1, ``(n,)``.
        groups: Group id of each row, ``(n,)``.
        min_rows: Minimum number of rows of a group.

    Returns:
        The mean, NaN if no group counts, and the share of the rows that count; both are NaN without
        rows, or if a score is NaN.
    """
    values = _values(scores)
    if not len(values) or np.isnan(values).any():
        return GroupedAUC.of(np.nan, np.nan)
    # One integer per row, ordered by group and within a group by score.
    keys = _numbers(_values(groups)) * _PLACES
    keys += _places(values)
    positives = np.sort(keys[_values(labels) > 0])
    keys.sort()
    group, first, positive_rows = np.unique(
        positives // _PLACES, return_index=True, return_counts=True
    )
    start, end = (keys.searchsorted(bound * _PLACES) for bound in (group, group + 1))
    rows = end - start
    negative_rows = rows - positive_rows
    ranks = np.add.reduceat(_twice_the_ranks(positives, keys), first) if len(first) else first
    won_twice = ranks - (2 * start + positive_rows) * positive_rows
    counts = (negative_rows > 0) & (rows >= min_rows)
    aucs = won_twice[counts] / (2 * positive_rows * negative_rows)[counts]
    total = rows[counts].sum()
    mean = (aucs * rows[counts]).sum() / total if total else np.nan
    return GroupedAUC.of(mean, total / len(values))


def _values(tensor: Tensor) -> Values:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16; float32 holds the same numbers.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _twice_the_ranks(chosen: Values, ascending: Values) -> Int64Array:
    """Return twice the mean rank, from 1/2, of each sorted chosen value among all."""
    return ascending.searchsorted(chosen, "left") + ascending.searchsorted(chosen, "right")


def _numbers(groups: Values) -> Int64Array:
    """Map groups to integers below 2^31 - 1, in any order."""
    first, last = int(groups.min()), int(groups.max())
    if last - first < _SIGN - 1:
        return groups.astype(np.int64, copy=False) - first
    return np.unique(groups, return_inverse=True)[1]


def _places(scores: Values) -> Int64Array:
    """Return integers in [0, 2^32) in the order of the scores, with the same ties."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1]
    bits = (scores + np.float32(0)).view(np.int32)  # negative zero has different bits
    bits ^= (bits >> 31) & _MAGNITUDE  # the bits of a negative float grow as it falls
    return bits + _SIGN
