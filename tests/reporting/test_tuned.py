import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats

from mtnrec.checks import InputError
from mtnrec.reporting.page import ReportTables, write_page
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.scores import comparisons
from mtnrec.reporting.table.tuning import trial_table, tuned_frame, tuning_tables
from mtnrec.reporting.tuned import selection_optimism
from mtnrec.tuning.record import Budget, Trial, TunedArm, Tuning

SPACE = {"optimizer.lr": "tag(log,interval(0.0001,0.01))"}
ARMS = {"lr_only": {}, "mtn": {"mtn": {"lam": 0.02}}}


def auc(value):
    return {"ctr": value, "cvr": value, "ctcvr": value}


@pytest.fixture
def sweep(tmp_path, write_run):
    """Two arms with two trials each, and fresh runs of seeds 1 to 5."""

    def make(root=tmp_path, *, trials=2, place="p", arms=ARMS, model="MMoE", prefix="", better=0.0):
        found = []
        for number, (name, keys) in enumerate(arms.items()):
            told = []
            for trial in range(trials):
                folder, rate = (
                    f"{prefix}{name}-trial{trial}",
                    0.001 * (trial + 1 + number) + len(prefix) / 1e4,
                )
                lr = {"optimizer.lr": rate}
                path = write_run(
                    root, folder, model=model, auc=auc(0.8 + trial / 100), **keys, **lr
                )
                untest(path)
                told.append(Trial(folder, lr, 0.8 + trial / 100))
            fresh = {}
            for seed in range(1, 6):
                fresh[str(seed)] = f"{prefix}{name}-fresh{seed}"
                value = auc(0.75 + number * better + seed / 1000)
                write_run(root, fresh[str(seed)], model=model, seed=seed, auc=value, **keys, **lr)
            fixed = [f"mtn.enabled={bool(keys)}"]
            budget = Budget(trials, 1, 0, 0)
            found.append(
                TunedArm(
                    *(name, number == 0, place, fixed, SPACE, budget, "val/cvr_auc", "higher"),
                    *(told, {"optimizer.lr": 1.0}, fresh),
                )
            )
        Tuning.read(root / "tuning.json").replace(found).write(root)

    return make


def untest(folder):
    path = folder / "result.json"
    record = json.loads(path.read_text())
    record["config"]["test"] = False
    for part in ("metrics", "counts", "calibration_curves"):
        record[part] = {k: v for k, v in record[part].items() if not k.startswith("test/")}
    record["seconds"]["test"] = 0.0
    path.write_text(json.dumps(record))


def test_comparisons_are_between_the_fresh_runs_of_tuned_arms_alone(sweep, tmp_path):
    sweep(better=0.01)

    runs = read_runs(tmp_path)
    cells = comparisons(runs.results)

    assert {run.name.partition("-")[2][:5] for run in runs} == {"fresh"}
    assert len(runs.trials) == 4
    assert set(runs.settings["label"]) == {"MMoE lr only", "MMoE mtn"}
    (cell,) = cells[cells["treated"] & (cells["task"] == "cvr")].to_dict("records")
    assert cell["pairs"] == 5
    assert cell["difference"] == pytest.approx(0.01)
    assert not any("trial" in name for name in runs.results["run"])
    assert set(runs.costs["run"]) == {run.name for run in runs}


def test_a_tuned_arm_may_be_named_as_the_baseline(sweep, tmp_path):
    sweep(better=0.01)

    cells = comparisons(read_runs(tmp_path, "arm=mtn").results)

    (cell,) = cells[cells["treated"] & (cells["task"] == "cvr")].to_dict("records")
    assert (cell["label"], cell["difference"]) == ("MMoE lr only", pytest.approx(-0.01))
    with pytest.raises(
        InputError, match=r"must name an arm .* got arm=laf\. Choose from .*lr_only"
    ):
        _ = read_runs(tmp_path, "arm=laf").settings


def test_places_and_budgets_are_compared_within_themselves_alone(sweep, tmp_path):
    sweep()
    sweep(place="q", model="ESMM", prefix="esmm-")
    sweep(place="r", trials=3, prefix="more-", arms={"lr_only": {}, "mtn": {"mtn": {"lam": 0.03}}})

    runs = read_runs(tmp_path)

    settings = runs.settings.drop_duplicates("arm")
    blocks = settings.groupby("baseline")["label"].agg(sorted).tolist()
    assert sorted(blocks) == [
        ["ESMM lr only", "ESMM mtn"],
        ["MMoE (trials=2) lr only", "MMoE (trials=2) mtn"],
        ["MMoE (trials=3) lr only", "MMoE (trials=3) mtn"],
    ]
    assert settings.groupby("baseline")["treated"].sum().tolist() == [1, 1, 1]
    chosen, *_ = tuning_tables(runs)
    assert "different budgets" in chosen.warnings[0]


def test_ordinary_runs_next_to_a_tuned_sweep_keep_their_labels_and_baselines(
    sweep, write_run, tmp_path
):
    sweep(tmp_path / "tuned")
    for seed in range(2):
        write_run(tmp_path, f"plain{seed}", seed=seed, model="ESMM")
        write_run(tmp_path, f"mtn{seed}", seed=seed, model="ESMM", mtn=True)

    settings = read_runs(tmp_path).settings.set_index("run")

    assert settings.loc["mtn0", "label"] == "ESMM +MTN"
    assert settings.loc["mtn0", "baseline"] == settings.loc["plain1", "baseline"]
    assert settings.loc["tuned/mtn-fresh1", "label"] == "MMoE mtn"


