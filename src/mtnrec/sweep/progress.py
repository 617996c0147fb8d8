"""How the runs of a sweep stand: done, running, failed, and the time that is left."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

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
_TRACES = (RECORD_FILE, FAILURE_FILE, RUNNING_FILE)  # of a run that was begun
_ORDER = (State.FINISHED, State.RUNNING, State.FAILED, State.INTERRUPTED, State.WAITING)


@dataclass(frozen=True)
class RunProgress:
    """A run as it stands.

    Args:
        name: Its folder, from the sweep's.
        state: What has become of it.
        seconds: That a finished one took, or a running one has taken; 0 for others.
        progress: Of a running one, what it says of itself.
        failure: Of a failed one, what went wrong.
    """

    name: str
    state: State
    seconds: float = 0.0
    progress: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """What runs of about the same cost share: all of the name but seed and hash."""
        return self.name.rpartition("-seed")[0]


def read_progress(root: Path) -> list[RunProgress]:
    """Return the runs that the sweeps below a folder have planned or begun, by name.

    Raises:
        InputError: If there are none.
    """
    folders = {path.parent for file in _TRACES for path in root.rglob(file)}
    for path in root.rglob(PLAN_FILE):
        planned = read_json(path) or {"cells": {}}
        folders |= {path.parent / name for name in planned["cells"]}
    if not folders:
        raise InputError(
            f"no sweep has begun in {root}: `python -m mtnrec.train -m seed=0,1,2` begins one in "
            "runs"
        )
    return [_read_run(root, folder) for folder in sorted(folders)]


def _read_run(root: Path, folder: Path) -> RunProgress:
    name, state = folder.relative_to(root).as_posix(), run_state(folder)
    if state is State.FINISHED:
        record = folder / RECORD_FILE
        return RunProgress(
            name, state, seconds=_recorded_seconds(record, record.stat().st_mtime_ns)
        )
    if state is State.RUNNING:
        progress = read_json(folder / RUNNING_FILE) or {}
        elapsed = time.time() - progress.get("started", time.time())
        return RunProgress(name, state, seconds=elapsed, progress=progress)
    if state is State.FAILED:
        return RunProgress(name, state, failure=read_json(folder / FAILURE_FILE))
    return RunProgress(name, state)


@cache
def _recorded_seconds(record: Path, modified: int) -> float:
    """Read a record once; ``modified`` tells a new one from an old."""
    return sum((read_json(record) or {"seconds": {}})["seconds"].values())


def seconds_left(runs: Sequence[RunProgress]) -> float | None:
    """Estimate the time until all runs are done, from the finished ones of the same kind.

    As many as run now are taken to run side by side until the end.

    Returns:
        Seconds; None where nothing is finished yet.
    """
    finished = [run for run in runs if run.state is State.FINISHED]
    if not finished:
        return None
    of_all = fmean(run.seconds for run in finished)
    of_kind = {
        kind: fmean(run.seconds for run in finished if run.kind == kind)
        for kind in {run.kind for run in finished}
    }
    left = sum(
        max(of_kind.get(run.kind, of_all) - run.seconds, 0)
        for run in runs
        if run.state not in (State.FINISHED, State.FAILED)
    )
    return left / max(1, sum(run.state is State.RUNNING for run in runs))


def render_progress(runs: Sequence[RunProgress]) -> RenderableType:
    """Lay the state of a sweep out: counts, a bar, what runs, what failed."""
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
            yield Text(f"failed: {run.name}: {run.failure['message']}")
            yield Text(f"  {run.failure.get('command', '')}")


def _duration(seconds: float) -> str:
    """Write a time in its two largest units.

    >>> _duration(59.6), _duration(3725)
    ('1 min', '1 h 2 min')
    """
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
