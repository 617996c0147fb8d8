"""Read tables with any columns: csv, tsv, Parquet, several files as one, frames in memory.

A csv file has a header, a separator, and quotes where a cell holds the separator, a quote or a line
break; it may be compressed (``.gz``, ``.zst``). All its cells are text. Empty cells are missing, as
are empty texts and NaN in Parquet.
"""

import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeGuard, cast

import numpy as np
import polars as pl
import polars.selectors as cs
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from polars.exceptions import PanicException, PolarsError
from rich.filesize import decimal

from mtnrec.arrays import BoolArray, Int64Array
from mtnrec.checks import InputError, check_choice, find_duplicates, format_names
from mtnrec.data.raw import blocks
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block, read_blocks
from mtnrec.data.raw.files import identities
from mtnrec.data.raw.limits import BoundedStream, inflated
from mtnrec.schema import MOST_COLUMNS
from mtnrec.system.resources import memory_bytes

_ROWS_PER_CHUNK = 1 << 16  # of Parquet
_BYTES_PER_VALUE = 16  # at least, for a text
_READABLE = (pl.Boolean, pl.String, pl.Categorical, pl.Enum, pl.Date, pl.Datetime, pl.Null)
_FORMS = re.compile(r"\.(?:[ct]sv(?:\.gz|\.zst)?|parquet)$")
FORMS = "a .csv, .tsv or .parquet file, a compressed one (.csv.gz, .csv.zst)"
_SEPARATORS = (",", ";", "\t", "|")
_SAMPLE = 1000  # lines from which the separator and the decimal sign are inferred
# Names that pandas gives its index.
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+(?:\.\d+)?")
_MOST_BLANKS = 1 << 16  # bytes of line ends at the end of a file
_DECIMAL_COMMA = r"^([+-]?[0-9]*),([0-9]+(?:[eE][+-]?[0-9]+)?)$"
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")  # 1,250 may be 1250 or 1.25


@dataclass(frozen=True)
class Chunk:
    """Rows of a source.

    Args:
        frame: Cells of the rows; missing ones are null.
        stored: The same rows as they are stored: empty texts and NaN are kept.
        path: The file, or a description of the frame.
        unit: ``line`` in a csv file, otherwise ``row``; both count from 1.
        numbers: Line or row number of each, ``(rows,)``.
        first: Number of earlier rows in the source.
    """

    frame: pl.DataFrame
    stored: pl.DataFrame
    path: Path | str
    unit: str
    numbers: Int64Array
    first: int

    def place(self, row: int) -> str:
        """Return the position of a row, for messages."""
        return f"{self.path}, {self.unit} {self.numbers[row]}"


class RowRules:
    """Marks the rows of a chunk that break a rule.

    Args:
        chunk: The rows.
        bad_rows: What becomes of a row that breaks a rule.
    """

    def __init__(self, chunk: Chunk, bad_rows: BadRows) -> None:
        self._chunk = chunk
        self._bad_rows = bad_rows
        self.broken = np.zeros(chunk.frame.height, np.bool_)

    def require(self, name: str, holds: BoolArray, rule: str) -> None:
        """Refuse or count the rows whose cell of a column breaks a rule, each row once.

        Args:
            name: The column.
            holds: Whether each row follows the rule, ``(rows,)``.
            rule: The rule, for the message.

        Raises:
            InputError: If rows are refused.
        """
        broken = ~(holds | self.broken)
        for row in np.flatnonzero(broken):
            value = self._chunk.frame[name][int(row)]
            got = "nothing" if value is None else repr(value)[:40]
            self._bad_rows.add(f"{self._chunk.place(int(row))}, column {name!r}", rule, got)
        self.broken |= broken


class Dialect(NamedTuple):
    """Separator of the cells of a csv file, and decimal sign of its numbers."""

    separator: str = ","
    decimal: str = "."


class ArrowStream(Protocol):
    """A frame: any object with the Arrow PyCapsule stream interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Export the rows as a stream of Arrow record batches."""


