import json

import pandas as pd
import pytest

from mtnrec.reporting.figure import catalogue as figures

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
SWEEP = [*LOG, "hydra.mode=MULTIRUN", "mtn.enabled=false,true"]


@pytest.fixture(scope="module")
def runs(train):
    return train(*SWEEP, model="mmoe")


def mark(figure, folder, name, title):
    """Replace the drawing, which takes seconds and is tested elsewhere."""
    paths = tuple(folder / f"{name}.{suffix}" for suffix in ("pdf", "svg", "png"))
    for path in paths:
        path.write_text("<svg></svg>")
    return paths


@pytest.fixture(scope="module")
def reported(runs, report, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", mark)
        report(f"runs={runs}", f"out={out}", "metric=log_loss", "split=val")
    return out


def test_a_sweep_becomes_results_tables_figures_and_a_page(reported):
    names = {path.name for path in reported.rglob("*") if path.is_file()}
    assert {"index.html", "results.csv", "results.parquet", "costs.csv", "epochs.csv"} <= names
    assert {f"models_without_noise.{suffix}" for suffix in ("md", "tex", "html", "csv")} <= names
    kinds = {path.name.partition("-")[0] for path in (reported / "figures").glob("*.png")}
    assert kinds >= {"training_curves", "alphas", "effective_ranks", "spectra", "reliability"}
    assert kinds >= {"paired_differences", "expert_distances"}
    page = (reported / "index.html").read_text()
    assert "Mean log loss on the validation rows" in page
    assert "The validation log loss of an arm minus that of its baseline" in page
    assert "test AUC" not in page.partition("Costs of each arm")[0].replace("a test AUC", "")


def test_every_metric_of_every_record_is_in_the_results(runs, reported):
    table = pd.read_csv(reported / "results.csv", converters={"value": float})
    parquet = pd.read_parquet(reported / "results.parquet")
    for path in runs.rglob("result.json"):
        record = json.loads(path.read_text())
        own = table[table["run"] == path.parent.name]
        names = own["split"] + "/" + own["task"] + "_" + own["metric"]
        names = names.str.replace("/all_mean_auc", "/mean_auc")  # of no task
        found = dict(zip(names, own["value"], strict=True))
        assert found == {
            name: pytest.approx(value, rel=0, abs=0) for name, value in record["metrics"].items()
        }
        assert set(own["seed"]) == {record["seed"]}
        assert set(own["mtn"]) == {record["mtn"]["enabled"]}
    assert parquet["value"].tolist() == table["value"].tolist()


@pytest.mark.slow
def test_runs_are_compared_with_the_baseline_of_the_command_line(
    runs, report, tmp_path, monkeypatch
):
    monkeypatch.setattr(figures, "save", mark)

    report(f"runs={runs}", f"out={tmp_path / 'out'}", "baseline=mtn.enabled=true")

    settings = pd.read_csv(tmp_path / "out" / "results.csv").drop_duplicates("run")
    assert dict(zip(settings["mtn"], settings["treated"], strict=True)) == {
        False: True,
        True: False,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runs=nowhere"], "nowhere is not a folder"),
        (["runs=.", "out=report"], ". has no finished run"),
    ],
)
def test_a_folder_without_runs_is_refused(overrides, message, report):
    with pytest.raises(SystemExit, match=f"^mtnrec: {message}"):
        report(*overrides)


def test_an_unknown_metric_is_refused_before_anything_is_written(runs, report, tmp_path):
    with pytest.raises(SystemExit, match=r"no run has the metric test/auk\. Choose one of"):
        report(f"runs={runs}", f"out={tmp_path / 'report'}", "metric=auk")

    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("margin=0", "margin must be a number in"),
        ("resamples=-1", "resamples must be an integer >= 0, got -1"),
        ("resamples=99", "resamples must be 0 or at least 100, got 99"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_the_runs_are_read(override, message, report):
    with pytest.raises(SystemExit, match=f"^mtnrec: {message}"):
        report("runs=nowhere", override)
