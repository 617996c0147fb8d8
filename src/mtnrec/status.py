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


@entry_point("status")
def main(cfg: DictConfig) -> None:
    """Show the progress of a sweep; on a terminal, until every run is finished or failed."""
    check_number("refresh", cfg.refresh, minimum=0.1)
    root, console = Path(cfg.runs), get_console()
    runs = read_progress(root)
    if not console.is_terminal:
        console.print(render_progress(runs))
        return
    with Live(render_progress(runs), console=console, auto_refresh=False) as live:
        while any(run.state not in (State.FINISHED, State.FAILED) for run in runs):
            time.sleep(cfg.refresh)
            runs = read_progress(root)
            live.update(render_progress(runs), refresh=True)


if __name__ == "__main__":
    main()
