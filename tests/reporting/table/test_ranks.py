import csv
import io

import numpy as np
import pytest
from scipy import stats

from mtnrec.reporting.figure.catalogue import plan_figures
from mtnrec.reporting.figure.results import critical_differences
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.ranks import rank_arms, rank_tables
from mtnrec.reporting.table.render import to_csv

MODELS = ("ESMM", "MMoE", "Shared-bottom")
FLIP = {"noise.label_flip": {"conversion": 0.1}}
# AUC of each model, by data set: mean ranks 1, 2.5 and 2.5.
AUCS = {"a": (0.8, 0.7, 0.6), "b": (0.75, 0.65, 0.7)}


@pytest.fixture
def write(tmp_path, write_run):
    """Write a run of each model with the given values, one after the other."""

    def write(data, values, seed=0, tasks=("ctr",), models=MODELS, **settings):
        for model, value in zip(models, values, strict=True):
            name = f"{data}-{model}-{seed}-{settings}"
            auc = dict.fromkeys(tasks, value)
            write_run(tmp_path, name, model=model, data=data, seed=seed, auc=auc, **settings)

    return write


@pytest.fixture
def ranked(tmp_path):
    """Rank the written runs; return the mean rank of each arm by noise and task."""

    def ranked(**keys):
        found = rank_arms(read_runs(tmp_path).results, **keys)
        return {
            (ranking.noise, ranking.task): dict(
                zip(ranking.arms, ranking.test.mean_ranks.tolist(), strict=True)
            )
            for ranking in found
        }

    return ranked


def test_the_mean_rank_is_over_data_sets_and_the_highest_auc_has_rank_one(write, ranked):
    for data, values in AUCS.items():
        write(data, values)

    assert ranked() == {("", "ctr"): dict(zip(MODELS, (1, 2.5, 2.5), strict=True))}


@pytest.mark.parametrize(
    ("metric", "expected"), [("log_loss", (3, 2, 1)), ("calibration", (2, 1, 3))]
)
def test_the_better_direction_of_the_metric_decides(metric, expected, write, ranked):
    for data in "ab":
        for model, value in zip(MODELS, (1.2, 0.9, 0.7), strict=True):
            write(data, [0.5], models=[model], metrics={f"test/ctr_{metric}": value})

    assert ranked(metric=metric) == {("", "ctr"): dict(zip(MODELS, expected, strict=True))}


def test_an_arm_is_ranked_by_its_mean_over_the_seeds_that_all_arms_have(write, tmp_path):
    for data, values in AUCS.items():
        for seed in (0, 1):
            write(data, values, seed=seed)
    write("a", [0.99], seed=2, models=["Shared-bottom"])  # alone, it would be the best

    (ranking,) = rank_arms(read_runs(tmp_path).results)

    assert ranking.test.mean_ranks.tolist() == [1, 2.5, 2.5]
    assert dict(zip(ranking.data, ranking.seeds, strict=True)) == {"a": 2, "b": 2}
    assert ranking.left_out == ()


def test_the_tests_are_those_of_the_table_of_means(write, tmp_path):
    means = np.random.default_rng(0).uniform(0.6, 0.8, (5, 3))
    for data, values in zip("abcde", means, strict=True):
        for seed, shift in ((0, -0.01), (1, 0.01)):
            write(data, values + shift, seed=seed)

    (ranking,) = rank_arms(read_runs(tmp_path).results)

    quantile = stats.studentized_range.ppf(0.95, 3, np.inf) / 2**0.5
    assert ranking.test.p_value == pytest.approx(stats.friedmanchisquare(*means.T).pvalue)
    assert ranking.test.critical_difference == pytest.approx(quantile * (3 * 4 / 6 / 5) ** 0.5)


def test_two_arms_or_one_data_set_are_not_ranked(write, ranked):
    write("a", AUCS["a"])
    assert ranked() == {}

    write("b", AUCS["b"][:2], models=MODELS[:2])
    assert ranked() == {}


def test_arms_and_data_sets_with_gaps_are_left_out_and_named(write, tmp_path):
    for data, values in AUCS.items():
        write(data, values)
    write("a", [0.9], models=["PLE"])
    write("c", [0.5], models=["ESMM"])

    (ranking,) = rank_arms(read_runs(tmp_path).results)

    (table,) = rank_tables([ranking])
    assert ranking.arms == MODELS
    assert sorted(ranking.data) == ["a", "b"]
    assert ranking.left_out == ("c", "PLE")
    assert table.warnings[-1].endswith("since runs are missing: c, PLE.")


