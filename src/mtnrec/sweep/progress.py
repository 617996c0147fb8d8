"""Progress of a sweep: finished, running and failed runs, and the time left."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtnrec.checks import InputError
from mtnrec.metric.catalogue import metric_info, parse_metric_key
from mtnrec.run.folder import FAILURE_FILE, RUNNING_FILE, State, run_state
from mtnrec.run.record import RECORD_FILE, RunRecord
from mtnrec.system.files import read_json

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

_LEADERS = 10  # arms of a leaderboard


@dataclass(frozen=True)
class RunProgress:
    """Progress of one run.

    Args:
        name: Folder of the run, relative to that of the sweep.
        state: State of the run.
        seconds: Seconds a finished run took or a running one has taken so far; otherwise 0.
        progress: Content of ``running.json`` of a running run.
        failure: Content of ``failure.json`` of a failed run.
        overrides: Overrides of a planned run.
        monitor: Metric that chooses the epoch of a started run.
        value: Its value at the best epoch of a finished run or the last one of a running run.
        better: Better direction of the monitor of a finished run.
        arm: Hash of the arm of a finished run.
        is_trial: Whether a finished run is a trial of a search, which is not tested.
    """

    name: str
    state: State
    seconds: float = 0.0
    progress: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None
    overrides: tuple[str, ...] = ()
    monitor: str | None = None
    value: float | None = None
    better: str = "higher"
    arm: str = ""
    is_trial: bool = False

    @property
    def kind(self) -> str:
        """Name without seed and hash; runs of one kind cost about the same."""
        return self.name.rpartition("-seed")[0] or self.name


def read_progress(root: Path) -> list[RunProgress]:
    """Return the planned and started runs of all sweeps below a folder, sorted by name.

    Raises:
        InputError: If there are no runs.
    """
    folders: dict[Path, tuple[str, ...]] = {
        path.parent: () for file in _TRACES for path in root.rglob(file)
    }
    submitted: set[Path] = set()
    for path in root.rglob(PLAN_FILE):
        plan = _or(_plan, path, _Plan({}, []))
        folders |= {path.parent / name: tuple(line) for name, line in plan.cells.items()}
        submitted |= {path.parent / name for name in plan.submitted}
    if not folders:
        raise InputError(
            f"runs must be the folder of a sweep, got {root}. Start one in the folder runs with "
            "`python -m mtnrec.train -m seed=0,1,2`."
        )
    return [
        _read_run(root, folder, folders[folder], folder in submitted) for folder in sorted(folders)
    ]


class _Plan(NamedTuple):
    cells: Mapping[str, Sequence[str]]  # overrides by folder
    submitted: list[str]


def _plan(path: Path) -> _Plan:
    content = _read(path)
    cells, submitted = content.get("cells"), content.get("submitted", {})
    if (
        not (isinstance(cells, Mapping) and isinstance(submitted, Mapping))
        or not all(isinstance(line, list) for line in cells.values())
        or {"/", ".."} & {part for name in (*cells, *submitted) for part in Path(name).parts}
    ):
        raise InputError(f"{path} is not the plan of a sweep. Delete it and run again.")
    return _Plan(cells, [*submitted])


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


def _read_run(root: Path, folder: Path, overrides: tuple[str, ...], submitted: bool) -> RunProgress:
    name, state = folder.relative_to(root).as_posix(), run_state(folder)
    if state is State.WAITING and submitted:
        state = State.SUBMITTED
    run = RunProgress(name, state, overrides=overrides)
    if state is State.FINISHED:
        record = folder / RECORD_FILE
        return replace(run, **_recorded(record, record.stat().st_mtime_ns))
    if state is State.RUNNING:
        running = folder / RUNNING_FILE
        progress = _or(_read, running, dict[str, Any]())
        return replace(
            run,
            seconds=max(0.0, _or(lambda path: _elapsed(path, progress), running, 0.0)),
            progress=progress,
            monitor=progress.get("monitor"),
            value=progress.get("value"),
        )
    if state is State.FAILED:
        return replace(run, failure=_or(_read, folder / FAILURE_FILE, dict[str, Any]()))
    return run


def _elapsed(path: Path, progress: Mapping[str, Any]) -> float:
    """Return the seconds up to the last heartbeat, by the clock of the run's own host."""
    started = _number(path, progress.get("started", 0))
    return _number(path, progress.get("heartbeat", started)) - started


@cache
def _recorded(record: Path, modified: int) -> dict[str, Any]:
    """Return the fields of a finished run, cached until ``modified`` changes."""
    content = _or(read_json, record, None)
    if content is None:
        return {}
    seconds = _or(lambda path: _sum_of_seconds(path, content), record, 0.0)
    try:
        read = RunRecord.from_content(content, record)
    except InputError:  # of another version
        return {"seconds": seconds}
    found = monitored(read)
    return {
        "seconds": seconds,
        "monitor": found.name,
        "value": found.value,
        "better": found.better,
        "arm": read.identity.arm,
        "is_trial": not read.is_tested,
    }


