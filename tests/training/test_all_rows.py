"""CVR of a synthetic log is measured against the truth over all rows."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import entr, expit, rel_entr
from torch import nn

import mtnrec
from mtnrec.checks import InputError
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.model.log_probabilities import funnel_log_probabilities
from mtnrec.reporting.figure import catalogue as figures
from mtnrec.reporting.runs import read_runs
from mtnrec.schema import CategoricalField, Schema
from mtnrec.system.files import read_json

LOG = ["data.rows=2990", "data.click_rate=0.2", "data.conversion_rate=0.3"]
LATER = ["data.later_stages={buy:0.4}", "monitor=val/buy_auc"]


class Logits(nn.Module):
    """Predicts with the two numerical features as logits; the second is bent by a line."""

    def __init__(self, schema, slope=1.0, shift=0.0):
        super().__init__()
        self.slope, self.shift = slope, shift
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        click, conversion = (batch.numerical + 0 * self.unused).split(1, dim=1)
        return funnel_log_probabilities(click, self.slope * conversion + self.shift)

    def task_layers(self):
        return []

    def shared_layers(self):
        return []


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log whose features are the true logits; true CVR and CTR are opposed."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("log")
    schema = Schema((CategoricalField("shop", 3),), ("a", "b"), ("click", "conversion"), True)
    with write_prepared(folder, ("train", "test")) as writer:
        for split in ("train", "test"):
            click = rng.normal(size=400).astype(np.float32)
            logits = np.stack([click, rng.normal(size=400) - click], axis=1).astype(np.float32)
            p = expit(logits.astype(np.float64)).cumprod(axis=1)
            labels = rng.random((400, 1)) < p  # one draw, so that a conversion has a click
            columns = {"categorical": rng.integers(0, 3, (400, 1)), "numerical": logits}
            writer.append(split, columns | {"labels": labels, "probabilities": p})
        writer.finish(source="truth", parameters={}, schema=schema, report={})
    return mtnrec.AliExpress(country="NL", dir=folder, batch_size=150)


def mark(figure, folder, name, title):
    """Replace the drawing, which takes seconds and is tested elsewhere."""
    path = folder / f"{name}.svg"
    path.write_text("<svg></svg>")
    return (path,)


def true_cvr(data, split):
    p = data.column(split, "probabilities")
    return p[:, 1] / p[:, 0]


def pairwise_auc(scores, p):
    """Area in which each row is a positive with weight ``p`` and a negative with ``1 - p``."""
    wins = np.where(scores[:, None] == scores, 0.5, scores[:, None] > scores)
    return (p @ wins @ (1 - p)) / (p.sum() * (1 - p).sum())


def test_a_model_that_predicts_the_truth_has_the_bayes_values_and_a_bent_one_its_auc(log):
    trainer = {"max_epochs": 1, "accelerator": "cpu"}
    exact, bent = (
        mtnrec.fit(log, model, trainer=trainer).metrics
        for model in (Logits, partial(Logits, slope=0.5, shift=1.0))
    )

    data = log.copy_for_run()
    data.setup()
    for split in ("val", "test"):
        cvr = true_cvr(data, split)
        auc, entropy = pairwise_auc(cvr, cvr), (entr(cvr) + entr(1 - cvr)).mean()
        wrong = expit(0.5 * np.log(cvr / (1 - cvr)) + 1)
        divergence = (rel_entr(cvr, wrong) + rel_entr(1 - cvr, 1 - wrong)).mean()
        log_losses = [run[f"{split}/cvr_all_rows_log_loss"] for run in (exact, bent)]
        assert log_losses == pytest.approx([entropy, entropy + divergence], rel=1e-6)
        aucs = [run[f"{split}/cvr_all_rows_auc"] for run in (exact, bent)]
        assert aucs == pytest.approx([auc, auc], abs=1e-6)


@pytest.mark.slow
def test_record_history_and_report_have_every_conditional_task(
    train, report, tmp_path, monkeypatch
):
    for mtn in ("false", "true"):
        train(*LOG, *LATER, f"mtn.enabled={mtn}", folder=tmp_path / mtn)
    monkeypatch.setattr(figures, "save", mark)

    report(f"runs={tmp_path}", "metric=all_rows_auc")

    record = read_json(tmp_path / "true" / "result.json")
    names = {name.partition("/")[2] for name in record["metrics"] if "all_rows" in name}
    tasks = ("conversion_given_click", "buy_given_conversion")
    metrics = ("all_rows_auc", "all_rows_log_loss")
    assert names == {f"{task}_{metric}" for task in tasks for metric in metrics}
    best = record["history"][record["best_epoch"]]
    for name in names:
        assert best[f"val/{name}"] == record["metrics"][f"val/{name}"]
    results = read_runs(tmp_path).results
    found = results[results["metric"] == "all_rows_auc"]
    assert len(found) == 2 * 2 * 2
    assert found["value"].between(0, 1).all()
    page = (tmp_path / "report" / "index.html").read_text()
    assert "AUC over all rows against the true probability" in page


def test_the_truth_cannot_choose_the_epoch(log):
    with pytest.raises(InputError, match=r"monitor must .* got 'val/cvr_all_rows_auc'"):
        mtnrec.fit(log, Logits, monitor="val/cvr_all_rows_auc")
