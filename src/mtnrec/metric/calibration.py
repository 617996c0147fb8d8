"""How well predicted probabilities agree with the labels."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtnrec.metric.ranking import SortedScores, sort_scores


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
    return curve_of_sorted(sort_scores(probabilities.double(), labels), bins)


def curve_of_sorted(probabilities: SortedScores, bins: int = 20) -> CalibrationCurve:
    """Return what :func:`calibration_curve` does, of float64 probabilities."""
    rows, positives = probabilities.rows.numpy(), probabilities.positives.numpy()
    starts = _starts_of_bins(rows, bins)
    ends = np.append(starts[1:], len(rows))
    starts, ends = starts[starts < ends], ends[starts < ends]
    sums = np.array([rows[start:end].sum() for start, end in zip(starts, ends, strict=True)])
    positives_below = np.append(positives.searchsorted(rows[starts]), len(positives))
    in_bin = ends - starts
    columns = sums / in_bin, np.diff(positives_below) / in_bin, in_bin
    return CalibrationCurve(*map(torch.from_numpy, columns))


def _starts_of_bins(ascending: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.int64]:
    """Return the first row of each bin, ``(bins,)``; a tie lies where its mean rank does."""
    rows, border = len(ascending), np.arange(bins)
    if not rows:
        return np.zeros(bins, np.int64)
    tie = ascending[(-(-border * rows // bins)).clip(max=rows - 1)]
    first, end = ascending.searchsorted(tie, "left"), ascending.searchsorted(tie, "right")
    # In whole numbers: the mean rank, from 0, is (first + end - 1) / 2.
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
    """Return the mean distance of predicted and observed rates over the rows.

    Returns:
        float64 scalar, in [0, 1] for probabilities; NaN if there are no rows.
    """
    distances = (curve.predicted - curve.observed).abs()
    return (distances * curve.rows).sum() / curve.rows.sum()
