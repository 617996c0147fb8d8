"""Progress of a sweep: finished, running and failed runs, and the time left."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtnrec.checks import InputError
from mtnrec.files import read_json
from mtnrec.run.folder import FAILURE_FILE, RUNNING_FILE, State, run_state
from mtnrec.run.record import RECORD_FILE

PLAN_FILE = "sweep.json"
_TRACES = (RECORD_FILE, FAILURE_FILE, RUNNING_FILE)  # files of a started run
_ORDER = (
    State.FINISHED,
    State.RUNNING,
    State.FAILED,
    State.INTERRUPTED,
    State.SUBMITTED,
    State.WAITING,
)

T = TypeVar("T")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunProgress:
    """Progress of one run.

    Args:
        name: Folder of the run, relative to that of the sweep.
        state: State of the run.
        seconds: Seconds a finished run took or a running one has taken so far; otherwise 0.
        progress: Content of ``running.json`` of a running run.
        failure: Content of ``failure.json`` of a failed run.
    """

    name: str
    state: State
    seconds: float = 0.0
    progress: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """Name without seed and hash; runs of one kind cost about the same."""
        return self.name.rpartition("-seed")[0]


def read_progress(root: Path) -> list[RunProgress]:
    """Return the planned and started runs of all sweeps below a folder, sorted by name.

    Raises:
        InputError: If there are no runs.
    """
    folders = {path.parent for file in _TRACES for path in root.rglob(file)}
    submitted: set[Path] = set()
    for path in root.rglob(PLAN_FILE):
        planned, waiting = _or(_planned, path, ([], []))
        folders |= {path.parent / name for name in planned}
        submitted |= {path.parent / name for name in waiting}
    if not folders:
        raise InputError(
            f"runs must be the folder of a sweep, got {root}. Start one in the folder runs with "
            "`python -m mtnrec.train -m seed=0,1,2`."
        )
    return [_read_run(root, folder, folder in submitted) for folder in sorted(folders)]


def _planned(path: Path) -> tuple[list[str], list[str]]:
    """Return the planned runs, and those that were submitted."""
    plan = _read(path)
    cells, submitted = plan.get("cells"), plan.get("submitted", {})
    if not (isinstance(cells, Mapping) and isinstance(submitted, Mapping)) or {"/", ".."} & {
        part for name in (*cells, *submitted) for part in Path(name).parts
    }:
        raise InputError(f"{path} is not the plan of a sweep. Delete it and run again.")
    return [*cells], [*submitted]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) or {}


def _number(path: Path, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path} must hold a number, got {str(value)[:40]}. Delete it.")
    return float(value)


def _or(read: Callable[[Path], T], path: Path, otherwise: T) -> T:
    """Read a file; if it is of another shape, warn once and return the last argument."""
    try:
        return read(path)
    except InputError as error:
        _warn_once(str(error))
        return otherwise


@cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _read_run(root: Path, folder: Path, submitted: bool) -> RunProgress:
    name, state = folder.relative_to(root).as_posix(), run_state(folder)
    if state is State.WAITING and submitted:
        state = State.SUBMITTED
    if state is State.FINISHED:
        record = folder / RECORD_FILE
        return RunProgress(
            name, state, seconds=_recorded_seconds(record, record.stat().st_mtime_ns)
        )
    if state is State.RUNNING:
        running = folder / RUNNING_FILE
        progress = _or(_read, running, dict[str, Any]())
        elapsed = _or(lambda path: _elapsed(path, progress), running, 0.0)
        return RunProgress(name, state, seconds=elapsed, progress=progress)
    if state is State.FAILED:
        return RunProgress(name, state, failure=_or(_read, folder / FAILURE_FILE, dict[str, Any]()))
    return RunProgress(name, state)


def _elapsed(path: Path, progress: Mapping[str, Any]) -> float:
    now = time.time()
    return now - _number(path, progress.get("started", now))


@cache
def _recorded_seconds(record: Path, modified: int) -> float:
    """Return a record's total seconds, cached until ``modified`` changes."""
    return _or(_sum_of_seconds, record, 0.0)


def _sum_of_seconds(record: Path) -> float:
    seconds = _read(record).get("seconds")
    if not isinstance(seconds, Mapping):
        raise InputError(f"{record} lacks the key seconds. Delete it and run again.")
    return sum(_number(record, value) for value in seconds.values())


def seconds_left(runs: Sequence[RunProgress]) -> float | None:
    """Estimate the time until all runs are done, from finished runs of the same kind.

    Assumes that as many runs as now run in parallel until the end.

    Returns:
        Seconds; None if no run is finished.
    """
    finished = [run for run in runs if run.state is State.FINISHED]
    if not finished:
        return None
    overall = fmean(run.seconds for run in finished)
    by_kind = {
        kind: fmean(run.seconds for run in finished if run.kind == kind)
        for kind in {run.kind for run in finished}
    }
    left = sum(
        max(by_kind.get(run.kind, overall) - run.seconds, 0)
        for run in runs
        if run.state not in (State.FINISHED, State.FAILED)
    )
    return left / max(1, sum(run.state is State.RUNNING for run in runs))


def render_progress(runs: Sequence[RunProgress]) -> RenderableType:
    """Render the progress of a sweep: counts, a bar, running and failed runs."""
    counts = Counter(run.state for run in runs)
    summary = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    left = seconds_left(runs)
    done = counts[State.FINISHED] + counts[State.FAILED]
    if done < len(runs) and left is not None:
        summary += f"; about {_duration(left)} left"
    bar = ProgressBar(total=len(runs), completed=counts[State.FINISHED])
    head = Text(f"{len(runs)} runs: {summary}")
    return Group(head, Padding(bar), *_running(runs), *_failed(runs))


def _running(runs: Sequence[RunProgress]) -> Iterator[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("running", "epochs", "time", "where"):
        table.add_column(header, justify="left" if header in ("running", "where") else "right")
    for run in runs:
        if run.state is not State.RUNNING:
            continue
        progress = run.progress or {}
        place = f"{progress.get('pid', '')} on {progress.get('host', '')}"
        epochs = str(progress.get("epochs", 0))
        table.add_row(run.name, epochs, _duration(run.seconds), place)
    if table.row_count:
        yield table


def _failed(runs: Sequence[RunProgress]) -> Iterator[RenderableType]:
    for run in runs:
        if run.failure is not None:
            yield Text(f"failed: {run.name}: {run.failure.get('message', '')}")
            yield Text(f"  {run.failure.get('command', '')}")


def _duration(seconds: float) -> str:
    """Format a time in its two largest units.

    >>> _duration(59.6), _duration(3725)
    ('1 min', '1 h 2 min')
    """
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
