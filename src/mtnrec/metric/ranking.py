"""Exact AUCs, over a whole split at once."""

import torch
from torch import Tensor


def auc(scores: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Return the exact area under the ROC curve, ties counted half (Mann-Whitney).

    The statistic is summed in integers for labels, so the result is the correctly rounded ratio
    of two whole numbers up to 10^8 rows.

    Args:
        scores: ``(n,)``; only their order matters.
        positives: Labels 0 or 1, ``(n,)``, or the weight of each row as a positive.
        negatives: The weight of each row as a negative; ``1 - positives`` if not given.

    Returns:
        float64 scalar; NaN if a class has no weight or a score is NaN.

    >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    tensor(0.8750, dtype=torch.float64)
    """
    if not len(scores):
        return scores.new_full((), torch.nan, dtype=torch.float64)
    given = [positives] if negatives is None else [positives, negatives]
    # Labels are counted; float32 would lose digits of a large split's sums.
    inexact = any(weights.is_floating_point() for weights in given)
    dtype = torch.float64 if inexact else torch.int64
    positives = positives.to(dtype)
    negatives = 1 - positives if negatives is None else negatives.to(dtype)
    order = scores.argsort()
    scores = scores[order]
    ends = _ends_of_runs(scores[1:] != scores[:-1])
    positive_sums = positives[order].cumsum(0)[ends]
    negative_sums = negatives[order].cumsum(0)[ends]
    pairs = _pairs_won_twice(positive_sums, negative_sums)
    area = pairs.sum().double() / (2 * positive_sums[-1].double() * negative_sums[-1])
    return torch.where(scores[-1].isnan(), torch.nan, area)  # sorting puts NaN last


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Return the mean AUC of the groups, weighted by their rows (GAUC; Zhou et al., KDD 2018).

    Groups with one class have no AUC and do not count.

    Args:
        scores: ``(n,)``.
        labels: 0 or 1, ``(n,)``.
        groups: Group id of each row, ``(n,)``.

    Returns:
        float64 scalar; NaN if no group has both classes or a score is NaN.
    """
    if not len(scores) or scores.isnan().any():
        return scores.new_full((), torch.nan, dtype=torch.float64)
    order = scores.argsort()
    order = order[groups[order].argsort(stable=True)]
    scores, groups, positives = scores[order], groups[order], labels[order].long()
    new_group = groups[1:] != groups[:-1]
    tie_ends = _ends_of_runs(new_group | (scores[1:] != scores[:-1]))
    group_ends = _ends_of_runs(new_group)
    positive_sums, negative_sums = positives.cumsum(0), (1 - positives).cumsum(0)
    pairs = _pairs_won_twice(positive_sums[tie_ends], negative_sums[tie_ends])

    # Pairs across groups are whole groups of negatives below: take them off again.
    group_positives = _increments(positive_sums[group_ends])
    group_negatives = _increments(negative_sums[group_ends])
    negatives_below = negative_sums[group_ends] - group_negatives
    group_of_tie = torch.searchsorted(group_ends, tie_ends)
    group_pairs = pairs.new_zeros(len(group_ends)).index_add_(0, group_of_tie, pairs)
    group_pairs -= 2 * group_positives * negatives_below

    both = (group_positives > 0) & (group_negatives > 0)
    rows = (group_positives + group_negatives)[both].double()
    pairs_of_group = 2 * group_positives[both].double() * group_negatives[both]
    return (group_pairs[both] / pairs_of_group * rows).sum() / rows.sum()


def _ends_of_runs(changes: Tensor) -> Tensor:
    """Turn "entry ``i + 1`` differs from entry ``i``" into the last index of each run."""
    last = changes.new_tensor([len(changes)], dtype=torch.long)
    return torch.cat([changes.nonzero().squeeze(1), last])


def _increments(sums: Tensor) -> Tensor:
    return sums.diff(prepend=sums.new_zeros(1))


def _pairs_won_twice(positive_sums: Tensor, negative_sums: Tensor) -> Tensor:
    """Twice the (positive, negative) pairs that the positives of each tie win, ties half."""
    negatives = _increments(negative_sums)
    return _increments(positive_sums) * (2 * (negative_sums - negatives) + negatives)
