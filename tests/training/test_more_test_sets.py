"""Test sets besides ``test``: each is read once, and changes nothing about the others."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from stress.ddp import MODELS, compare
from stress.ddp import train as train_apart

import mtnrec
from mtnrec.checks import InputError
from mtnrec.data.table import Table
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.scores import comparisons
from mtnrec.serving.scorer import load_checkpoint
from mtnrec.training.recorder import RunRecorder

LABELS = ["click", "buy"]
ROWS = {"train": 700, "test": 150, "random": 230}


def draw(rows, seed):
    rng = np.random.default_rng(seed)
    price = rng.normal(size=rows)
    click = rng.random(rows) < 1 / (1 + np.exp(-price))
    return pd.DataFrame(
        {
            "shop": rng.integers(0, 9, rows),
            "price": price,
            "user": rng.integers(0, 20, rows),
            "click": click.astype(int),
            "buy": (click & (rng.random(rows) < 0.5)).astype(int),
        }
    )


@pytest.fixture(scope="module")
def frames():
    return {name: draw(rows, seed) for seed, (name, rows) in enumerate(ROWS.items())}


@pytest.fixture(scope="module")
def keys(frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    return [
        *("data=table", "data.labels=[click,buy]", "data.funnel=true", "data.group=user"),
        *(f"data.{name}={folder}/{name}.csv" for name in ("train", "test")),
        f"data.tests={{random:{folder}/random.csv}}",
        f"data.dir={folder}/prepared",
    ]


@pytest.fixture(scope="module")
def run(train, keys):
    return train(*keys, model="mmoe")


def read(folder):
    return json.loads((folder / "result.json").read_text())


def in_split(values, split):
    return {key.partition("/")[2]: v for key, v in values.items() if key.startswith(f"{split}/")}


def test_a_further_test_set_is_measured_as_the_test_set_is(run, frames):
    record = read(run)

    assert record["data"]["rows"] == {"train": 560, "val": 140, "test": 150, "test_random": 230}
    frame = frames["random"]
    scores = load_checkpoint(run, "cpu").score(frame)
    for task, label in (("ctr", "click"), ("ctcvr", "buy")):
        auc = roc_auc_score(frame[label], scores[task])
        assert record["metrics"][f"test_random/{task}_auc"] == pytest.approx(auc, abs=1e-6)
        loss = log_loss(frame[label], scores[task])
        assert record["metrics"][f"test_random/{task}_log_loss"] == pytest.approx(loss, rel=1e-5)
        count = {"rows": 230, "positives": int(frame[label].sum())}
        assert record["counts"][f"test_random/{task}"] == count
    found = {split: in_split(record["metrics"], split).keys() for split in ("test", "test_random")}
    assert found["test_random"] == found["test"]
    curves = in_split(record["calibration_curves"], "test_random")
    assert sum(curves["ctr"]["rows"]) == 230


@pytest.mark.slow
def test_a_further_test_set_changes_nothing_else(run, keys, train, tmp_path):
    without = [key for key in keys if not key.startswith(("data.tests", "data.dir"))]

    record, alone = read(run), read(train(*without, f"data.dir={tmp_path}/alone", model="mmoe"))

    for key in ("metrics", "counts", "calibration_curves"):
        kept = {name: v for name, v in record[key].items() if not name.startswith("test_random/")}
        assert kept == alone[key]
    for key in ("history", "best_epoch", "expert_distances"):
        assert record[key] == alone[key]
    parameters = record["data"]["parameters"]
    assert parameters.pop("tests")["random"][0][0] == "random.csv"
    assert parameters == alone["data"]["parameters"]


def test_each_test_set_is_logged_once(run):
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    for name in ("test/ctr_auc", "test_random/ctr_auc", "test_random/mean_auc"):
        assert len([row for row in rows if row[name]]) == 1


@pytest.mark.slow
def test_a_run_that_was_interrupted_at_the_test_resumes(run, keys, train, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "on_test_start", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            train(*keys, model="mmoe", folder=tmp_path)

    train(*keys, model="mmoe", folder=tmp_path)

    for key in ("metrics", "counts", "history", "expert_distances"):
        assert read(tmp_path)[key] == read(run)[key]


@pytest.mark.slow
def test_the_commands_take_a_further_test_set(run, keys, predict, evaluate, report, tmp_path):
    data = [key for key in keys if key.startswith(("data=", "data.dir"))]
    split = "split=test_random"

    evaluate(f"checkpoint={run}", *data, split, f"out={tmp_path}/metrics.json")
    predict(f"checkpoint={run}", *data, split, f"out={tmp_path}/scores.parquet")
    report(f"runs={run}", f"out={tmp_path}/report", split)

    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    record = read(run)
    for task in ("ctr", "cvr", "ctcvr"):
        key = f"test_random/{task}_auc"
        assert found[f"{task}_auc"] == pytest.approx(record["metrics"][key], abs=1e-6)
    assert len(pd.read_parquet(tmp_path / "scores.parquet")) == 230
    cells = comparisons(read_runs(run).results, split="test_random")
    expected = [record["metrics"][f"test_random/{task}_auc"] for task in cells["task"]]
    assert cells["mean"].tolist() == pytest.approx(expected)
    assert "AUC on the test_random rows" in (tmp_path / "report" / "index.html").read_text()


def test_the_description_has_every_test_set(run, keys, describe, capsys, frames):
    describe(*(key for key in keys if key.startswith(("data=", "data.dir"))))

    (line,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:4] == ["test_random", "CTCVR", "buy", "on"]
    ]
    assert f"{frames['random']['buy'].sum()}" in line.split()


def test_a_damaged_test_set_is_found(frames, tmp_path):
    tables = {"train": frames["train"], "test": frames["test"]}
    more = {"tests": {"random": frames["random"]}, "labels": LABELS, "funnel": True}
    made = Table(**tables, **more, dir=tmp_path / "set")
    made.prepare_data()
    path = tmp_path / "set" / "test_random" / "labels.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"test_random/labels\.npy has SHA-256"):
        Table(dir=tmp_path / "set").prepare_data()


def test_a_further_frame_is_a_test_set_in_python(frames, tmp_path):
    data = Table(
        train=frames["train"],
        test=frames["test"],
        tests={"random": frames["random"]},
        labels=LABELS,
        funnel=True,
    )

    run = mtnrec.fit(data, {"embedding_dim": 4, "tower_widths": [8]}, trainer={"max_epochs": 1})

    frame = frames["random"]
    auc = roc_auc_score(frame["click"], run.score(frame)["ctr"])
    assert run.metrics["test_random/ctr_auc"] == pytest.approx(auc, abs=1e-6)
    assert run.record.config["data"]["tests"] == {"random": "<DataFrame>"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, about evaluating here
def test_two_processes_measure_every_test_set_exactly(keys, tmp_path):
    own = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    own += ["trainer.precision=64-true", "threads=1", "model.embedding_dim=4", *MODELS["mmoe"]]

    train_apart(tmp_path, *keys, *own)

    assert compare(tmp_path, tmp_path).metrics_equal
    assert read(tmp_path)["counts"]["test_random/ctr"]["rows"] == ROWS["random"]
