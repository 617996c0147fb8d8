import io
import json
import time

import pytest
from rich.console import Console

from mtnrec.checks import InputError
from mtnrec.run.folder import State, lock_run_folder, report_progress
from mtnrec.sweep.progress import RunProgress, read_progress, render_progress, seconds_left


def render(runs):
    console = Console(width=100, file=io.StringIO())
    console.print(render_progress(runs))
    return " ".join(console.file.getvalue().split())


def finish(folder, seconds):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"seconds": seconds}))


@pytest.fixture
def sweep(tmp_path):
    """One run done, one failed, two planned."""
    names = [f"log-esmm-seed{seed}-abc" for seed in range(4)]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": {name: [] for name in names}}))
    finish(tmp_path / names[0], {"setup": 1.0, "fit": 8.0, "test": 1.0})
    with (
        pytest.raises(ValueError, match="no"),
        lock_run_folder(tmp_path / names[1], [], ["python", "again"]),
    ):
        raise ValueError("no luck")
    return tmp_path


def test_every_planned_run_is_read_with_its_state(sweep):
    runs = read_progress(sweep)

    found = [run.state for run in runs]
    assert found == [State.FINISHED, State.FAILED, State.WAITING, State.WAITING]
    assert runs[0].seconds == 10
    assert runs[1].failure["message"] == "no luck"


def test_a_folder_of_several_sweeps_holds_the_runs_of_all(sweep):
    finish(sweep / "more" / "log-mmoe-seed0-def", {"fit": 1.0})

    names = [run.name for run in read_progress(sweep)]

    assert len(names) == 5
    assert "more/log-mmoe-seed0-def" in names


def test_a_running_run_shows_its_progress(sweep):
    folder = sweep / "log-esmm-seed2-abc"
    with lock_run_folder(folder, [], []):
        text = render(read_progress(sweep))

    assert "4 runs: 1 finished, 1 running, 1 failed, 1 waiting" in text
    assert "log-esmm-seed2-abc 0 0 s" in text
    assert "failed: log-esmm-seed1-abc: no luck python again" in text


def test_the_time_left_is_estimated_from_runs_of_the_same_kind():
    done = [
        RunProgress("log-esmm-seed0-a", State.FINISHED, seconds=100),
        RunProgress("log-esmm-seed1-a", State.FINISHED, seconds=140),
        RunProgress("log-mmoe-seed0-a", State.FINISHED, seconds=600),
    ]
    running = [
        RunProgress("log-esmm-seed2-a", State.RUNNING, seconds=20),
        RunProgress("log-mmoe-seed1-a", State.RUNNING, seconds=900),  # longer than it should take
    ]
    waiting = [
        RunProgress("log-mmoe-seed2-a", State.WAITING),
        RunProgress("log-esmm-mtn-seed0-a", State.INTERRUPTED),  # a kind without a finished run
    ]
    failed = [RunProgress("log-esmm-seed3-a", State.FAILED)]

    of_all = (100 + 140 + 600) / 3
    assert seconds_left(done + running + waiting + failed) == (100 + 0 + 600 + of_all) / 2
    assert seconds_left(running) is None
    assert seconds_left(done + waiting) is None  # nothing runs


def test_the_end_is_estimated_while_runs_are_running():
    done = RunProgress("log-esmm-seed0-a", State.FINISHED, seconds=7200)
    running = RunProgress("log-esmm-seed1-a", State.RUNNING)
    waiting = RunProgress("log-esmm-seed2-a", State.WAITING)

    text = render([done, running, waiting])
    assert "1 finished, 1 running, 1 waiting; about 4 h 0 min left" in text
    assert "left" not in render([done])
    assert "left" not in render([done, waiting])


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"runs must be the folder of a sweep, got .*-m seed=0"):
        read_progress(tmp_path)


def test_the_command_prints_the_state_once_without_a_terminal(sweep, status, capsys):
    status(f"runs={sweep}")

    assert "4 runs: 1 finished, 1 failed, 2 waiting" in capsys.readouterr().out


def test_the_command_refuses_a_refresh_of_zero(sweep, status):
    with pytest.raises(
        SystemExit, match=r"^mtnrec: refresh must be a number in \[0\.1, inf\), got 0"
    ):
        status(f"runs={sweep}", "refresh=0")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("log-esmm-seed0-abc/result.json", '{"seconds": [1]}'),
        ("log-esmm-seed0-abc/result.json", '{"seconds": {"fit": "1"}}'),
        ("log-esmm-seed0-abc/result.json", "[]"),
        ("log-esmm-seed1-abc/failure.json", '{"message": 3}'),
        ("log-esmm-seed1-abc/failure.json", "{"),
        ("more/sweep.json", '{"cells": [1]}'),
        ("more/sweep.json", '{"cells": {"../../a": 1}}'),
        ("more/sweep.json", "[]"),
    ],
)
def test_an_odd_file_is_named_and_the_other_runs_are_shown(file, text, sweep, caplog):
    (sweep / "more").mkdir()
    (sweep / file).write_text(text)

    shown = render(read_progress(sweep))

    assert "4 runs: 1 finished, 1 failed, 2 waiting" in shown
    assert all(message.startswith(f"{sweep / file} ") for message in caplog.messages)
    assert len(caplog.messages) == ("message" not in text)


