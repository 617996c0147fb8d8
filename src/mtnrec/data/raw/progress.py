"""Progress of reading raw files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from mtnrec.data.raw.limits import READ_BYTES, refuse_damage


class ReadProgress:
    """Progress bar of the bytes read from raw files, with row count and time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            DownloadColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[rows]:,} rows", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
        )
        self._task: TaskID | None = None
        self._rows = 0

    def __enter__(self) -> "ReadProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        """Open a file and show the progress of reading it."""
        self._rows = 0
        self._task = self._progress.add_task(path.name, total=path.stat().st_size, rows=0)
        with refuse_damage(str(path)):
            raw = path.open("rb", buffering=0)
        with raw as file:
            # Buffered here, since each read updates the bar.
            metered = cast(io.RawIOBase, self._progress.wrap_file(file, task_id=self._task))
            yield io.BufferedReader(metered, READ_BYTES)
        self._progress.update(self._task, completed=path.stat().st_size)

    def log(self, what: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(what, markup=False, highlight=False, soft_wrap=True)

    def advance(self, rows: int) -> None:
        """Add to the row count of the open file."""
        self._rows += rows
        if self._task is not None:
            self._progress.update(self._task, rows=self._rows)
