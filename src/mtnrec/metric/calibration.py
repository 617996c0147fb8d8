"""Agreement of predicted probabilities with the labels: log loss and calibration."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtnrec.arrays import Float64Array, Int64Array
from mtnrec.metric.ranking import SortedScores, sort_scores


def log_loss(positive: Tensor, negative: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats.

    Args:
        positive: ``log P(label = 1)``, ``(n,)``.
        negative: ``log P(label = 0)``, ``(n,)``.
        labels: 0 or 1, ``(n,)``.

    Returns:
        float64 scalar; NaN without rows.
    """
    return -torch.where(labels > 0, positive, negative).double().mean()


def expected_log_loss(positive: Tensor, negative: Tensor, probabilities: Tensor) -> Tensor:
    """Return the expectation of the :func:`log_loss` over labels drawn from true probabilities.

    The true probabilities themselves have the least, their mean entropy.

    Args:
        positive: ``log P(label = 1)``, ``(n,)``.
        negative: ``log P(label = 0)``, ``(n,)``.
        probabilities: True ``P(label = 1)``, float64 ``(n,)``.

    Returns:
        float64 scalar; NaN without rows.
    """
    return -(probabilities * positive + (1 - probabilities) * negative).mean()


class CalibrationCurve(NamedTuple):
    """Predicted and observed rates over bins of equal mass, least probable first.

    Args:
        predicted: Mean probability of each non-empty bin, float64 ``(bins,)``.
        observed: Share of positives in each, float64 ``(bins,)``.
        rows: Number of rows in each, int64 ``(bins,)``.
    """

    predicted: Tensor
    observed: Tensor
    rows: Tensor


def calibration_curve(probabilities: Tensor, labels: Tensor, bins: int = 20) -> CalibrationCurve:
    """Return predicted and observed rates over bins of equal mass.

    Rows are binned by the rank of their probability, and ties share a bin, so that the result does
    not depend on the order of the rows.

    Args:
        probabilities: ``(n,)``.
        labels: 0 or 1, ``(n,)``.
        bins: Number of bins; empty ones are left out.
    """
    return curve_of_sorted(sort_scores(probabilities.double(), labels), bins)


def curve_of_sorted(probabilities: SortedScores, bins: int = 20) -> CalibrationCurve:
    """Return the :func:`calibration_curve` of sorted float64 probabilities."""
    rows, positives = probabilities.rows.numpy(), probabilities.positives.numpy()
    starts = _bin_starts(rows, bins)
    ends = np.append(starts[1:], len(rows))
    starts, ends = starts[starts < ends], ends[starts < ends]
    sums = np.array([rows[start:end].sum() for start, end in zip(starts, ends, strict=True)])
    positives_below = np.append(positives.searchsorted(rows[starts]), len(positives))
    in_bin = ends - starts
    columns = sums / in_bin, np.diff(positives_below) / in_bin, in_bin
    return CalibrationCurve(*map(torch.from_numpy, columns))


def _bin_starts(ascending: Float64Array, bins: int) -> Int64Array:
    """Return the first row of each bin, ``(bins,)``; ties go to the bin of their mean rank."""
    rows, border = len(ascending), np.arange(bins)
    if not rows:
        return np.zeros(bins, np.int64)
    tie = ascending[(-(-border * rows // bins)).clip(max=rows - 1)]
    first, end = ascending.searchsorted(tie, "left"), ascending.searchsorted(tie, "right")
    # In integers: the mean rank, from 0, is (first + end - 1) / 2.
    return np.where((first + end - 1) * bins >= 2 * border * rows, first, end)


def calibration(curve: CalibrationCurve) -> Tensor:
    """Return predicted over observed positives, ``sum(p) / sum(y)``; 1 is calibrated.

    Returns:
        float64 scalar; NaN if there are no positives.
    """
    predicted, observed = (
        (rates * curve.rows).sum() for rates in (curve.predicted, curve.observed)
    )
    return torch.where(observed > 0, predicted / observed, torch.nan)


def expected_calibration_error(curve: CalibrationCurve) -> Tensor:
    """Return the mean distance between predicted and observed rates over the rows.

    Returns:
        float64 scalar, in [0, 1] for probabilities; NaN without rows.
    """
    distances = (curve.predicted - curve.observed).abs()
    return (distances * curve.rows).sum() / curve.rows.sum()