@pytest.mark.parametrize("text", ['{"started": "now"}', '{"started": [1], "epochs": {}}', "[]"])
def test_an_odd_file_of_a_running_run_is_named(text, sweep, caplog):
    folder = sweep / "log-esmm-seed2-abc"
    with lock_run_folder(folder, [], []):
        (folder / "running.json").write_text(text)
        shown = render(read_progress(sweep))

    assert "1 running" in shown
    assert caplog.messages[0].startswith(f"{folder / 'running.json'} ")


def test_a_running_run_shows_its_monitor(sweep):
    folder = sweep / "log-esmm-seed2-abc"
    with lock_run_folder(folder, [], []):
        progress = {"epochs": 3, "monitor": "val/cvr_auc", "value": 0.71234, "host": "h", "pid": 7}
        report_progress(folder, progress)
        text = render(read_progress(sweep))

    assert "log-esmm-seed2-abc 3 0 s val/cvr_auc 0.7123 7 on h" in text


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 7200.0])
def test_a_clock_that_is_behind_or_ahead_changes_no_time(skew, sweep):
    folder = sweep / "log-esmm-seed2-abc"
    with lock_run_folder(folder, [], []):
        begun = time.time() - 500 + skew  # by the clock of the run's host
        running = {"started": begun, "heartbeat": begun + 40, "pid": 7, "host": "h"}
        (folder / "running.json").write_text(json.dumps(running))
        (run,) = (run for run in read_progress(sweep) if run.state is State.RUNNING)

    assert run.seconds == pytest.approx(40)


def test_a_clock_that_is_set_back_counts_no_time(sweep):
    folder = sweep / "log-esmm-seed2-abc"
    with lock_run_folder(folder, [], []):
        (folder / "running.json").write_text('{"started": 1000, "heartbeat": 100}')
        text = render(read_progress(sweep))

    assert "log-esmm-seed2-abc 0 0 s" in text


@pytest.fixture
def arms(tmp_path, write_run):
    """Two arms of two seeds and their plan, with one seed in common and another monitor."""
    planned = {}
    for rate, seed, value in [(0.1, 0, 0.6), (0.1, 1, 0.8), (0.01, 0, 0.71), (0.01, 1, 0.72)]:
        name = f"log-mmoe-seed{seed}-{rate}"
        metrics = {"val/cvr_auc": value, "val/ctr_log_loss": 1 - value}
        config = {"optimizer.lr": rate, "monitor": "val/cvr_auc"}
        write_run(tmp_path, name, seed=seed, metrics=metrics, **config)
        planned[name] = ["patience=1", f"optimizer.lr={rate}", f"seed={seed}"]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": planned}))
    return tmp_path


def test_the_leaderboard_ranks_arms_by_their_mean_monitor(arms):
    text = render(read_progress(arms))

    assert "best arms runs mean val/cvr_auc lowest highest" in text
    first = "optimizer.lr=0.01 2 0.7150 0.7100 0.7200"
    assert f"{first} optimizer.lr=0.1 2 0.7000 0.6000 0.8000" in text


def test_trials_have_a_leaderboard_of_their_own(arms):
    path = arms / "log-mmoe-seed1-0.1" / "result.json"
    record = json.loads(path.read_text())
    record["config"]["test"] = False
    path.write_text(json.dumps(record))

    text = render(read_progress(arms))

    of_arms, of_trials = text.split("best trials runs mean val/cvr_auc lowest highest")
    assert "optimizer.lr=0.1 1 0.6000 0.6000 0.6000" in of_arms
    assert of_trials.count("0.8000") == 3


def test_the_leaderboard_names_a_run_by_its_folder_if_nothing_else_does(tmp_path, write_run):
    write_run(tmp_path, "first", monitor="val/cvr_auc", metrics={"val/cvr_auc": 0.6})

    assert "highest first 1 0.6000" in render(read_progress(tmp_path))


def test_the_leaderboard_of_a_loss_begins_with_the_smallest(arms):
    for path in arms.rglob("result.json"):
        record = json.loads(path.read_text())
        record["config"]["monitor"] = "val/ctr_log_loss"
        path.write_text(json.dumps(record))

    text = render(read_progress(arms))

    assert "optimizer.lr=0.01 2 0.2850 0.2800 0.2900 optimizer.lr=0.1 2 0.3000" in text


def test_the_status_on_a_terminal_ends_when_nothing_runs(sweep, status, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("mtnrec.status._QUIET", 0.2)
    monkeypatch.setattr(Console, "is_terminal", True)

    status(f"runs={sweep}", "refresh=0.1")

    assert "2 waiting" in capsys.readouterr().out


def test_a_watching_status_stays(sweep, status, monkeypatch):
    class StoppedError(Exception):
        pass

    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 5:
            raise StoppedError

    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr("mtnrec.status._QUIET", 0.0)
    monkeypatch.setattr("mtnrec.status.time.sleep", nap)

    with pytest.raises(StoppedError):
        status(f"runs={sweep}", "watch=true")
