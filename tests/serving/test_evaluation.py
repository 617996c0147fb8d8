"""Metrics of labelled rows are those of the training's test, and of scikit-learn."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mtnrec import load_checkpoint


def evaluated(evaluate, tmp_path, *overrides):
    evaluate(*overrides, f"out={tmp_path}/metrics.json")
    return json.loads((tmp_path / "metrics.json").read_text())


def test_the_test_split_has_the_metrics_of_the_record(shop, evaluate, tmp_path):
    run, _, data = shop
    record = json.loads((run / "result.json").read_text())

    found = evaluated(evaluate, tmp_path, f"checkpoint={run}", *data)

    assert found["rows"] == 90
    for task, counts in ((name, record["counts"][f"test/{name}"]) for name in ("ctr", "cvr")):
        assert found["metrics"][f"{task}_rows"] == counts["rows"]
        assert found["metrics"][f"{task}_positives"] == counts["positives"]
    recorded = {k.removeprefix("test/"): v for k, v in record["metrics"].items() if "test" in k}
    assert {key: found["metrics"][key] for key in recorded} == pytest.approx(recorded, rel=1e-6)


def test_a_table_has_the_metrics_of_scikit_learn(shop, evaluate, tmp_path, capsys):
    run, rows, _ = shop
    rows.to_csv(tmp_path / "rows.csv", index=False)
    scores = load_checkpoint(run, "cpu").score(rows).astype(np.float64)
    clicked = rows["click"] == 1

    table = f"table={tmp_path}/rows.csv"
    metrics = evaluated(evaluate, tmp_path, f"checkpoint={run}", table, "batch_size=7")["metrics"]

    for task, label, chosen in (
        ("ctr", "click", slice(None)),
        ("cvr", "buy", clicked),
        ("ctcvr", "buy", slice(None)),
    ):
        truth, score = rows[label][chosen], scores[task][chosen]
        assert metrics[f"{task}_auc"] == pytest.approx(roc_auc_score(truth, score))
        assert metrics[f"{task}_log_loss"] == pytest.approx(log_loss(truth, score), rel=1e-5)
        assert metrics[f"{task}_calibration"] == pytest.approx(score.sum() / truth.sum(), rel=1e-5)
    assert "buy where click = 1" in capsys.readouterr().out


def test_the_grouped_auc_is_that_of_the_column(shop, evaluate, tmp_path):
    run, rows, _ = shop
    rows = rows.assign(user=[f"u{row % 9}" for row in range(90)])
    rows.to_parquet(tmp_path / "rows.parquet")
    scores = load_checkpoint(run, "cpu").score(rows)["ctr"].astype(np.float64)
    aucs, weights = [], []
    for _, part in rows.groupby("user"):
        if part["click"].nunique() == 2:
            aucs.append(roc_auc_score(part["click"], scores[part.index]))
            weights.append(len(part))

    table = f"table={tmp_path}/rows.parquet"
    found = evaluated(evaluate, tmp_path, f"checkpoint={run}", table, "group=user")["metrics"]

    assert found["ctr_grouped_auc"] == pytest.approx(np.average(aucs, weights=weights))
    assert found["ctr_grouped_share"] == pytest.approx(sum(weights) / 90)


def test_groups_that_are_too_small_do_not_count(shop, evaluate, tmp_path):
    run, rows, _ = shop
    rows = rows.assign(user=["many"] * 30 + [f"u{row % 20}" for row in range(60)])
    rows.to_parquet(tmp_path / "rows.parquet")
    scores = load_checkpoint(run, "cpu").score(rows)["ctr"].astype(np.float64)

    keys = [f"table={tmp_path}/rows.parquet", "group=user", "min_group_rows=4"]
    found = evaluated(evaluate, tmp_path, f"checkpoint={run}", *keys)["metrics"]

    auc = roc_auc_score(rows["click"][:30], scores[:30])
    assert found["ctr_grouped_auc"] == pytest.approx(auc)
    assert found["ctr_grouped_share"] == pytest.approx(30 / 90)


def test_groups_do_not_depend_on_the_types_of_the_files(shop, evaluate, tmp_path):
    run, rows, _ = shop
    rows = rows.assign(user=[row % 9 for row in range(90)])
    found = []
    for number, as_type in enumerate((int, float)):
        parts = tmp_path / str(number)
        parts.mkdir()
        rows[:40].to_parquet(parts / "0.parquet")
        rows[40:].astype({"user": as_type}).to_parquet(parts / "1.parquet")
        metrics = evaluated(evaluate, tmp_path, f"checkpoint={run}", f"table={parts}", "group=user")
        found.append(metrics["metrics"]["ctr_grouped_auc"])

    assert found[0] == found[1]


@pytest.fixture(scope="module")
def ratings(train, tmp_path_factory):
    """Rows with a label that is rather low, by two settings of the positive value."""
    folder = tmp_path_factory.mktemp("ratings")
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 5, 500)
    stars = np.clip(shop + rng.integers(0, 2, 500), 1, 5)
    rows = pd.DataFrame({"shop": shop, "stars": stars, "low": np.where(stars > 2, "No", "Yes")})
    rows.to_csv(folder / "rows.csv", index=False)

    def run(label, positive):
        data = ["data=table", f"data.train={folder}/rows.csv", f"data.labels=[{label}]"]
        data += [f"data.exclude={[name for name in ('stars', 'low') if name != label]}"]
        data += [f"data.positive={positive}", f"data.dir={folder}/{label}"]
        return train(*data, f"monitor=val/{label}_auc", model="shared_bottom")

    return run, rows


@pytest.mark.parametrize(("label", "positive"), [("low", "'yes'"), ("stars", "[1,2]")])
@pytest.mark.slow
def test_labels_are_read_with_the_positive_values_of_the_training(
    label, positive, ratings, evaluate, predict, tmp_path, capsys
):
    make, rows = ratings
    run = make(label, positive)
    rows.to_parquet(tmp_path / "rows.parquet")
    keys = [f"checkpoint={run}", f"table={tmp_path}/rows.parquet"]

    found = evaluated(evaluate, tmp_path, *keys)["metrics"]

    truth, scores = rows["stars"] <= 2, load_checkpoint(run, "cpu").score(rows)[label]
    assert found[f"{label}_positives"] == truth.sum()
    assert found[f"{label}_auc"] == pytest.approx(roc_auc_score(truth, scores))
    capsys.readouterr()
    predict(*keys, f"out={tmp_path}/scores.csv")
    assert f"{truth.mean():.6f}" in capsys.readouterr().out
    if label == "low":  # under a single positive value, 0 and 1 are not its opposite
        rows.assign(low=truth.astype(int)).to_csv(tmp_path / "rows.csv", index=False)
        with pytest.raises(SystemExit, match=r"line \d+: a label must be .* data.positive=yes"):
            evaluate(keys[0], f"table={tmp_path}/rows.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"click": None}, "the table must have the labels click, buy to be evaluated"),
        ({"click": ["maybe"] + ["1"] * 89}, r"rows.csv, line 2: a label must be 0 or 1 \(click"),
        (
            {"click": pd.array([1] * 89 + [None], "Int64")},
            r"rows.csv, line 91: a label must be 0 or 1",
        ),
        ({"click": 0, "buy": 1}, r"line 2: a conversion must have a click"),
        ({"user": ["a"] * 5 + [None] * 85}, r"line 7, column 'user': a group must not be missing"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_named(change, message, shop, evaluate, tmp_path):
    run, rows, _ = shop
    rows = rows.assign(user="a").assign(**change)
    if change.get("click", "") is None:
        rows = rows.drop(columns="click")
    rows.to_csv(tmp_path / "rows.csv", index=False)

    with pytest.raises(SystemExit, match=message):
        evaluate(f"checkpoint={run}", f"table={tmp_path}/rows.csv", "group=user")


def test_a_row_without_labels_is_no_reason_against_scores(shop, predict, tmp_path):
    run, rows, _ = shop
    rows.assign(click=["?"] * 90).to_csv(tmp_path / "rows.csv", index=False)

    predict(f"checkpoint={run}", f"table={tmp_path}/rows.csv", f"out={tmp_path}/scores.csv")

    assert len(pd.read_csv(tmp_path / "scores.csv")) == 90
