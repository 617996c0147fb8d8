"""Types passed between data, network and metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Bags:
    """Bags of one multi-valued field, one per row.

    An exported model takes them padded to ``K`` tokens instead, ``tokens`` and ``weights`` of shape
    ``(B, K)``: tokens with weight 0 do not count, and ``offsets`` is ignored.

    Args:
        tokens: Vocabulary indices, bag after bag, int32 ``(tokens,)``.
        weights: Weight of each token, float32 ``(tokens,)``.
        offsets: Where each bag starts, and the end of the last, int32 ``(B + 1,)``.
    """

    tokens: Tensor
    weights: Tensor
    offsets: Tensor


@dataclass  # not frozen: Lightning's precision plugins convert a batch field by field
class Batch:
    """Rows of a data set.

    Args:
        categorical: Vocabulary indices, int32 ``(B, F)``.
        numerical: Numerical features, float32 ``(B, N)``.
        labels: Zeros and ones, float32 ``(B, T)``; None where the rows are only scored.
        group: Search or user id, int64 ``(B,)``; None where the data has none.
        bags: The ``M`` multi-valued fields.
    """

    categorical: Tensor
    numerical: Tensor
    labels: Tensor | None = None
    group: Tensor | None = None
    bags: tuple[Bags, ...] = ()

    def __len__(self) -> int:
        return self.categorical.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Move every tensor to ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy every tensor to page-locked memory, for an asynchronous move to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        labels = None if self.labels is None else change(self.labels)
        group = None if self.group is None else change(self.group)
        bags = tuple(
            Bags(change(bags.tokens), change(bags.weights), change(bags.offsets))
            for bags in self.bags
        )
        return Batch(change(self.categorical), change(self.numerical), labels, group, bags)


class LogProbabilities(NamedTuple):
    """Log-probabilities that a network predicts for each label.

    Args:
        positive: ``log P(label = 1)``, ``(B, T)``.
        negative: ``log P(label = 0)``, ``(B, T)``; stored as well because computing it from
            ``positive`` suffers from cancellation.
    """

    positive: Tensor
    negative: Tensor
