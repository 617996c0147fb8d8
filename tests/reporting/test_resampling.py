"""AUCs on resampled users against sklearn, scipy, DeLong's variance and simulated logs."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from mtnrec.checks import InputError
from mtnrec.reporting.resampling import GroupedAuc, draw_groups, resample_aucs, resample_runs
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.significance import compare_over_rows
from mtnrec.reporting.table.scores import comparisons, row_table
from mtnrec.run.scores import Scores, read_scores, scores_file, write_scores


def drawn(rows, seed=0, *, users=None, gain=1.0):
    """Scores of two models, labels and users, with a strong effect of the user on both."""
    rng = np.random.default_rng(seed)
    user = np.arange(rows) if users is None else np.sort(rng.integers(users, size=rows))
    taste = rng.normal(size=rows)[user] if users is None else rng.normal(size=users)[user]
    labels = rng.random(rows) < 1 / (1 + np.exp(1 - taste))
    one, other = (rng.normal(size=rows) + gain * taste for _ in range(2))
    return one.astype(np.float32), other.astype(np.float32), labels, user


def kept(scores, labels, users=None):
    groups = None if users is None else users.astype(np.int64)
    return Scores({"ctr": scores}, {"ctr": labels}, groups)


@pytest.mark.parametrize("decimals", [9, 1, 0], ids=["without_ties", "with_ties", "mostly_ties"])
@pytest.mark.parametrize("users", [7, 90, None])
def test_the_auc_of_a_resample_is_sklearns_with_its_draws_as_weights(users, decimals):
    scores, _, labels, user = drawn(300, users=users)
    scores = scores.round(decimals)
    count = user.max() + 1
    draws = np.random.default_rng(1).integers(0, 4, (count, 5)).astype(float)

    found = GroupedAuc(scores, labels, user, count)(draws)

    for auc, weights in zip(found, draws.T, strict=True):
        expected = roc_auc_score(labels, scores, sample_weight=weights[user])
        assert auc == pytest.approx(expected, rel=1e-12)


def test_a_resample_without_one_of_the_classes_has_no_auc():
    auc = GroupedAuc(
        np.float32([1, 2, 3]), np.array([True, False, False]), np.array([0, 1, 1]), count=2
    )

    assert np.isnan(auc(np.array([[1, 0, 1], [0, 1, 1.0]]))).tolist() == [True, True, False]


def test_each_resample_draws_as_many_users_as_there_are_whatever_the_chunk():
    one = np.hstack(list(draw_groups(50, 400, 0, chunk=400)))
    parts = list(draw_groups(50, 400, 0, chunk=7))

    np.testing.assert_array_equal(np.hstack(parts), one)
    assert {part.shape[1] for part in parts} == {7, 400 % 7}
    assert set(one.sum(axis=0)) == {50}
    counts, expected = np.bincount(one.astype(int).ravel()), stats.binom(50, 1 / 50)
    assert counts[:4] / one.size == pytest.approx(expected.pmf(range(4)), abs=0.01)


def test_the_interval_over_rows_is_that_of_scipys_bootstrap():
    one, other, labels, _ = drawn(120)
    resampled = [resample_aucs(kept(scores, labels), 4000)["ctr"] for scores in (one, other)]

    found = compare_over_rows([0.0], [resampled[0] - resampled[1]])

    def difference(first, second, label, axis=-1):
        ranks = (stats.rankdata(scores, axis=axis) for scores in (first, second))
        a, b = ((rank * label).sum(axis) for rank in ranks)
        return (a - b) / (label.sum(axis) * (1 - label).sum(axis))

    data = (one, other, labels.astype(float))
    expected = stats.bootstrap(
        data, difference, paired=True, vectorized=True, n_resamples=4000, method="percentile", rng=0
    )
    interval = expected.confidence_interval
    spread = expected.standard_error
    assert (found.rows_low, found.rows_high) == pytest.approx(interval, abs=0.15 * spread)
    assert np.std(resampled[0] - resampled[1], ddof=1) == pytest.approx(spread, rel=0.05)


def test_the_spread_over_rows_is_delongs():
    one, other, labels, _ = drawn(800)
    resampled = [resample_aucs(kept(scores, labels), 1500)["ctr"] for scores in (one, other)]

    def placements(scores):
        wins = (scores[labels][:, None] > scores[~labels]) + 0.0
        return wins.mean(axis=1), wins.mean(axis=0)

    parts = [a - b for a, b in zip(placements(one), placements(other), strict=True)]
    delong = sum(part.var(ddof=1) / len(part) for part in parts) ** 0.5
    assert np.std(resampled[0] - resampled[1]) == pytest.approx(delong, rel=0.06)


def test_users_are_drawn_whole_since_their_rows_are_alike():
    one, _, labels, users = drawn(4000, users=40, gain=3.0)

    by_user = resample_aucs(kept(one, labels, users), 500)["ctr"].std()
    by_row = resample_aucs(kept(one, labels), 500)["ctr"].std()

    worlds = [drawn(4000, seed, users=40, gain=3.0) for seed in range(1, 120)]
    true = np.std([roc_auc_score(label, score) for score, _, label, _ in worlds])
    assert by_user == pytest.approx(true, rel=0.35)
    assert by_row < true / 2


def reject(world, seeds, shift=0.0, resamples=200):
    """Compare two arms of a simulated log; return difference, p over users and p over both."""
    users, rows = 60, 600
    rng = np.random.default_rng(world)
    user = np.sort(rng.integers(users, size=rows))
    taste = rng.normal(size=users)[user]
    labels = rng.random(rows) < 1 / (1 + np.exp(1 - taste))
    draws = np.hstack(list(draw_groups(users, resamples, world, chunk=resamples)))
    differences, resampled = [], []
    for _ in range(seeds):
        aucs = []
        for gain in (1 + shift, 1):
            scores = (rng.normal(size=rows) + gain * taste).astype(np.float32)
            auc = GroupedAuc(scores, labels, user, users)
            aucs.append(np.append(auc(np.ones((users, 1))), auc(draws)))
        differences.append((aucs[0] - aucs[1])[0])
        resampled.append((aucs[0] - aucs[1])[1:])
    found = compare_over_rows(differences, resampled)
    return np.mean(differences), found.rows_p, found.both_p


def assert_is_nominal(p_values):
    rejected = int((np.array(p_values) < 0.05).sum())
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], len(p_values), 0.05)
    assert low <= rejected <= high


@pytest.mark.slow
def test_equal_arms_differ_over_users_as_often_as_the_level():
    assert_is_nominal([reject(world, 1)[1] for world in range(250)])


def test_a_better_arm_is_found_over_users_with_the_power_of_its_effect():
    differences, p_values, _ = np.array([reject(world, 1, shift=1) for world in range(120)]).T

    planned = stats.norm.sf(stats.norm.ppf(0.975) - differences.mean() / differences.std())
    assert 0.3 < planned < 0.95
    assert np.mean(p_values < 0.05) == pytest.approx(planned, abs=0.15)


@pytest.mark.slow
def test_equal_arms_differ_as_often_as_the_level_over_users_and_over_both_with_few_seeds():
    _, over_rows, over_both = zip(*[reject(world, 4) for world in range(600)], strict=True)

    assert_is_nominal(over_rows)
    assert_is_nominal(over_both)


@pytest.fixture
def write_pair(tmp_path, write_run):
    """Write runs with kept scores of an arm and its baseline, for each seed."""

    def write(seeds=3, *, baseline_labels=None, gain=0.0, name="test"):
        for seed in range(seeds):
            one, other, labels, users = drawn(600, users=50)
            shift = np.random.default_rng(seed).normal(size=600) * 0.1
            for mtn, scores in ((True, one + gain * labels), (False, other)):
                own = labels if mtn or baseline_labels is None else baseline_labels(labels)
                found = (scores + shift).astype(np.float32)
                auc = {"ctr": float(roc_auc_score(own, found))}
                folder = write_run(tmp_path, f"{mtn}-{seed}", mtn=mtn, seed=seed, auc=auc)
                sums = {name: write_scores(folder, name, kept(found, own, users))}
                record = json.loads((folder / "result.json").read_text()) | {"scores": sums}
                (folder / "result.json").write_text(json.dumps(record))
        return read_runs(tmp_path)

    return write


def compared(runs, **keys):
    return comparisons(runs.results, resampled=resample_runs(runs, resamples=300), **keys)


def test_a_comparison_has_the_intervals_of_its_own_runs(write_pair):
    runs = write_pair()

    cells = compared(runs)

    (cell,) = cells[cells["treated"]].to_dict("records")
    aucs = {
        run.name: resample_aucs(read_scores(run.folder, "test", run.record.scores["test"]), 300)[
            "ctr"
        ]
        for run in runs
    }
    pairs = [aucs[f"True-{seed}"] - aucs[f"False-{seed}"] for seed in range(3)]
    values = runs.results.query("split == 'test' and metric == 'auc'")
    values = values.pivot_table(index="seed", columns="treated", values="value")
    expected = compare_over_rows(values[True] - values[False], pairs)
    assert cell["groups"] == 50
    for name in ("rows_low", "rows_high", "rows_p", "both_low", "both_high", "both_p"):
        assert cell[name] == getattr(expected, name)
    assert cell["rows_low"] < cell["difference"] < cell["rows_high"]


def test_the_table_of_intervals_is_there_only_if_there_is_something_in_it(write_pair):
    runs = write_pair(1)

    alone = row_table(compared(runs), "one seed")
    nothing = row_table(comparisons(runs.results), "no scores")

    assert "over both" not in alone.groups[0].columns  # one seed has no spread
    (row,) = alone.rows
    assert [cell.text for cell in row.cells][1:4] == ["ctr", "1", "50"]
    assert nothing is None


def test_the_table_of_several_seeds_gives_the_verdict_over_both(write_pair):
    table = row_table(compared(write_pair(gain=3.0)), "several")

    verdict = table.groups[0].columns.index("verdict")
    assert table.rows[0].cells[verdict].text == "different"
    assert len(table.rows[0].cells) == len(table.groups[0].columns)
    assert "within ±0.0005" in table.notes[-1]


def test_arms_that_were_tested_on_other_rows_are_not_compared_over_rows(write_pair):
    cells = compared(write_pair(baseline_labels=lambda labels: ~labels))

    assert cells["rows_p"].isna().all()
    assert cells["p_value"].notna().any()


def test_another_metric_has_no_intervals_over_rows(write_pair):
    assert compared(write_pair(), metric="log_loss")["rows_p"].isna().all()


def test_scores_of_another_test_set_are_those_of_its_split(write_pair):
    runs = write_pair(name="july")

    assert resample_runs(runs, split="test", resamples=100).aucs == {}
    assert len(resample_runs(runs, split="july", resamples=100).aucs) == 6


def test_a_damaged_file_is_refused_and_not_read_without_resamples(write_pair, tmp_path):
    runs = write_pair(1)
    scores_file(tmp_path / "True-0", "test").write_bytes(b"PAR1")

    assert resample_runs(runs, resamples=0).aucs == {}
    with pytest.raises(InputError, match=r"True-0.*is not the file of scores that the run wrote"):
        resample_runs(runs, resamples=100)
