"""Submit the runs of a sweep to Slurm without waiting for them."""

import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from rich import get_console

from mtnrec.run.folder import State, run_state
from mtnrec.sweep.progress import PLAN_FILE
from mtnrec.system.files import write_json

_QUEUE = ("squeue", "--me", "--array", "--noheader", "--format=%i")

_logger = logging.getLogger(__name__)


def submit_jobs(
    pending: Mapping[Path, Sequence[str]],
    launcher: Launcher,
    directory: Path,
    plan: Mapping[str, Any],
) -> None:
    """Submit the runs that are neither in progress nor in the queue.

    The plan of the sweep keeps their job IDs under ``submitted``.

    Args:
        pending: Overrides of the unfinished runs, by folder.
        launcher: Launcher that returns job IDs.
        directory: Folder of the sweep.
        plan: Plan of the sweep, the content of its file.
    """
    submitted: dict[str, str] = plan["submitted"]
    queued = _queued_jobs() if submitted else set()
    new = {
        folder.relative_to(directory).as_posix(): overrides
        for folder, overrides in pending.items()
        if run_state(folder) is not State.RUNNING
    }
    new = {name: lines for name, lines in new.items() if submitted.get(name) not in queued}
    if new:
        jobs = launcher.launch(list(new.values()), initial_job_idx=0)
        submitted |= {name: str(job.task_name) for name, job in zip(new, jobs, strict=True)}
        write_json(directory / PLAN_FILE, {**plan, "submitted": submitted})
    get_console().print(
        f"{len(new)} of {len(plan['cells'])} runs are submitted; {len(pending) - len(new)} are in "
        "progress or in the queue from before, the others are finished. Follow them with\n"
        f"  python -m mtnrec.status runs={directory}",
        markup=False,
        soft_wrap=True,
    )


def _queued_jobs() -> set[str]:
    """Return the IDs of the user's jobs that wait or run in Slurm."""
    try:
        found = subprocess.run(_QUEUE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        _logger.warning("%s; runs that wait in the queue are submitted again", error)
        return set()
    return set(found.stdout.split())
