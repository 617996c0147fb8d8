"""Plan and launch the runs of a sweep.

A run folder is named after its settings, so the same command finds the runs it finished before.
"""

import json
import logging
import shlex
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
from hydra.core.override_parser.types import Override
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationToMissingValueError
from rich import get_console
from rich.live import Live

from mtnrec.checks import InputError
from mtnrec.command.config import naming_folders_after, resolve_settings
from mtnrec.command.interrupt import got_sigterm, interrupt_status
from mtnrec.command.job import draws_on_screen, make_datamodule, train_command
from mtnrec.command.keys import check_choices, check_keys
from mtnrec.data.datamodule import DataModule
from mtnrec.run.folder import (
    FAILURE_FILE,
    RUNNING_FILE,
    State,
    find_record,
    record_failure,
    run_state,
)
from mtnrec.run.identity import RunIdentity
from mtnrec.run.record import RunRecord, warn_of_changes, warn_without_scores
from mtnrec.run.secrets import redact_text
from mtnrec.sweep.composition import Composer
from mtnrec.sweep.progress import PLAN_FILE, read_progress, render_leaderboard, render_progress
from mtnrec.sweep.submission import submit_jobs
from mtnrec.system.files import read_json, write_json

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
        command: Command that repeats the run.
    """

    overrides: tuple[str, ...]
    folder: Path
    config: dict[str, Any]
    command: tuple[str, ...] = ()


def split_experiments(
    config: DictConfig, loader: ConfigLoader, arguments: Sequence[str]
) -> list[tuple[DictConfig, list[str]]]:
    """Return a sweep per swept experiment, since each brings its grid, folder and launcher.

    Args:
        config: Config of the sweep.
        loader: Composes the config of each experiment.
        arguments: Arguments of the command line.

    Returns:
        Config and arguments of each sweep; those given if no experiment is swept.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    swept = [o for o in parsed if o.key_or_group == "experiment" and o.is_sweep_override()]
    if not swept:
        return [(config, list(arguments))]
    others = [o.input_line for o in parsed if o.key_or_group != "experiment" and o.input_line]
    sweeps = []
    for experiment in swept[-1].sweep_string_iterator():
        chosen = [*others, f"experiment={experiment}"]
        lines = [*config.hydra.overrides.hydra, *chosen]
        name = config.hydra.job.config_name
        sweeps.append((loader.load_configuration(name, lines, RunMode.MULTIRUN), chosen))
    return sweeps


