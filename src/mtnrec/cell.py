"""A cell of a sweep: what determines its result, its folder, and what has become of it."""

import fcntl
import hashlib
import json
import os
import shlex
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, cast

from omegaconf import DictConfig, OmegaConf

from mtnrec.checks import InputError
from mtnrec.config import find_input_error
from mtnrec.files import read_json, remove_leftovers, write_json

RECORD_FILE = "result.json"
FAILURE_FILE = "failure.json"
RUNNING_FILE = "running.json"
_LOCK_FILE = ".lock"
_LOOKS, _PAUSE = 10, 0.02  # seconds
# Keys of the config that say where a run reads and writes, or how it is shown and computed, not
# what comes out; of the data the checksum says it.
_NOT_OF_THE_CELL = ("logger", "output_dir", "data_root", "resume", "threads")
_NOT_OF_THE_DATA = ("dir", "raw_dir", "train", "test", "verify", "threads")
_NOT_OF_THE_TRAINER = (
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
)
CHECKPOINTS = "checkpoint_every_n_steps"  # of `ResumePoint`, not of Lightning's trainer


def keys_of_lightning(trainer: DictConfig) -> DictConfig:
    """Return the config of the trainer without what Lightning's own does not take."""
    return OmegaConf.masked_copy(trainer, [str(key) for key in trainer if key != CHECKPOINTS])


class CellBusyError(InputError):
    """Another process is making the cell."""


class State(StrEnum):
    """What has become of a cell."""

    FINISHED = "finished"
    FAILED = "failed"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    WAITING = "waiting"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved config that determines the result.

    A part that is switched off counts as such, whatever its other keys say: so runs without MTN
    are the same cell at every ``mtn.lam``.
    """
    settings = {key: value for key, value in config.items() if key not in _NOT_OF_THE_CELL}
    for part, keys in (("data", _NOT_OF_THE_DATA), ("trainer", _NOT_OF_THE_TRAINER)):
        settings[part] = {key: value for key, value in config[part].items() if key not in keys}
    if not config["mtn"]["enabled"]:
        settings["mtn"] = {"enabled": False}
    # MTN takes its factors anew at each checkpoint; nothing else depends on it.
    if not config["mtn"]["enabled"] or not config["trainer"].get(CHECKPOINTS):
        settings["trainer"].pop(CHECKPOINTS, None)
    if not config["noise"]["proportion"]:
        settings["noise"] = {"proportion": 0}
    return settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings by dotted key.

    >>> dict(flatten({"seed": 0, "mtn": {"lam": 1e-05, "layers": [0, 1]}}))
    {'seed': 0, 'mtn.lam': 1e-05, 'mtn.layers': [0, 1]}
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def cell_of(config: Mapping[str, Any], checksum: str) -> str:
    """Return the hash of what determines a result: the settings and the data set's checksum."""
    return _hash([settings_of(config), checksum])


def folder_name(config: Mapping[str, Any]) -> str:
    """Return the name of a cell's folder: what most sweeps vary, and a hash of all settings."""
    model = str(config["model"]["_target_"]).rpartition(".")[2].lower()
    mtn = "-mtn" if config["mtn"]["enabled"] else ""
    noise = f"-noise{config['noise']['proportion']:g}" if config["noise"]["proportion"] else ""
    name = f"{config['data']['name']}-{model}{mtn}{noise}-seed{config['seed']}"
    return f"{name}-{_hash(settings_of(config))[:8]}"


def _hash(content: Any) -> str:
    # Keys like 101 and `default` are not sorted with each other before they are text.
    as_text = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_text, sort_keys=True).encode()).hexdigest()[:16]