class Monitored(NamedTuple):
    """Monitor of a finished run, its value at the best epoch and its better direction."""

    name: str
    value: float | None
    better: str


def monitored(record: RunRecord) -> Monitored:
    """Return the monitor of a finished run."""
    name = str(record.config.get("monitor"))
    key = parse_metric_key(name, {place.partition("/")[2] for place in record.counts})
    metric = "" if key is None else key.metric
    info = metric_info(metric, record.added_metrics.get(metric, "higher"))
    return Monitored(name, record.metrics.get(name), info.better)


def _sum_of_seconds(record: Path, content: Mapping[str, Any]) -> float:
    seconds = content.get("seconds")
    if not isinstance(seconds, Mapping):
        raise InputError(f"{record} lacks the key seconds. Delete it and run again.")
    return sum(_number(record, value) for value in seconds.values())


def seconds_left(runs: Sequence[RunProgress]) -> float | None:
    """Estimate the time until all runs are done, from finished runs of the same kind.

    Assumes that as many runs as now run in parallel until the end.

    Returns:
        Seconds; None if no run is finished or none is running.
    """
    finished = [run for run in runs if run.state is State.FINISHED]
    running = sum(run.state is State.RUNNING for run in runs)
    if not finished or not running:
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
    return left / running


def render_progress(runs: Sequence[RunProgress]) -> RenderableType:
    """Render the progress of a sweep: counts, a bar, running and failed runs, best arms."""
    counts = Counter(run.state for run in runs)
    summary = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    left = seconds_left(runs)
    if left is not None:
        summary += f"; about {_duration(left)} left"
    bar = ProgressBar(total=len(runs), completed=counts[State.FINISHED])
    head = Text(f"{len(runs)} runs: {summary}")
    return Group(head, Padding(bar), *_running(runs), *_failed(runs), *render_leaderboard(runs))


def _running(runs: Sequence[RunProgress]) -> Iterator[RenderableType]:
    table = _table("running", "epochs", "time", "monitor", "", "where")
    for run in runs:
        if run.state is not State.RUNNING:
            continue
        progress = run.progress or {}
        place = f"{progress.get('pid', '')} on {progress.get('host', '')}"
        epochs = str(progress.get("epochs", 0))
        value = "" if run.value is None else f"{run.value:.4f}"
        table.add_row(run.name, epochs, _duration(run.seconds), run.monitor or "", value, place)
    if table.row_count:
        yield table


def render_leaderboard(runs: Sequence[RunProgress]) -> Iterator[RenderableType]:
    """Render the arms of the finished runs by the mean of their monitor, the best first.

    Arms are compared by one monitor; each monitor has its own table, and so have the trials of a
    search, whose best values are optimistic.
    """
    done = [run for run in runs if run.state is State.FINISHED and run.value is not None]
    for is_trial, monitor in sorted({(run.is_trial, str(run.monitor)) for run in done}):
        own = [run for run in done if (run.is_trial, run.monitor) == (is_trial, monitor)]
        arms: dict[str, list[RunProgress]] = {}
        for run in own:
            arms.setdefault(run.arm, []).append(run)
        is_lower_better = any(run.better == "lower" for arm in arms.values() for run in arm)
        sign = 1 if is_lower_better else -1
        ranked = sorted(arms.values(), key=lambda arm: sign * _mean(arm))
        name = "best trials" if is_trial else "best arms"
        table = _table(name, "runs", f"mean {monitor}", "lowest", "highest")
        for arm in ranked[:_LEADERS]:
            values = _values(arm)
            numbers = (f"{value:.4f}" for value in (_mean(arm), min(values), max(values)))
            table.add_row(_label(arm, own), str(len(arm)), *numbers)
        yield table
        if len(ranked) > _LEADERS:
            yield Text(f"and {len(ranked) - _LEADERS} more {name.removeprefix('best ')}")


def _values(arm: Sequence[RunProgress]) -> list[float]:
    return [run.value for run in arm if run.value is not None]


def _mean(arm: Sequence[RunProgress]) -> float:
    return fmean(_values(arm))


def _label(arm: Sequence[RunProgress], runs: Sequence[RunProgress]) -> str:
    """Return the overrides that distinguish an arm, or its folder's name if nothing does."""
    own = set.intersection(*(set(run.overrides) for run in arm))
    own -= {line for line in own if line.startswith("seed=")}  # of an arm's only run so far
    shared = set.intersection(*(set(run.overrides) for run in runs))
    return " ".join(line for line in arm[0].overrides if line in own - shared) or arm[0].kind


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in headers:
        is_text = header in ("running", "monitor", "where", "best arms", "best trials")
        table.add_column(header, justify="left" if is_text else "right")
    return table


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
