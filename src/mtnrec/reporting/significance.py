"""Paired comparison of two arms, ranks of several, Holm's correction, intervals of a mean."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats  # type: ignore[import-untyped]

from mtnrec.checks import InputError

_LEVEL = 0.05
_POWER = 0.8
_DIFFERENCE = 0.001  # smallest AUC difference worth detecting
_PAIRS_FOR_WILCOXON = 6  # with five pairs no two-sided p-value is below 0.05


@dataclass(frozen=True)
class PairedComparison:
    """Effect of a treatment, estimated from pairs of runs.

    Args:
        pairs: Number of complete pairs.
        dropped: Pairs left out because a value is NaN.
        baseline_mean: Mean of the baseline; NaN without pairs.
        treated_mean: Mean with the treatment, over the same pairs.
        difference: Mean of ``treated - baseline``.
        deviation: Standard deviation of the differences; None below two pairs.
        low: Lower end of the 95 % t-interval of ``difference``; None below two pairs and where the
            differences do not vary, since their spread is then unknown.
        high: Upper end of the interval.
        p_value: P-value of the two-sided paired t-test; None as for ``low``.
        wilcoxon_p: P-value of the two-sided signed-rank test; None below six pairs and where all
            differences are zero.
    """

    pairs: int
    dropped: int
    baseline_mean: float
    treated_mean: float
    difference: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    wilcoxon_p: float | None = None

    @property
    def seeds_needed(self) -> int | None:
        """Pairs needed to detect a difference of 0.001; None as for ``low``."""
        return seeds_needed(self.deviation) if self.deviation else None


@dataclass(frozen=True)
class RankTest:
    """Comparison of several arms by their ranks on several data sets (Demsar, JMLR 2006).

    Args:
        mean_ranks: Mean rank of each arm, shape ``(arms,)``.
        p_value: P-value of Friedman's test, corrected for ties; NaN if all arms tie everywhere.
        critical_difference: Smallest difference of two mean ranks that Nemenyi's test finds
            significant at 5 %, over all pairs of arms.
    """

    mean_ranks: NDArray[np.float64]
    p_value: float
    critical_difference: float


class Interval(NamedTuple):
    """A mean and its 95 % t-interval; ``low`` and ``high`` are NaN below two values."""

    mean: Any
    low: Any
    high: Any


def compare(baseline: ArrayLike, treated: ArrayLike) -> PairedComparison:
    """Compare two arms, pair by pair.

    Args:
        baseline: Values of the baseline, shape ``(pairs,)``.
        treated: Values with the treatment, in the same order.

    Raises:
        InputError: If the two are not vectors of equal length.

    >>> found = compare([0.70, 0.72, 0.71], [0.71, 0.74, 0.72])
    >>> found.pairs, round(found.difference, 4), round(found.p_value, 4)
    (3, 0.0133, 0.0572)
    """
    before, after = np.asarray(baseline, np.float64), np.asarray(treated, np.float64)
    if before.ndim != 1 or before.shape != after.shape:
        raise InputError(
            f"paired values must be two vectors of equal length, got shapes {before.shape} and "
            f"{after.shape}"
        )
    complete = ~(np.isnan(before) | np.isnan(after))
    before, after = before[complete], after[complete]
    pairs = len(before)
    if pairs == 0:
        return PairedComparison(0, len(complete), math.nan, math.nan, math.nan)
    differences = after - before
    # Equal differences of rounded numbers may differ in their last bits.
    rounding = 4 * np.finfo(np.float64).eps * max(abs(before).max(), abs(after).max())
    deviation = float(differences.std(ddof=1)) if pairs > 1 else math.nan
    varies = deviation > rounding
    difference = float(differences.mean())
    _, low, high = mean_interval(differences)
    t = difference / (deviation / math.sqrt(pairs)) if varies else math.nan
    return PairedComparison(
        pairs=pairs,
        dropped=len(complete) - pairs,
        baseline_mean=float(before.mean()),
        treated_mean=float(after.mean()),
        difference=difference,
        deviation=None if pairs < 2 else deviation if varies else 0.0,
        low=float(low) if varies else None,
        high=float(high) if varies else None,
        p_value=float(2 * stats.t.sf(abs(t), pairs - 1)) if varies else None,
        wilcoxon_p=_wilcoxon(differences, rounding),
    )


def compare_ranks(costs: ArrayLike) -> RankTest:
    """Rank arms on each data set and compare their mean ranks.

    Args:
        costs: Values that are smaller the better, shape ``(data sets, arms)``, without NaN. The
            smallest has rank 1; ties share the mean of their ranks.

    >>> found = compare_ranks([[1, 2, 3], [1, 2, 2], [2, 1, 3]])
    >>> found.mean_ranks.round(2).tolist(), round(found.p_value, 4)
    ([1.33, 1.83, 2.83], 0.1482)
    """
    ranks = stats.rankdata(costs, axis=1)
    count, arms = ranks.shape
    middle = (arms + 1) / 2
    mean_ranks = ranks.mean(axis=0)
    between, within = count * ((mean_ranks - middle) ** 2).sum(), ((ranks - middle) ** 2).sum()
    chi_squared = count * (arms - 1) * between / within if within else math.nan
    quantile = stats.studentized_range.ppf(1 - _LEVEL, arms, np.inf) / math.sqrt(2)
    return RankTest(
        mean_ranks=mean_ranks,
        p_value=float(stats.chi2.sf(chi_squared, arms - 1)),
        critical_difference=float(quantile * math.sqrt(arms * (arms + 1) / (6 * count))),
    )


def seeds_needed(
    deviation: float, *, difference: float = _DIFFERENCE, power: float = _POWER
) -> int:
    """Return the pairs that a two-sided paired t-test at 0.05 needs to detect a difference.

    Args:
        deviation: Standard deviation of the differences, above 0.
        difference: True mean of the differences.
        power: Probability of detecting it.

    >>> seeds_needed(0.001)
    10
    """
    effect = abs(difference) / deviation
    high = 2
    while _power(high, effect) < power:
        high *= 2
    return 2 + bisect_left(range(2, high + 1), power, key=lambda pairs: _power(pairs, effect))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return Holm's (1979) adjusted p-values, in the order given.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.arange(len(values), 0, -1) * values[order]
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def stars(p_value: float | None) -> str:
    """Return ``**`` for p < 0.01, ``*`` for p < 0.05, otherwise nothing, as in the paper.

    >>> stars(0.003), stars(0.01), stars(0.05), stars(None)
    ('**', '*', '', '')
    """
    if p_value is None:
        return ""
    return "*" * ((p_value < 0.05) + (p_value < 0.01))


def mean_interval(values: ArrayLike) -> Interval:
    """Return the mean over the first axis and its 95 % t-interval.

    NaN is ignored: curves of different lengths are padded with it.

    Args:
        values: One row per run, shape ``(runs, ...)``.
    """
    table = np.asarray(values, np.float64)
    counts = np.sum(~np.isnan(table), axis=0)
    mean = np.nansum(table, axis=0) / _positive(counts)
    freedom = _positive(counts - 1)
    variance = np.nansum((table - mean) ** 2, axis=0) / freedom
    half = stats.t.ppf(1 - _LEVEL / 2, freedom) * np.sqrt(variance / _positive(counts))
    return Interval(mean, mean - half, mean + half)


def _positive(counts: Any) -> Any:
    return np.where(counts > 0, counts, np.nan)


def _wilcoxon(differences: NDArray[np.float64], rounding: float) -> float | None:
    differences = np.where(abs(differences) <= rounding, 0, differences)
    if len(differences) < _PAIRS_FOR_WILCOXON or not differences.any():
        return None
    return float(stats.wilcoxon(differences).pvalue)


def _power(pairs: int, effect: float) -> float:
    # scipy.stats.nct calls the same functions of the noncentral t, but is ten times slower.
    critical = special.stdtrit(pairs - 1, 1 - _LEVEL / 2)
    below, above = special.nctdtr(pairs - 1, effect * math.sqrt(pairs), (-critical, critical))
    return float(1 - above + np.nan_to_num(below))  # NaN where it is negligible
