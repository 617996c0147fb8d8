"""Read tables with any columns: csv, csv.gz, Parquet, folders of Parquet parts, frames in memory.

A csv file has a header, commas, and quotes where a cell holds a comma, a quote or a line break. All
its cells are text. Empty cells are missing, as are empty texts and NaN in Parquet.
"""

import csv
import hashlib
import io
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from polars.exceptions import PanicException, PolarsError
from rich.filesize import decimal

from mtnrec.arrays import BoolArray, Int64Array
from mtnrec.checks import InputError, find_duplicates, format_names
from mtnrec.data.raw import blocks
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block, read_blocks
from mtnrec.data.raw.limits import inflated
from mtnrec.resources import memory_bytes
from mtnrec.schema import MOST_COLUMNS

_ROWS_PER_CHUNK = 1 << 16  # of Parquet
_BYTES_PER_VALUE = 16  # at least, for a text
_UNREADABLE = (pl.Binary, pl.Object, pl.Time, pl.Duration)


@dataclass(frozen=True)
class Chunk:
    """Rows of a source.

    Args:
        frame: Cells of the rows; missing ones are null.
        path: The file, or a description of the frame.
        unit: ``line`` in a csv file, otherwise ``row``; both count from 1.
        numbers: Line or row number of each, ``(rows,)``.
        first: Number of earlier rows in the source.
        unchanged: Columns whose cells are as in the source, to be copied.
    """

    frame: pl.DataFrame
    path: Path | str
    unit: str
    numbers: Int64Array
    first: int
    unchanged: pl.DataFrame = field(default_factory=pl.DataFrame)

    def place(self, row: int) -> str:
        """Return the position of a row, for messages."""
        return f"{self.path}, {self.unit} {self.numbers[row]}"


class ArrowStream(Protocol):
    """A frame: any object with the Arrow PyCapsule stream interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Export the rows as a stream of Arrow record batches."""


class Source(ABC):
    """A table whose rows are read chunk by chunk.

    Attributes:
        path: The file or folder, or a description of the frame, for messages.
        name: Short form of ``path``.
        columns: Names of the columns.
    """

    path: Path | str
    name: str
    columns: list[str]

    @property
    @abstractmethod
    def identity(self) -> list[list[str | int]]:
        """JSON that identifies the content, stored in the manifest."""

    @abstractmethod
    def chunks(
        self, columns: list[str], bad_rows: BadRows, *, lists: Sequence[str] = ()
    ) -> Iterator[Chunk]:
        """Read some columns of all rows, in order and in bounded memory.

        Rows of a csv file with too few or too many cells go to ``bad_rows``. In Parquet files and
        frames, the columns named in ``lists`` may hold lists.

        Raises:
            InputError: If a file is damaged or truncated, a column has an unsupported type, or
                there are no rows.
        """

    def require_columns(self, key: str, names: list[str]) -> None:
        """Refuse names that are not columns; ``key`` is the setting that lists them."""
        if missing := [name for name in names if name not in self.columns]:
            raise InputError(
                f"{self.path} lacks the column {format_names(missing)} of {key}; it has "
                f"{format_names(self.columns)}"
            )


