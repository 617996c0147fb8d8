import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtnrec.checks import InputError
from mtnrec.run import folder as folder_module
from mtnrec.run.folder import (
    RunFolderBusyError,
    State,
    clear_earlier_run,
    lock_run_folder,
    report_progress,
    run_state,
)
from mtnrec.system import files


def test_a_run_goes_from_waiting_to_running_to_finished(tmp_path):
    folder = tmp_path / "run"

    assert run_state(folder) is State.WAITING
    with lock_run_folder(folder, ["seed=0"], ["command"]):
        assert run_state(folder) is State.RUNNING
        report_progress(folder, {"epochs": 3})
        running = json.loads((folder / "running.json").read_text())
        assert (running["pid"], running["epochs"]) == (os.getpid(), 3)
        (folder / "result.json").write_text("{}")
    assert run_state(folder) is State.FINISHED
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "result.json"]


def test_a_failure_is_written_with_the_command_that_repeats_the_run(tmp_path):
    with pytest.raises(InputError), lock_run_folder(tmp_path, ["seed=0"], ["run", "me"]):
        raise InputError("seed must be 1")

    failure = json.loads((tmp_path / "failure.json").read_text())
    assert run_state(tmp_path) is State.FAILED
    assert (failure["error"], failure["message"]) == ("InputError", "seed must be 1")
    assert (failure["overrides"], failure["command"]) == (["seed=0"], "run me")
    assert "test_folder.py" in failure["traceback"]


def test_a_new_attempt_deletes_the_failure(tmp_path):
    with pytest.raises(ValueError, match="bad"), lock_run_folder(tmp_path, [], []):
        raise ValueError("bad")

    with lock_run_folder(tmp_path, [], []):
        assert not (tmp_path / "failure.json").exists()
    assert run_state(tmp_path) is State.WAITING


def test_two_processes_cannot_hold_the_same_folder(tmp_path):
    with (
        lock_run_folder(tmp_path, [], []),
        pytest.raises(RunFolderBusyError, match=rf"\({os.getpid()} on ") as info,
        lock_run_folder(tmp_path, [], []),
    ):
        pass

    assert "is in use by another process" in str(info.value)
    assert not (tmp_path / "failure.json").exists()


def test_reading_the_state_blocks_no_run(tmp_path):
    with lock_run_folder(tmp_path, [], []):
        pass

    with (tmp_path / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with lock_run_folder(tmp_path, [], []):
            assert run_state(tmp_path) is State.RUNNING


def _hold(folder, ready):
    with lock_run_folder(folder, [], []):
        ready.set()
        signal.pause()


def assert_interrupted_when_killed(hold, folder):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    assert run_state(folder) is State.RUNNING

    process.kill()
    process.join()

    assert run_state(folder) is State.INTERRUPTED
    with lock_run_folder(folder, [], []):
        assert run_state(folder) is State.RUNNING


def test_a_killed_process_leaves_an_interrupted_run(tmp_path):
    assert_interrupted_when_killed(_hold, tmp_path)


def read_running(folder):
    return json.loads((folder / "running.json").read_text())


def test_a_run_writes_a_heartbeat_and_keeps_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "HEARTBEAT", 0.01)
    with lock_run_folder(tmp_path, [], []):
        report_progress(tmp_path, {"epochs": 3})
        first = read_running(tmp_path)
        while read_running(tmp_path)["heartbeat"] == first["heartbeat"]:
            time.sleep(0.01)

        assert read_running(tmp_path) == first | {"heartbeat": pytest.approx(time.time(), abs=5)}
    time.sleep(0.05)
    assert not (tmp_path / "running.json").exists()


def _without_locks(fd, operation):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr("fcntl.flock", _without_locks)
    monkeypatch.setattr(files, "_warned", set())


def test_a_run_is_held_and_followed_on_a_file_system_without_locks(
    no_locks, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(files, "STALE", 0.1)
    monkeypatch.setattr(files, "HEARTBEAT", 0.05)
    folder = tmp_path / "run"
    with lock_run_folder(folder, [], []):
        assert run_state(folder) is State.RUNNING
        with pytest.raises(RunFolderBusyError), lock_run_folder(folder, [], []):
            pass
        assert run_state(folder) is State.RUNNING
    assert run_state(folder) is State.WAITING
    with lock_run_folder(tmp_path / "other", [], []):
        (tmp_path / "other" / "result.json").write_text("{}")
    assert run_state(tmp_path / "other") is State.FINISHED

    (record,) = caplog.records
    assert "has no locks (No locks available)" in record.getMessage()


def _hold_without_locks(folder, ready):
    fcntl.flock = _without_locks
    _hold(folder, ready)


def test_a_killed_process_is_noticed_at_once_on_its_machine_without_locks(no_locks, tmp_path):
    assert_interrupted_when_killed(_hold_without_locks, tmp_path)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EROFS])
@pytest.mark.parametrize(
    ("host", "age", "state"),
    [
        ("elsewhere", 60, State.RUNNING),
        ("elsewhere", 180, State.INTERRUPTED),
        (socket.gethostname(), 60, State.RUNNING),
        (socket.gethostname(), 180, State.INTERRUPTED),
    ],
)
def test_an_old_heartbeat_tells_an_interrupted_run_if_the_lock_cannot(
    tmp_path, monkeypatch, error, host, age, state
):
    def refuse(fd, operation):
        raise OSError(error, os.strerror(error))

    with lock_run_folder(tmp_path, [], []):
        running = read_running(tmp_path)
    running |= {"host": host, "heartbeat": time.time() - age}
    (tmp_path / "running.json").write_text(json.dumps(running))
    monkeypatch.setattr("fcntl.flock", refuse)

    assert run_state(tmp_path) is state


def test_readers_do_not_take_each_other_for_the_run(tmp_path):
    with lock_run_folder(tmp_path, [], []):
        running = (tmp_path / "running.json").read_text()
    (tmp_path / "running.json").write_text(running)

    with ThreadPoolExecutor(4) as pool:
        states = set(pool.map(run_state, [tmp_path] * 200))

    assert states == {State.INTERRUPTED}


@pytest.mark.parametrize("resumes", [False, True])
def test_a_restart_clears_what_an_earlier_training_logged(resumes, tmp_path):
    logs = ["csv/metrics.csv", "tensorboard/events.1"]
    kept = ["spectra/epoch_000.npz", "wandb/wandb-resume.json"]
    always = ["wandb/offline-run-1/run-1.wandb", "train.log"]
    for name in (*logs, *kept, *always):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    clear_earlier_run(tmp_path, resumes=resumes)

    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {*always, *(kept if resumes else [])}


def test_secrets_are_hidden_in_the_files_of_a_run(tmp_path):
    words = ["a.token=abc"]
    with lock_run_folder(tmp_path, words, words):
        assert "abc" not in (tmp_path / "running.json").read_text()

    with pytest.raises(InputError), lock_run_folder(tmp_path, words, words):
        raise InputError("token='abc' is refused")

    assert "abc" not in (tmp_path / "failure.json").read_text()
