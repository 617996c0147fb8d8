"""How well predicted probabilities agree with the labels."""

from typing import NamedTuple

import torch
from torch import Tensor


def log_loss(positive: Tensor, negative: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats.

    Args:
        positive: ``log P(label = 1)``, ``(n,)``.
        negative: ``log P(label = 0)``, ``(n,)``.
        labels: 0 or 1, ``(n,)``.

    Returns:
        float64 scalar; NaN if there are no rows.
    """
    return -torch.where(labels > 0, positive, negative).double().mean()


def calibration(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return predicted over observed positives, ``sum(p) / sum(y)``; 1 is calibrated.

    Returns:
        float64 scalar; NaN if there are no positives.
    """
    positives = labels.double().sum()
    return torch.where(positives > 0, probabilities.double().sum() / positives, torch.nan)


class CalibrationCurve(NamedTuple):
    """Predicted and observed rates over bins of equal mass, least probable first.

    Args:
        predicted: Mean probability of each bin that has rows, float64 ``(bins,)``.
        observed: Share of positives in it, float64 ``(bins,)``.
        rows: Its rows, int64 ``(bins,)``.
    """

    predicted: Tensor
    observed: Tensor
    rows: Tensor


def calibration_curve(probabilities: Tensor, labels: Tensor, bins: int = 20) -> CalibrationCurve:
    """Return predicted and observed rates over bins of equal mass.

    Rows are binned by the rank of their probability, equal probabilities into one bin, so that
    the result does not depend on the order of the rows.

    Args:
        probabilities: ``(n,)``.
        labels: 0 or 1, ``(n,)``.
        bins: Number of bins; those without rows are left out.
    """
    ordered, order = probabilities.sort()
    _, tie, size = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    # The mean rank of a tie, from 0; in float32 the last rank of 2 * 10^7 rows falls off the bins.
    middle = size.cumsum(0) - (size + 1).double() / 2
    bin_of_tie = (middle * bins / len(ordered)).long()
    bin_of_row = bin_of_tie[tie]
    rows = size.new_zeros(bins).index_add_(0, bin_of_tie, size)
    sums = middle.new_zeros(bins)
    predicted = sums.index_add(0, bin_of_row, ordered.double()) / rows
    observed = sums.index_add(0, bin_of_row, labels[order].double()) / rows
    filled = rows > 0
    return CalibrationCurve(predicted[filled], observed[filled], rows[filled])


def expected_calibration_error(curve: CalibrationCurve) -> Tensor:
    """Return the mean distance of predicted and observed rates over the rows.

    Returns:
        float64 scalar, in [0, 1] for probabilities; NaN if there are no rows.
    """
    distances = (curve.predicted - curve.observed).abs()
    return (distances * curve.rows).sum() / curve.rows.sum()