class FileSource(Source):
    """A table on disk; the constructor reads the headers.

    Args:
        key: The setting that names it, for example ``data.train``.
        path: A ``.csv``, ``.csv.gz`` or ``.parquet`` file, or a folder of ``.parquet`` files.

    Raises:
        InputError: If it cannot be read, or a column name is repeated or empty.
    """

    path: Path

    def __init__(self, key: str, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._files = _files(key, self.path)
        self.columns = _header(self._files[0])
        for file in self._files[1:]:
            header = _header(file)
            if differing := sorted(set(header) ^ set(self.columns)):
                raise InputError(
                    f"{file} and {self._files[0].name} differ in the columns "
                    f"{format_names(differing)}; the parts of a folder must have the same columns"
                )

    @property
    def identity(self) -> list[list[str | int]]:
        """Name and size of each file."""
        return [[file.name, file.stat().st_size] for file in self._files]

    def chunks(
        self,
        columns: list[str],
        bad_rows: BadRows,
        *,
        lists: Sequence[str] = (),
        unchanged: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        """Read some columns; those in ``unchanged`` of any type, in ``Chunk.unchanged``."""
        first, all_columns = 0, [*dict.fromkeys([*columns, *unchanged])]
        for path in self._files:
            if path.suffix == ".parquet":
                with readable(path):
                    types = pl.scan_parquet(path, glob=False).select(columns).collect_schema()
                _check_types(path, types, lists)
                parts = _read_parquet(path, all_columns)
            else:
                parts = _read_csv(path, all_columns, bad_rows)
            for unit, numbers, frame in parts:
                read = _missing_to_null(frame.select(columns))
                yield Chunk(read, path, unit, numbers, first, frame.select(unchanged))
                first += frame.height
        if not first:
            raise InputError(f"{self.path} has no rows")


class FrameSource(Source):
    """A table in memory, read like a Parquet file with the same columns.

    The constructor imports the rows as Arrow arrays and hashes them. It copies only columns that
    the frame stores in another form (for example pandas texts).

    Args:
        key: The setting that holds it, for example ``data.train``.
        frame: The frame; a pandas index is ignored.

    Raises:
        InputError: If it has no rows, a column name is repeated or empty, or Arrow or polars does
            not support the type of a column.
    """

    path: str

    def __init__(self, key: str, frame: ArrowStream) -> None:
        self.path = self.name = f"the frame of {key}"
        with _representable(self.path):
            self._frame = cast(pl.DataFrame, pl.from_arrow(self._to_arrow(frame), rechunk=False))
            self._sha256 = _hash_content(self._frame)
        if not self._frame.height:
            raise InputError(f"{self.path} has no rows")
        self.columns = self._frame.columns

    @property
    def identity(self) -> list[list[str | int]]:
        """SHA-256 of names, types and values, independent of the memory layout."""
        return [["sha256", self._sha256]]

    def _to_arrow(self, frame: ArrowStream) -> pa.Table:
        pandas = sys.modules.get("pandas")  # absent unless pandas was imported
        if pandas is not None and isinstance(frame, pandas.DataFrame):
            names = ["" if pandas.isna(label) is True else str(label) for label in frame.columns]
            _check_names(self.path, names)
            return pa.Table.from_pandas(frame, preserve_index=False)
        reader = pa.RecordBatchReader.from_stream(frame)
        _check_names(self.path, reader.schema.names)
        return reader.read_all()

    def chunks(
        self, columns: list[str], bad_rows: BadRows, *, lists: Sequence[str] = ()
    ) -> Iterator[Chunk]:
        frame = self._frame.select(columns)
        _check_types(self.path, frame.schema, lists)
        for first in range(0, frame.height, _ROWS_PER_CHUNK):
            part = frame.slice(first, _ROWS_PER_CHUNK)
            numbers = np.arange(first + 1, first + 1 + part.height)
            yield Chunk(_missing_to_null(part), self.path, "row", numbers, first)


def open_source(key: str, table: str | Path | ArrowStream) -> Source:
    """Open the table, a path or a frame, of the setting ``key``.

    Raises:
        InputError: If it cannot be read.
    """
    return FrameSource(key, table) if is_frame(table) else FileSource(key, cast(str, table))


def is_frame(table: object) -> TypeGuard[ArrowStream]:
    """Return whether a table is a frame rather than a path.

    >>> is_frame(pl.DataFrame({"click": [0, 1]})), is_frame("clicks.csv")
    (True, False)
    """
    return hasattr(table, "__arrow_c_stream__")


def check_table(key: str, table: object) -> None:
    """Refuse anything but a path or a frame, without reading it.

    >>> check_table("data.train", {"click": [0, 1]})
    Traceback (most recent call last):
    mtnrec.checks.InputError: data.train must be a path (a .csv, .csv.gz or .parquet file, or a \
folder of .parquet files) or a frame (of pandas, polars, pyarrow or any library with \
`__arrow_c_stream__`), got an object of type dict
    """
    if not isinstance(table, str | os.PathLike) and not is_frame(table):
        raise InputError(
            f"{key} must be a path (a .csv, .csv.gz or .parquet file, or a folder of .parquet "
            "files) or a frame (of pandas, polars, pyarrow or any library with "
            f"`__arrow_c_stream__`), got an object of type {type(table).__name__}"
        )


_Rows = tuple[str, Int64Array, pl.DataFrame]


def _files(key: str, path: Path) -> list[Path]:
    if path.is_dir():
        parts = sorted(part for part in path.glob("*.parquet") if part.name[0] not in "._")
        if not parts:
            raise InputError(f"{key}: the folder {path} has no .parquet files directly in it")
        if others := [part.name for part in parts if not part.is_file()]:
            raise InputError(f"{key}: {path} holds {format_names(others)}, which are not files")
        return parts
    if not path.is_file():
        raise InputError(f"{key}: {path} is missing")
    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise InputError(
            f"{key} must be a .csv, .csv.gz or .parquet file or a folder of .parquet files, got "
            f"{path}"
        )
    return [path]


@contextmanager
def readable(path: object) -> Iterator[None]:
    """Turn an error from reading a damaged file into one that names it."""
    try:
        yield
    # A polars panic is not an Exception.
    except (
        PolarsError,
        PanicException,
        pa.ArrowException,
        OSError,
        UnicodeError,
        csv.Error,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read ({reason}): it is damaged, truncated or in another format"
        ) from error


@contextmanager
def _representable(path: str) -> Iterator[None]:
    """Turn an error from a frame that Arrow or polars cannot represent into one that names it."""
    try:
        yield
    except InputError:
        raise
    except (
        *(PolarsError, PanicException, pa.ArrowException),
        *(OSError, TypeError, ValueError),
    ) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read as Arrow data ({reason}). Turn its columns into numbers, "
            "texts, booleans or dates, or drop them."
        ) from error


class _HashStream(io.RawIOBase):
    """Stream that hashes its input."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)


def _hash_content(frame: pl.DataFrame) -> str:
    """Return the SHA-256 of the columns, each as an Arrow IPC stream of one batch.

    Categories are hashed as their texts. ``take`` copies the arrays, which zeroes the bytes of
    missing cells and those outside a slice.
    """
    stream = _HashStream()
    rows = pa.array(np.arange(frame.height))
    for column in frame:
        if column.dtype in (pl.Categorical, pl.Enum):
            column = column.cast(pl.String)
        array = column.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).take(rows)
        table = pa.table({column.name: array})
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    return stream.sha256.hexdigest()


def _header(path: Path) -> list[str]:
    with readable(path):
        if path.suffix == ".parquet":
            names = pl.scan_parquet(path, glob=False).collect_schema().names()
        else:
            names = _csv_header(path)
    _check_names(path, names)
    return names


def _check_names(path: Path | str, names: list[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise _too_wide(path)
    if "" in names:
        raise InputError(
            f"{path}: column {names.index('') + 1} has no name. Name or delete it (pandas writes "
            "its index to csv as such a column, unless index=False)."
        )
    if twice := find_duplicates(names):
        raise InputError(f"{path} names the column {format_names(twice)} twice. Rename one.")


def _csv_header(path: Path) -> list[str]:
    first = _lines(next(_blocks(path)))[0]
    if not first:
        raise InputError(f"{path} must start with a header, got an empty line. Delete that line.")
    if first.count(",") >= MOST_COLUMNS:
        raise _too_wide(path)
    return next(csv.reader([first.removeprefix("\ufeff")], strict=True))


def _too_wide(path: Path | str) -> InputError:
    return InputError(f"{path} has more than {MOST_COLUMNS:,} columns. Leave some out.")


def _missing_to_null(frame: pl.DataFrame) -> pl.DataFrame:
    changes = []
    for name, dtype in frame.schema.items():
        column = pl.col(name)
        if dtype in (pl.Categorical, pl.Enum):
            column, dtype = column.cast(pl.String), pl.String()
        if dtype == pl.String:
            changes.append(pl.when(column != "").then(column).alias(name))
        elif dtype.is_decimal():
            changes.append(column.cast(pl.Float64))
        elif dtype.is_float():
            changes.append(column.fill_nan(None))
    return frame.with_columns(changes)


def _read_parquet(path: Path, columns: list[str]) -> Iterator[_Rows]:
    row = 1
    with readable(path):
        check_row_groups(path, path)
        scan = pl.scan_parquet(path, glob=False, hive_partitioning=False).select(columns)
        for frame in scan.collect_batches(chunk_size=_ROWS_PER_CHUNK, maintain_order=True):
            yield "row", np.arange(row, row + frame.height), frame
            row += frame.height


def _check_types(path: Path | str, schema: pl.Schema, lists: Sequence[str]) -> None:
    for name, dtype in schema.items():
        nested = dtype.is_nested() and not (name in lists and isinstance(dtype, pl.List))
        if nested or dtype in _UNREADABLE:
            raise InputError(
                f"{path}: the column {name!r} is of type {dtype}. Leave it out with "
                "data.exclude, or turn it into numbers or texts."
            )


def check_row_groups(name: object, file: Any) -> None:
    """Refuse a Parquet file whose row groups exceed the memory: each is decoded as a whole.

    On disk, a run of equal values takes a few bytes at any length.

    Args:
        name: Name of the file, for messages.
        file: Path or content of the file.

    Raises:
        InputError: If the largest row group takes more than half of the memory.
    """
    metadata = pq.read_metadata(file)
    values = [
        sum(group.column(column).num_values for column in range(group.num_columns))
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    ]
    needed, memory = _BYTES_PER_VALUE * max(values, default=0), memory_bytes()
    if not 0 <= needed <= memory // 2:
        raise InputError(
            f"{name} has a row group of {max(values):,} values, about {decimal(needed)}, but the "
            f"memory is {decimal(memory)}. Write it in smaller row groups."
        )


def _read_csv(path: Path, columns: list[str], bad_rows: BadRows) -> Iterator[_Rows]:
    header = _header(path)
    with readable(path):
        for numbers, widths, make_frame in _split_csv(path, header):
            bad = widths != len(header)
            rule = f"expected {len(header)} values (the row is truncated or malformed)"
            for row in np.flatnonzero(bad):
                bad_rows.add(f"{path}, line {numbers[row]}", rule, str(widths[row]))
            yield "line", numbers[~bad], make_frame(~bad).select(columns)


def _blocks(path: Path) -> Iterator[Block]:
    with path.open("rb") as file:
        stream = inflated(file, path) if path.suffix == ".gz" else file
        yield from read_blocks(stream, str(path))


def _lines(block: Block) -> pl.Series:
    """Split a block into lines without line ends."""
    try:
        text = block.data.decode()
    except UnicodeDecodeError as error:
        line = block.first_line + block.data.count(b"\n", 0, error.start)
        raise InputError(f"{block.source}, line {line}: the text is not UTF-8") from error
    return pl.Series([text[:-1]]).str.split("\n").explode().str.strip_suffix("\r")


_Lines = tuple[Int64Array, Int64Array, Callable[[BoolArray], pl.DataFrame]]


def _split_csv(path: Path, header: list[str]) -> Iterator[_Lines]:
    """Split lines into cells: first line and width of each row, and a function to make a frame.

    Polars' csv reader would pad short rows with nulls. From the first quote on, rows are split by
    the csv module, which is several times slower.
    """
    blocks = _blocks(path)
    for block in blocks:
        lines, line = _lines(block), block.first_line
        if b'"' in block.data:
            rest = chain.from_iterable(map(_lines, blocks))
            yield from _split_quoted(chain(lines, rest), line, header)
            return
        numbers = np.arange(line, line + len(lines))
        if line == 1:
            lines, numbers = lines[1:], numbers[1:]
        commas = lines.str.count_matches(",", literal=True).to_numpy().astype(np.int64)
        widths = np.where(lines.str.len_bytes().to_numpy() > 0, commas + 1, 0)

        def make_frame(keep: BoolArray, lines: pl.Series = lines) -> pl.DataFrame:
            if len(header) == 1:
                return lines.filter(keep).to_frame(header[0])
            cells = lines.filter(keep).str.split_exact(",", len(header) - 1)
            return cells.struct.rename_fields(header).struct.unnest()

        yield numbers, widths, make_frame


_Row = tuple[int, int, list[str]]  # first line, width, and the cells if the width is the header's


def _split_quoted(lines: Iterator[str], line: int, header: list[str]) -> Iterator[_Lines]:
    reader = csv.reader((text + "\n" for text in lines), strict=True)
    before = line - 1

    def numbered() -> Iterator[_Row]:
        while True:
            start = before + reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise csv.Error(f"line {start}: {error}") from error
            if row is None:
                return
            yield start, len(row), row if len(row) == len(header) else []

    rows = numbered()
    if line == 1:
        next(rows)
    for part in _in_blocks(rows):

        def make_frame(keep: BoolArray, part: list[_Row] = part) -> pl.DataFrame:
            kept = [cells for (_, _, cells), good in zip(part, keep, strict=True) if good]
            return pl.DataFrame(kept, dict.fromkeys(header, pl.String), orient="row")

        numbers, widths = np.array([row[:2] for row in part]).T
        yield numbers, widths, make_frame


def _in_blocks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Group rows into parts of about ``BLOCK_BYTES``."""
    part: list[_Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += sum(map(len, row[2])) + len(row[2]) + 1
        if size >= blocks.BLOCK_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
