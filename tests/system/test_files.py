import errno
import json
import math
import os
import socket
import time

import pytest
from filelock import Timeout

from mtnrec.checks import InputError
from mtnrec.system import files
from mtnrec.system.files import acquire_lock, is_locked, read_json, write_atomic, write_json


def test_a_write_leaves_only_the_file(tmp_path):
    write_json(tmp_path / "result.json", {"seed": 0, "metrics": {"test/ctr_auc": 0.1 + 0.2}})

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == {"seed": 0, "metrics": {"test/ctr_auc": 0.1 + 0.2}}


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"7", b"\xff", b"[" * 100_000])
def test_anything_but_a_json_object_is_refused(text, tmp_path):
    (tmp_path / "result.json").write_bytes(text)

    with pytest.raises(InputError, match=r"result\.json is not (valid|a) JSON.*\. Delete it"):
        read_json(tmp_path / "result.json")


def test_nan_and_infinities_become_null(tmp_path):
    write_json(
        tmp_path / "result.json",
        {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf, "e": None}},
    )

    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == {"a": None, "b": [None, 1.0], "c": {"d": None, "e": None}}


def test_numbers_and_words_may_be_keys_together(tmp_path):
    write_json(tmp_path / "result.json", {"widths": {"default": 128, 101: 16}})

    assert read_json(tmp_path / "result.json") == {"widths": {"default": 128, "101": 16}}


def test_an_old_file_survives_a_failing_write(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError("no space left on device")

    write_json(tmp_path / "result.json", {"seed": 0})
    monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(OSError, match="no space left"):
        write_json(tmp_path / "result.json", {"seed": 1})

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"seed": 0}


def test_an_old_file_survives_values_that_json_cannot_hold(tmp_path):
    write_json(tmp_path / "result.json", {"seed": 0})

    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "result.json", {"seed": object()})

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"seed": 0}


def test_a_missing_file_has_no_content(tmp_path):
    assert read_json(tmp_path / "result.json") is None


def test_a_written_file_is_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 0.1], "c": None})
    write_atomic(tmp_path / "a.bin", b"\x00\xff")

    assert read_json(tmp_path / "a.json") == {"b": [1, 0.1], "c": None}
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    path = tmp_path / ".lock"

    assert is_locked(path) is False
    with acquire_lock(path):
        assert is_locked(path) is True
        with pytest.raises(Timeout):
            acquire_lock(path)
    assert is_locked(path) is False
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def no_locks(request, monkeypatch):
    """A file system without locks, on which markers soon become stale."""

    def refuse(fd, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(files, "HEARTBEAT", 0.05)
    monkeypatch.setattr(files, "STALE", 0.2)
    monkeypatch.setattr(files, "_warned", set())


def test_a_marker_keeps_others_out_where_locks_are_missing(no_locks, tmp_path, caplog):
    path = tmp_path / ".lock"
    with acquire_lock(path):
        assert is_locked(path) is None
        for wait in (False, True):  # the holder's heartbeat outlasts the wait
            with pytest.raises(Timeout):
                acquire_lock(path, wait=wait)
    with acquire_lock(path, wait=False):
        pass

    (record,) = caplog.records
    assert record.getMessage().startswith(f"the file system of {tmp_path} has no locks")


def test_a_marker_from_another_machine_is_taken_over_without_a_heartbeat(no_locks, tmp_path):
    path, marker = tmp_path / ".lock", tmp_path / ".lock.marker"
    with acquire_lock(path):
        text = marker.read_text()
    assert socket.gethostname() in text
    marker.write_text(text.replace(socket.gethostname(), "elsewhere"))

    with pytest.raises(Timeout):
        acquire_lock(path, wait=False)
    start = time.monotonic()
    with acquire_lock(path):
        assert time.monotonic() - start >= 0.2


def test_an_error_that_is_not_about_locks_is_raised(tmp_path, monkeypatch):
    def fail(fd, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", fail)

    with pytest.raises(OSError, match="Input/output error"):
        acquire_lock(tmp_path / ".lock")