def test_the_table_has_validation_and_test_of_each_arm_side_by_side(sweep, tmp_path):
    sweep(better=0.01)

    runs = read_runs(tmp_path)
    frame = tuned_frame(runs).set_index("arm")
    chosen, ranges = tuning_tables(runs)

    values = 0.75 + np.arange(1, 6) / 1000
    assert frame.loc["lr only", "best"] == 0.81
    assert frame.loc["lr only", "optimism"] == pytest.approx(0.81 - values.mean())
    assert frame.loc["mtn", "tested"] == pytest.approx(values + 0.01)
    assert [row.header for row in chosen.rows] == [
        "MMoE lr only on synthetic",
        "MMoE mtn on synthetic",
    ]
    texts = [cell.text for cell in chosen.rows[0].cells]
    assert texts == ["2 of 2", "1", "0.8100", "0.7530", "+0.0570", "0.7530"]
    assert chosen.rows[0].cells[3].spread == f"{values.std(ddof=1):.4f}"
    assert [cell.text for cell in ranges.rows[1].cells] == [
        *("optimizer.lr", "tag(log,interval(0.0001,0.01))", "0.003", "1.00")
    ]
    assert len(trial_table(runs).rows) == 4


def test_the_page_has_a_section_on_tuning_with_all_trials(sweep, write_run, tmp_path):
    sweep(tmp_path / "tuned")
    write_run(tmp_path / "other", "run")
    pages = []
    for root in ("tuned", "other"):
        runs = read_runs(tmp_path / root)
        compared, path = comparisons(runs.results), tmp_path / f"{root}.html"
        tables = ReportTables(scores=[], tuning=[*tuning_tables(runs)])
        write_page(path, runs, left_out=[], compared=compared, tables=tables, figures=[])
        pages.append(path.read_text())

    assert "<h2>Tuning" in pages[0]
    assert "Search spaces and chosen values" in pages[0]
    assert pages[0].count("lr_only-trial1") == 1
    assert "<h2>Tuning" not in pages[1]


def test_the_trials_are_written_as_a_table(sweep, tmp_path):
    sweep()

    read_runs(tmp_path).write(tmp_path / "out")

    table = pd.read_csv(tmp_path / "out" / "searched.csv")
    assert len(table) == 4
    assert table[table["is_best"]]["run"].tolist() == ["lr_only-trial1", "mtn-trial1"]
    assert table["setting"].tolist() == [0.001, 0.002, 0.002, 0.003]


def test_fresh_runs_of_an_earlier_search_are_left_out(sweep, tmp_path, caplog):
    sweep()
    sweep(prefix="later-")

    runs = read_runs(tmp_path)

    assert {run.name.partition("-")[0] for run in runs} == {"later"}
    assert "10 runs of settings that a later search replaced are left out" in caplog.text


def test_a_folder_of_trials_alone_is_refused(write_run, tmp_path):
    untest(write_run(tmp_path, "trial"))

    with pytest.raises(InputError, match=r"only runs without a test, 1 of them\. Let the"):
        read_runs(tmp_path)


def test_without_a_tuned_sweep_there_is_no_table(write_run, tmp_path):
    write_run(tmp_path, "run")

    assert list(tuning_tables(read_runs(tmp_path))) == []


def largest_of(count):
    """Mean of the largest of ``count`` standard normal numbers, by integration."""

    def density(x):
        return x * count * stats.norm.pdf(x) * stats.norm.cdf(x) ** (count - 1)

    return integrate.quad(density, -10, 10)[0]


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("count", [5, 30])
def test_the_optimism_on_pure_noise_is_that_of_the_largest_of_normal_numbers(count, better):
    rng, sigma, studies = np.random.default_rng(0), 0.01, 400
    sign = 1 if better == "higher" else -1
    found = []
    for _ in range(studies):
        values = 0.7 + sigma * rng.standard_normal(count)
        trials = [Trial(str(number), {}, float(value)) for number, value in enumerate(values)]
        budget = Budget(count, 1, 0, 0)
        arm = TunedArm("a", True, "p", [], {}, budget, "val/cvr_auc", better, trials)
        found.append(selection_optimism(arm, (0.7 + sigma * rng.standard_normal(10)).tolist()))
        assert arm.best.value == (max if sign > 0 else min)(values)

    error = np.std(found, ddof=1) / math.sqrt(studies)
    assert np.mean(found) == pytest.approx(sigma * largest_of(count), abs=4 * error)
    assert np.mean(found) > 10 * error


def test_without_a_fresh_value_or_a_best_trial_there_is_no_optimism():
    budget = Budget(1, 1, 0, 0)
    arms = [
        TunedArm("a", True, "p", [], {}, budget, "val/cvr_auc", "higher", [Trial("x", {}, value)])
        for value in (0.7, None)
    ]

    assert selection_optimism(arms[0], []) is None
    assert selection_optimism(arms[1], [0.7]) is None


def test_a_tuned_sweep_is_reported_without_optuna(sweep, tmp_path):
    sweep()
    code = (
        "import sys\nfrom mtnrec.reporting.runs import read_runs\n"
        "from mtnrec.reporting.table.tuning import tuning_tables\n"
        f"assert len(list(tuning_tables(read_runs({str(tmp_path)!r})))) == 2\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = set(done.stdout.split())
    assert not loaded & {"optuna", "torch", "lightning", "hydra", "omegaconf"}
