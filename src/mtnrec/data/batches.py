"""Batches of rows, gathered by row number."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtnrec.arrays import Int32Array, IntArray
from mtnrec.batch import Bags, Batch
from mtnrec.data.prepared.layout import BAG_DTYPES, bag_stem
from mtnrec.data.prepared.store import Arrays
from mtnrec.schema import Schema

RowIndices = IntArray


class RowGatherer(Dataset[Batch]):
    """Gathers a batch by position, with one ``take`` per array.

    Args:
        arrays: Arrays of a prepared split, of equal length.
        rows: Row numbers of the split in those arrays, ``(rows,)``.
        schema: The fields.
        change: Changes a batch in place, given its row numbers in those arrays.
        readers: Threads that read the rows of a batch in parallel, if they come from disk.
    """

    def __init__(
        self,
        arrays: Arrays,
        rows: RowIndices,
        schema: Schema,
        change: Callable[[RowIndices, Batch], None] | None = None,
        readers: int = 1,
    ) -> None:
        self._arrays = {stem: np.asarray(array) for stem, array in arrays.items()}
        self._rows = rows
        self._multivalued = [field.name for field in schema.multivalued]
        self._change = change
        self._readers = readers
        self._pool = ThreadPoolExecutor(readers) if readers > 1 else None

    def __getitem__(self, positions: RowIndices) -> Batch:
        rows = self._rows.take(positions)
        batch = Batch(
            categorical=self._take("categorical", rows),
            numerical=self._take("numerical", rows),
            labels=self._take("labels", rows).float(),
            group=self._take("group", rows) if "group" in self._arrays else None,
            bags=tuple(
                gather_bags(self._arrays, field, self._arrays["bag"][rows, column])
                for column, field in enumerate(self._multivalued)
            ),
        )
        if self._change is not None:
            self._change(rows, batch)
        return batch

    def _take(self, stem: str, rows: RowIndices) -> Tensor:
        array = self._arrays[stem]
        if self._pool is None:
            return torch.from_numpy(array.take(rows, axis=0))
        # numpy releases the GIL while it copies, so that the reads overlap.
        parts = np.array_split(rows, self._readers)
        taken = self._pool.map(lambda part: array.take(part, axis=0), parts)
        return torch.from_numpy(np.concatenate(list(taken)))

    def __len__(self) -> int:
        return len(self._rows)


def gather_bags(arrays: Arrays, field: str, bags: Int32Array) -> Bags:
    """Gather bags of a multi-valued field by their numbers ``bags``, ``(n,)``."""
    offsets, tokens, weights = (arrays[bag_stem(field, part)] for part in BAG_DTYPES)
    starts = offsets[bags]
    lengths = offsets[bags + 1] - starts
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    positions = np.repeat(starts - (ends - lengths), lengths) + np.arange(total)
    return Bags(
        torch.from_numpy(np.asarray(tokens).take(positions)),
        torch.from_numpy(np.asarray(weights).take(positions)),
        torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
    )
