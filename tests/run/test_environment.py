"""Code and machine of a run."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtnrec.run import environment
from mtnrec.run.environment import describe_changes, describe_machine, find_commits, sources
from mtnrec.run.record import RECORD_FILE, RunRecord, warn_of_changes


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """A package of the user's own, and a config that names a class in it."""
    package = tmp_path / "own_networks"
    package.mkdir()
    for name in ("__init__", "net", "layers"):
        (package / f"{name}.py").write_text(f"NAME = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package, {"model": {"_target_": "own_networks.net.Net"}}


def test_the_sources_of_a_run_are_the_modules_of_its_own(own_network):
    _, config = own_network
    others = {"optimizer": {"_target_": "torch.optim.Adam"}, "mtn": {"_target_": "mtnrec.mtn.MTN"}}
    others |= {"timeout": {"_target_": "datetime.timedelta"}, "list": [{"_target_": "no_such.X"}]}

    assert sources(config | others).keys() == {"own_networks"}
    assert sources(others) == {}


def test_the_files_of_an_installed_package_are_not_listed(monkeypatch):
    listed = []
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: listed.append(folder) or [])

    assert sources({"trainer": {"_target_": "lightning.Trainer"}}) == {}
    assert listed == []  # torch alone has thousands of files


@pytest.mark.parametrize("name", ["net", "layers"])
def test_any_file_of_an_own_package_changes_its_hash(name, own_network):
    package, config = own_network
    before = sources(config)
    assert sources(config) == before

    (package / f"{name}.py").write_text("NAME = 1\n")

    assert sources(config) != before


def test_a_class_of_a_script_is_hashed_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("class Net: ...\n")
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False
    )
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    assert sources({"model": {"_target_": "__main__.Net"}}).keys() == {"__main__"}


def test_changes_name_what_differs_and_ignore_what_is_unknown():
    before = {"mtnrec": "1", "torch": "2.7", "threads": 1, "source of net": "a"}

    assert describe_changes(before, before) == []
    assert describe_changes(before, {"mtnrec": "1", "torch": None, "threads": None}) == []
    assert describe_changes(before, {**before, "threads": 2, "source of net": "b"}) == [
        "threads was 1 and is 2",
        "source of net has changed",
    ]


def test_finished_runs_of_other_code_are_counted_in_one_warning(write_run, tmp_path, caplog):
    record = RunRecord.read(write_run(tmp_path, "run") / RECORD_FILE)
    record = dataclasses.replace(record, threads=1, versions={"torch": "1.0"})

    warn_of_changes([(record, 2), (record, 2)])

    (message,) = caplog.messages
    assert message.startswith("2 finished runs are kept, made by other code (torch was 1.0 and is ")
    assert "threads was 1 and is 2)" in message
    assert "resume=false to train again" in message


def test_the_same_code_is_not_warned_of(write_run, tmp_path, caplog):
    record = RunRecord.read(write_run(tmp_path, "run") / RECORD_FILE)

    warn_of_changes([(dataclasses.replace(record, versions={}, threads=None), 2)])

    assert caplog.messages == []


def test_the_machine_has_a_processor_cores_and_memory():
    machine = describe_machine()

    assert machine["processor"]
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 2**20
    assert machine["os"].startswith(os.uname().sysname)


def git(folder, *arguments):
    author = ["-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", "-C", folder, *author, *arguments], check=True, capture_output=True)


def test_the_commit_of_the_working_directory_is_clean_or_dirty(tmp_path):
    assert find_commits()["working_directory"] is None
    git(tmp_path, "init")
    (tmp_path / "net.py").write_text("1")
    git(tmp_path, "add", "net.py")
    git(tmp_path, "commit", "-m", "x", "--no-verify")

    clean = find_commits()["working_directory"]
    (tmp_path / "net.py").write_text("2")
    dirty = find_commits()["working_directory"]

    assert len(clean["commit"]) == 40
    assert clean == {"commit": dirty["commit"], "dirty": False}
    assert dirty["dirty"] is True


@pytest.mark.parametrize("checkouts", [1, 2])
def test_git_is_asked_once_per_checkout(checkouts, tmp_path, monkeypatch):
    package, folder = tmp_path / "src" / "mtnrec", tmp_path / "notebooks"
    for made in (package, folder):
        made.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    for root in (tmp_path, folder)[:checkouts]:
        git(root, "init")
        git(root, "commit", "--allow-empty", "-m", root.name, "--no-verify")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(environment, "_PACKAGE", package)
    run, asked = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: asked.append(a) or run(*a, **k))

    commits = find_commits()

    assert len(asked) == checkouts
    assert len({str(commit) for commit in commits.values()}) == checkouts
    assert None not in commits.values()
