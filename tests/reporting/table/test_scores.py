import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mtnrec.checks import InputError
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.scores import comparisons, difference_table, score_table, split_by_table

SHIFTS = {"ctr": 0.0, "cvr": 0.004, "ctcvr": -0.004}


@pytest.fixture
def write_arms(tmp_path, write_run):
    """Write runs of a baseline and of MTN; return the AUCs, ``values[mtn][task]``."""

    def write(seeds=range(6), mtn_seeds=None, shifts=SHIFTS, mtn=True, **settings):
        rng = np.random.default_rng(0)
        base = {seed: 0.7 + rng.normal(0, 0.01, len(shifts)) for seed in range(20)}
        step = {seed: rng.normal(0, 0.001, len(shifts)) for seed in range(20)}
        for seed in seeds:
            auc = dict(zip(shifts, base[seed].tolist(), strict=True))
            write_run(tmp_path, f"off-{settings}-{seed}", seed=seed, auc=auc, **settings)
        for seed in seeds if mtn_seeds is None else mtn_seeds:
            treated = base[seed] + step[seed] + list(shifts.values())
            auc = dict(zip(shifts, treated.tolist(), strict=True))
            write_run(tmp_path, f"{mtn}-{settings}-{seed}", seed=seed, auc=auc, mtn=mtn, **settings)
        return base, step

    return write


@pytest.fixture
def results(tmp_path):
    return lambda: read_runs(tmp_path).results


def cell_of(cells, **place):
    for key, value in place.items():
        cells = cells[cells[key] == value]
    (row,) = cells.to_dict("records")
    return row


def test_a_cell_is_the_paired_comparison_of_its_seeds(write_arms, results):
    base, step = write_arms()

    cells = comparisons(results())

    for number, (task, shift) in enumerate(SHIFTS.items()):
        baseline = np.array([base[seed][number] for seed in range(6)])
        treated = baseline + [step[seed][number] + shift for seed in range(6)]
        cell = cell_of(cells, task=task, mtn=True)
        assert cell["mean"] == pytest.approx(treated.mean())
        assert cell["baseline_mean"] == pytest.approx(baseline.mean())
        assert cell["p_value"] == pytest.approx(stats.ttest_rel(treated, baseline).pvalue)
        assert cell["wilcoxon_p"] == pytest.approx(stats.wilcoxon(treated, baseline).pvalue)
        assert cell["improved"] == (treated.mean() > baseline.mean())
        assert cell_of(cells, task=task, mtn=False)["mean"] == pytest.approx(baseline.mean())


def test_holms_correction_is_over_the_whole_table(write_arms, results):
    for model in ("MMoE", "ESMM"):
        write_arms(model=model, shifts={"ctr": 0.001, "cvr": 0.0007, "ctcvr": 0.0})

    cells = comparisons(results())

    tested = cells[cells["mtn"]]
    assert len(tested) == 6
    expected = multipletests(tested["p_value"], method="holm")[1]
    np.testing.assert_allclose(tested["holm_p"], expected)
    assert cells.loc[~cells["mtn"], "holm_p"].isna().all()


def test_both_arms_are_averaged_over_the_seeds_that_both_have(write_arms, results):
    base, _ = write_arms(seeds=range(8), mtn_seeds=range(2, 10))

    cells = comparisons(results())

    for mtn in (False, True):
        cell = cell_of(cells, task="ctr", mtn=mtn)
        assert (cell["seeds"], cell["all_seeds"]) == (6, 10)
    mean = np.mean([base[seed][0] for seed in range(2, 8)])
    assert cell_of(cells, task="ctr", mtn=False)["mean"] == pytest.approx(mean)
    assert cell_of(cells, task="ctr", mtn=True)["baseline_mean"] == pytest.approx(mean)
    notes = {cell.note for row in score_table(cells, "t").rows for cell in row.cells}
    assert notes == {"6 of 10 seeds"}


