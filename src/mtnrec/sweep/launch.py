"""Plan and launch the runs of a sweep.

A run folder is named after its settings, so the same command finds the runs it finished before.
"""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich import get_console
from rich.live import Live

from mtnrec.checks import InputError
from mtnrec.command.config import naming_folders_after, resolve_settings
from mtnrec.command.job import draws_on_screen, make_datamodule, train_command
from mtnrec.data.datamodule import DataModule
from mtnrec.files import read_json, write_json
from mtnrec.run.folder import (
    FAILURE_FILE,
    RUNNING_FILE,
    State,
    find_record,
    record_failure,
    run_state,
)
from mtnrec.run.identity import RunIdentity
from mtnrec.run.record import RunRecord, warn_of_changes
from mtnrec.run.secrets import redact_text
from mtnrec.sweep.progress import PLAN_FILE, read_progress, render_progress
from mtnrec.sweep.submission import submit_jobs

_MAX_CRASHES = 3  # crashes of its process after which a run counts as failed
_PAUSE = 1.0  # seconds between two checks of other processes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Args:
        overrides: Overrides of the config.
        folder: Folder of the run.
        config: Composed and resolved config, without keys that depend on the folder.
    """

    overrides: tuple[str, ...]
    folder: Path
    config: dict[str, Any]


def plan(
    config: DictConfig,
    loader: ConfigLoader,
    grids: Iterable[Mapping[str, Any]],
    arguments: Sequence[str],
) -> list[Job]:
    """Return the runs of all grids, each once.

    Args:
        config: Config of the sweep.
        loader: Composes the configs of the runs.
        grids: Swept values of each grid, by key.
        arguments: Arguments of the command line, which replace keys in every grid.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed = [
        parser.parse_overrides([*(f"{key}={value}" for key, value in grid.items()), *arguments])
        for grid in grids
    ]
    swept = {line.key_or_group for lines in parsed for line in lines if line.is_sweep_override()}
    jobs: dict[str, Job] = {}
    for lines in parsed:
        (runs,) = BasicSweeper.split_arguments(lines, None)
        for overrides in runs:
            with naming_folders_after(swept):
                composed = loader.load_sweep_config(config, overrides)
                folder = Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir
            settings = resolve_settings(composed)
            run = RunIdentity(settings, checksum="", seed_keys=()).id
            jobs.setdefault(run, Job(tuple(overrides), folder, settings))
    return list(jobs.values())


def run_jobs(jobs: Sequence[Job], launcher: Launcher, config: DictConfig) -> None:
    """Run the jobs that are not finished; exit with status 1 if some still are not.

    A launcher with ``wait=False`` only submits them.

    Args:
        jobs: All runs of the sweep.
        launcher: Launches the unfinished ones.
        config: Config of the sweep.
    """
    directory = Path(config.hydra.sweep.dir)
    directory.mkdir(parents=True, exist_ok=True)
    planned = {job.folder.relative_to(directory).as_posix(): _shown(job) for job in jobs}
    submitted = (read_json(directory / PLAN_FILE) or {}).get("submitted", {})
    sweep = {"started": time.time(), "cells": planned, "submitted": submitted}
    write_json(directory / PLAN_FILE, sweep)
    prepared = _prepare_data(jobs)
    finished = {job.folder: _find_finished(job, *prepared[_data_key(job)]) for job in jobs}
    pending = [job for job in jobs if finished[job.folder] is None]
    _logger.info(
        "%d runs in %s, %d of them finished before", len(jobs), directory, len(jobs) - len(pending)
    )
    warn_of_changes(
        (record, job.config["threads"]) for job in jobs if (record := finished[job.folder])
    )
    for job in pending:
        if run_state(job.folder) is State.RUNNING:
            continue
        for stale in (FAILURE_FILE, RUNNING_FILE):
            (job.folder / stale).unlink(missing_ok=True)
        job.folder.mkdir(parents=True, exist_ok=True)  # the run takes the name from here
    if not getattr(launcher, "wait", True):
        submit_jobs({job.folder: job.overrides for job in pending}, launcher, directory)
        return
    with _on_the_screen(directory, config):
        _launch(pending, launcher)
    _close(jobs, pending)


