"""Run a job of a sweep in a subprocess."""

import logging
import subprocess
import sys
from pathlib import Path

from mtnrec.command.job import job_command, job_overrides, owns_screen
from mtnrec.run.folder import FAILURE_FILE, record_failure
from mtnrec.run.record import RECORD_FILE, RunRecord
from mtnrec.system.files import read_json

_LINES = 30  # last lines shown of the output of a failed run

_logger = logging.getLogger(__name__)


def run_in_subprocess(output_dir: Path) -> RunRecord:
    """Run this job of a sweep in a subprocess and return its record.

    Lightning starts the other ranks by repeating the command line of rank 0, which in a sweep is
    that of the sweep, and kills rank 0 when another rank fails.

    Raises:
        RuntimeError: If the command fails.
    """
    (output_dir / FAILURE_FILE).unlink(missing_ok=True)
    command = job_command(output_dir)
    shown = owns_screen()
    output = None if shown else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, *command[1:]],
        check=False,
        stdout=output,
        stderr=None if shown else subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0 and (output_dir / RECORD_FILE).is_file():
        return RunRecord.read(output_dir / RECORD_FILE)
    if not shown:
        _logger.error("%s", "\n".join(done.stdout.splitlines()[-_LINES:]))
    failure = read_json(output_dir / FAILURE_FILE)
    if failure is not None:
        raise RuntimeError(failure["message"])
    error = RuntimeError(f"one of its processes ended with exit status {done.returncode}")
    record_failure(output_dir, error, job_overrides(), command)
    raise error