def test_two_runs_of_different_seeds_are_never_paired(write_arms, results):
    write_arms(seeds=[0, 1], mtn_seeds=[2, 3])

    cells = comparisons(results())

    assert (cells["pairs"] == 0).all()
    assert cells[["p_value", "difference", "baseline_mean"]].isna().all(axis=None)
    assert cells["mean"].notna().all()
    assert not cells["improved"].any()
    table = score_table(cells, "t")
    assert "3 numbers are not compared with a baseline" in table.warnings[0]
    assert {cell.note for row in table.rows for cell in row.cells} == {"2 of 4 seeds"}


@pytest.mark.parametrize(
    "change",
    [{"data.split_seed": 1}, {"optimizer.lr": 0.1}, {"data.rows": 5000}],
)
def test_runs_of_different_splits_settings_or_data_are_never_paired(write_arms, results, change):
    write_arms(mtn_seeds=[])
    write_arms(seeds=[], mtn_seeds=range(6), **change)

    cells = comparisons(results())

    assert (cells["pairs"] == 0).all()
    assert (cells["seeds"] == 6).all()


def test_label_noise_is_in_no_table_without_noise(write_arms, results):
    write_arms()
    write_arms(**{"noise.label_flip": {"conversion": 0.1}})

    tables = split_by_table(results())

    flipped = "synthetic (label_flip.conversion=0.1)"
    assert list(tables) == ["Models without noise", f"Models under noise, {flipped}"]
    assert [set(table["data"]) for table in tables.values()] == [{"synthetic"}, {flipped}]
    table = score_table(comparisons(tables[f"Models under noise, {flipped}"]), "")
    assert [group.header for group in table.groups] == [flipped]


def test_runs_under_different_noise_masks_are_never_paired(write_arms, results):
    write_arms(mtn_seeds=[], noise=0.1)
    write_arms(seeds=[], mtn_seeds=range(6), noise=0.1, **{"noise.seed": 7})

    assert (comparisons(results())["pairs"] == 0).all()


def test_a_seed_whose_metric_is_undefined_counts_in_no_arm(tmp_path, write_run, results):
    for seed in range(4):
        for mtn in (False, True):
            auc = {"buy": 0.7 + 0.01 * seed + 0.001 * seed * mtn}
            undefined = {"test/buy_auc": None} if mtn and seed == 2 else {}
            write_run(tmp_path, f"{mtn}{seed}", seed=seed, mtn=mtn, auc=auc, metrics=undefined)

    cells = comparisons(results())

    assert cells["seeds"].tolist() == [3, 3]
    assert cell_of(cells, mtn=False)["mean"] == pytest.approx((0.7 + 0.71 + 0.73) / 3)


def test_a_metric_that_is_never_defined_is_an_empty_cell(tmp_path, write_run, results):
    for mtn in (False, True):
        write_run(tmp_path, f"{mtn}", mtn=mtn, auc={"ctr": 0.7, "cvr": None, "ctcvr": 0.8})

    table = score_table(comparisons(results()), "t")

    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["0.7000", "—", "0.8000"]
    ] * 2
    assert table.rows[1].cells[1].note == "undefined"


def test_the_layout_is_the_papers(tmp_path, write_run, results):
    for data in ("ali_ccp", "aliexpress_es", "aliexpress_nl", "own"):
        for model in ("Shared-bottom", "ESMM", "MMoE", "Another"):
            for mtn in (True, False):
                write_run(tmp_path, f"{data}/{model}/{mtn}", data=data, model=model, mtn=mtn)

    table = score_table(comparisons(results()), "t")

    assert [group.header for group in table.groups] == [
        "AliExpress NL",
        "AliExpress ES",
        "Ali-CCP",
        "own",
    ]
    assert {group.columns for group in table.groups} == {("CTR", "CVR", "CTCVR")}
    assert [(row.header, row.starts) for row in table.rows] == [
        (f"{model}{variant}", not variant)
        for model in ("MMoE", "ESMM", "Shared-bottom", "Another")
        for variant in ("", " +MTN")
    ]


