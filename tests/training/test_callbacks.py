"""Callbacks of the user's own, and the keys and code that a run warns of."""

import json
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from shared_fixtures import Killed

import mtnrec
from mtnrec.checks import InputError
from mtnrec.command.compose import compose_run
from mtnrec.command.config import resolve_settings
from mtnrec.run.identity import result_settings

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
SCALED = "own_callbacks.Scaled"
MODULE = '''
import lightning as L
import torch

class Scaled(L.Callback):
    """Shrinks all weights a little after each epoch, and draws random numbers for it."""

    def __init__(self, rate: float = 0.1, token: str = "", note: str = "") -> None:
        self.rate, self.token, self.note = rate, token, note
        self.epochs = 0

    @property
    def state_key(self):
        return f"Scaled{self.rate}"

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 - self.rate * torch.rand(1).item() / self.epochs)
        with open(f"{trainer.default_root_dir}/order.txt", "a") as file:
            file.write(f"{self.rate} ")

class NotOne:
    pass
'''


@pytest.fixture(autouse=True)
def _own_module(tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_callbacks", raising=False)


def read_record(folder):
    return json.loads((folder / "result.json").read_text())


def test_callbacks_run_in_order_and_are_part_of_the_run(train, tmp_path):
    plain = train(*LOG)
    two = f"callbacks={{a:{{_target_:{SCALED},rate:0.2}},b:{{_target_:{SCALED},rate:0.1}}}}"

    folder = train(*LOG, two, folder=tmp_path / "run")

    assert (folder / "order.txt").read_text() == "0.2 0.1 0.2 0.1 "
    record, expected = read_record(folder), read_record(plain)
    assert record["metrics"] != expected["metrics"]
    assert record["cell"] != expected["cell"]
    assert record["sources"].keys() == {"own_callbacks"}


@pytest.mark.slow
def test_a_list_of_callbacks_is_accepted_on_the_command_line(train, tmp_path):
    folder = train(
        *LOG, f"callbacks=[{{_target_:{SCALED}}}]", "trainer.max_epochs=1", folder=tmp_path
    )

    assert (folder / "order.txt").read_text() == "0.1 "


@pytest.mark.slow
def test_a_killed_run_with_a_callback_ends_with_the_bits_of_an_uninterrupted_one(
    train, kill, tmp_path
):
    run = [*LOG, f"+callbacks.mine._target_={SCALED}", "trainer.max_epochs=3", "model.dropout=0.2"]
    whole = train(*run)
    kill("on_train_epoch_start", 3)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path / "run")

    folder = train(*run, folder=tmp_path / "run")

    assert "last.ckpt, after epoch 1" in (folder / "train.log").read_text()
    paths = (f / "checkpoints" / "best.ckpt" for f in (whole, folder))
    expected, found = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_record(folder)["metrics"] == read_record(whole)["metrics"]


