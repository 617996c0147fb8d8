"""A new metric, setting or key of the record is added in one place, and reaches the report."""

import dataclasses

import pytest

from mtnrec.metric import catalogue
from mtnrec.metric.task_metrics import TaskRows
from mtnrec.reporting import runs as runs_module
from mtnrec.reporting.runs import read_runs
from mtnrec.run.record import RunRecord
from mtnrec.training import fit as fit_module

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]


def brier(rows):
    """Mean squared error of the probabilities."""
    return (rows.positive.double().exp() - rows.labels).square().mean()


@pytest.fixture
def with_brier(monkeypatch):
    row = catalogue.MetricInfo("Brier score", better="lower", can_monitor=True)
    monkeypatch.setitem(catalogue.METRICS, "brier", row)
    monkeypatch.setattr(TaskRows, "brier", brier, raising=False)


@pytest.mark.slow
def test_a_metric_is_a_row_of_the_catalogue_and_a_method(with_brier, train, report, tmp_path):
    for mtn in ("false", "true"):
        train(*LOG, f"mtn.enabled={mtn}", "monitor=val/ctr_brier", folder=tmp_path / "runs" / mtn)

    report(f"runs={tmp_path / 'runs'}", "metric=brier")

    results = read_runs(tmp_path / "runs").results
    values = results.loc[results["metric"] == "brier", "value"]
    assert len(values) == 2 * 2 * 3
    assert values.between(0, 1).all()
    page = (tmp_path / "runs" / "report" / "index.html").read_text()
    assert "Mean Brier score on the test rows" in page


def test_a_setting_of_the_config_defines_an_arm_for_both_report_and_wandb(write_run, tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", **{"optimizer.momentum": 0.9})

    runs = read_runs(tmp_path)

    assert runs.settings["arm"].nunique() == 2
    groups = [run.record.identity.group for run in runs]
    assert [group.split()[-1] for group in groups] == [arm[:8] for arm in runs.settings["arm"]]
    assert runs.settings["model"].tolist() == ["MMoE", "MMoE (optimizer.momentum=0.9)"]


def test_a_key_of_the_record_is_a_field(train, monkeypatch, tmp_path):
    longer = dataclasses.make_dataclass(
        "LongerRecord",
        [("colour", str, dataclasses.field(default="blue"))],
        bases=(RunRecord,),
        frozen=True,
    )
    for module in (fit_module, runs_module):
        monkeypatch.setattr(module, "RunRecord", longer)

    train(*LOG, folder=tmp_path)

    (run,) = read_runs(tmp_path)
    assert run.record.colour == "blue"
    assert '"colour": "blue"' in (tmp_path / "result.json").read_text()
