"""Run folders: record, failure, lock, and the state that they imply."""

import os
import shlex
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import Timeout

from mtnrec.checks import InputError
from mtnrec.run.identity import RunIdentity
from mtnrec.run.record import RECORD_FILE, RunRecord
from mtnrec.run.secrets import redact_text
from mtnrec.system.files import (
    HEARTBEAT,
    STALE,
    acquire_lock,
    is_locked,
    read_json,
    remove_leftovers,
    write_json,
)

FAILURE_FILE = "failure.json"
RUNNING_FILE = "running.json"
BEST_CHECKPOINT = "checkpoints/best.ckpt"  # in the folder of a run
LAST_CHECKPOINT = "checkpoints/last.ckpt"  # of an unfinished run
_LOCK_FILE = ".lock"

_writing = threading.Lock()  # the heartbeat and the training both write running.json

Explain = Callable[[Exception], Exception | None]
"""Returns the cause of an error that the user can fix, or None."""


def _as_raised(error: Exception) -> None:
    """Keep the raised error."""


class RunFolderBusyError(InputError):
    """Another process holds the run folder."""


class State(StrEnum):
    """State of a run."""

    FINISHED = "finished"
    FAILED = "failed"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    SUBMITTED = "submitted"
    WAITING = "waiting"


def find_record(folder: Path, config: Mapping[str, Any], checksum: str | None) -> RunRecord | None:
    """Return the record in a folder, or None unless it is of the same run."""
    path = folder / RECORD_FILE
    content = read_json(path)
    if content is None or checksum is None:
        return None
    run = RunIdentity(config, checksum, seed_keys=())
    return RunRecord.from_content(content, path) if content.get("cell") == run.id else None


def run_state(folder: Path) -> State:
    """Return the state of the run in a folder."""
    if (folder / RECORD_FILE).is_file():
        return State.FINISHED
    if _is_locked(folder):
        return State.RUNNING
    if (folder / FAILURE_FILE).is_file():
        return State.FAILED
    return State.INTERRUPTED if (folder / RUNNING_FILE).is_file() else State.WAITING


def _is_locked(folder: Path) -> bool:
    locked = is_locked(folder / _LOCK_FILE)
    return _has_heartbeat(read_json(folder / RUNNING_FILE) or {}) if locked is None else locked


