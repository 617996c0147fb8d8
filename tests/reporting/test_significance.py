import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from mtnrec.checks import InputError
from mtnrec.reporting.significance import (
    RowComparison,
    compare,
    compare_over_rows,
    compare_ranks,
    holm,
    mean_interval,
    seeds_needed,
    stars,
    verdict,
)


def drawn(pairs, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    baseline = 0.7 + rng.normal(0, 0.01, pairs)
    return baseline, baseline + shift + rng.normal(0, 0.002, pairs)


@pytest.mark.parametrize("pairs", [2, 3, 10, 60])
@pytest.mark.parametrize("shift", [0.0, -0.003])
def test_the_comparison_is_scipys_paired_t_test(pairs, shift):
    baseline, treated = drawn(pairs, shift)

    found = compare(baseline, treated)

    expected = stats.ttest_rel(treated, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.pairs == pairs
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.difference == pytest.approx(treated.mean() - baseline.mean())
    assert found.baseline_mean == baseline.mean()
    assert found.treated_mean == treated.mean()
    assert found.deviation == pytest.approx(np.std(treated - baseline, ddof=1))


def test_the_signed_rank_test_starts_at_six_pairs():
    baseline, treated = drawn(6, 0.01)

    found = compare(baseline, treated)

    assert (treated > baseline).all()
    assert found.wilcoxon_p == pytest.approx(2 / 2**6)  # one of 64 signs, two-sided
    assert compare(baseline[:5], treated[:5]).wilcoxon_p is None


def test_the_signed_rank_test_is_scipys():
    baseline, treated = drawn(20, 0.001)

    assert compare(baseline, treated).wilcoxon_p == stats.wilcoxon(treated, baseline).pvalue


def test_one_pair_has_a_difference_and_nothing_else():
    found = compare([0.7], [0.75])

    assert found.difference == pytest.approx(0.05)
    assert found.pairs == 1
    fields = ("deviation", "low", "high", "p_value", "wilcoxon_p", "seeds_needed")
    assert [getattr(found, field) for field in fields] == [None] * 6


def test_zero_pairs_have_no_mean():
    found = compare([math.nan], [0.75])

    assert (found.pairs, found.dropped) == (0, 1)
    assert math.isnan(found.difference)
    assert found.p_value is None


@pytest.mark.parametrize("shift", [0.0, 0.001])
def test_differences_that_do_not_vary_have_no_p_value(shift):
    baseline = 0.7 + np.arange(7) / 30

    found = compare(baseline, baseline + shift)

    assert found.deviation == 0
    assert found.difference == pytest.approx(shift)
    assert (found.p_value, found.low, found.high, found.seeds_needed) == (None,) * 4
    # Seven signs that agree are evidence; seven zeros are none.
    assert found.wilcoxon_p == (pytest.approx(2 / 2**7) if shift else None)


def test_pairs_with_an_undefined_metric_are_dropped_and_counted():
    baseline, treated = drawn(8)
    baseline[2], treated[5] = math.nan, math.nan
    whole = [0, 1, 3, 4, 6, 7]

    found = compare(baseline, treated)

    assert (found.pairs, found.dropped) == (6, 2)
    assert found.p_value == compare(baseline[whole], treated[whole]).p_value


@pytest.mark.parametrize("treated", [[0.1, 0.2], [[0.1]], 0.1])
def test_values_that_cannot_be_paired_are_refused(treated):
    with pytest.raises(InputError, match="two vectors of equal length, got shapes"):
        compare([0.1], treated)


@pytest.mark.parametrize("deviation", [1e-9, 1e-5, 3e-4, 0.001, 0.0025, 0.02])
@pytest.mark.parametrize("power", [0.8, 0.95])
def test_seeds_needed_are_the_fewest_that_statsmodels_gives_the_power(deviation, power):
    needed = seeds_needed(deviation, power=power)

    def powers(pairs):
        return TTestPower().power(0.001 / deviation, pairs, alpha=0.05, alternative="two-sided")

    assert needed == 2 or powers(needed - 1) < power
    # statsmodels gives NaN where scipy loses a tail that is nothing.
    assert deviation < 1e-4 or powers(needed) >= power


def test_the_comparison_reports_the_seeds_needed_for_a_thousandth():
    baseline, treated = drawn(10)

    assert compare(baseline, treated).seeds_needed == seeds_needed(
        np.std(treated - baseline, ddof=1)
    )


@pytest.mark.parametrize("count", [0, 1, 2, 24])
def test_holm_is_that_of_statsmodels(count):
    values = np.random.default_rng(count).random(count) ** 4

    expected = multipletests(values, method="holm")[1] if count else []

    np.testing.assert_allclose(holm(values), expected, rtol=1e-12)


def test_holm_keeps_ties_equal_and_below_one():
    assert holm([0.5, 0.5, 0.01]).tolist() == [1, 1, 0.03]


def test_stars_are_those_of_the_papers_tables():
    found = [stars(p) for p in (None, 1.0, 0.05, 0.0499, 0.01, 0.0099, 0.0)]

    assert found == ["", "", "", "*", "*", "**", "**"]


def test_the_mean_interval_is_that_of_statsmodels():
    values = np.random.default_rng(0).normal(size=(7, 3))

    mean, low, high = mean_interval(values)

    expected = DescrStatsW(values)
    np.testing.assert_allclose(mean, expected.mean)
    np.testing.assert_allclose((low, high), expected.tconfint_mean(0.05))


def test_curves_of_different_length_count_where_they_have_values():
    curves = [[1.0, 2.0, 3.0, math.nan], [3.0, 4.0, math.nan, math.nan]]

    mean, low, high = mean_interval(curves)

    np.testing.assert_array_equal(mean, [2, 3, 3, math.nan])
    np.testing.assert_array_equal(np.isnan(low), [False, False, True, True])
    assert high[0] == pytest.approx(2 + 12.706204736432095)  # t of one degree; the sd of 1, 3 is √2


def test_a_planted_difference_is_found_and_false_positives_are_at_the_level():
    tables = 1000
    found = {
        shift: sum(compare(*drawn(5, shift, seed)).p_value < 0.05 for seed in range(tables))
        for shift in (0.0, 0.01)
    }

    low, high = stats.binom.ppf([1e-5, 1 - 1e-5], tables, 0.05)
    assert low <= found[0.0] <= high
    power = TTestPower().power(0.01 / 0.002, 5, alpha=0.05)
    assert found[0.01] >= stats.binom.ppf(1e-5, tables, power)


def test_holm_keeps_the_errors_of_a_whole_table_at_the_level():
    rng = np.random.default_rng(0)
    tables, cells, pairs = 2000, 12, 10
    differences = rng.normal(size=(tables, cells, pairs))
    p_values = stats.ttest_1samp(differences, 0, axis=2).pvalue

    wrong = sum(bool((holm(table) < 0.05).any()) for table in p_values)

    assert wrong <= stats.binom.ppf(1 - 1e-5, tables, 0.05)
    assert (p_values < 0.05).any(axis=1).mean() > 0.3  # what there is without it


@pytest.mark.parametrize("decimals", [9, 1], ids=["without_ties", "with_ties"])
def test_friedmans_p_value_is_scipys(decimals):
    costs = np.random.default_rng(0).normal(size=(6, 4)).round(decimals)

    found = compare_ranks(costs)

    assert found.p_value == pytest.approx(stats.friedmanchisquare(*costs.T).pvalue, rel=1e-12)


def test_ties_share_the_mean_of_their_ranks():
    found = compare_ranks([[0.1, 0.2, 0.2], [0.3, 0.3, 0.3]])

    assert found.mean_ranks.tolist() == [(1 + 2) / 2, (2.5 + 2) / 2, (2.5 + 2) / 2]


def test_friedmans_p_value_is_undefined_where_all_arms_tie():
    assert np.isnan(compare_ranks(np.ones((3, 4))).p_value)


@pytest.mark.parametrize(
    ("arms", "quantile"),
    [
        (3, 2.343),
        (4, 2.569),
        (5, 2.728),
        (6, 2.850),
        (7, 2.949),
        (8, 3.031),
        (9, 3.102),
        (10, 3.164),
    ],
)
def test_the_critical_difference_uses_demsars_quantiles(arms, quantile):
    """Demsar (2006), Table 5(a), rounded there to three decimals."""
    found = compare_ranks(np.random.default_rng(0).normal(size=(14, arms)))

    factor = (arms * (arms + 1) / (6 * 14)) ** 0.5
    assert found.critical_difference / factor == pytest.approx(quantile, abs=1.1e-3)


def test_the_critical_difference_of_demsars_example():
    """Demsar (2006), section 3.2.2: four classifiers on 14 data sets."""
    found = compare_ranks(np.random.default_rng(0).normal(size=(14, 4)))

    assert round(found.critical_difference, 2) == 1.25


def test_the_range_of_normal_variables_exceeds_the_quantile_in_one_of_twenty_cases():
    arms, count = 24, 4
    found = compare_ranks(np.random.default_rng(0).normal(size=(count, arms)))

    q = found.critical_difference / (arms * (arms + 1) / (6 * count)) ** 0.5 * 2**0.5
    z = np.linspace(-10, 10, 20001)
    density = arms * stats.norm.pdf(z) * (stats.norm.cdf(z) - stats.norm.cdf(z - q)) ** (arms - 1)
    assert np.trapezoid(density, z) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize("pairs", [2, 5, 40])
@pytest.mark.parametrize(("shift", "margin"), [(0.0, 0.0005), (0.0004, 0.001), (-0.003, 0.001)])
def test_the_equivalence_test_is_that_of_statsmodels(pairs, shift, margin):
    baseline, treated = drawn(pairs, shift)

    found = compare(baseline, treated, margin=margin)

    expected, *_ = ttost_paired(treated, baseline, -margin, margin)
    assert found.equivalence_p == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_arms_a_margin_apart_are_called_equivalent_as_often_as_the_level():
    margin, deviation, pairs, tables = 0.0005, 0.0003, 5, 1500
    rng = np.random.default_rng(0)
    found = {
        shift: sum(
            compare(np.zeros(pairs), row, margin=margin).equivalence_p < 0.05
            for row in rng.normal(shift, deviation, (tables, pairs))
        )
        for shift in (margin, 0.0)
    }

    low, high = stats.binom.ppf([1e-5, 1 - 1e-5], tables, 0.05)
    assert low <= found[margin] <= high
    # Both one-sided tests must reject: at least their powers less one.
    one_sided = TTestPower().power(margin / deviation, pairs, alpha=0.05, alternative="larger")
    assert found[0.0] >= stats.binom.ppf(1e-5, tables, 2 * one_sided - 1)
    assert found[0.0] <= stats.binom.ppf(1 - 1e-5, tables, one_sided)


def test_differences_that_do_not_vary_are_not_called_equivalent():
    assert compare([0.7] * 4, [0.7] * 4).equivalence_p is None
    assert verdict(math.nan, math.nan) == ""


def test_a_significant_difference_below_the_margin_is_equivalent():
    treated = 0.7 + np.array([0.0001, 0.0002, 0.0001, 0.0002, 0.0001, 0.0002])

    found = compare(np.full(6, 0.7), treated)

    assert found.p_value < 0.01
    assert verdict(found.p_value, found.equivalence_p) == "equivalent"


def seeds_and_rows(seeds, rng, *, shift=0.0, of_seeds=0.001, shared=0.0005, own=0.0004, size=200):
    """Differences of runs that share their rows, and the same on resampled rows."""
    observed, resampled = (
        rng.normal(0, shared, (1, columns)) + rng.normal(0, own, (seeds, columns))
        for columns in (1, size)
    )
    observed = observed[:, 0] + shift + rng.normal(0, of_seeds, seeds)
    return observed, observed[:, None] + resampled


def test_without_an_effect_of_the_rows_both_are_the_t_test_over_seeds():
    differences = np.random.default_rng(0).normal(0.001, 0.001, 6)

    found = compare_over_rows(differences, np.repeat(differences[:, None], 100, axis=1))

    expected = stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval()
    assert found.both_p == pytest.approx(expected.pvalue)
    assert (found.both_low, found.both_high) == pytest.approx((interval.low, interval.high))
    assert (found.rows_low, found.rows_high) == pytest.approx([differences.mean()] * 2)
    low, _, _ = ttost_paired(differences, np.zeros(6), -0.0005, 0.0005)
    assert found.both_equivalence_p == pytest.approx(low)


def test_without_an_effect_of_the_seeds_both_are_the_normal_interval_over_rows():
    resampled = 0.001 + np.random.default_rng(0).normal(0, 0.002, 20000)

    found = compare_over_rows([0.001, 0.001], [resampled, resampled])

    z = stats.norm.ppf(0.975)
    half = z * resampled.std()
    assert (found.both_low, found.both_high) == pytest.approx((0.001 - half, 0.001 + half), 1e-3)
    assert (found.rows_low, found.rows_high) == pytest.approx(
        (0.001 - half, 0.001 + half), abs=0.03 * half
    )


def test_the_p_value_over_rows_inverts_its_interval():
    resampled = np.random.default_rng(0).normal(0.002, 0.001, 999)

    found = compare_over_rows([0.002], [resampled])

    assert found.rows_p == pytest.approx(2 * (1 + (resampled <= 0).sum()) / 1000)
    assert (found.rows_p < 0.05) == (found.rows_low > 0)
    assert compare_over_rows([1.0], [np.ones(999)]).rows_p == 2 / 1000
    assert compare_over_rows([0.0], [np.zeros(999)]).rows_p == 1


def test_an_auc_that_many_resamples_leave_undefined_has_no_interval():
    resampled = np.random.default_rng(0).normal(size=(2, 100))
    few, many = resampled.copy(), resampled.copy()
    few[0, :5], many[0, :6] = np.nan, np.nan

    assert compare_over_rows([0, 0.1], few).rows_p is not None
    assert compare_over_rows([0, 0.1], many) == RowComparison()


@pytest.mark.slow
def test_over_both_equal_arms_differ_at_the_level_and_a_planted_difference_is_found():
    rng, tables, seeds, shift = np.random.default_rng(0), 1000, 5, 0.0025
    found = {
        planted: [
            compare_over_rows(*seeds_and_rows(seeds, rng, shift=planted)).both_p < 0.05
            for _ in range(tables)
        ]
        for planted in (0.0, shift)
    }

    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], tables, 0.05)
    assert low <= sum(found[0.0]) <= high
    of_seeds, shared = (0.001**2 + 0.0004**2) / seeds, 0.0005**2
    error = (of_seeds + shared) ** 0.5
    freedom = error**4 / (of_seeds**2 / (seeds - 1))
    critical = stats.t.ppf(0.975, freedom)
    planned = stats.nct.sf(critical, freedom, shift / error)
    assert np.mean(found[shift]) == pytest.approx(planned, abs=0.05)


def test_over_seeds_alone_the_rows_that_arms_share_are_taken_for_a_difference():
    rng = np.random.default_rng(0)
    wrong = [
        compare(np.zeros(5), seeds_and_rows(5, rng, shared=0.001)[0]).p_value < 0.05
        for _ in range(500)
    ]

    assert np.mean(wrong) > 0.2  # why there is an interval over both


def test_with_many_seeds_the_error_over_both_is_that_of_resampling_seeds_and_users():
    """The pigeonhole bootstrap (Owen, 2007) of a mean, written out."""
    rng, seeds, users, resamples = np.random.default_rng(0), 40, 300, 3000
    values = rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 3, users)
    values += rng.normal(0, 0.5, (seeds, users))
    weights = rng.multinomial(users, [1 / users] * users, resamples).T / users
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, resamples).T / seeds

    found = compare_over_rows(values.mean(axis=1), values @ weights)

    pigeonhole = ((values @ weights) * of_seeds).sum(axis=0).std()
    half = (found.both_high - found.both_low) / 2
    assert half / stats.t.ppf(0.975, seeds - 1) == pytest.approx(pigeonhole, rel=0.06)