def plan(
    config: DictConfig,
    loader: ConfigLoader,
    grids: Iterable[Mapping[str, Any]],
    arguments: Sequence[str],
) -> list[Job]:
    """Return the runs of all grids, each once.

    A key of a group that the choice of a run lacks is left out of that run, with a warning.

    Args:
        config: Config of the sweep.
        loader: Composes the configs of the runs.
        grids: Swept values of each grid, by key.
        arguments: Arguments of the command line, which replace keys in every grid.

    Raises:
        InputError: If no run has a key, or two runs have one folder.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[list[Override]] = []
    for grid in grids:
        values = {key: "null" if value is None else value for key, value in grid.items()}
        lines = [*(f"{key}={value}" for key, value in values.items()), *arguments]
        parsed.append(parser.parse_overrides(lines))
    swept = {line.key_or_group for part in parsed for line in part if line.is_sweep_override()}
    values_of = [{line.key_or_group: line.input_line for line in part} for part in parsed]
    # A key with one value in each grid is swept too, if the grids differ in it.
    given = {item for own in values_of for item in own.items()}
    swept |= {key for key, line in given if any(own.get(key) != line for own in values_of)}
    jobs: dict[str, Job] = {}
    composer = Composer(config, loader)
    for parsed_lines in parsed:
        (runs,) = BasicSweeper.split_arguments(parsed_lines, None)
        for overrides in runs:
            with naming_folders_after(swept):
                job = make_job(*composer.compose(overrides))
            jobs.setdefault(RunIdentity(job.config, checksum="", seed_keys=()).id, job)
    composer.report()
    for folder, count in Counter(job.folder for job in jobs.values()).items():
        if count > 1:
            raise InputError(
                f"hydra.sweep.subdir must name each run by its settings, got {folder.name!r} for "
                "two different runs. Leave it out."
            )
    return list(jobs.values())


def make_job(composed: DictConfig, overrides: Sequence[str]) -> Job:
    """Return the run of a composed config.

    Raises:
        InputError: If its folder's name depends on an unknown value, or a key is not known.
    """
    try:
        folder = Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir
    except InterpolationToMissingValueError as error:
        raise InputError(
            "hydra.sweep.subdir must name each run by its settings, so that the same command finds "
            f"it again, got an unknown value ({error.msg}). Leave it out."
        ) from error
    check_choices(overrides)
    check_keys(composed, "train")
    settings = resolve_settings(composed)
    command = train_command(folder.absolute(), overrides, composed.hydra)
    return Job(tuple(overrides), folder, settings, tuple(command))


def run_jobs(
    jobs: Sequence[Job], launcher: Launcher, config: DictConfig, earlier: Sequence[Job] = ()
) -> None:
    """Run the jobs that are not finished; exit with status 1 if some still are not.

    A launcher with ``wait=False`` only submits them. With ``dry_run`` they are only listed. If none
    of them has its data set, none is started.

    Args:
        jobs: All runs of the sweep.
        launcher: Launches the unfinished ones.
        config: Config of the sweep.
        earlier: Runs that the sweep launched before and that its plan keeps.

    Raises:
        InputError: If no unfinished run has its data set.
    """
    directory = Path(config.hydra.sweep.dir)
    prepared = PreparedData(jobs, prepare=not config.dry_run)
    finished = {job.folder: prepared.find_finished(job) for job in jobs}
    pending = [job for job in jobs if finished[job.folder] is None]
    if config.dry_run:
        _list(jobs, pending, directory)
        return
    prepared.check(pending)
    sweep = write_plan([*earlier, *jobs], directory)
    _logger.info(
        "%d runs in %s, %d of them finished before", len(jobs), directory, len(jobs) - len(pending)
    )
    warn_of_changes(
        (record, job.config["threads"]) for job in jobs if (record := finished[job.folder])
    )
    warn_without_scores(
        record for job in jobs if job.config["keep_scores"] and (record := finished[job.folder])
    )
    if not getattr(launcher, "wait", True):
        _make_folders(pending)
        submit_jobs({job.folder: job.overrides for job in pending}, launcher, directory, sweep)
        return
    launch_jobs(pending, launcher, config, [*earlier, *jobs])
    _close(jobs, pending, directory)


def write_plan(jobs: Sequence[Job], directory: Path) -> dict[str, Any]:
    """Write the plan of a sweep, which its status is read from, and return its content."""
    directory.mkdir(parents=True, exist_ok=True)
    planned = {job.folder.relative_to(directory).as_posix(): _shown(job) for job in jobs}
    submitted = (read_json(directory / PLAN_FILE) or {}).get("submitted", {})
    sweep = {"started": time.time(), "cells": planned, "submitted": submitted}
    write_json(directory / PLAN_FILE, sweep)
    return sweep


def launch_jobs(
    pending: Sequence[Job], launcher: Launcher, config: DictConfig, jobs: Sequence[Job]
) -> None:
    """Launch runs and wait for them; if interrupted, say what is kept and exit.

    Args:
        pending: Runs to launch.
        launcher: Launches them.
        config: Config of the sweep.
        jobs: All runs of the sweep so far.
    """
    directory = Path(config.hydra.sweep.dir)
    _make_folders(pending)
    try:
        with _on_the_screen(directory, config):
            _launch(pending, launcher)
    except (KeyboardInterrupt, SystemExit) as error:
        status = interrupt_status(error)
        if status is None:
            raise
        _say_interrupted(jobs, directory)
        sys.exit(status)


def _make_folders(pending: Sequence[Job]) -> None:
    for job in pending:
        if run_state(job.folder) is State.RUNNING:
            continue
        for stale in (FAILURE_FILE, RUNNING_FILE):
            (job.folder / stale).unlink(missing_ok=True)
        job.folder.mkdir(parents=True, exist_ok=True)  # the run takes the name from here


def _list(jobs: Sequence[Job], pending: Sequence[Job], directory: Path) -> None:
    """Print the state of each run; a finished one with other settings or data waits."""
    console = get_console()
    head = f"{len(jobs)} runs in {directory}, {len(jobs) - len(pending)} of them finished"
    console.print(head, markup=False, highlight=False, soft_wrap=True)
    for job in jobs:
        state = run_state(job.folder)
        if job in pending and state is State.FINISHED:
            state = State.WAITING
        line = f"{state:12}{job.folder.relative_to(directory)}  {' '.join(_shown(job))}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _say_interrupted(jobs: Sequence[Job], directory: Path) -> None:
    states = Counter(run_state(job.folder) for job in jobs)
    started = states[State.INTERRUPTED] + states[State.RUNNING]  # a worker may not have ended yet
    command = redact_text(shlex.join(["python", "-m", "mtnrec.train", *sys.argv[1:]]))
    sys.stderr.write(
        f"mtnrec: interrupted. {directory} keeps {states[State.FINISHED]} of {len(jobs)} runs "
        f"finished, and the last complete epoch of {started} interrupted. To resume:\n"
        f"  {command}\n"
    )


def _shown(job: Job) -> list[str]:
    return [redact_text(override) for override in job.overrides]


def _data_key(job: Job) -> str:
    """Return a key of a job's data set."""
    return json.dumps(job.config["data"])


