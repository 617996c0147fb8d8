"""One column of a table: its kind, and its cells as texts, numbers, labels and times.

A missing cell is null, and a cell that cannot be parsed becomes null.
"""

from typing import Any

import numpy as np
import polars as pl

from mtnrec.arrays import Float64Array

MOST_CATEGORIES = 100
_BLOCK = 4096
_INTEGER = r"^(?:0|-?[1-9][0-9]*)$"
_CODE = r"^0[0-9]"  # a zip code, for example
_DATE = r"^\d{4}-\d{2}-\d{2}(?:[T ]|$)"
_LABELS = {"0": 0, "false": 0, "1": 1, "true": 1}
_TYPES = {"integer": pl.Int64, "number": pl.Float64}


def transformed(values: Float64Array, fill: Any, shift: Any, scale: Any) -> Float64Array:
    """Return the stored numbers: NaN becomes ``fill``, then ``(value - shift) / scale``.

    Args:
        values: ``(n,)``, or ``(n, N)`` with ``fill``, ``shift`` and ``scale`` for each column.
        fill: Replaces NaN; NaN keeps missing cells missing.
        shift: Subtracted.
        scale: Divisor.
    """
    return (np.where(np.isnan(values), fill, values) - shift) / scale


class Profile:
    """Kind and distinct values of a column, updated chunk by chunk.

    A text is an integer or a number if it is written as one (``007`` is neither), and a date if it
    starts with ``YYYY-MM-DD``.
    """

    def __init__(self) -> None:
        self._kinds = {"integer", "number", "date", "boolean"}
        self._values: set[str] = set()
        self._empty = True

    def update(self, column: pl.Series) -> None:
        """Add a chunk."""
        present = column.drop_nulls()
        if not len(present):
            return
        self._empty = False
        self._kinds &= _kinds(present, self._kinds)
        if "integer" in self._kinds and len(self._values) <= MOST_CATEGORIES:
            distinct = to_text(present.unique()).head(2 * MOST_CATEGORIES)
            self._values.update(distinct.to_list())

    @property
    def kind(self) -> str:
        """``integer``, ``number``, ``date``, ``boolean``, ``text`` or ``empty``."""
        if self._empty:
            return "empty"
        found = [k for k in ("integer", "number", "date", "boolean") if k in self._kinds]
        return found[0] if found else "text"

    @property
    def distinct(self) -> int | None:
        """Number of distinct integers; None if there are more than ``MOST_CATEGORIES``."""
        return len(self._values) if len(self._values) <= MOST_CATEGORIES else None


def _kinds(present: pl.Series, candidates: set[str]) -> set[str]:
    dtype = present.dtype
    if dtype == pl.Boolean:
        return {"boolean"}
    if dtype in (pl.Date, pl.Datetime):
        return {"date"}
    if dtype.is_integer():
        return {"integer", "number"}
    if dtype.is_float():
        return {"number"}
    kinds = set()
    if "integer" in candidates and present.str.contains(_INTEGER).all():
        kinds.add("integer")
    if "number" in candidates and not (
        to_numbers(present).null_count() or present.str.contains(_CODE).any()
    ):
        kinds.add("number")
    if "date" in candidates and present.str.contains(_DATE).all():
        kinds.add("date")
    return kinds


def to_text(column: pl.Series) -> pl.Series:
    """Convert each cell to text; equal integers give equal texts, be they text, float or integer.

    >>> to_text(pl.Series([1.0, 2.5, None])).to_list()
    ['1', '2.5', None]
    """
    text = column.cast(pl.String)
    if not column.dtype.is_float():
        return text
    whole = column.cast(pl.Int64, strict=False)
    return pl.select(
        pl.when(whole.cast(column.dtype) == column).then(whole.cast(pl.String)).otherwise(text)
    ).to_series()


def to_numbers(column: pl.Series) -> pl.Series:
    """Parse each cell as float64; NaN stays NaN.

    >>> to_numbers(pl.Series(["1e3", ".5", "many", None])).to_list()
    [1000.0, 0.5, None, None]
    """
    if column.dtype.is_temporal():  # polars would return days or microseconds
        return pl.repeat(None, len(column), dtype=pl.Float64, eager=True)
    return column.cast(pl.Float64, strict=False)


def to_labels(column: pl.Series) -> pl.Series:
    """Parse 0, 1, true and false, ignoring case.

    >>> to_labels(pl.Series(["1", "False", "yes", None])).to_list()
    [1, 0, None, None]
    """
    text = to_text(column).str.to_lowercase()
    return text.replace_strict(_LABELS, default=None, return_dtype=pl.UInt8)


def to_times(column: pl.Series, kind: str) -> pl.Series:
    """Convert integers, numbers or dates to numbers in the same order; dates to microseconds.

    >>> days = pl.Series(["1970-01-01", "1970-01-01 00:00:01.5", "1970-01-02T00:00:00Z"])
    >>> to_times(days, "date").to_list()
    [0, 1500000, 86400000000]
    """
    if kind in _TYPES:
        return column.cast(_TYPES[kind], strict=False).fill_nan(None)
    if column.dtype == pl.String:
        text = column.str.replace(" ", "T", literal=True).str.strip_suffix("Z")
        forms = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
        parsed = [text.str.to_datetime(f, strict=False, time_unit="us") for f in forms]
        column = pl.select(pl.coalesce(*parsed)).to_series()
    elif column.dtype not in (pl.Date, pl.Datetime):
        return pl.repeat(None, len(column), dtype=pl.Int64, eager=True)
    return column.dt.epoch("us")


class Moments:
    """Mean and standard deviation of columns, in float64; a missing cell (NaN) counts as the mean.

    Rows are summed in blocks of a fixed length, so that the result is the same to the bit however
    a file is split into chunks.
    """

    def __init__(self, columns: int) -> None:
        self.mean = np.zeros(columns)
        self._rows = 0
        self._count = np.zeros(columns)
        self._squares = np.zeros(columns)
        self._rest = np.empty((0, columns))

    def update(self, values: Float64Array) -> None:
        """Add rows, ``(rows, columns)``."""
        rows = np.concatenate([self._rest, values])
        whole = len(rows) - len(rows) % _BLOCK
        for start in range(0, whole, _BLOCK):
            self._add(rows[start : start + _BLOCK])
        self._rest = rows[whole:]

    def finish(self) -> None:
        """Add the remaining rows."""
        self._add(self._rest)
        self._rest = self._rest[:0]

    @property
    def scale(self) -> Float64Array:
        """Standard deviation; 1 for a column that is constant up to rounding."""
        variance = self._squares / max(self._rows, 1)
        epsilon = np.finfo(np.float64).eps
        rounding = (self._rows * self.mean * epsilon) ** 2 + self._rows * variance * epsilon
        return np.where(variance <= rounding, 1.0, np.sqrt(variance))

    def _add(self, block: Float64Array) -> None:
        # Update of mean and sum of squares by those of a block: Chan, Golub and LeVeque (1983).
        present = ~np.isnan(block)
        count = present.sum(axis=0)
        mean = np.where(present, block, 0).sum(axis=0) / count.clip(min=1)
        squares = (np.where(present, block - mean, 0) ** 2).sum(axis=0)
        total = self._count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * count / total.clip(min=1)
        between = difference**2 * self._count * count / total.clip(min=1)
        self._squares = self._squares + squares + between
        self._count = total
        self._rows += len(block)
