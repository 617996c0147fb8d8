import fcntl
import json
import multiprocessing
import os
import signal
import threading

import pytest

from mtnrec.checks import InputError
from mtnrec.run.folder import RunFolderBusyError, State, lock_run_folder, report_progress, run_state


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


def test_a_killed_process_leaves_an_interrupted_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    assert run_state(tmp_path) is State.RUNNING

    process.kill()
    process.join()

    assert run_state(tmp_path) is State.INTERRUPTED
    with lock_run_folder(tmp_path, [], []):
        assert run_state(tmp_path) is State.RUNNING