def _has_heartbeat(running: Mapping[str, Any]) -> bool:
    """Return whether the process that wrote ``running.json`` seems to be alive."""
    if running.get("host") == socket.gethostname():
        try:
            os.kill(running["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # a process of another user
            pass
    return time.time() - running.get("heartbeat", 0) < STALE


@contextmanager
def lock_run_folder(
    folder: Path, overrides: Sequence[str], command: Sequence[str], explain: Explain = _as_raised
) -> Iterator[None]:
    """Lock a run folder for the block, and write ``failure.json`` if the block raises.

    The lock ends with the process; see :func:`mtnrec.system.files.acquire_lock`. Meanwhile a thread
    writes the time as ``heartbeat`` into ``running.json``.

    Args:
        folder: Folder of the run.
        overrides: Config overrides of the run.
        command: Command that repeats the run.
        explain: Returns the error that ``failure.json`` names; None stands for the raised one.

    Raises:
        RunFolderBusyError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(folder / _LOCK_FILE)
    except Timeout:
        raise RunFolderBusyError(
            f"{folder} is in use by another process{_lock_holder(folder)}. Wait for it, or choose "
            "another hydra.run.dir."
        ) from None
    with lock:
        for name in (RECORD_FILE, FAILURE_FILE, RUNNING_FILE):
            remove_leftovers(folder / name)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        write_json(folder / RUNNING_FILE, _process_info(overrides))
        with recording_failure(folder, overrides, command, explain), _beating(folder):
            yield
        (folder / RUNNING_FILE).unlink()  # kept if the process is killed


@contextmanager
def recording_failure(
    folder: Path, overrides: Sequence[str], command: Sequence[str], explain: Explain = _as_raised
) -> Iterator[None]:
    """Write ``failure.json`` if the block raises; for ranks that do not hold the lock.

    If several ranks fail, only the first one writes, since the others fail as a consequence. If a
    rank is killed, the others lose their connection or are terminated before they notice; then no
    rank writes, and the run counts as interrupted.
    """
    try:
        yield
    except Exception as error:
        if _is_locked(folder) and not (folder / FAILURE_FILE).is_file():
            with suppress(OSError):  # a full disk must not hide the error
                record_failure(folder, error, overrides, command, explain)
        raise


def record_failure(
    folder: Path,
    error: Exception,
    overrides: Sequence[str],
    command: Sequence[str],
    explain: Explain = _as_raised,
) -> None:
    """Write ``failure.json`` for a run that has ended; arguments as in :func:`lock_run_folder`."""
    named = explain(error) or error
    failure = {
        "status": "failed",
        "error": type(named).__name__,
        "message": redact_text(str(named)),
        "traceback": redact_text("".join(traceback.format_exception(error))),
        "overrides": [redact_text(override) for override in overrides],
        "command": redact_text(shlex.join(command)),
    }
    write_json(folder / FAILURE_FILE, failure)
    (folder / RUNNING_FILE).unlink(missing_ok=True)


def clear_earlier_run(folder: Path, *, resumes: bool) -> None:
    """Delete what an earlier training in the folder logged, before the next one logs.

    Args:
        folder: Folder of the run.
        resumes: Whether the same training continues: it keeps its spectra and its W&B run. Its
            other logs are deleted as well, since it logs the earlier epochs again.
    """
    names = ["csv", "tensorboard", "scores"]
    for name in names if resumes else [*names, "spectra"]:
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("events.*", "*/events.*"):  # a TensorBoard logger of another name
        for path in folder.glob(f"{pattern}tfevents.*"):
            path.unlink()
    if not resumes:
        # The id that W&B resumes; what the earlier run has not sent yet stays in wandb/.
        (folder / "wandb" / "wandb-resume.json").unlink(missing_ok=True)


def describe_kept(folder: Path) -> str:
    """Return a sentence on what an unfinished run keeps in its folder."""
    if run_state(folder) is State.FINISHED:
        return f"{folder} is finished"
    if not (folder / LAST_CHECKPOINT).is_file():
        return f"{folder} keeps no complete epoch"
    epochs = (read_json(folder / RUNNING_FILE) or {}).get("epochs", 0)
    return f"{folder} keeps {epochs} complete epochs in {LAST_CHECKPOINT}"


def report_progress(folder: Path, progress: dict[str, Any]) -> None:
    """Add progress and the time to ``running.json`` if it exists."""
    with _writing:
        running = read_json(folder / RUNNING_FILE)
        if running is not None:
            heartbeat = {"heartbeat": time.time()}
            write_json(folder / RUNNING_FILE, running | progress | heartbeat)


@contextmanager
def _beating(folder: Path) -> Iterator[None]:
    """Renew the heartbeat in ``running.json`` during the block."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            with suppress(OSError):  # a full disk, or a server that is away for a while
                report_progress(folder, {})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _process_info(overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": (now := time.time()),
        "heartbeat": now,
        "overrides": [redact_text(override) for override in overrides],
    }


def _lock_holder(folder: Path) -> str:
    running = read_json(folder / RUNNING_FILE)
    return "" if running is None else f" ({running.get('pid')} on {running.get('host')})"


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint of the best epoch in the folder of a run; a file as it is.

    Raises:
        InputError: If there is no such file.
    """
    found = path / BEST_CHECKPOINT if path.is_dir() else path
    if not found.is_file():
        raise InputError(
            f"checkpoint: {found} is missing. Choose another file or the folder of a run, or train "
            "again."
        )
    return found
