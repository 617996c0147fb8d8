"""The metrics on what is hard for them, against scikit-learn and exact arithmetic."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from mtnrec.batch import LogProbabilities
from mtnrec.metric.calibration import (
    calibration,
    calibration_curve,
    expected_calibration_error,
    log_loss,
)
from mtnrec.metric.ranking import auc, grouped_auc, weighted_auc
from mtnrec.metric.task_metrics import TaskMetrics
from mtnrec.schema import Schema

FUNNEL = Schema((), ("price",), ("click", "conversion"), funnel=True)
# Both ends, subnormals of both types, neighbours of 1, values that only float64 tells apart.
HARD = [0.0, 5e-324, 1e-310, 1e-45, 1e-40, 1e-38, 0.1, 0.1 + 2**-56, 0.5, 1 - 2**-24, 1 - 2**-53, 1]
GROUPS = [-(2**62), -1, 0, 1, 2**62]
ROWS = st.lists(
    st.tuples(st.sampled_from(HARD) | st.floats(0, 1), st.integers(0, 1), st.sampled_from(GROUPS)),
    max_size=40,
)
TYPES = st.sampled_from([np.float32, np.float64])


def split(rows, dtype):
    """Probabilities, labels and group ids of drawn rows."""
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return tuple(map(np.array, columns, (dtype, np.uint8, np.int64)))


def exact_auc(p, labels):
    """Share of the pairs in the right order, ties half; None without pairs."""
    positives, negatives = p[labels == 1][:, None], p[labels == 0]
    pairs = len(positives) * len(negatives)
    won = 2 * int((positives > negatives).sum()) + int((positives == negatives).sum())
    return Fraction(won, 2 * pairs) if pairs else None


def exact_calibration_error(p, labels, bins):
    """The error in whole numbers and fractions: a tie lies in the bin of its mean rank."""
    excess = [Fraction(0)] * bins
    for probability, label in zip(p, labels, strict=True):
        below, tied = int((p < probability).sum()), int((p == probability).sum())
        bin_of_row = (2 * below + tied - 1) * bins // (2 * len(p))
        excess[bin_of_row] += Fraction(float(probability)) - int(label)
    return sum(map(abs, excess)) / len(p)


def equals(found, expected):
    assert found.dtype == torch.float64
    return found.isnan().item() if expected is None else found.item() == float(expected)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(ROWS, TYPES)
def test_the_auc_is_the_rounded_share_of_pairs(rows, dtype):
    p, labels, _ = split(rows, dtype)

    expected = exact_auc(p, labels)

    scores, tensor = torch.from_numpy(p), torch.from_numpy(labels)
    assert equals(auc(scores, tensor), expected)
    assert equals(weighted_auc(scores, tensor, 1 - tensor.long()), expected)
    if expected is not None:
        assert float(expected) == pytest.approx(roc_auc_score(labels, p), abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(ROWS, TYPES)
def test_the_grouped_auc_is_the_mean_over_groups_with_both_classes(rows, dtype):
    p, labels, groups = split(rows, dtype)
    members = [groups == group for group in np.unique(groups)]

    aucs = [(exact_auc(p[own], labels[own]), int(own.sum())) for own in members]

    known = [(value, count) for value, count in aucs if value is not None]
    found = grouped_auc(*map(torch.from_numpy, (p, labels, groups))).mean
    if not known:
        assert found.isnan()
    else:
        expected = sum(v * n for v, n in known) / sum(n for _, n in known)
        assert found.item() == pytest.approx(float(expected), abs=4e-16)


@settings(max_examples=100, deadline=None)
@given(ROWS, TYPES, st.integers(1, 25))
def test_calibration_and_its_error_equal_exact_arithmetic(rows, dtype, bins):
    p, labels, _ = split(rows, dtype)
    curve = calibration_curve(torch.from_numpy(p), torch.from_numpy(labels), bins)

    total = sum(Fraction(float(value)) for value in p)

    assert curve.rows.sum() == len(p)
    if labels.any():
        expected = float(total / int(labels.sum()))
        assert calibration(curve).item() == pytest.approx(expected, rel=1e-14, abs=1e-320)
    else:
        assert calibration(curve).isnan()
    if len(p):
        expected = float(exact_calibration_error(p, labels, bins))
        assert expected_calibration_error(curve).item() == pytest.approx(expected, abs=1e-15)
    else:
        assert expected_calibration_error(curve).isnan()


@settings(max_examples=50, deadline=None)
@given(ROWS, TYPES, st.randoms(use_true_random=False))
def test_no_bit_depends_on_the_order_of_the_rows(rows, dtype, random):
    values = []
    for _ in range(2):
        p, labels, groups = map(torch.from_numpy, split(rows, dtype))
        curve = calibration_curve(p, labels)
        error = expected_calibration_error(curve)
        values.append(
            [auc(p, labels), calibration(curve), error, grouped_auc(p, labels, groups).mean]
        )
        random.shuffle(rows)

    torch.testing.assert_close(values[0][:3], values[1][:3], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values[0][3], values[1][3], rtol=0, atol=4e-16, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-15, 1 - 1e-15), st.integers(0, 1)), min_size=1))
def test_log_loss_equals_sklearn_and_fifty_digits(rows):
    p, labels = np.array(rows).T

    found = log_loss(*map(torch.from_numpy, (np.log(p), np.log1p(-p), labels))).item()

    with mpmath.workdps(50):
        chances = [mpmath.mpf(v) if label else 1 - mpmath.mpf(v) for v, label in rows]
        expected = -sum(map(mpmath.log, chances)) / len(rows)
    assert found == pytest.approx(float(expected), rel=4e-15)
    assert found == pytest.approx(sklearn_log_loss(labels, p, labels=[0, 1]), rel=1e-13)


def test_log_loss_of_a_certain_score_is_zero_or_infinite():
    p = torch.tensor([0.0, 1.0], dtype=torch.float64)

    right, wrong = (log_loss(p.log(), (-p).log1p(), torch.tensor(y)) for y in ([0, 1], [1, 1]))

    assert right.item() == 0
    assert wrong.item() == math.inf  # scikit-learn clips, which hides the error


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 100, 1])
def test_one_positive_in_a_million_rows(levels, dtype):
    rng = np.random.default_rng(0)
    scores = rng.random(1_000_000, dtype) if levels is None else rng.integers(0, levels, 1_000_000)
    scores = (scores / (levels or 1)).astype(dtype)
    labels = np.zeros(len(scores), np.uint8)
    labels[777_777] = 1

    found = auc(*map(torch.from_numpy, (scores, labels)))

    below, tied = (scores < scores[777_777]).sum(), (scores == scores[777_777]).sum() - 1
    assert found.item() == float(Fraction(int(2 * below + tied), 2 * 999_999))


def measure(logits, labels):
    """All metrics of ESMM's probabilities; logits ``(n, 2)``."""
    a, b = torch.tensor(logits, dtype=torch.float64).reshape(-1, 2).T
    p, q = a.sigmoid(), b.sigmoid()
    positive = torch.stack([p, p * q], dim=1).log()
    negative = torch.stack([1 - p, 1 - p * q], dim=1).log()
    metrics = TaskMetrics(FUNNEL)
    tensor = torch.tensor(labels).reshape(-1, 2)
    metrics.update(LogProbabilities(positive, negative), tensor, torch.arange(len(tensor)) // 4)
    return {name: value.item() for name, value in metrics.compute().items()}


KINDS = ("auc", "log_loss", "calibration", "ece", "grouped_auc", "grouped_share")
UNDEFINED = {
    "no row": ([], [], dict.fromkeys(("ctr", "cvr", "ctcvr"), KINDS)),
    "one row": (
        [[0, 0]],
        [[1, 0]],
        {
            "ctr": ("auc", "grouped_auc"),
            "cvr": ("auc", "calibration", "grouped_auc"),
            "ctcvr": ("auc", "calibration", "grouped_auc"),
        },
    ),
    "two rows": ([[0, 0], [1, 1]], [[1, 1], [0, 0]], {"cvr": ("auc", "grouped_auc")}),
    "no click": (
        [[0, 0], [1, 1], [2, 1]],
        [[0, 0]] * 3,
        {
            "ctr": ("auc", "calibration", "grouped_auc"),
            "cvr": KINDS,
            "ctcvr": ("auc", "calibration", "grouped_auc"),
        },
    ),
    "only conversions": (
        [[0, 0], [1, 1]],
        [[1, 1]] * 2,
        dict.fromkeys(("ctr", "cvr", "ctcvr"), ("auc", "grouped_auc")),
    ),
}


@pytest.mark.parametrize(("logits", "labels", "undefined"), UNDEFINED.values(), ids=UNDEFINED)
def test_undefined_values_and_only_those_are_nan(logits, labels, undefined):
    found = measure(logits, labels)

    expected = {f"{task}_{kind}" for task, kinds in undefined.items() for kind in kinds}
    expected |= {"mean_auc"} if any("auc" in kinds for kinds in undefined.values()) else set()
    assert {name for name, value in found.items() if math.isnan(value)} == expected
    clicks = [conversion for click, conversion in labels if click]
    assert found["cvr_rows"] == len(clicks)
    assert found["cvr_positives"] == sum(clicks)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 1000, 2, 1])
def test_ten_million_rows_equal_sklearn(levels):
    rng = np.random.default_rng(0)
    p = rng.random(10_000_000, np.float32)
    labels = (rng.random(len(p), np.float32) < 0.05 * p).astype(np.uint8)
    if levels is not None:
        p = np.ceil(p * levels) / np.float32(levels + 1)

    scores, tensor = torch.from_numpy(p), torch.from_numpy(labels)
    curve = calibration_curve(scores, tensor)

    assert auc(scores, tensor).item() == pytest.approx(roc_auc_score(labels, p), abs=1e-13)
    wide = torch.from_numpy(p.astype(np.float64)).clamp(1e-9, 1 - 1e-9)
    found = log_loss(wide.log(), (-wide).log1p(), tensor).item()
    assert found == pytest.approx(sklearn_log_loss(labels, wide.numpy()), rel=1e-11)
    expected = math.fsum(p.tolist()) / int(labels.sum())
    assert calibration(curve).item() == pytest.approx(expected, rel=1e-13)
    assert curve.rows.sum() == len(p)
