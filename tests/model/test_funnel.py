"""Funnels of more than two stages: probabilities, data, training and report."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from mpmath import mp, mpf
from sklearn.metrics import roc_auc_score

from mtnrec.checks import InputError
from mtnrec.data.synthetic import Synthetic
from mtnrec.data.table import Table
from mtnrec.metric.task_metrics import TaskMetrics, bayes_aucs
from mtnrec.model.log_probabilities import funnel_log_probabilities
from mtnrec.reporting.runs import read_runs
from mtnrec.schema import Schema

STAGES = ("view", "click", "cart", "buy")
TASKS = ["view", "click_given_view", "click", "cart_given_click", "cart", "buy_given_cart", "buy"]
LOG = ["data.rows=3100", "data.click_rate=0.4", "data.conversion_rate=0.5"]
LATER = {"cart": 0.5, "buy": 0.6}


def exact(logits):
    """log P and log (1 - P) of each stage, from 150 digits."""
    mp.dps = 150
    product, found = mpf(1), []
    for logit in logits:
        product /= 1 + mp.exp(-mpf(logit))
        found.append((float(mp.log(product)), float(mp.log(1 - product))))
    return np.array(found).T


@pytest.mark.parametrize(
    "logits", [(0.5, -1.0, 2.0), (60, 60, 60), (-60, 3, -60), (40, -40, 40, 1), (2, 3, 4, 5)]
)
def test_the_probabilities_of_all_stages_are_exact_in_float64(logits):
    parts = [torch.tensor([[x]], dtype=torch.float64) for x in logits]

    positive, negative = funnel_log_probabilities(*parts)

    expected = exact(logits)
    np.testing.assert_allclose(positive[0], expected[0], rtol=4e-15)
    np.testing.assert_allclose(negative[0], expected[1], rtol=4e-15)


def test_the_tasks_are_each_label_on_all_rows_and_given_the_one_before():
    schema = Schema((), ("x",), STAGES, funnel=True)

    assert [task.name for task in schema.tasks] == TASKS
    definitions = dict(zip(TASKS, map(schema.definition, schema.tasks), strict=True))
    assert definitions["cart_given_click"] == "cart where click = 1"
    assert definitions["buy"] == "buy on all rows"


def test_labels_whose_tasks_would_have_one_name_are_refused():
    with pytest.raises(InputError, match=r"tasks must have unique names.*b_given_a"):
        Schema((), ("x",), ("a", "b", "b_given_a"), funnel=True)


@pytest.mark.parametrize("labels", [("click",), ()])
def test_a_funnel_of_one_stage_is_refused(labels):
    with pytest.raises(InputError, match="a funnel must have at least two labels"):
        Schema((), ("x",), labels, funnel=True)


def test_the_aucs_are_those_of_scikit_learn_on_the_rows_of_each_task():
    rng = np.random.default_rng(0)
    schema = Schema((), ("x",), STAGES, funnel=True)
    labels = np.cumprod(rng.random((400, 4)) < 0.7, axis=1)
    scores = funnel_log_probabilities(*torch.from_numpy(rng.normal(size=(4, 400, 1))))
    metrics = TaskMetrics(schema)
    metrics.update(scores, torch.from_numpy(labels), None)

    found = metrics.compute()

    p = scores.positive.exp().numpy()
    for task in schema.tasks:
        rows = labels[:, task.given] == 1 if task.given is not None else np.ones(400, bool)
        score = p[:, task.label] / (1 if task.given is None else p[:, task.given])
        expected = roc_auc_score(labels[rows, task.label], score[rows])
        assert found[f"{task.name}_auc"].item() == pytest.approx(expected, abs=1e-12)
        assert found[f"{task.name}_rows"].item() == rows.sum()


def test_the_log_has_the_rates_and_the_first_two_stages_of_a_shorter_one(tmp_path):
    keys = {"rows": 20_000, "click_rate": 0.3, "conversion_rate": 0.4}
    short = Synthetic(dir=tmp_path / "short", **keys)
    long = Synthetic(dir=tmp_path / "long", later_stages=LATER, **keys)
    for log in (short, long):
        log.prepare_data()
        log.setup()

    assert long.schema.labels == ("click", "conversion", "cart", "buy")
    p, q = (log.column("test", "probabilities") for log in (short, long))
    labels = long.split_labels("test")
    np.testing.assert_allclose(q[:, :2], p)
    rates = q.mean(axis=0)[1:] / q.mean(axis=0)[:-1]
    np.testing.assert_allclose(rates[1:], list(LATER.values()), rtol=0.05)
    assert (np.diff(labels.astype(int), axis=1) <= 0).all()
    aucs = bayes_aucs(long.schema, q, labels)
    carted = labels[:, 2] == 1
    expected = roc_auc_score(labels[carted, 3], q[carted, 3] / q[carted, 2])
    assert aucs["buy_given_cart_bayes_auc"] == pytest.approx(expected)


@pytest.fixture
def shop():
    rng = np.random.default_rng(0)
    labels = np.cumprod(rng.random((600, 4)) < 0.7, axis=1)
    frame = pd.DataFrame(labels, columns=list(STAGES))
    return frame.assign(x=rng.random(600), brand=rng.integers(0, 5, 600))


def test_a_table_is_checked_stage_by_stage(shop):
    data = Table(train=shop, labels=list(STAGES), funnel=True)
    data.prepare_data()
    data.setup()
    assert [task.name for task in data.schema.tasks] == TASKS

    shop.loc[7, ["view", "click", "cart", "buy"]] = [1, 0, 0, 1]
    with pytest.raises(InputError, match="each label of a funnel the one before it"):
        Table(train=shop, labels=list(STAGES), funnel=True).prepare_data()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["esmm", "mmoe"])
def test_models_train_on_four_stages_with_mtn(model, train, tmp_path):
    stages = "data.later_stages={cart:0.5,buy:0.6}"
    for mtn in ("false", "true"):
        keys = [*LOG, stages, "monitor=val/buy_auc", f"mtn.enabled={mtn}"]
        train(*keys, model=model, folder=tmp_path / "runs" / mtn)

    record = json.loads((tmp_path / "runs" / "true" / "result.json").read_text())
    names = ["click", "conversion_given_click", "conversion", "cart_given_conversion", "cart"]
    names += ["buy_given_cart", "buy"]
    assert {f"test/{name}" for name in names} == {k for k in record["counts"] if k[:5] == "test/"}
    assert read_runs(tmp_path / "runs").tasks == names