@pytest.mark.slow
def test_a_choice_of_the_group_logs_with_every_logger(train, tmp_path):
    folder = train(
        *LOG, "callbacks=learning_rate", "logger=[csv,tensorboard]", "trainer.max_epochs=1"
    )

    assert "lr-Adam" in (folder / "csv" / "metrics.csv").read_text()
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.callbacks=[{_target_:own_callbacks.Scaled}]", "trainer.callbacks must be left"),
        ("+callbacks.mine._target_=own_callbacks.NotOne", "callbacks.mine must be a Lightning cal"),
        ("+callbacks.mine.rate=1", "callbacks.mine must be a Lightning callback, got {'rate': 1}"),
        (
            f"callbacks={{a:{{_target_:{SCALED}}},b:{{_target_:{SCALED}}}}}",
            "callbacks must have different state keys, got Scaled0.1 twice",
        ),
    ],
)
def test_what_is_not_a_callback_of_the_run_is_refused(override, message, train, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(*LOG, override, folder=tmp_path / "run")

    assert message in stop.value.code


def settings(*callbacks):
    return result_settings(resolve_settings(compose_run({"callbacks": callbacks}, KEYS)))


KEYS = {"output_dir": "", "data_root": "data"}


def test_python_and_the_command_line_name_the_same_callbacks(compose_config):
    command = compose_config(
        "callbacks=learning_rate", "+callbacks.mine={_target_:own_callbacks.Scaled,rate:0.3}"
    )
    own = __import__("own_callbacks").Scaled
    expected = result_settings(resolve_settings(command))["callbacks"]
    epoch = LearningRateMonitor(logging_interval="epoch")

    assert settings("learning_rate", partial(own, rate=0.3))["callbacks"] == expected
    (_, described) = settings("learning_rate", own(rate=0.3))["callbacks"]
    assert described == {**expected[1], "token": "", "note": ""}
    assert settings(epoch, own(0.3))["callbacks"][0].items() >= expected[0].items()
    assert settings("learning_rate", {"_target_": SCALED, "rate": 0.3})["callbacks"] == expected
    assert settings("learning_rate", own)["callbacks"][1] == {"_target_": SCALED}
    assert "callbacks" not in settings()


def test_a_callback_whose_arguments_are_not_known_is_refused():
    class Forgetful(L.Callback):
        def __init__(self, rate):
            pass

    with pytest.raises(InputError, match="callbacks must be an object that stores the arguments"):
        settings(Forgetful(1))


@pytest.mark.slow
def test_fit_runs_callbacks(tmp_path):
    data = mtnrec.Synthetic(rows=2000, click_rate=0.2, conversion_rate=0.3, batch_size=512)
    own = __import__("own_callbacks").Scaled

    run = mtnrec.fit(
        data,
        {"embedding_dim": 4, "tower_widths": [8]},
        callbacks=[own(0.2), own],
        logger=["csv", "tensorboard"],
        trainer={"max_epochs": 1, "accelerator": "cpu"},
    )

    assert (run.folder / "order.txt").read_text() == "0.2 0.1 "
    assert {"csv", "tensorboard"} <= {path.name for path in run.folder.iterdir()}


@pytest.mark.slow
def test_a_finished_run_of_other_sources_is_kept_with_a_warning(train, tmp_path):
    run = [*LOG, f"+callbacks.mine._target_={SCALED}", "trainer.max_epochs=1"]
    folder = train(*run, folder=tmp_path / "run")
    before = read_record(folder)
    (tmp_path / "own_callbacks.py").write_text(MODULE + "# edited\n")

    train(*run, folder=folder)

    assert read_record(folder) == before
    log = (folder / "train.log").read_text()
    assert "1 finished run is kept, made by other code (source of own_callbacks has changed)" in log


@pytest.mark.slow
def test_an_interrupted_run_of_other_sources_restarts(train, kill, tmp_path):
    run = [*LOG, f"+callbacks.mine._target_={SCALED}", "trainer.max_epochs=2"]
    kill("on_train_epoch_start", 2)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path / "run")
    (tmp_path / "own_callbacks.py").write_text(MODULE + "# edited\n")

    folder = train(*run, folder=tmp_path / "run")

    log = (folder / "train.log").read_text()
    assert "(source of own_callbacks has changed): training restarts" in log
    assert "resumes from" not in log


def test_the_record_names_machine_commits_and_why_it_stopped(train):
    record = read_record(train(*LOG, "trainer.max_epochs=1"))

    assert record["machine"].keys() == {
        *("host", "os", "processor", "cores", "memory_bytes", "gpus"),
    }
    assert record["commits"].keys() == {"working_directory", "mtnrec"}
    assert record["sources"] == {}
    assert record["stopped"] == "ended after all 1 epoch of trainer.max_epochs"


def test_a_secret_reaches_no_file_of_a_run(train, tmp_path, monkeypatch):
    variable, literal = "4f2a9c81d7e6b3", "9e8d7c6b5a43"
    monkeypatch.setenv("MY_TOKEN", variable)
    run = [
        *LOG,
        f"+callbacks.a={{_target_:{SCALED},note:x,token:{literal}}}",
        "trainer.max_epochs=1",
    ]
    run += ["callbacks.a.note='${oc.env:MY_TOKEN}'", "logger=[csv,tensorboard]"]
    train(*run, folder=tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train(*run, "data.rows=0", folder=tmp_path / "failed")

    files = (*tmp_path.glob("run/**/*"), *tmp_path.glob("failed/**/*"))
    for path in filter(Path.is_file, files):
        for secret in (variable, literal):
            assert secret.encode() not in path.read_bytes(), path
    assert (tmp_path / "failed" / "failure.json").is_file()
    assert literal not in str(stop.value.code)
