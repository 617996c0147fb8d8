"""Vocabularies: raw value to index, index 0 for a missing or unseen value."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from mtnrec.data.store import Writer
from mtnrec.schema import CategoricalField

_ROWS_PER_CHUNK = 1 << 20


class Vocabulary:
    """The values of one integer field that occur in the training rows."""

    def __init__(self) -> None:
        self.values: npt.NDArray[np.int32] = np.empty(0, np.int32)

    def update(self, column: npt.NDArray[np.int32]) -> None:
        """Add the values of a chunk of training rows, ``(rows,)``."""
        self.values = np.union1d(self.values, column)

    def encode(self, column: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Turn raw values into indices; values are numbered from 1 in ascending order.

        >>> vocabulary = Vocabulary()
        >>> vocabulary.update(np.array([30, 10, 30], np.int32))
        >>> vocabulary.encode(np.array([10, 20, 30], np.int32))
        array([1, 0, 2], dtype=int32)
        """
        if not len(self.values):
            return np.zeros(len(column), np.int32)
        position = np.searchsorted(self.values, column).clip(max=len(self.values) - 1)
        return np.where(self.values[position] == column, position + 1, 0).astype(np.int32)

    def write(self, path: Path) -> None:
        """Write a Parquet table with the columns ``value`` and ``index``."""
        index = np.arange(1, len(self.values) + 1, dtype=np.int32)
        pl.DataFrame({"value": self.values, "index": index}).write_parquet(path)


def encode_in_place(
    writer: Writer, splits: tuple[str, ...], names: tuple[str, ...], vocabularies: list[Vocabulary]
) -> tuple[CategoricalField, ...]:
    """Replace the raw values that ``writer`` holds by indices, and write the vocabularies.

    The raw values go through the array itself, so that a log is parsed once and memory does not
    grow with its rows.
    """
    writer.close_arrays()
    for split in splits:
        array = writer.rewrite(split, "categorical")
        for start in range(0, len(array), _ROWS_PER_CHUNK):
            chunk = array[start : start + _ROWS_PER_CHUNK]
            for column, vocabulary in enumerate(vocabularies):
                chunk[:, column] = vocabulary.encode(chunk[:, column])
    folder = writer.directory / "vocabulary"
    folder.mkdir()
    for name, vocabulary in zip(names, vocabularies, strict=True):
        vocabulary.write(folder / f"{name}.parquet")
    return tuple(
        CategoricalField(name, len(vocabulary.values) + 1)
        for name, vocabulary in zip(names, vocabularies, strict=True)
    )