def test_labels_without_a_funnel_keep_their_names(tmp_path, write_run, results):
    write_run(tmp_path, "a", auc={"visit": 0.7, "ctr": 0.8})

    (group,) = score_table(comparisons(results()), "t").groups

    assert group.columns == ("ctr", "visit")


def test_bold_and_stars_mark_improvement_and_significance(write_arms, results):
    write_arms()

    baseline, treated = score_table(comparisons(results()), "t").rows

    assert [cell.bold for cell in treated.cells] == [False, True, False]
    assert [cell.stars for cell in treated.cells][1:] == ["**", "**"]  # one better, one worse
    assert [cell.holm_stars for cell in treated.cells][1:] == ["**", "**"]
    assert not treated.cells[2].bold
    assert not any(cell.stars or cell.holm_stars or cell.bold for cell in baseline.cells)


def test_a_star_may_appear_without_holms_dagger(tmp_path, write_run, results):
    changes = {task: [1.0, -1.0, 2.0, -2.0, 0.5] for task in "bcde"} | {"a": [1, 2, 3, 4, 0.5]}
    for seed in range(5):
        for mtn in (False, True):
            auc = {task: 0.7 + mtn * steps[seed] / 1000 for task, steps in changes.items()}
            write_run(tmp_path, f"{mtn}{seed}", seed=seed, mtn=mtn, auc=auc)

    cells = score_table(comparisons(results()), "t").rows[1].cells

    p_values = [stats.ttest_1samp(changes[task], 0).pvalue for task in "abcde"]
    assert 0.01 < p_values[0] < 0.05 < multipletests(p_values, method="holm")[1][0]
    assert [(cell.stars, cell.holm_stars) for cell in cells] == [("*", ""), *[("", "")] * 4]


@pytest.mark.parametrize(
    ("metric", "baseline", "treated", "improved"),
    [
        ("auc", 0.7, 0.8, True),
        ("log_loss", 0.3, 0.2, True),
        ("log_loss", 0.2, 0.3, False),
        ("ece", 0.02, 0.01, True),
        ("calibration", 1.1, 0.95, True),
        ("calibration", 0.95, 1.1, False),
    ],
)
def test_each_metric_has_its_own_direction_of_improvement(
    tmp_path, write_run, results, metric, baseline, treated, improved
):
    for mtn, value in ((False, baseline), (True, treated)):
        values = {f"test/buy_{metric}": value}
        write_run(tmp_path, f"{mtn}", mtn=mtn, auc={"buy": 0.7}, metrics=values)

    cells = comparisons(results(), metric=metric)

    assert cells["improved"].tolist() == [False, improved]


def test_the_validation_split_can_be_tabulated(tmp_path, write_run, results):
    write_run(tmp_path, "a", auc={"buy": 0.7}, metrics={"val/buy_auc": 0.75})

    cells = comparisons(results(), split="val")

    assert cells["mean"].tolist() == [0.75]
    (note,) = score_table(cells, "t").notes
    assert note.startswith("Mean AUC on the validation rows over 1 seeds")


def test_an_unknown_metric_lists_the_known_ones(tmp_path, write_run, results):
    write_run(tmp_path, "a")

    with pytest.raises(InputError, match=r"no run has the metric test/f1\. Choose one of test/auc"):
        comparisons(results(), metric="f1")


@pytest.mark.parametrize(("seeds", "warned"), [(4, True), (5, False)])
def test_under_five_pairs_the_table_warns(write_arms, results, seeds, warned):
    write_arms(seeds=range(seeds))

    cells = comparisons(results())

    for layout in (score_table, difference_table):
        warnings = " ".join(layout(cells, "t").warnings)
        assert ("Fewer than five pairs of runs in 3 of 3" in warnings) == warned


