"""Show how a sweep stands.

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
from mtnrec.sweep.progress import lay_out, read_cells


@entry_point("status")
def main(cfg: DictConfig) -> None:
    """Show how a sweep stands; on a terminal, until nothing of it runs or waits."""
    check_number("refresh", cfg.refresh, minimum=0.1)
    runs, console = Path(cfg.runs), get_console()
    cells = read_cells(runs)
    if not console.is_terminal:
        console.print(lay_out(cells))
        return
    with Live(lay_out(cells), console=console, auto_refresh=False) as live:
        while any(cell.state not in (State.FINISHED, State.FAILED) for cell in cells):
            time.sleep(cfg.refresh)
            cells = read_cells(runs)
            live.update(lay_out(cells), refresh=True)


if __name__ == "__main__":
    main()