def resolve_settings(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain containers, without what depends on the run's folder."""
    return {
        str(key): OmegaConf.to_container(config[key], resolve=True)
        if OmegaConf.is_config(config[key])
        else config[key]
        for key in config
        if key not in ("hydra", "output_dir", "logger")
    }


def keys_of_seed(config: DictConfig) -> list[str]:
    """Return the dotted keys of a config that change with the seed, the seed among them.

    They are not settings of an arm: with ``noise.seed=${seed}`` each repeat has its own noise, and
    the repeats remain repeats of one another.
    """
    other = cast(DictConfig, OmegaConf.merge(config, {"seed": config.seed + 1}))
    one, two = (dict(flatten(resolve_settings(c))) for c in (config, other))
    return sorted(key for key, value in one.items() if two[key] != value)


def _folder_of_config(_root_: DictConfig) -> str:
    return folder_name(resolve_settings(_root_))


# Hydra asks for the folder of a job before it has set the keys that depend on it.
OmegaConf.register_new_resolver("cell_folder", _folder_of_config, replace=True)


def find_record(
    folder: Path, config: Mapping[str, Any], checksum: str | None
) -> dict[str, Any] | None:
    """Return the record in a folder if it is of the same cell; None if there is no such record."""
    record = read_json(folder / RECORD_FILE)
    if record is None or checksum is None or record["cell"] != cell_of(config, checksum):
        return None
    return record


def state_of(folder: Path) -> State:
    """Say what has become of the cell in a folder."""
    if (folder / RECORD_FILE).is_file():
        return State.FINISHED
    if _is_locked(folder):
        return State.RUNNING
    if (folder / FAILURE_FILE).is_file():
        return State.FAILED
    return State.INTERRUPTED if (folder / RUNNING_FILE).is_file() else State.WAITING


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / _LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def claim(folder: Path, overrides: Sequence[str], command: Sequence[str]) -> Iterator[None]:
    """Hold a cell's folder while its run is made; what goes wrong is written to ``failure.json``.

    The system lets go of the folder however the process ends.

    Args:
        folder: Folder of the run.
        overrides: The run's overrides of the config.
        command: What makes the run again.

    Raises:
        CellBusyError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("wb") as lock:
        if not _lock(lock):
            raise CellBusyError(
                f"{folder} is being made by another process{_owner(folder)}: wait for it, or "
                "choose another hydra.run.dir"
            )
        for name in (RECORD_FILE, FAILURE_FILE, RUNNING_FILE):
            remove_leftovers(folder / name)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        write_json(folder / RUNNING_FILE, _who(overrides))
        with recording_failure(folder, overrides, command):
            yield
        (folder / RUNNING_FILE).unlink()  # it stays where the process was stopped


@contextmanager
def recording_failure(
    folder: Path, overrides: Sequence[str], command: Sequence[str]
) -> Iterator[None]:
    """Write to ``failure.json`` what goes wrong in a process of a run; :func:`claim` does so too.

    Of several processes the first to fail writes, since the others fail for want of it. Where one
    was killed, the others lose their connection to it, or are ended before they notice; then none
    writes, and the run is interrupted.
    """
    try:
        yield
    except Exception as error:
        if _is_locked(folder) and not (folder / FAILURE_FILE).is_file():
            with suppress(OSError):  # on a full disk what has failed is told all the same
                record_failure(folder, error, overrides, command)
        raise


def record_failure(
    folder: Path, error: Exception, overrides: Sequence[str], command: Sequence[str]
) -> None:
    """Write ``failure.json`` of a run that has ended; the arguments are those of :func:`claim`."""
    write_json(folder / FAILURE_FILE, _failure(error, overrides, command))
    (folder / RUNNING_FILE).unlink(missing_ok=True)


def report_progress(folder: Path, progress: dict[str, Any]) -> None:
    """Add to what is said of a run that is being made, if it is said at all."""
    running = read_json(folder / RUNNING_FILE)
    if running is not None:
        write_json(folder / RUNNING_FILE, running | progress)


def _lock(file: IO[bytes]) -> bool:
    # A second look, since `state_of` holds the lock for the blink of an eye.
    for _ in range(_LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        else:
            return True
    return False


def _who(overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        "overrides": list(overrides),
    }


def _owner(folder: Path) -> str:
    running = read_json(folder / RUNNING_FILE)
    return "" if running is None else f" ({running['pid']} on {running['host']})"


def _failure(error: Exception, overrides: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    root = find_input_error(error) or error
    return {
        "status": "failed",
        "error": type(root).__name__,
        "message": str(root),
        "traceback": "".join(traceback.format_exception(error)),
        "overrides": list(overrides),
        "command": shlex.join(command),
    }
