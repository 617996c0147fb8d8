import csv
import json

import pytest
import torch

from mtnrec.record import RunRecorder

# Dropout draws random numbers in each step; MTN learns; the best epoch is not the last.
LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
RUN = [
    *LOG,
    "data.batch_size=128",
    "optimizer.lr=0.03",
    "model.dropout=0.3",
    "mtn.enabled=true",
    "trainer.max_epochs=9",
    "patience=2",
]


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture
def kill(monkeypatch):
    """Let the next run die where a hook is called for the n-th time."""

    def arrange(hook, number):
        original, calls = getattr(RunRecorder, hook), []

        def dying(self, *arguments):
            calls.append(hook)
            if len(calls) == number:
                monkeypatch.setattr(RunRecorder, hook, original)
                raise Killed
            return original(self, *arguments)

        monkeypatch.setattr(RunRecorder, hook, dying)

    return arrange


def read_record(folder):
    return json.loads((folder / "result.json").read_text())


def outcome(folder):
    """All of a record that is no time."""
    record = read_record(folder)
    keys = ("cell", "metrics", "counts", "history", "best_epoch", "calibration_curves", "noise")
    return {key: record[key] for key in keys}


def read_csv(folder):
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (name, row["step"]): pytest.approx(float(row[name]), rel=1e-6)
        for row in rows
        for name in row
        if row[name]
    }


@pytest.fixture(scope="module")
def whole(train):
    return train(*RUN)


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_train_epoch_start", 2),
        ("on_validation_end", 3),
        ("on_test_start", 1),  # what ended the training is not forgotten
    ],
)
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    hook, number, whole, train, kill, tmp_path
):
    kill(hook, number)
    with pytest.raises(Killed):
        train(*RUN, folder=tmp_path)
    assert (tmp_path / "running.json").exists()
    assert not (tmp_path / "result.json").exists()

    train(*RUN, folder=tmp_path)

    assert outcome(tmp_path) == outcome(whole)
    assert 3 <= len(outcome(whole)["history"]) < 9  # patience ended it
    weights, expected = (
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path, whole)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert read_csv(tmp_path) == read_csv(whole)
    epochs = [f"after epoch {number - 2}" if hook != "on_test_start" else "after epoch"]
    assert f"last.ckpt, {epochs[0]}" in (tmp_path / "train.log").read_text()
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_the_moments_of_rows_go_on_where_they_were(train, kill, tmp_path):
    lazy = [*LOG, "data=synthetic_ali_ccp", "optimizer=lazy_adam", "trainer.gradient_clip_val=0.1"]
    expected = train(*lazy, "trainer.max_epochs=3")
    kill("on_validation_end", 2)
    with pytest.raises(Killed):
        train(*lazy, "trainer.max_epochs=3", folder=tmp_path)

    train(*lazy, "trainer.max_epochs=3", folder=tmp_path)

    assert "last.ckpt, after epoch 0" in (tmp_path / "train.log").read_text()
    assert outcome(tmp_path) == outcome(expected)
    assert len(outcome(tmp_path)["history"]) == 3


def test_a_resumed_run_counts_the_time_before(train, kill, tmp_path):
    kill("on_test_start", 1)
    with pytest.raises(Killed):
        train(*RUN, "logger=tensorboard", folder=tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]

    train(*RUN, "logger=tensorboard", folder=tmp_path)

    assert read_record(tmp_path)["seconds"]["fit"] > state["RunRecorder"]["fit_seconds"] > 0


def test_a_run_of_other_settings_does_not_go_on_from_the_checkpoint(train, kill, tmp_path):
    kill("on_train_epoch_start", 2)
    with pytest.raises(Killed):
        train(*RUN, folder=tmp_path)

    train(*RUN, "optimizer.lr=0.01", folder=tmp_path)

    assert "training starts anew" in (tmp_path / "train.log").read_text()
    assert read_record(tmp_path)["config"]["optimizer"]["lr"] == 0.01


def test_a_finished_run_is_kept_unless_it_shall_not_be(train, tmp_path):
    train(*LOG, "trainer.max_epochs=1", folder=tmp_path)
    record = tmp_path / "result.json"
    first = record.stat().st_mtime_ns

    train(*LOG, "trainer.max_epochs=1", folder=tmp_path)
    assert record.stat().st_mtime_ns == first
    assert "is finished; resume=false trains again" in (tmp_path / "train.log").read_text()

    train(*LOG, "trainer.max_epochs=1", "resume=false", folder=tmp_path)
    assert record.stat().st_mtime_ns > first
