"""Strict reading of comma-separated files: every error names file, line, column and value."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.exceptions import PolarsError

from mtnrec.checks import InputError

_ROWS_PER_CHUNK = 1 << 17
_HEADER_LINES = 1

Types = Mapping[str, pl.DataType | type[pl.DataType]]


def read_delimited(path: Path, types: Types) -> Iterator[tuple[int, pl.DataFrame]]:
    """Read a csv file with a header in chunks of bounded memory.

    Args:
        path: The file; comma, no quotes.
        types: Integer or float type of each column; the file has these columns in any order.

    Yields:
        The line number of the chunk's first row (the header is line 1), and the chunk with its
        columns in the order of ``types``. No cell is missing.

    Raises:
        InputError: If the file is absent or empty, lacks a column or has one more, or has a row
            that is cut, too long, or holds something that is not of its column's type.
    """
    header = _read_header(path, types)
    columns = [pl.col(name) for name in types]
    line = 1 + _HEADER_LINES
    schema = {name: types[name] for name in header}
    scan = pl.scan_csv(path, schema=schema, quote_char=None, glob=False)
    try:
        for frame in scan.select(columns).collect_batches(chunk_size=_ROWS_PER_CHUNK):
            if any(frame.null_count().row(0)):
                raise _locate_bad_cell(path, header, types)
            yield line, frame
            line += frame.height
    except PolarsError as error:
        raise _locate_bad_cell(path, header, types) from error
    if line == 1 + _HEADER_LINES:
        raise InputError(f"{path} has a header and no rows: the file is not whole")


def refuse_rows(
    path: Path,
    first_line: int,
    bad: npt.NDArray[np.bool_],
    rule: str,
    values: npt.NDArray[np.generic],
) -> None:
    """Raise for the first row that ``bad`` marks.

    Args:
        path: The file that the rows were read from.
        first_line: Line number of the first row.
        bad: Which rows break the rule, ``(rows,)``.
        rule: What must hold.
        values: What is there instead, one entry a row.
    """
    if bad.any():
        row = int(bad.argmax())
        raise InputError(f"{path}, line {first_line + row}: {rule}, got {values[row]}")


def _read_header(path: Path, types: Types) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        first = file.readline().rstrip("\r\n")
    if not first:
        raise InputError(f"{path} is empty or starts with an empty line: a header is expected")
    header = first.split(",")
    if missing := [name for name in types if name not in header]:
        raise InputError(
            f"{path} lacks the column {_some(missing)}; its header has {_some(header)}"
        )
    if unknown := [name for name in header if name not in types]:
        raise InputError(f"{path} has an unknown column {_some(unknown)}: remove it")
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise InputError(f"{path} names the column {_some(twice)} twice")
    return header


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown}, … ({len(names)} in all)"


def _locate_bad_cell(path: Path, header: list[str], types: Types) -> InputError:
    """Read the file again, slowly, to name the first bad cell."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        next(file)
        for line, text in enumerate(file, start=1 + _HEADER_LINES):
            text = text.rstrip("\r\n")
            where = f"{path}, line {line}"
            row = text.split(",") if text else []
            if len(row) != len(header):
                return InputError(
                    f"{where}: expected {len(header)} values, got {len(row)}; the row is cut or "
                    "malformed"
                )
            for name, cell in zip(header, row, strict=True):
                if not _parses(cell, types[name]):
                    kind = "an integer" if types[name].is_integer() else "a number"
                    return InputError(
                        f"{where}, column {name!r}: expected {kind}, got {cell[:40]!r}"
                    )
    return InputError(f"{path} cannot be parsed as comma-separated numbers")


def _parses(text: str, dtype: pl.DataType | type[pl.DataType]) -> bool:
    # The reader skips blanks before a number, a cast does not.
    return pl.Series([text.lstrip(" \t")]).cast(dtype, strict=False).null_count() == 0