class PreparedData:
    """Data sets of a sweep's runs.

    Args:
        jobs: Runs of the sweep.
        prepare: Whether to prepare the data sets before the runs share them; early warnings name
            those that are missing.
    """

    def __init__(self, jobs: Sequence[Job], *, prepare: bool) -> None:
        self._runs = len(jobs)
        # Checksum, None if the set is missing, and the settings that its record has.
        self._found: dict[str, tuple[str | None, dict[str, Any]]] = {}
        uses = Counter(map(_data_key, jobs))
        for job in jobs:
            data = _data_key(job)
            if data in self._found:
                continue
            self._found[data] = None, {}
            try:
                datamodule: DataModule = make_datamodule(job.config["data"], job.overrides)
                if prepare:
                    datamodule.prepare_data()
                self._found[data] = datamodule.find_checksum(), datamodule.settings_used()
            except (InputError, InstantiationException) as error:
                message = redact_text(str(error))
                _logger.warning("%d of %d runs will fail: %s", uses[data], len(jobs), message)

    def check(self, pending: Sequence[Job]) -> None:
        """Refuse to start if none of the runs has its data set.

        Raises:
            InputError: If so.
        """
        if pending and all(self._found[_data_key(job)][0] is None for job in pending):
            raise InputError(
                f"{len(pending)} of {self._runs} runs cannot start, since their data set is "
                "missing. Do what the warnings say, then start the sweep again."
            )

    def find_finished(self, job: Job) -> RunRecord | None:
        """Return the record of a run that is finished and need not be made again."""
        if not job.config["resume"] or run_state(job.folder) is not State.FINISHED:
            return None
        checksum, used = self._found[_data_key(job)]
        config = job.config | {"data": {**job.config["data"], **used}}
        return find_record(job.folder, config, checksum)


def _launch(pending: Sequence[Job], launcher: Launcher) -> None:
    deaths: Counter[Path] = Counter()
    while pending:
        # A worker that dies ends the others, so a run is tried alone before it counts as failed.
        suspects = [job for job in pending if deaths[job.folder] == _MAX_CRASHES - 1]
        launched = suspects[:1] or pending
        try:
            launcher.launch([job.overrides for job in launched], initial_job_idx=0)
        except (Exception, SystemExit) as error:  # a killed worker ends the whole launch
            if got_sigterm():
                raise
            dead = [job for job in launched if run_state(job.folder) is State.INTERRUPTED]
            if not dead:
                raise
            _logger.warning("%s; continuing with the remaining runs", redact_text(str(error)))
            for job in dead:
                (job.folder / RUNNING_FILE).unlink(missing_ok=True)  # counted
                deaths[job.folder] += 1
                if deaths[job.folder] == _MAX_CRASHES:
                    _give_up(job, error)
        else:
            others = [job for job in pending if job is not launched[0]] if suspects else []
            pending = [*others, *_wait_for_others(launched)]
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


def _give_up(job: Job, error: BaseException) -> None:
    died = RuntimeError(f"its process died {_MAX_CRASHES} times: {error}")
    record_failure(job.folder, died, job.overrides, job.command)


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


def _close(jobs: Sequence[Job], pending: Sequence[Job], directory: Path) -> None:
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
    console.print(*render_leaderboard(read_progress(directory)))
    if finished < len(jobs):
        sys.exit(f"mtnrec: {len(jobs) - finished} of {len(jobs)} runs are not finished")
