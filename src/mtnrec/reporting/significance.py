"""Paired comparison of two arms over seeds and test rows, ranks of several, Holm's correction.

Three intervals answer three questions: that over seeds, how training noise moves a difference on
these test rows; that over rows, how the choice of test users moves the difference of these trained
models; that over both, what a new training would show on new users.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats  # type: ignore[import-untyped]

from mtnrec.checks import InputError

_LEVEL = 0.05
_POWER = 0.8
_DIFFERENCE = 0.001  # smallest AUC difference worth detecting
MARGIN = 0.0005  # AUC difference below which two arms are called equivalent
_LEAST_DEFINED = 0.95  # share of the resamples that must define a metric
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
        equivalence_p: P-value of the two one-sided t-tests that the true difference is smaller than
            a margin; None as for ``low``.
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
    equivalence_p: float | None = None

    @property
    def seeds_needed(self) -> int | None:
        """Pairs needed to detect a difference of 0.001; None as for ``low``."""
        return seeds_needed(self.deviation) if self.deviation else None


@dataclass(frozen=True)
class RowComparison:
    """Effect of a treatment, with the uncertainty from the choice of the test rows.

    All values are None where fewer than 95 % of the resamples define the metric; those of ``both``
    also below two seeds, and where neither seeds nor rows move the difference.

    Args:
        rows_low: Lower end of the 95 % percentile interval over the resampled groups, of the mean
            difference of these trained models.
        rows_high: Its upper end.
        rows_p: Two-sided p-value that inverts this interval, at least ``2 / (resamples + 1)``.
        both_low: Lower end of the 95 % t-interval over seeds and groups.
        both_high: Its upper end.
        both_p: Two-sided p-value of the t-test over seeds and groups.
        both_equivalence_p: P-value of the two one-sided t-tests with the same error.
    """

    rows_low: float | None = None
    rows_high: float | None = None
    rows_p: float | None = None
    both_low: float | None = None
    both_high: float | None = None
    both_p: float | None = None
    both_equivalence_p: float | None = None


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


def compare(baseline: ArrayLike, treated: ArrayLike, *, margin: float = MARGIN) -> PairedComparison:
    """Compare two arms, pair by pair.

    Args:
        baseline: Values of the baseline, shape ``(pairs,)``.
        treated: Values with the treatment, in the same order.
        margin: Differences below it count as none.

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
    error = deviation / math.sqrt(pairs)
    return PairedComparison(
        pairs=pairs,
        dropped=len(complete) - pairs,
        baseline_mean=float(before.mean()),
        treated_mean=float(after.mean()),
        difference=difference,
        deviation=None if pairs < 2 else deviation if varies else 0.0,
        low=float(low) if varies else None,
        high=float(high) if varies else None,
        p_value=_two_sided(difference, error, pairs - 1) if varies else None,
        wilcoxon_p=_wilcoxon(differences, rounding),
        equivalence_p=_equivalence(difference, error, pairs - 1, margin) if varies else None,
    )


def compare_over_rows(
    differences: ArrayLike, resampled: ArrayLike, *, margin: float = MARGIN
) -> RowComparison:
    """Compare two arms with the uncertainty from test rows, alone and with that from seeds.

    Over rows: the percentile bootstrap of the mean difference. Over both: the variance of the mean
    over ``S`` seeds on shared rows is ``s^2 / S + c``, with the variance ``s^2`` of the differences
    over seeds and the covariance ``c``, over rows, of the differences of two seeds, which the
    resamples estimate; ``t`` has ``(s^2 / S + c)^2 / ((s^2 / S)^2 / (S - 1))`` degrees of freedom.
    This is the analysis of several readers of the same cases, here seeds and rows, by Obuchowski &
    Rockette (1995), with the degrees of freedom of Hillis (2007). To resample the seeds too (the
    pigeonhole bootstrap: Owen, 2007) agrees for many seeds. With three to five, equal arms differ
    at 5 % in 1 to 23 % of simulated tables, in 4 to 8 % by this analysis.

    Args:
        differences: Difference of each seed on the test rows, ``(S,)``.
        resampled: The same on each resample of the rows, ``(S, resamples)``; NaN where undefined.
        margin: Differences below it count as none.
    """
    observed, drawn = np.asarray(differences, np.float64), np.asarray(resampled, np.float64)
    is_defined = ~np.isnan(drawn).any(axis=0)
    if is_defined.mean() < _LEAST_DEFINED or np.isnan(observed).any():
        return RowComparison()
    drawn = drawn[:, is_defined]
    means = drawn.mean(axis=0)
    tail = 1 + min((means <= 0).sum(), (means >= 0).sum())
    low, high = np.quantile(means, [_LEVEL / 2, 1 - _LEVEL / 2])
    rows = RowComparison(float(low), float(high), min(1.0, 2 * tail / (len(means) + 1)))
    seeds = len(observed)
    if seeds < 2:
        return rows
    of_seeds = observed.var(ddof=1) / seeds
    own = drawn.var(axis=1, ddof=1).sum()
    shared = max(0.0, (seeds**2 * means.var(ddof=1) - own) / (seeds * (seeds - 1)))
    error = math.sqrt(of_seeds + shared)
    if not error:
        return rows
    freedom = error**4 / (of_seeds**2 / (seeds - 1)) if of_seeds else math.inf
    difference = float(observed.mean())
    half = error * stats.t.ppf(1 - _LEVEL / 2, freedom)
    return replace(
        rows,
        both_low=float(difference - half),
        both_high=float(difference + half),
        both_p=_two_sided(difference, error, freedom),
        both_equivalence_p=_equivalence(difference, error, freedom, margin),
    )


def _two_sided(difference: float, error: float, freedom: float) -> float:
    return float(2 * stats.t.sf(abs(difference) / error, freedom))


def _equivalence(difference: float, error: float, freedom: float, margin: float) -> float:
    """Return the larger p-value of two one-sided t-tests against ±margin (Schuirmann, 1987)."""
    return float(stats.t.sf((margin - abs(difference)) / error, freedom))


def verdict(p_value: float, equivalence_p: float) -> str:
    """Return what two p-values allow to be said of a difference; nothing if they are undefined.

    A difference below the margin that is significant is ``equivalent``: it is known to be too small
    to matter.

    >>> verdict(0.2, 0.01), verdict(0.01, 0.2), verdict(0.2, 0.2), verdict(math.nan, math.nan)
    ('equivalent', 'different', 'undecided', '')
    """
    if math.isnan(p_value):
        return ""
    if equivalence_p < _LEVEL:
        return "equivalent"
    return "different" if p_value < _LEVEL else "undecided"


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

    NaN is a test that is undefined: it stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    >>> holm([0.01, math.nan, 0.04, 0.03]).tolist()
    [0.03, nan, 0.06, 0.06]
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]  # NaN is last
    steps = np.arange(len(order), 0, -1) * values[order]
    adjusted = np.full_like(values, np.nan)
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
