"""Strict reading of comma-separated numbers: every error names file, line, column and value."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.exceptions import PolarsError

from mtnrec.arrays import BoolArray, Int64Array
from mtnrec.checks import InputError, find_duplicates, format_names
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block

# First bytes of zlib, gzip and zstd streams, but of no number: polars would inflate the block.
_MAGIC = (b"x", b"\x1f", b"(")

Types = Mapping[str, pl.DataType | type[pl.DataType]]


@dataclass(frozen=True)
class Rows:
    """Rows of a file, with their line numbers.

    Args:
        source: Name of the file, for messages.
        lines: Line number of each row, ``(rows,)``.
        frame: The rows.
    """

    source: str
    lines: Int64Array
    frame: pl.DataFrame

    def refuse(
        self,
        bad: BoolArray,
        rule: str,
        values: npt.NDArray[np.generic],
        bad_rows: BadRows,
    ) -> None:
        """Hand the rows that break a rule to ``bad_rows``.

        Args:
            bad: Mask of the rows that break it, ``(rows,)``.
            rule: The rule, for messages.
            values: Value found in each row.
            bad_rows: Refuses or counts them.
        """
        for row in np.flatnonzero(bad):
            bad_rows.add(f"{self.source}, line {self.lines[row]}", rule, str(values[row]))


def read_delimited(
    blocks: Iterable[Block], types: Types, bad_rows: BadRows, *, has_header: bool
) -> Iterator[Rows]:
    """Parse a csv file that has commas, no quotes and no missing cells.

    Args:
        blocks: Lines of the file.
        types: Integer or float type of each column.
        bad_rows: Refuses or counts rows that are truncated, too long, or hold a value that is not
            of its column's type.
        has_header: Whether the first line names the columns, in any order; without a header they
            are those of ``types``.

    Yields:
        The rows of each block, columns in the order of ``types``.

    Raises:
        InputError: If there are no rows, or the header lacks, repeats or adds a column.
    """
    header = list(types)
    is_empty = True
    source = ""
    for block in blocks:
        source = block.source
        data, line = block.data, block.first_line
        if line == 1 and has_header:
            first, data = data.split(b"\n", 1)
            header = _check_header(source, first.decode(errors="replace").rstrip("\r"), types)
            line = 2
        if data:
            is_empty = False
            parts = list(
                _parse(source, line, data, {name: types[name] for name in header}, bad_rows)
            )
            lines = np.concatenate(
                [np.arange(0), *(first + np.arange(f.height) for first, f in parts)]
            )
            frame = pl.concat([f for _, f in parts]) if parts else pl.DataFrame(schema=dict(types))
            yield Rows(source, lines, frame.select(list(types)))
    if is_empty:
        raise InputError(f"{source} has a header but no rows. Download it again, or regenerate it.")


def _check_header(source: str, first: str, types: Types) -> list[str]:
    if not first:
        raise InputError(f"{source} must start with a header, got an empty line. Delete that line.")
    header = first.split(",")
    if missing := [name for name in types if name not in header]:
        raise InputError(
            f"{source} lacks the column {format_names(missing)}; its header has "
            f"{format_names(header)}"
        )
    if unknown := [name for name in header if name not in types]:
        raise InputError(f"{source} has an unknown column {format_names(unknown)}. Delete it.")
    if twice := find_duplicates(header):
        raise InputError(f"{source} names the column {format_names(twice)} twice. Delete one.")
    return header


def _parse(
    source: str, line: int, data: bytes, types: Types, bad_rows: BadRows
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Parse lines; if that fails, bisect them until each bad line stands alone."""
    count = data.count(b"\n")
    frame = _parse_whole(data, count, types)
    if frame is not None:
        yield line, frame
    elif count == 1:
        bad_rows.add(f"{source}, line {line}", *_explain(data, types))
    else:
        cut = 0
        for _ in range(count // 2):
            cut = data.index(b"\n", cut) + 1
        yield from _parse(source, line, data[:cut], types, bad_rows)
        yield from _parse(source, line + count // 2, data[cut:], types, bad_rows)


def _parse_whole(data: bytes, count: int, types: Types) -> pl.DataFrame | None:
    """Parse ``count`` lines, or return None if one of them breaks the format."""
    if data.startswith(_MAGIC):
        return None
    try:
        frame = pl.read_csv(data, has_header=False, schema=dict(types), quote_char=None)
    except PolarsError:
        return None
    is_whole = frame.height == count and not any(frame.null_count().row(0))
    return frame if is_whole else None


def _explain(data: bytes, types: Types) -> tuple[str, str]:
    """Return the rule that a line breaks, and the value found."""
    text = data.decode(errors="replace").rstrip("\r\n")
    cells = text.split(",") if text else []
    if len(cells) != len(types):
        return f"expected {len(types)} values (the row is truncated or malformed)", str(len(cells))
    for (name, dtype), cell in zip(types.items(), cells, strict=True):
        # The reader skips leading blanks, a cast does not.
        if pl.Series([cell.lstrip(" \t")]).cast(dtype, strict=False).null_count():
            kind = "an integer" if dtype.is_integer() else "a number"
            return f"column {name!r}: expected {kind}", repr(cell[:40])
    return "expected comma-separated numbers", repr(text[:40])
