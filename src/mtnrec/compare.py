"""Compare two runs: the settings that differ, and their metrics side by side.

``python -m mtnrec.compare runs/a runs/b``
"""

import argparse
import sys
from pathlib import Path

from rich import get_console
from rich.table import Table as Grid

from mtnrec.checks import InputError
from mtnrec.command.help import WITHOUT_KEYS
from mtnrec.reporting.table.pair import metrics_of_pair, settings_of_pair
from mtnrec.reporting.table.render import Table
from mtnrec.run.record import RECORD_FILE, RunRecord


def main() -> None:
    """Read two records and print their tables."""
    parser = argparse.ArgumentParser(
        "python -m mtnrec.compare", description=WITHOUT_KEYS["compare"]
    )
    parser.add_argument("first", help="folder of a finished run, A")
    parser.add_argument("second", help="folder of another, B")
    arguments = parser.parse_args()
    try:
        pair = _read(arguments.first), _read(arguments.second)
    except InputError as error:
        sys.exit(f"mtnrec: {error}")
    for table in (settings_of_pair(*pair), metrics_of_pair(*pair)):
        get_console().print(_grid(table))


def _read(folder: str) -> RunRecord:
    path = Path(folder)
    path = path if path.name == RECORD_FILE else path / RECORD_FILE
    if not path.is_file():
        raise InputError(
            f"the arguments must be folders of finished runs, got {folder} without {RECORD_FILE}. "
            "Choose the folder of one run."
        )
    return RunRecord.read(path)


def _grid(table: Table) -> Grid:
    grid = Grid(title=table.title, title_justify="left", caption=" ".join(table.notes) or None)
    grid.caption_justify = "left"
    for column in (table.stub, *table.groups[0].columns):
        grid.add_column(column, justify="left" if table.is_text or not grid.columns else "right")
    for row in table.rows:
        grid.add_row(row.header, *(cell.text for cell in row.cells))
    return grid


if __name__ == "__main__":
    main()
