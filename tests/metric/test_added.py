"""Metrics of the group ``metrics``: their values, names and refusals."""

import pytest
import torch
import torchmetrics
from sklearn.metrics import average_precision_score, brier_score_loss

from mtnrec.checks import InputError
from mtnrec.metric.added import AddedMetrics
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.scores import comparisons
from mtnrec.run.record import RunRecord
from mtnrec.sweep.progress import read_progress, render_leaderboard

PRECISION = torchmetrics.classification.BinaryAveragePrecision
LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]


class Pair(torchmetrics.Metric):
    """A metric that returns two numbers."""

    higher_is_better = True

    def update(self, probabilities, labels):
        """Ignore the rows."""

    def compute(self):
        """Return the two numbers."""
        return torch.zeros(2)


class Undirected(Pair):
    """A metric that does not say which direction is better."""

    higher_is_better = None


def test_values_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, generator=generator, dtype=torch.float64)
    labels = (torch.rand(500, generator=generator) < probabilities).to(torch.uint8)
    added = AddedMetrics({"precision": PRECISION(), "brier": torchmetrics.MeanSquaredError()})

    for _ in range(2):  # the second measurement does not contain the first one's rows
        found = added.measure(probabilities, labels)

        expected = average_precision_score(labels, probabilities)
        assert found["precision"].item() == pytest.approx(expected, rel=1e-6)
        expected = brier_score_loss(labels, probabilities)
        assert found["brier"].item() == pytest.approx(expected, rel=1e-6)
    assert added.directions == {"precision": "higher", "brier": "lower"}


def test_a_metric_without_rows_is_undefined():
    none = torch.zeros(0, dtype=torch.float64)

    assert AddedMetrics({"precision": PRECISION()}).measure(none, none)["precision"].isnan()


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("auc", PRECISION(), "do not end in .*auc.*got 'auc'"),
        ("my_auc", PRECISION(), "got 'my_auc'"),
        ("clicked_rows", PRECISION(), "got 'clicked_rows'"),
        ("val/x", PRECISION(), "got 'val/x'"),
        ("pair", Pair(), "metrics.pair must return one number"),
        ("none", Undirected(), "metrics.none must say which direction is better"),
        ("module", torch.nn.Identity(), "metrics.module must be a torchmetrics.Metric"),
        (
            "words",
            torchmetrics.text.WordErrorRate(),
            "metrics.words must take probabilities and labels",
        ),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(name, metric, message):
    with pytest.raises(InputError, match=message):
        AddedMetrics({name: metric})


def test_an_added_metric_chooses_the_epoch_and_reaches_the_tables(train, tmp_path):
    for mtn in ("false", "true"):
        chosen = ["metrics=[average_precision,brier]", "monitor=val/ctr_brier"]
        train(*LOG, *chosen, f"mtn.enabled={mtn}", folder=tmp_path / "runs" / mtn)

    record = RunRecord.read(tmp_path / "runs" / "true" / "result.json")
    curve = [epoch["val/ctr_brier"] for epoch in record.history]
    assert record.best_epoch == curve.index(min(curve))
    assert record.added_metrics == {"average_precision": "higher", "brier": "lower"}
    results = read_runs(tmp_path / "runs").results
    assert set(results.loc[results["metric"] == "brier", "better"]) == {"lower"}
    assert results.loc[results["metric"] == "average_precision", "value"].between(0, 1).all()
    compared = comparisons(results, metric="brier")
    better = compared["mean"] < compared["baseline_mean"]
    assert compared["improved"].tolist() == better.tolist()
    (table,) = render_leaderboard(read_progress(tmp_path / "runs"))
    means = [float(text) for text in list(table.columns[2].cells)]
    assert means == sorted(means)
