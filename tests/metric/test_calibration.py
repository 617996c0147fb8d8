"""Log loss, calibration and its error against scikit-learn, hand values and a slow loop."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn import calibration as sklearn_calibration
from sklearn import metrics

from mtnrec.metric.calibration import (
    calibration,
    calibration_curve,
    expected_calibration_error,
    expected_log_loss,
    log_loss,
)


def draw(rows, *, levels=None, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.random(rows) if levels is None else rng.integers(0, levels + 1, rows) / levels
    # Calibrated, so that the excess of a bin is as often positive as negative.
    return p, (rng.random(rows) < p).astype(np.uint8)


def slow_calibration_error(p, labels, bins):
    ranks_twice = 2 * rankdata(p).astype(np.float64) - 2
    excess = [0.0] * bins
    for rank_twice, probability, label in zip(ranks_twice, p, labels, strict=True):
        excess[int(rank_twice) * bins // (2 * len(p))] += float(probability) - float(label)
    return sum(map(abs, excess)) / len(p)


def calibration_error(p, labels, **keys):
    return expected_calibration_error(calibration_curve(p, labels, **keys))


def test_log_loss_equals_sklearn():
    p, labels = draw(500)

    result = log_loss(*map(torch.from_numpy, (np.log(p), np.log1p(-p), labels)))

    assert result.item() == pytest.approx(metrics.log_loss(labels, p), abs=1e-13)


def test_log_loss_of_saturated_logits_is_the_logit():
    logits = torch.tensor([-80.0, 80.0])
    positive = torch.nn.functional.logsigmoid(logits)
    negative = torch.nn.functional.logsigmoid(-logits)

    # Probabilities in float32 would clamp these losses.
    assert log_loss(positive, negative, torch.tensor([1, 0])).item() == 80
    assert log_loss(positive, negative, torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-30)


def test_log_loss_of_many_rows_loses_no_digit():
    positive = torch.full((1_000_000,), 0.1).log()

    result = log_loss(positive, torch.zeros(1_000_000), torch.ones(1_000_000))

    assert result.item() == pytest.approx(-positive[0].item(), rel=1e-12)


def test_log_loss_of_no_rows_is_nan():
    assert log_loss(torch.empty(0), torch.empty(0), torch.empty(0)).isnan()


def test_expected_log_loss_is_the_mean_over_all_draws_of_the_labels():
    rng = np.random.default_rng(0)
    true, predicted = torch.from_numpy(rng.uniform(0.05, 0.95, (2, 6)))
    expected = 0.0
    for labels in itertools.product([0, 1], repeat=6):
        chance = torch.where(torch.tensor(labels) > 0, true, 1 - true).prod().item()
        expected += chance * metrics.log_loss(labels, predicted, labels=[0, 1])

    found = expected_log_loss(predicted.log(), (-predicted).log1p(), true)

    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_calibration_is_predicted_over_observed_positives():
    p = torch.tensor([0.5, 0.25, 0.75, 0.0])

    for labels, expected in (([1, 0, 0, 0], 1.5), ([1.0, 1.0, 1.0, 0.0], 0.5)):
        assert calibration(calibration_curve(p, torch.tensor(labels))).item() == expected


@pytest.mark.parametrize("rows", [0, 3])
def test_calibration_without_positives_is_nan(rows):
    assert calibration(calibration_curve(torch.full((rows,), 0.5), torch.zeros(rows))).isnan()


@pytest.mark.parametrize("levels", [None, 40])
def test_calibration_is_the_ratio_of_the_sums(levels):
    p, labels = draw(1000, levels=levels)

    result = calibration(calibration_curve(*map(torch.from_numpy, (p, labels))))

    assert result.item() == pytest.approx(p.sum() / labels.sum(), rel=1e-14)


@pytest.mark.parametrize("bins", [1, 7, 20])
@pytest.mark.parametrize("levels", [None, 40, 3])
@pytest.mark.parametrize("rows", [1, 13, 1000])
def test_calibration_error_equals_a_slow_loop(rows, levels, bins):
    p, labels = draw(rows, levels=levels)

    result = calibration_error(*map(torch.from_numpy, (p, labels)), bins=bins)

    assert result.item() == pytest.approx(slow_calibration_error(p, labels, bins), abs=1e-13)


def test_calibration_error_has_twenty_bins_by_default():
    p, labels = draw(1000)

    result = calibration_error(*map(torch.from_numpy, (p, labels)))

    assert result.item() == pytest.approx(slow_calibration_error(p, labels, 20), abs=1e-13)


def test_rows_next_to_a_border_fall_into_their_bin():
    # Their ranks over bins differ from a whole number by less than float32 can tell.
    p = np.arange(99_999) / 99_999
    labels = (np.random.default_rng(0).random(len(p)) < p).astype(np.uint8)

    result = calibration_error(*map(torch.from_numpy, (p, labels)), bins=1000)

    assert result.item() == pytest.approx(slow_calibration_error(p, labels, 1000), abs=1e-13)


@pytest.mark.parametrize("levels", [None, 6])
def test_calibration_error_does_not_depend_on_the_order_of_the_rows(levels):
    p, labels = map(torch.from_numpy, draw(777, levels=levels))

    for seed in range(5):
        shuffled = torch.randperm(777, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            calibration_error(p[shuffled], labels[shuffled]),
            calibration_error(p, labels),
            rtol=0,
            atol=1e-14,
        )


@pytest.mark.parametrize("seed", range(10))
def test_calibration_error_lies_between_the_excess_and_the_mean_distance(seed):
    rng = np.random.default_rng(seed)
    p, labels = rng.beta(0.2, 0.2, 300), rng.integers(0, 2, 300)

    result = calibration_error(*map(torch.from_numpy, (p, labels))).item()

    assert abs((p - labels).mean()) - 1e-14 <= result <= np.abs(p - labels).mean() + 1e-14 <= 1


def test_calibration_error_of_the_worst_scores_is_one():
    labels = torch.tensor([0, 1]).repeat(50)

    assert calibration_error(1.0 - labels, labels).item() == 1


def test_calibration_error_of_the_observed_rate_is_zero():
    labels = torch.tensor([0, 0, 0, 1]).repeat(50)

    assert calibration_error(torch.full((200,), 0.25), labels).item() == 0


def test_calibration_error_is_nan_for_no_rows_and_for_nan_scores():
    assert calibration_error(torch.empty(0), torch.empty(0)).isnan()
    assert calibration_error(torch.tensor([0.2, torch.nan]), torch.tensor([0, 1])).isnan()


@pytest.mark.parametrize("bins", [1, 8, 20])
@pytest.mark.parametrize("bend", [0.3, 1, 3])
def test_the_curve_equals_sklearn_where_all_probabilities_differ(bend, bins):
    p, labels = draw(1000)
    p = p**bend

    curve = calibration_curve(*map(torch.from_numpy, (p, labels)), bins=bins)

    observed, predicted = sklearn_calibration.calibration_curve(
        labels, p, n_bins=bins, strategy="quantile"
    )
    np.testing.assert_allclose(curve.predicted, predicted, rtol=1e-13)
    np.testing.assert_allclose(curve.observed, observed, rtol=1e-13)
    assert curve.rows.tolist() == [1000 // bins] * bins


def test_equal_probabilities_fall_into_the_bin_of_their_mean_rank():
    p = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.9, 0.1, 0.5, 0.5])
    labels = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0])

    # Of ranks 0 to 7 the mean ones are 0.5, 4 and 7; four bins begin at 0, 2, 4 and 6.
    curve = calibration_curve(p, labels, bins=4)

    np.testing.assert_allclose(curve.predicted, [0.1, 0.5, 0.9], rtol=1e-7)
    assert curve.observed.tolist() == [0.5, 0.4, 1.0]
    assert curve.rows.tolist() == [2, 5, 1]
    assert curve.rows.dtype == torch.int64


@pytest.mark.parametrize("levels", [None, 40, 3, 1])
@pytest.mark.parametrize("rows", [1, 13, 1000])
def test_the_bins_hold_every_row_once_in_the_order_of_the_probabilities(rows, levels):
    p, labels = draw(rows, levels=levels)

    predicted, observed, in_bin = calibration_curve(*map(torch.from_numpy, (p, labels)))

    assert in_bin.sum() == rows
    assert in_bin.min() > 0
    assert len(in_bin) <= min(20, len(set(p)))
    assert predicted.diff().gt(0).all()
    assert (predicted @ in_bin.double()).item() == pytest.approx(p.sum(), rel=1e-13)
    assert (observed @ in_bin.double()).item() == pytest.approx(labels.sum(), rel=1e-13)


def test_the_curve_of_no_rows_has_no_bins():
    assert [len(column) for column in calibration_curve(torch.empty(0), torch.empty(0))] == [0] * 3
