"""The AUCs against scikit-learn, scipy and loops over pairs."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, rankdata
from sklearn.metrics import roc_auc_score

from mtnrec.metric.ranking import auc, grouped_auc, weighted_auc


def draw(rows, *, levels=None, seed=0):
    """Scores (only ``levels`` different ones), labels and groups."""
    rng = np.random.default_rng(seed)
    scores = rng.random(rows) if levels is None else rng.integers(0, levels, rows) / levels
    labels = rng.random(rows) < 0.1 + 0.4 * scores
    return scores, labels.astype(np.uint8), rng.integers(0, rows // 4, rows)


def tensors(*arrays):
    return map(torch.from_numpy, arrays)


def slow_grouped_auc(scores, labels, groups):
    aucs, rows = [], []
    for group in np.unique(groups):
        own = groups == group
        if len(np.unique(labels[own])) == 2:
            aucs.append(roc_auc_score(labels[own], scores[own]))
            rows.append(own.sum())
    return np.average(aucs, weights=rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 300, 5, 2])
@pytest.mark.parametrize("rows", [40, 3000])
def test_equals_sklearn(rows, levels, dtype):
    scores, labels, _ = draw(rows, levels=levels)
    scores = scores.astype(dtype)

    result = auc(*tensors(scores, labels))

    assert result.item() == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)
    assert result.dtype == torch.float64


@pytest.mark.parametrize("seed", range(20))
def test_is_the_share_of_pairs_in_the_right_order(seed):
    scores, labels, _ = draw(30, levels=6, seed=seed)

    result = auc(*tensors(scores, labels))

    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    won = sum((p > n) + (p == n) / 2 for p, n in pairs)
    assert result.item() == pytest.approx(won / len(pairs), abs=1e-15)


def test_equals_the_mann_whitney_statistic():
    scores, labels, _ = draw(500, levels=20)

    result = auc(*tensors(scores, labels))

    positives, negatives = scores[labels == 1], scores[labels == 0]
    statistic = mannwhitneyu(positives, negatives).statistic
    assert result.item() == pytest.approx(statistic / (len(positives) * len(negatives)), abs=1e-15)


def test_ties_count_half():
    scores = torch.tensor([0.2, 0.7, 0.7, 0.7])

    # Of three pairs one is won and two are ties.
    assert auc(scores, torch.tensor([0, 0, 1, 0])).item() == 2 / 3


def test_constant_scores_give_one_half():
    _, labels, _ = draw(101)

    assert auc(torch.full((101,), 0.3), torch.from_numpy(labels)).item() == 0.5


def test_negative_zero_ties_with_zero():
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0])

    assert auc(scores, torch.tensor([1, 0, 0, 1])).item() == 0.5
    assert grouped_auc(scores, torch.tensor([1, 0, 0, 1]), torch.tensor([1, 1, 2, 2])).mean == 0.5


def test_infinite_scores_are_scores():
    scores = torch.tensor([-torch.inf, 0.0, torch.inf, -torch.inf])

    assert auc(scores, torch.tensor([0, 0, 1, 1])).item() == 0.625  # 1 tie and 2 wins of 4


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([0.1, 0.2], [0, 0]),
        ([0.1, 0.2], [1, 1]),
        ([0.3], [1]),
        ([], []),
        ([0.1, torch.nan, 0.3], [0, 1, 1]),
        ([torch.nan, torch.nan], [0, 1]),
    ],
)
def test_is_nan_for_one_class_for_no_rows_and_for_nan_scores(scores, labels):
    scores, labels = torch.tensor(scores), torch.tensor(labels, dtype=torch.uint8)

    assert auc(scores, labels).isnan()
    assert grouped_auc(scores, labels, torch.zeros(len(labels), dtype=torch.long)).mean.isnan()


@pytest.mark.parametrize("levels", [None, 7])
def test_the_order_of_the_rows_does_not_matter(levels):
    scores, labels, groups = tensors(*draw(2000, levels=levels))
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(1))

    assert auc(scores[shuffled], labels[shuffled]) == auc(scores, labels)
    torch.testing.assert_close(
        grouped_auc(scores[shuffled], labels[shuffled], groups[shuffled]),
        grouped_auc(scores, labels, groups),
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize(
    "transform",
    [
        torch.log1p,
        torch.exp,
        lambda scores: 8 * scores - 3,
        lambda scores: (8 * scores - 3).float(),
        lambda scores: (scores + 0.01).float().log(),
        torch.Tensor.float,
        torch.Tensor.bfloat16,  # 64 levels: it holds them all
    ],
)
def test_only_the_order_of_the_scores_matters(transform):
    scores, labels, groups = tensors(*draw(2000, levels=64))

    assert auc(transform(scores), labels) == auc(scores, labels)
    assert grouped_auc(transform(scores), labels, groups) == grouped_auc(scores, labels, groups)


def test_the_opposite_scores_have_the_complementary_auc():
    scores, labels, _ = tensors(*draw(2000, levels=64))

    assert auc(-scores, labels).item() == pytest.approx(1 - auc(scores, labels).item(), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_labels_may_have_any_type(dtype):
    scores, labels, groups = tensors(*draw(2000))

    assert auc(scores, labels.to(dtype)) == auc(scores, labels)
    assert grouped_auc(scores, labels.to(dtype), groups) == grouped_auc(scores, labels, groups)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_large_split_loses_no_digit(dtype):
    # The 2 * 10^10 pairs are far more than the whole numbers that float32 holds.
    scores, labels, _ = draw(300_000, levels=100_000)

    result = auc(torch.from_numpy(scores), torch.from_numpy(labels).to(dtype))

    positives = int(labels.sum())
    negatives = len(labels) - positives
    ranks_twice = int((2 * rankdata(scores)).astype(np.int64)[labels == 1].sum())
    won_twice = ranks_twice - positives * (positives + 1)
    assert result.item() == float(Fraction(won_twice, 2 * positives * negatives))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 5])
def test_weights_act_as_in_sklearn(levels, dtype):
    scores, _, _ = draw(1000, levels=levels)
    positives, negatives = np.random.default_rng(1).random((2, 1000)).astype(dtype)

    result = weighted_auc(*tensors(scores, positives, negatives))

    expected = roc_auc_score(
        np.repeat([1, 0], 1000),
        np.tile(scores, 2),
        sample_weight=np.concatenate([positives, negatives]).astype(np.float64),
    )
    assert result.item() == pytest.approx(expected, abs=1e-12)


def test_integer_weights_repeat_rows():
    scores, _, _ = draw(200, levels=30)
    positives, negatives = np.random.default_rng(1).integers(0, 4, (2, 200))

    result = weighted_auc(*tensors(scores, positives, negatives))

    repeated = np.concatenate([np.repeat(scores, positives), np.repeat(scores, negatives)])
    labels = np.repeat([1, 0], [positives.sum(), negatives.sum()])
    assert result.item() == pytest.approx(roc_auc_score(labels, repeated), abs=1e-14)


def test_negatives_may_have_fractional_weights():
    scores, labels, _ = draw(500, levels=30)
    negatives = np.random.default_rng(1).random(500) * (1 - labels)

    result = weighted_auc(*tensors(scores, labels, negatives))

    weights = np.where(labels == 1, 1, negatives)
    assert result.item() == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))


@pytest.mark.parametrize("levels", [None, 30, 2, 1])
def test_grouped_auc_equals_a_loop_over_groups(levels):
    scores, labels, groups = draw(400, levels=levels)

    result = grouped_auc(*tensors(scores, labels, groups))

    assert result.mean.item() == pytest.approx(slow_grouped_auc(scores, labels, groups), abs=1e-13)
    assert result.mean.dtype == torch.float64


@pytest.mark.parametrize("min_rows", [2, 4, 6])
def test_small_groups_do_not_count_and_the_share_says_how_many_rows_do(min_rows):
    scores, labels, groups = draw(400, levels=30)
    kept = np.bincount(groups)[groups] >= min_rows
    both = [len(np.unique(labels[groups == group])) == 2 for group in groups]

    result = grouped_auc(*tensors(scores, labels, groups), min_rows=min_rows)

    expected = slow_grouped_auc(scores[kept], labels[kept], groups[kept])
    assert result.mean.item() == pytest.approx(expected, abs=1e-13)
    assert result.share.item() == pytest.approx(np.mean(kept & both), abs=1e-15)


def test_no_group_counts_if_all_are_too_small():
    scores, labels, groups = tensors(*draw(400, levels=30))

    mean, share = grouped_auc(scores, labels, groups, min_rows=401)

    assert mean.isnan()
    assert share == 0


def test_groups_weigh_by_their_rows():
    scores = torch.tensor([0.1, 0.2, 0.5, 0.4, 0.3])
    labels = torch.tensor([0, 1, 0, 1, 0])

    # AUC 1 of two rows, AUC 1/2 of three.
    result = grouped_auc(scores, labels, torch.tensor([7, 7, 9, 9, 9]))

    assert result.mean.item() == pytest.approx((2 * 1 + 3 * 0.5) / 5, abs=1e-15)


def test_groups_with_one_class_do_not_count():
    scores, labels, groups = draw(400, levels=9)
    more_scores, _, _ = draw(100, levels=9, seed=1)
    more_labels = np.repeat([0, 1], 50).astype(np.uint8)
    more_groups = -1 - np.repeat([0, 1], 50)

    result = grouped_auc(
        *tensors(
            np.concatenate([more_scores, scores]),
            np.concatenate([more_labels, labels]),
            np.concatenate([more_groups, groups]),
        )
    )

    assert result.mean.item() == pytest.approx(slow_grouped_auc(scores, labels, groups), abs=1e-13)


def test_one_group_has_the_auc_of_the_split():
    scores, labels, _ = tensors(*draw(900, levels=50))
    group = torch.full((900,), torch.iinfo(torch.int64).min)

    assert grouped_auc(scores, labels, group).mean == auc(scores, labels)


@pytest.mark.parametrize("step", [2**50, 2**32, (2**31 - 2) // 899, 1])
def test_groups_are_only_names(step):
    scores, labels, groups = tensors(*draw(900, levels=50))
    names = torch.randperm(900, generator=torch.Generator().manual_seed(1)) * step - 2**58

    torch.testing.assert_close(
        grouped_auc(scores, labels, names[groups]),
        grouped_auc(scores, labels, groups),
        rtol=0,
        atol=1e-14,
    )
