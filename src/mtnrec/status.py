"""Show the progress of a sweep.

``python -m mtnrec.status runs=runs/table_1``
"""

import time
from pathlib import Path

from omegaconf import DictConfig
from rich import get_console
from rich.live import Live

from mtnrec.checks import check_number
from mtnrec.command.entry_point import entry_point
from mtnrec.run.folder import State
from mtnrec.sweep.progress import read_progress, render_progress

_QUIET = 3.0  # seconds without a running run until nothing is taken to run


@entry_point("status")
def main(cfg: DictConfig) -> None:
    """Show the progress of a sweep; on a terminal, as long as something runs."""
    check_number("refresh", cfg.refresh, minimum=0.1)
    root, console = Path(cfg.runs), get_console()
    runs = read_progress(root)
    if not console.is_terminal:
        console.print(render_progress(runs))
        return
    seen = time.monotonic()  # when something ran last
    with Live(render_progress(runs), console=console, auto_refresh=False) as live:
        while cfg.watch or time.monotonic() - seen < _QUIET:
            time.sleep(cfg.refresh)
            runs = read_progress(root)
            live.update(render_progress(runs), refresh=True)
            if any(run.state in (State.RUNNING, State.SUBMITTED) for run in runs):
                seen = time.monotonic()
            elif all(run.state in (State.FINISHED, State.FAILED) for run in runs) and not cfg.watch:
                return


if __name__ == "__main__":
    main()
