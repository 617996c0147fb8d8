"""Vocabularies: raw value to index; index 0 stands for a missing, rare or unseen value."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from mtnrec.arrays import Int32Array, Int64Array
from mtnrec.data.prepared.writer import Writer
from mtnrec.schema import CategoricalField

_SMALLEST_MERGE = 1 << 20
_LARGEST_TABLE = 1 << 26  # entries: 256 MiB


class ValueCounts:
    """Number of training rows per value of an integer field."""

    def __init__(self) -> None:
        self._values: Int32Array = np.empty(0, np.int32)
        self._counts: Int64Array = np.empty(0, np.int64)
        self._pending: list[tuple[Int32Array, Int64Array]] = []
        self._pending_size = 0

    def update(self, column: Int32Array, rows: Int64Array | None = None) -> None:
        """Count the values of a chunk.

        Args:
            column: Values, ``(n,)``.
            rows: Number of training rows per entry of ``column``, ``(n,)``; one if None.
        """
        if rows is None:
            column, rows = np.unique(column, return_counts=True)
        self._pending.append((column, rows.astype(np.int64, copy=False)))
        self._pending_size += len(column)
        # A merge costs as much as all values so far, so it waits until as many are pending.
        if self._pending_size > max(_SMALLEST_MERGE, len(self._values)):
            self._merge()

    def vocabulary(self, *, min_count: int = 1, missing: int | None = None) -> "Vocabulary":
        """Return the vocabulary of the values in at least ``min_count`` rows.

        Args:
            min_count: Number of rows, at least 1.
            missing: Value that marks a missing one; None if every integer is a value.
        """
        self._merge()
        keep = self._counts >= min_count
        if missing is not None:
            keep &= self._values != missing
        return Vocabulary(self._values[keep])

    def _merge(self) -> None:
        parts = [(self._values, self._counts), *self._pending]
        self._values, self._counts = _sum_by_value(
            np.concatenate([values for values, _ in parts]),
            np.concatenate([counts for _, counts in parts]),
        )
        self._pending, self._pending_size = [], 0


def _sum_by_value(values: Int32Array, rows: Int64Array) -> tuple[Int32Array, Int64Array]:
    if not len(values):
        return values, rows
    order = values.argsort(kind="stable")
    values, rows = values[order], rows[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    return values[starts], np.add.reduceat(rows, starts)


class Vocabulary:
    """Indices of the values of one integer field, 1 for the smallest.

    Args:
        values: Values with an index, ascending, ``(n,)``.
    """

    def __init__(self, values: Int32Array) -> None:
        self.values = values
        self._lowest = int(values[0]) - 1 if len(values) else 0
        span = int(values[-1]) - self._lowest + 2 if len(values) else 1
        self._table: Int32Array | None = None
        if span <= min(_LARGEST_TABLE, max(64 * len(values), 1 << 16)):
            # One look-up per entry; values out of range are clipped to the ends, which hold 0.
            self._table = np.zeros(span, np.int32)
            self._table[values.astype(np.int64) - self._lowest] = np.arange(1, len(values) + 1)

    @property
    def size(self) -> int:
        """Number of indices, including 0."""
        return len(self.values) + 1

    def encode(self, column: Int32Array) -> Int32Array:
        """Map raw values ``(rows,)`` to indices.

        >>> Vocabulary(np.array([10, 30], np.int32)).encode(np.array([10, 20, 30], np.int32))
        array([1, 0, 2], dtype=int32)
        """
        if self._table is not None:
            return self._table.take(column.astype(np.int64) - self._lowest, mode="clip")
        if not len(self.values):
            return np.zeros(len(column), np.int32)
        position = np.searchsorted(self.values, column).clip(max=len(self.values) - 1)
        return np.where(self.values[position] == column, position + 1, 0).astype(np.int32)

    def write(self, folder: Path, name: str) -> CategoricalField:
        """Write ``vocabulary/<name>.parquet`` with the columns ``value`` and ``index``."""
        return _write(folder, name, pl.Series(self.values))


class TextCounts:
    """Number of training rows per text of a field."""

    def __init__(self) -> None:
        self._counts = pl.DataFrame(schema={"value": pl.String, "rows": pl.Int64})
        self._pending: list[pl.DataFrame] = []

    def update(self, column: pl.Series) -> None:
        """Count the texts of a chunk, ignoring nulls."""
        values = column.drop_nulls().alias("value").to_frame()
        self._pending.append(values.group_by("value").agg(rows=pl.len().cast(pl.Int64)))
        if sum(map(len, self._pending)) > max(_SMALLEST_MERGE, len(self._counts)):
            self._merge()

    def vocabulary(self, *, min_count: int = 1) -> "TextVocabulary":
        """Return the vocabulary of the texts in at least ``min_count`` rows."""
        self._merge()
        return TextVocabulary(self._counts.filter(pl.col("rows") >= min_count)["value"].sort())

    def _merge(self) -> None:
        parts = pl.concat([self._counts, *self._pending])
        self._counts = parts.group_by("value").agg(pl.col("rows").sum())
        self._pending = []


class TextVocabulary:
    """Indices of the texts of one field, 1 for the first in byte order.

    Args:
        values: Texts with an index, ascending.
    """

    def __init__(self, values: pl.Series) -> None:
        self.values = values

    @property
    def size(self) -> int:
        """Number of indices, including 0."""
        return len(self.values) + 1

    def encode(self, column: pl.Series) -> Int32Array:
        """Map texts ``(rows,)`` to indices; null is 0.

        >>> TextVocabulary(pl.Series(["a", "c"])).encode(pl.Series(["c", "b", None])).tolist()
        [2, 0, 0]
        """
        if not len(self.values):
            return np.zeros(len(column), np.int32)
        position = self.values.search_sorted(column).clip(upper_bound=len(self.values) - 1)
        known = (self.values.gather(position) == column).fill_null(value=False)
        return np.where(known.to_numpy(), position.to_numpy() + 1, 0).astype(np.int32)

    def write(self, folder: Path, name: str) -> CategoricalField:
        """Write ``vocabulary/<name>.parquet`` with the columns ``value`` and ``index``."""
        return _write(folder, name, self.values)


def _write(folder: Path, name: str, values: pl.Series) -> CategoricalField:
    (folder / "vocabulary").mkdir(exist_ok=True)
    index = np.arange(1, len(values) + 1, dtype=np.int32)
    table = pl.DataFrame({"value": values, "index": index})
    table.write_parquet(folder / "vocabulary" / f"{name}.parquet")
    return CategoricalField(name, len(values) + 1)


def encode_in_place(
    writer: Writer,
    splits: Sequence[str],
    names: Sequence[str],
    vocabularies: Sequence[Vocabulary],
    *,
    threads: int = 1,
) -> tuple[CategoricalField, ...]:
    """Replace the raw values in ``writer`` with indices, and write the vocabularies.

    The array itself first holds the raw values, so that a log is parsed once and memory does not
    grow with its rows.
    """
    writer.close_arrays()

    def encode(rows: Int32Array) -> Int32Array:
        for column, vocabulary in enumerate(vocabularies):
            rows[:, column] = vocabulary.encode(rows[:, column])
        return rows

    for split in splits:
        writer.rewrite(split, "categorical", encode, threads=threads)
    return tuple(
        vocabulary.write(writer.directory, name)
        for name, vocabulary in zip(names, vocabularies, strict=True)
    )