def test_an_undefined_metric_is_a_gap(write, ranked):
    for data, values in AUCS.items():
        write(data, values)
        write(data, [None if data == "a" else 0.9], models=["PLE"])

    assert set(ranked()["", "ctr"]) == set(MODELS)


def test_each_noise_and_task_has_its_ranking(write, ranked):
    for data, values in AUCS.items():
        write(data, values, tasks=("cvr", "ctr"))
        write(data, values[::-1], noise=0.1)
        write(data, values, noise=0.1, **FLIP)

    assert list(ranked()) == [
        *(("", "ctr"), ("", "cvr")),
        *(("noise 0.1", "ctr"), ("noise 0.1, label_flip.conversion=0.1", "ctr")),
    ]


def test_one_data_set_under_two_noises_is_not_two(write, ranked):
    write("a", AUCS["a"])
    write("a", AUCS["a"], noise=0.1)
    write("a", AUCS["a"], **FLIP)

    assert ranked() == {}


def test_the_table_lists_arms_by_rank_and_the_tests_below(write, tmp_path):
    for data, values in AUCS.items():
        write(data, values, tasks=("ctr", "ctcvr"))

    (table,) = rank_tables(rank_arms(read_runs(tmp_path).results))

    p_value = stats.friedmanchisquare(*zip(*AUCS.values(), strict=True)).pvalue
    heads = [f"mean rank by test AUC {task}" for task in ("CTR", "CTCVR")]
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [
        ["Arm", *heads],
        ["ESMM", "1.00", "1.00"],
        ["MMoE", "2.50", "2.50"],
        ["Shared-bottom", "2.50", "2.50"],
        ["data sets", "2", "2"],
        ["Friedman p", *[f"{p_value:.3f}"] * 2],
        ["critical difference", *[f"{2.3437 * (12 / 12) ** 0.5:.2f}"] * 2],
    ]
    assert table.warnings[0].startswith("Only 2 data sets")


def test_the_bars_of_the_figure_are_as_long_as_the_critical_difference(write, tmp_path):
    for data, values in AUCS.items():
        write(data, values[::-1])
    (ranking,) = rank_arms(read_runs(tmp_path).results)

    (axes,) = critical_differences(ranking).axes

    bars, dots = axes.lines[::2], axes.lines[1::2]
    lengths = [float(np.ptp(bar.get_xdata())) for bar in bars]
    assert lengths == pytest.approx([ranking.test.critical_difference] * 3)
    assert [float(dot.get_xdata()[0]) for dot in dots] == sorted(ranking.test.mean_ranks)
    assert axes.texts[0].get_text() == "Shared-bottom, 1.00"


@pytest.mark.parametrize(
    ("metric", "split", "best", "values"),
    [
        ("auc", "test", "ESMM", "test AUC"),
        ("log_loss", "val", "MMoE", "validation log loss"),
    ],
)
def test_the_figure_ranks_by_the_metric_and_split_of_the_report(
    metric, split, best, values, write, tmp_path
):
    for data, aucs in AUCS.items():
        for model, auc in zip(MODELS, aucs, strict=True):
            write(data, [auc], models=[model], metrics={"val/ctr_log_loss": auc})
    runs = read_runs(tmp_path)

    (figure,) = [f.draw() for f in plan_figures(runs, metric, split) if f.kind == "ranks"]
    (table,) = rank_tables(rank_arms(runs.results, metric=metric, split=split))

    (axes,) = figure.axes
    assert axes.texts[0].get_text().startswith(f"{best}, 1.")
    assert axes.get_xlabel() == f"mean rank, CTR: {values}"
    assert table.groups[0].header == f"mean rank by {values}"


def test_a_long_name_of_an_arm_takes_several_lines_and_more_height(write, tmp_path):
    for data in "ab":
        write(data, [0.7, 0.6], models=["ESMM", "PLE"])
        write(data, [0.5], models=[f"Network{'WithALongName' * 2}"], **{"optimizer.lr": 0.01})
        write(data, [0.4], models=[f"Network{'WithALongName' * 2}"], **{"optimizer.lr": 0.02})
    (ranking,) = rank_arms(read_runs(tmp_path).results)

    (axes,) = critical_differences(ranking).axes

    texts = [text.get_text() for text in axes.texts]
    assert [text.count("\n") for text in texts] == [0, 0, 1, 1]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 46
    heights = [float(dot.get_ydata()[0]) for dot in axes.lines[1::2]]
    assert np.diff(heights)[-1] > np.diff(heights)[0]
