"""Row order per rank, and the position from which a run resumes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from mtnrec.batch import Batch
from mtnrec.data.batches import RowIndices


def row_dtype(rows: int) -> type[np.integer[Any]]:
    """Return the smallest integer dtype that can index ``rows`` rows (an epoch stores them all)."""
    return np.int32 if rows < 1 << 31 else np.int64


def permutation(rng: np.random.Generator, rows: int) -> RowIndices:
    """Return ``rng.permutation(rows)`` in half the memory."""
    order = np.arange(rows, dtype=row_dtype(rows))
    rng.shuffle(order)
    return order


class TrainSampler(Sampler[RowIndices]):
    """Random batches of one rank; their order is a function of (seed, epoch, rank).

    Each global batch of ``batch_size * world_size`` rows is dealt to the ranks in turn. All ranks
    get the same number of rows, so that the mean of their gradients is the gradient of the global
    mean; this leaves out the last ``rows % world_size`` rows of an epoch's order.

    After ``load_state_dict`` the saved epoch resumes where it stopped.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self._rows = rows - rows % world_size
        self._all_rows = rows
        self._global_batch = batch_size * world_size
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._epoch = 0
        self._batches = 0  # yielded in this epoch
        self._done = (0, 0)  # the epoch to resume, and its batches to skip

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, hence the order; Lightning calls it at the start of each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[RowIndices]:
        order = self._order(self._epoch)
        epoch, done = self._done
        for batch in range(done if epoch == self._epoch else 0, len(self)):
            self._batches = batch + 1
            yield self._deal(order, batch)[self._rank :: self._world_size]

    def _order(self, epoch: int) -> RowIndices:
        return permutation(np.random.default_rng([self._seed, epoch]), self._all_rows)

    def _deal(self, order: RowIndices, batch: int) -> RowIndices:
        start = batch * self._global_batch
        return order[start : min(start + self._global_batch, self._rows)]

    def batch_rows(self, epoch: int, batch: int, rank: int | None = None) -> RowIndices:
        """Return the rows of a batch of an epoch: one rank's, or those of all ranks."""
        rows = self._deal(self._order(epoch), batch)
        return rows if rank is None else rows[rank :: self._world_size]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._done = state_dict["epoch"], state_dict["batches"]

    def __len__(self) -> int:
        return -(-self._rows // self._global_batch)


class RepeatedSampler(TrainSampler, SequentialSampler):  # type: ignore[misc]
    """The same batches in every epoch, for ``trainer.overfit_batches``.

    Lightning replaces any other sampler than a sequential one then.
    """

    def _order(self, epoch: int) -> RowIndices:
        return super()._order(0)


class TrainLoader(DataLoader[Batch]):
    """Loader whose position in the epoch Lightning saves in each training checkpoint."""

    sampler: TrainSampler

    def state_dict(self) -> dict[str, int]:
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.sampler.load_state_dict(state_dict)


class EvaluationSampler(SequentialSampler):
    """Every row once and in order; each rank gets contiguous batches.

    The rows of rank 0, rank 1 and so on, concatenated, are in the order of a single process, so
    that metrics over all of them are the same to the last bit. All ranks get the same number of
    batches (the last ones may be empty), since a rank with more would wait for the others for
    ever.
    """

    def __init__(self, rows: int, batch_size: int, rank: int, world_size: int) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[RowIndices]:  # type: ignore[override]
        for batch in range(len(self)):
            start = (self._rank * len(self) + batch) * self._batch_size
            yield np.arange(min(start, self._rows), min(start + self._batch_size, self._rows))

    def __len__(self) -> int:
        return -(-self._rows // (self._batch_size * self._world_size))