def _shown(job: Job) -> list[str]:
    return [redact_text(override) for override in job.overrides]


def _data_key(job: Job) -> str:
    """Return a key of a job's data set."""
    return json.dumps(job.config["data"])


def _prepare_data(jobs: Sequence[Job]) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """Prepare the data sets before the runs share them, and warn early of missing ones.

    Returns:
        Checksum of each data set, None if it is missing, and the settings that its record has.
    """
    prepared: dict[str, tuple[str | None, dict[str, Any]]] = {}
    uses = Counter(map(_data_key, jobs))
    for job in jobs:
        data = _data_key(job)
        if data in prepared:
            continue
        prepared[data] = None, {}
        try:
            datamodule: DataModule = make_datamodule(job.config["data"], job.overrides)
            datamodule.prepare_data()
            prepared[data] = datamodule.find_checksum(), datamodule.settings_used()
        except (InputError, InstantiationException) as error:
            _logger.warning("%d of %d runs will fail: %s", uses[data], len(jobs), error)
    return prepared


def _find_finished(job: Job, checksum: str | None, used: Mapping[str, Any]) -> RunRecord | None:
    if not job.config["resume"] or run_state(job.folder) is not State.FINISHED:
        return None
    config = job.config | {"data": {**job.config["data"], **used}}
    return find_record(job.folder, config, checksum)


def _launch(pending: Sequence[Job], launcher: Launcher) -> None:
    deaths: Counter[Path] = Counter()
    while pending:
        try:
            launcher.launch([job.overrides for job in pending], initial_job_idx=0)
        except Exception as error:  # a killed worker ends the whole launch
            dead = [job for job in pending if run_state(job.folder) is State.INTERRUPTED]
            if not dead:
                raise
            _logger.warning("%s; continuing with the remaining runs", error)
            for job in dead:
                deaths[job.folder] += 1
                if deaths[job.folder] == _MAX_CRASHES:
                    _give_up(job, error)
        else:
            pending = _wait_for_others(pending)
        pending = [
            job for job in pending if run_state(job.folder) in (State.INTERRUPTED, State.WAITING)
        ]


def _wait_for_others(jobs: Sequence[Job]) -> list[Job]:
    """Wait for the runs in progress in other processes, and return them.

    Such a process belongs to another sweep, or is a worker that outlives its killed sweep.
    """
    busy = [job for job in jobs if run_state(job.folder) is State.RUNNING]
    if busy:
        _logger.info("%d runs are in progress in other processes; waiting for them", len(busy))
    while any(run_state(job.folder) is State.RUNNING for job in busy):
        time.sleep(_PAUSE)
    return busy


def _give_up(job: Job, error: Exception) -> None:
    died = RuntimeError(f"its process died {_MAX_CRASHES} times: {error}")
    record_failure(job.folder, died, job.overrides, train_command(job.folder, job.overrides))


@contextmanager
def _on_the_screen(directory: Path, config: DictConfig) -> Iterator[None]:
    """Show the progress of the sweep unless its runs draw on the screen themselves."""
    if draws_on_screen(config.hydra.launcher._target_) or not get_console().is_terminal:
        yield
        return
    with Live(
        get_renderable=lambda: render_progress(read_progress(directory)), refresh_per_second=1
    ):
        yield


def _close(jobs: Sequence[Job], pending: Sequence[Job]) -> None:
    states = [(job, run_state(job.folder)) for job in jobs]
    console = get_console()
    finished = sum(state is State.FINISHED for _, state in states)
    before = len(jobs) - len(pending)
    console.print(f"{finished} of {len(jobs)} runs are finished ({before} from before)")
    for job, state in states:
        if state is State.FAILED:
            failure = read_json(job.folder / FAILURE_FILE) or {}
            message = f"\n{job.folder} failed: {failure['message']}"
            console.print(message, markup=False, soft_wrap=True)
            console.print(f"  {failure.get('command', '')}", markup=False, soft_wrap=True)
        elif state is not State.FINISHED:
            console.print(f"\n{job.folder} is {state}", markup=False, soft_wrap=True)
    if finished < len(jobs):
        sys.exit(f"mtnrec: {len(jobs) - finished} of {len(jobs)} runs are not finished")