class Source(ABC):
    """A table whose rows are read chunk by chunk.

    Attributes:
        path: The file or folder, or a description of the frame, for messages.
        name: Short form of ``path``.
        columns: Names of the columns, without those of an index of pandas.
        index: Names of the columns that hold an index of pandas.
        dialect: Form of its csv files; None if it has none.
    """

    path: Path | str
    name: str
    columns: list[str]
    index: list[str]
    dialect: Dialect | None = None

    @abstractmethod
    def identity(self, checksum: Callable[[Path], str]) -> list[list[str | int]]:
        """Return JSON that identifies the content, stored in the manifest.

        Args:
            checksum: Returns the SHA-256 of a file.
        """

    @abstractmethod
    def chunks(
        self,
        columns: list[str],
        bad_rows: BadRows,
        *,
        lists: Sequence[str] = (),
        any_type: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        """Read some columns of all rows, in order and in bounded memory.

        Rows of a csv file with too few or too many cells go to ``bad_rows``. In Parquet files and
        frames, the columns named in ``lists`` may hold lists, those in ``any_type`` anything.

        Raises:
            InputError: If a file is damaged or truncated, a column has an unsupported type, or
                there are no rows.
        """

    @property
    def form(self) -> str:
        """Separator and decimal sign of its csv files, in words; empty if it has none."""
        if self.dialect is None:
            return ""
        separator, decimal = self.dialect
        return f"{self.name}: separator {separator!r}, decimal sign {decimal!r}"

    def require_columns(self, key: str, names: list[str]) -> None:
        """Refuse names that are not columns; ``key`` is the setting that lists them."""
        if missing := [name for name in names if name not in (*self.columns, *self.index)]:
            raise InputError(
                f"{self.path} lacks the column {format_names(missing)} of {key}; it has "
                f"{format_names(self.columns)}"
            )


class FileSource(Source):
    """A table on disk; the constructor reads the headers.

    Args:
        key: The setting that names it, for example ``data.train``.
        path: A ``.csv``, ``.tsv`` or ``.parquet`` file, one of them with ``.gz`` or ``.zst`` if it
            is text, a pattern with ``*`` for several files, or a folder of ``.parquet`` files.
        separator: Separator of the cells of csv files; None to infer it.
        decimal: Decimal sign of the numbers in csv files; None to infer it.

    Raises:
        InputError: If it cannot be read, or a column name is repeated or empty.
    """

    path: Path

    def __init__(
        self,
        key: str,
        path: str | Path,
        separator: str | None = None,
        decimal: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._key = key
        self._files = _files(key, self.path)
        if text := [file for file in self._files if file.suffix != ".parquet"]:
            self.dialect = _infer_dialect(text[0], separator, decimal)
        header = _header(self._files[0], self.dialect)
        self.index = _index(self._files[0], header)
        self.columns = [name for name in header if name not in self.index]
        for file in self._files[1:]:
            other = _header(file, self.dialect)
            if differing := sorted(set(header) ^ set(other)):
                raise InputError(
                    f"{file} and {self._files[0].name} differ in the columns "
                    f"{format_names(differing)}; the parts of a folder must have the same columns"
                )

    def identity(self, checksum: Callable[[Path], str]) -> list[list[str | int]]:
        """Return name, size and SHA-256 of each file."""
        return identities(self._files, checksum)

    def chunks(
        self,
        columns: list[str],
        bad_rows: BadRows,
        *,
        lists: Sequence[str] = (),
        any_type: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        first = 0
        for path in self._files:
            if path.suffix == ".parquet":
                check = partial(check_types, self._key, path, lists=lists, any_type=any_type)
                parts = _read_parquet(path, columns, check)
            else:
                parts = _read_csv(path, columns, bad_rows, cast(Dialect, self.dialect))
            has_commas = self.dialect is not None and self.dialect.decimal == ","
            for unit, numbers, frame in parts:
                cells = missing_to_null(frame)
                if has_commas:
                    cells = cells.with_columns(cs.string().str.replace(_DECIMAL_COMMA, "$1.$2"))
                yield Chunk(cells, frame, path, unit, numbers, first)
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
        self._key = key
        self._frame, self.index = read_frame(self.path, frame)
        with _representable(self.path):
            self._sha256 = _hash_content(self._frame)
        if not self._frame.height:
            raise InputError(f"{self.path} has no rows")
        self.columns = [name for name in self._frame.columns if name not in self.index]

    def identity(self, checksum: Callable[[Path], str]) -> list[list[str | int]]:
        """Return the SHA-256 of names, types and values, independent of the memory layout."""
        return [["sha256", self._sha256]]

    def chunks(
        self,
        columns: list[str],
        bad_rows: BadRows,
        *,
        lists: Sequence[str] = (),
        any_type: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        frame = self._frame.select(columns)
        check_types(self._key, self.path, frame.schema, lists, any_type)
        for first in range(0, frame.height, _ROWS_PER_CHUNK):
            part = frame.slice(first, _ROWS_PER_CHUNK)
            numbers = np.arange(first + 1, first + 1 + part.height)
            yield Chunk(missing_to_null(part), part, self.path, "row", numbers, first)


def open_source(
    key: str,
    table: str | Path | ArrowStream,
    separator: str | None = None,
    decimal: str | None = None,
) -> Source:
    """Open the table, a path or a frame, of the setting ``key``; see :class:`FileSource`.

    Raises:
        InputError: If it cannot be read.
    """
    if is_frame(table):
        return FrameSource(key, table)
    return FileSource(key, cast(str, table), separator, decimal)


def read_frame(
    path: str, frame: ArrowStream, columns: Collection[str] | None = None
) -> tuple[pl.DataFrame, list[str]]:
    """Import a frame, and find the columns that hold an index of pandas.

    Args:
        path: Description of the frame, for messages.
        frame: The frame; the index of one of pandas is ignored.
        columns: Columns to import, of those that it has; None for all.

    Raises:
        InputError: If a column name is repeated or empty, or a type is not supported.
    """
    with _representable(path):
        pandas = sys.modules.get("pandas")  # absent unless pandas was imported
        if pandas is not None and isinstance(frame, pandas.DataFrame):
            names = ["" if pandas.isna(label) is True else str(label) for label in frame.columns]
            kept = [i for i, name in enumerate(names) if columns is None or name in columns]
            _check_names(path, [names[i] for i in kept])
            table = pa.Table.from_pandas(frame.iloc[:, kept], preserve_index=False)
        else:
            table = pa.RecordBatchReader.from_stream(frame).read_all()
            names = table.schema.names
            kept = [i for i, name in enumerate(names) if columns is None or name in columns]
            _check_names(path, [names[i] for i in kept])
            table = table.select(kept)
        index = _index_of(table.schema.metadata, table.schema.names)
        return cast(pl.DataFrame, pl.from_arrow(table, rechunk=False)), index


def check_dialect(prefix: str, separator: Any, decimal: Any) -> str | None:
    r"""Check the settings ``separator`` and ``decimal``; return the separator, a tab for ``\t``.

    Args:
        prefix: Stands before their names in messages, for example ``data.``.
        separator: See :class:`FileSource`.
        decimal: See :class:`FileSource`.
    """
    if separator == r"\t":
        separator = "\t"
    if separator is not None and (
        len(str(separator)) != 1 or str(separator) in '"\r\n' or separator == " "
    ):
        raise InputError(
            f"{prefix}separator must be one character, got {separator!r}. Set a comma, a "
            "semicolon, a bar or a tab."
        )
    if decimal is not None:
        check_choice(f"{prefix}decimal", decimal, [".", ","])
    return None if separator is None else str(separator)


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
    mtnrec.checks.InputError: data.train must be a path (a .csv, .tsv or .parquet file, a \
compressed one (.csv.gz, .csv.zst), a pattern, or a folder of .parquet files) or a frame (of \
pandas, polars, pyarrow or any library with `__arrow_c_stream__`), got an object of type dict
    """
    if not isinstance(table, str | os.PathLike) and not is_frame(table):
        raise InputError(
            f"{key} must be a path ({FORMS}, a pattern, or a folder of .parquet files) or a frame "
            "(of pandas, polars, pyarrow or any library with `__arrow_c_stream__`), "
            f"got an object of type {type(table).__name__}"
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
    is_pattern = not path.exists() and glob.has_magic(str(path))
    files = sorted(filter(Path.is_file, _matches(path))) if is_pattern else [path]
    if not files:
        raise InputError(f"{key}: the pattern {path} matches no file")
    for file in files:
        if not file.is_file():
            raise InputError(f"{key}: {file} is missing")
        if not _FORMS.search(file.name):
            raise InputError(f"{key} must be {FORMS} or a folder of .parquet files, got {file}")
    return files


def _matches(pattern: Path) -> Iterator[Path]:
    return Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))


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


def _header(path: Path, dialect: Dialect | None) -> list[str]:
    with readable(path):
        if path.suffix == ".parquet":
            names = pl.scan_parquet(path, glob=False).collect_schema().names()
        else:
            names = _csv_header(path, cast(Dialect, dialect))
    _check_names(path, names)
    return names


def _index(path: Path, header: list[str]) -> list[str]:
    if path.suffix != ".parquet":
        return _index_of(None, header)
    with readable(path):
        return _index_of(pq.read_schema(path).metadata, header)


def _index_of(metadata: Mapping[bytes, bytes] | None, columns: Sequence[str]) -> list[str]:
    """Return the columns that hold an index of pandas, by pandas' metadata or by name."""
    found: Any = []
    try:
        found = json.loads((metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError, RecursionError):  # not written by pandas
        found = []
    named = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    return [name for name in columns if name in named or _INDEX.fullmatch(name)]


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


def _infer_dialect(path: Path, separator: str | None, decimal: str | None) -> Dialect:
    """Infer what is not given from the first lines of a csv file."""
    with readable(path):
        lines = [line.removeprefix("\ufeff") for line in split_lines(next(_blocks(path)))[:_SAMPLE]]
    if separator is None:
        is_tab = ".tsv" in path.suffixes
        separator = "\t" if is_tab else max(_SEPARATORS, key=partial(_rows_split_alike, lines))
    if decimal is None:
        cells = [cell for row in _split_sample(lines, separator) for cell in row]
        commas = [cell for cell in cells if re.match(_DECIMAL_COMMA, cell)]
        points = any(re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", cell) for cell in cells)
        # Between commas, a quoted 1,2 may be a list.
        is_comma = separator != "," and any(not _THOUSANDS.fullmatch(cell) for cell in commas)
        decimal = "," if is_comma and not points else "."
    return Dialect(separator, decimal)


def _split_sample(lines: Sequence[str], separator: str) -> list[list[str]]:
    try:
        return list(csv.reader((line + "\n" for line in lines), delimiter=separator))
    except csv.Error:
        return []


def _rows_split_alike(lines: Sequence[str], separator: str) -> tuple[bool, int, int]:
    """Return how well a separator fits: most rows have the width of the header, wide at best."""
    widths = [len(row) for row in _split_sample(lines, separator)]
    if not widths or widths[0] < 2:
        return False, 0, 0
    alike = sum(width == widths[0] for width in widths)
    return 2 * alike > len(widths), alike, widths[0]


def _csv_header(path: Path, dialect: Dialect) -> list[str]:
    first = split_lines(next(_blocks(path)))[0]
    if not first:
        raise InputError(f"{path} must start with a header, got an empty line. Delete that line.")
    if first.count(dialect.separator) >= MOST_COLUMNS:
        raise _too_wide(path)
    reader = csv.reader([first.removeprefix("\ufeff")], strict=True, delimiter=dialect.separator)
    return next(reader)


def _too_wide(path: Path | str) -> InputError:
    return InputError(f"{path} has more than {MOST_COLUMNS:,} columns. Leave some out.")


def missing_to_null(frame: pl.DataFrame) -> pl.DataFrame:
    """Return a frame whose missing cells are null; categories become texts."""
    changes = []
    for name, dtype in frame.schema.items():
        column = pl.col(name)
        if dtype in (pl.Categorical, pl.Enum):
            column, dtype = column.cast(pl.String), pl.String()
        if dtype == pl.String:
            changes.append(pl.when(column != "").then(column).alias(name))
        elif dtype.is_float():
            changes.append(column.fill_nan(None))
        elif dtype == pl.List(pl.String):
            changes.append(column.list.eval(pl.when(pl.element() != "").then(pl.element())))
    return frame.with_columns(changes)


def _read_parquet(
    path: Path, columns: list[str], check: Callable[[pl.Schema], None]
) -> Iterator[_Rows]:
    row = 1
    with readable(path):
        check_row_groups(path, path)
        scan = pl.scan_parquet(path, glob=False, hive_partitioning=False).select(columns)
        check(scan.collect_schema())
        for frame in scan.collect_batches(chunk_size=_ROWS_PER_CHUNK, maintain_order=True):
            yield "row", np.arange(row, row + frame.height), frame
            row += frame.height


def check_types(
    key: str,
    path: Path | str,
    schema: pl.Schema,
    lists: Sequence[str],
    any_type: Sequence[str] = (),
) -> None:
    """Refuse columns that hold neither numbers, texts, booleans nor dates.

    Args:
        key: The setting that names the table, for the remedy.
        path: The table, for messages.
        schema: Types of the columns.
        lists: Columns that may also hold lists of these.
        any_type: Columns that may hold anything.

    Raises:
        InputError: If there is one.
    """
    leave_out = "Leave it out with data.exclude, or turn" if key.startswith("data.") else "Turn"
    for name, dtype in schema.items():
        if name in any_type:
            continue
        is_list = isinstance(dtype, pl.List) and name in lists
        cell = cast(pl.List, dtype).inner if is_list else dtype
        if not (cell.is_numeric() or cell in _READABLE):
            raise InputError(
                f"{path}: the column {name!r} is of type {dtype}. {leave_out} it into numbers or "
                "texts."
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


def _read_csv(
    path: Path, columns: list[str], bad_rows: BadRows, dialect: Dialect
) -> Iterator[_Rows]:
    header = _header(path, dialect)
    with readable(path):
        for numbers, widths, make_frame in _split_csv(path, header, dialect.separator):
            bad = widths != len(header)
            rule = f"expected {len(header)} values (the row is truncated or malformed)"
            for row in np.flatnonzero(bad):
                bad_rows.add(f"{path}, line {numbers[row]}", rule, str(widths[row]))
            yield "line", numbers[~bad], make_frame(~bad).select(columns)


def _blocks(path: Path) -> Iterator[Block]:
    with path.open("rb") as file:
        stream: IO[bytes] | BoundedStream = file
        if path.suffix in (".gz", ".zst"):
            stream = inflated(file, path)
        yield from _without_last_blanks(read_blocks(stream, str(path)))


def _without_last_blanks(blocks: Iterator[Block]) -> Iterator[Block]:
    """Drop blank lines at the end of a file."""
    held = b""
    for block in blocks:
        data, first_line = held + block.data, block.first_line - held.count(b"\n")
        content = len(data.rstrip(b"\r\n"))
        end = data.find(b"\n", content) + 1 if content else 0
        if len(data) - end > _MOST_BLANKS or (first_line == 1 and not content):
            end = len(data)  # refused as rows
        held = data[end:]
        if end:
            yield Block(block.source, first_line, data[:end])


def split_lines(block: Block) -> pl.Series:
    """Split a block into lines without line ends."""
    try:
        text = block.data.decode()
    except UnicodeDecodeError as error:
        line = block.first_line + block.data.count(b"\n", 0, error.start)
        raise InputError(f"{block.source}, line {line}: the text is not UTF-8") from error
    return pl.Series([text[:-1]]).str.split("\n").explode().str.strip_suffix("\r")


_Lines = tuple[Int64Array, Int64Array, Callable[[BoolArray], pl.DataFrame]]


def _split_csv(path: Path, header: list[str], separator: str) -> Iterator[_Lines]:
    """Split lines into cells: first line and width of each row, and a function to make a frame.

    Polars' csv reader would pad short rows with nulls. From the first quote on, rows are split by
    the csv module, which is several times slower.
    """
    blocks = _blocks(path)
    for block in blocks:
        lines, line = split_lines(block), block.first_line
        if b'"' in block.data:
            rest = chain.from_iterable(map(split_lines, blocks))
            yield from _split_quoted(chain(lines, rest), line, header, separator)
            return
        numbers = np.arange(line, line + len(lines))
        if line == 1:
            lines, numbers = lines[1:], numbers[1:]
        separators = lines.str.count_matches(separator, literal=True).to_numpy().astype(np.int64)
        widths = np.where(lines.str.len_bytes().to_numpy() > 0, separators + 1, 0)

        def make_frame(keep: BoolArray, lines: pl.Series = lines) -> pl.DataFrame:
            if len(header) == 1:
                return lines.filter(keep).to_frame(header[0])
            cells = lines.filter(keep).str.split_exact(separator, len(header) - 1)
            return cells.struct.rename_fields(header).struct.unnest()

        yield numbers, widths, make_frame


_Row = tuple[int, int, list[str]]  # first line, width, and the cells if the width is the header's


def _split_quoted(
    lines: Iterator[str], line: int, header: list[str], separator: str
) -> Iterator[_Lines]:
    reader = csv.reader((text + "\n" for text in lines), strict=True, delimiter=separator)
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
