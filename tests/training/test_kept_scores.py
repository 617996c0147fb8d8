"""``keep_scores=true``: the file of the test rows' scores against the record and the data."""

from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from shared_fixtures import Killed
from sklearn.metrics import roc_auc_score
from stress.ddp import MODELS, settings
from stress.ddp import train as train_apart

from mtnrec.data.prepared.store import open_prepared
from mtnrec.metric.task_metrics import MeasuredRows
from mtnrec.run.record import RunRecord
from mtnrec.run.scores import read_scores
from mtnrec.training.kept_scores import to_scores

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]


@pytest.fixture(scope="module")
def kept(train):
    return train(*LOG, "keep_scores=true")


def record_of(folder):
    return RunRecord.read(folder / "result.json")


def assert_aucs_are_the_records(folder, name="test"):
    frame = polars.read_parquet(folder / "scores" / f"{name}.parquet")
    metrics = record_of(folder).metrics
    for task in ("ctr", "cvr", "ctcvr"):
        rows = frame.drop_nulls(f"score/{task}")
        auc = roc_auc_score(rows[f"label/{task}"], rows[f"score/{task}"])
        assert auc == pytest.approx(metrics[f"{name}/{task}_auc"], rel=0, abs=1e-12)


def test_the_aucs_of_the_kept_scores_are_those_of_the_record(kept):
    assert_aucs_are_the_records(kept)


def test_the_rows_are_those_of_the_prepared_test_set_in_its_order(kept):
    record = record_of(kept)
    arrays = open_prepared(Path(record.config["data"]["dir"]))[1]["test"]

    frame = polars.read_parquet(kept / "scores" / "test.parquet")

    click, conversion = arrays["labels"].T.astype(bool)
    np.testing.assert_array_equal(frame["label/ctr"], click)
    np.testing.assert_array_equal(frame["label/ctcvr"], conversion)
    np.testing.assert_array_equal(frame["label/cvr"].drop_nulls(), conversion[click])
    np.testing.assert_array_equal(frame["group"], arrays["group"])


@pytest.mark.slow
def test_training_does_not_depend_on_whether_scores_are_kept(kept, train):
    without = train(*LOG)

    found, expected = record_of(kept), record_of(without)
    assert found.metrics == expected.metrics
    assert (found.cell, found.identity.arm) == (expected.cell, expected.identity.arm)
    assert expected.scores == {}
    assert not (without / "scores").exists()


@pytest.mark.slow
def test_a_finished_run_without_scores_is_kept_with_a_warning(train):
    folder = train(*LOG, "trainer.max_epochs=1")

    train(*LOG, "trainer.max_epochs=1", "keep_scores=true", folder=folder)

    log = (folder / "train.log").read_text()
    assert "1 finished run is kept without scores, made without keep_scores=true. Set" in log


@pytest.mark.slow
def test_a_sweep_warns_once_of_its_finished_runs_without_scores(train, capsys):
    sweep = [*LOG, "trainer.max_epochs=1", "hydra.mode=MULTIRUN", "seed=0,1"]
    folder = train(*sweep)

    train(*sweep, "keep_scores=true", folder=folder)

    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count("2 finished runs are kept without scores") == 1


@pytest.mark.slow
def test_a_killed_run_keeps_the_scores_of_an_uninterrupted_one(kept, train, kill, tmp_path):
    kill("on_test_start", 1)
    with pytest.raises(Killed):
        train(*LOG, "keep_scores=true", folder=tmp_path)

    train(*LOG, "keep_scores=true", folder=tmp_path)

    assert record_of(tmp_path).scores == record_of(kept).scores


@pytest.mark.slow
def test_training_again_without_the_key_deletes_the_scores(train):
    folder = train(*LOG, "trainer.max_epochs=1", "keep_scores=true")

    train(*LOG, "trainer.max_epochs=1", "resume=false", folder=folder)

    assert not (folder / "scores").exists()


@pytest.mark.slow
def test_two_processes_keep_the_rows_in_the_order_of_one(tmp_path, train):
    keys = [*MODELS["esmm"], f"data_root={tmp_path / 'data'}", "keep_scores=true"]
    for devices in (1, 2):
        own = settings(mtn=False, option="none", devices=devices)
        train_apart(tmp_path / str(devices), *keys, *own)

    assert_aucs_are_the_records(tmp_path / "2")
    one, two = (
        read_scores(tmp_path / name, "test", record_of(tmp_path / name).scores["test"])
        for name in ("1", "2")
    )
    np.testing.assert_array_equal(one.groups, two.groups)
    for task, scores in one.scores.items():
        np.testing.assert_array_equal(one.labels[task], two.labels[task])
        np.testing.assert_allclose(two.scores[task], scores, rtol=1e-6)


def test_scores_in_half_precision_lose_no_bits(funnel_schema):
    positive = torch.linspace(-9, -0.01, 60, dtype=torch.bfloat16).view(30, 2)
    labels = torch.zeros(30, 2, dtype=torch.uint8)
    labels[:5, 0] = 1

    found = to_scores(funnel_schema, MeasuredRows(positive, labels, None))

    assert found.scores["ctr"].dtype == np.float32
    np.testing.assert_array_equal(found.scores["ctr"], positive[:, 0].double())
    assert np.isnan(found.scores["cvr"]).tolist() == [False] * 5 + [True] * 25


def test_the_flag_must_be_one(train):
    with pytest.raises(SystemExit, match="keep_scores"):
        train(*LOG, "keep_scores=perhaps")