def test_the_difference_table_shows_the_basis_of_a_comparison(write_arms, results):
    write_arms(seeds=range(7))
    cells = comparisons(results())

    table = difference_table(cells, "t")

    assert [row.header for row in table.rows] == ["MMoE +MTN"] * 3
    cell = cell_of(cells, task="cvr", mtn=True)
    texts = dict(
        zip(table.groups[0].columns, [cell.text for cell in table.rows[1].cells], strict=True)
    )
    assert texts["task"] == "CVR"
    assert texts["pairs"] == "7"
    assert texts["difference"] == f"{cell['difference']:+.4f}"
    assert texts["95 % interval"] == f"[{cell['low']:+.4f}, {cell['high']:+.4f}]"
    assert texts["Wilcoxon p"] == "0.016"  # 2 of 128 signs
    assert texts["p"] == "<0.001"
    assert texts["seeds for 0.001"] == f"{cell['seeds_needed']:.0f}"


def test_one_pair_has_a_difference_without_an_interval(write_arms, results):
    write_arms(seeds=[0])

    table = difference_table(comparisons(results()), "t")

    assert [cell.text for cell in table.rows[0].cells][-4:] == ["—"] * 4


def test_runs_are_split_into_the_papers_tables(tmp_path, write_run, results):
    for mtn in (False, True):
        write_run(tmp_path, f"clean/{mtn}", mtn=mtn)
        for noise in (0.1, 0.05):
            write_run(tmp_path, f"noisy/{noise}/{mtn}", mtn=mtn, noise=noise, data="ali_ccp")
    for lam in (1e-4, 1e-5):
        write_run(tmp_path, f"lam/{lam}", model="ESMM", mtn={"lam": lam})
    write_run(tmp_path, "lam/off", model="ESMM")

    parts = split_by_table(results())

    tables = {title: score_table(comparisons(part), title) for title, part in parts.items()}
    assert {
        title: ([group.header for group in table.groups], [row.header for row in table.rows])
        for title, table in tables.items()
    } == {
        "Models without noise": (
            ["synthetic"],
            ["MMoE", "MMoE +MTN", "ESMM", "ESMM +MTN"],  # of the paper's lambda
        ),
        "Models under noise, Ali-CCP": (["noise 0.05", "noise 0.1"], ["MMoE", "MMoE +MTN"]),
        "Variants of MTN, ESMM": (
            ["synthetic"],
            ["ESMM", "ESMM +MTN", "ESMM +MTN (lam=0.0001)"],
        ),
    }
    assert set(pd.concat(parts)["run"]) == set(results()["run"])


def test_a_variant_without_a_baseline_is_shown_and_not_compared(tmp_path, write_run, results):
    write_run(tmp_path, "a", mtn=True)

    table = score_table(comparisons(results()), "t")

    assert [row.header for row in table.rows] == ["MMoE +MTN"]
    assert table.warnings == ()


def test_all_variants_of_a_model_are_averaged_over_the_same_seeds(write_arms, results):
    write_arms(seeds=range(6), mtn={"lam": 1e-4})
    write_arms(seeds=[], mtn_seeds=range(1, 6), mtn={"lam": 1e-6})

    cells = comparisons(results())

    assert set(cells["seeds"]) == {5}
    assert cells.groupby("task")["baseline_mean"].nunique().tolist() == [1, 1, 1]


def test_random_differences_are_starred_at_the_level_and_never_by_holm(tmp_path, write_run):
    rng = np.random.default_rng(0)
    tasks = [f"task_{number}" for number in range(40)]
    for seed in range(5):
        for mtn in (False, True):
            auc = dict(zip(tasks, rng.normal(0.7, 0.01, len(tasks)).tolist(), strict=True))
            write_run(tmp_path, f"{mtn}{seed}", seed=seed, mtn=mtn, auc=auc, epochs=1)

    table = score_table(comparisons(read_runs(tmp_path).results), "t")

    starred = sum(bool(cell.stars) for cell in table.rows[1].cells)
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], len(tasks), 0.05)
    assert low <= starred <= high
    assert not any(cell.holm_stars for cell in table.rows[1].cells)
