"""Cross entropies without the positives that the model expects least."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import LogProbabilities
from mtnrec.checks import check_integer
from mtnrec.model.loss import row_cross_entropies
from mtnrec.objective.loss import check_shares, one_per_label


class Truncated(nn.Module):
    """Cross entropy that drops a share of each label's positives, those of the largest losses.

    Follows T-CE (Wang et al., *Denoising Implicit Feedback for Recommendation*, WSDM 2021), which
    sorts the losses of a batch. A batch of 2,048 rows has too few conversions for that, so a loss
    is compared with those of the last ``window`` positives of its label: with ``n`` of them and a
    current rate ``r``, a positive is dropped if its loss is above the ``floor(r * (n + 1))``-th
    largest, which has at most the probability ``r`` among exchangeable losses. The rate rises from
    0 to ``rate`` in proportion to the positives seen. Dropped rows count as rows with loss 0, so
    the other rows weigh as before and predictions shrink: the odds by about ``1 - rate``.

    Logged as ``train/dropped_label``, the share of the window's positives that were dropped, and
    ``train/threshold_label``, the loss above which a positive is dropped (the largest in the window
    as long as none is; 0 without positives). Each process has its own window. A step cannot be
    captured as a CUDA graph, since batches differ in their number of positives.

    Args:
        rate: Share of positives to drop, in [0, 1): one for all labels, or one for each,
            ``[0, 0.1]``. 0 is the cross entropy, to the bit.
        window: Number of positives of each label whose losses are kept, at least 1.
        warm_up: Positives of a label after which its rate is reached; 0 starts with it.

    Raises:
        InputError: If a value is out of range, or, in :meth:`prepare`, if there are not as many as
            labels.
    """

    def __init__(
        self,
        rate: float | Sequence[float] = 0.05,
        *,
        window: int = 10_000,
        warm_up: int = 10_000,
    ) -> None:
        super().__init__()
        check_shares("loss.rate", rate)
        check_integer("loss.window", window, minimum=1)
        check_integer("loss.warm_up", warm_up, minimum=0)
        self.rate = rate
        self.window = window
        self.warm_up = warm_up
        self.measured: dict[str, Tensor] = {}
        self._labels: tuple[str, ...] = ()
        self._rates: list[float] = []
        # Ring buffers of the positives of each label; not buffers of the module, which DDP copies.
        self._losses = torch.zeros(0, window)
        self._dropped = torch.zeros(0, window, dtype=torch.bool)
        self._seen: list[int] = []  # positives of each label

    def prepare(self, labels: Sequence[str]) -> None:
        """Make an empty window for each label."""
        self._labels = tuple(labels)
        self._rates = one_per_label("loss.rate", self.rate, labels)
        self._losses = torch.zeros(len(labels), self.window)
        self._dropped = torch.zeros(len(labels), self.window, dtype=torch.bool)
        self._seen = [0] * len(labels)

    def rank_state(self) -> dict[str, Any]:
        """Return the windows of this process."""
        return {
            "losses": self._losses.cpu(),
            "dropped": self._dropped.cpu(),
            "seen": list(self._seen),
        }

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Continue with windows that :meth:`rank_state` returned."""
        self._losses, self._dropped = state["losses"].clone(), state["dropped"].clone()
        self._seen = list(state["seen"])

    def forward(self, output: LogProbabilities, labels: Tensor) -> Tensor:
        """Return the mean loss of each label, ``(T,)``, and in training mode extend the windows."""
        found = -row_cross_entropies(output, labels)
        self._losses, self._dropped = (
            part.to(found.device) for part in (self._losses, self._dropped)
        )
        kept = torch.ones_like(found)
        self.measured = {}
        for column, label in enumerate(self._labels):
            is_positive = labels[:, column] == 1
            losses = -found[is_positive, column].detach().float()
            threshold, drops = self._threshold(column)
            dropped = losses > threshold if drops else torch.zeros_like(losses, dtype=torch.bool)
            kept[is_positive, column] = (~dropped).to(kept.dtype)
            if self.training:
                self._extend(column, losses, dropped)
            count = min(self._seen[column], self.window)
            self.measured[f"dropped_{label}"] = self._dropped[column].sum() / max(1, count)
            self.measured[f"threshold_{label}"] = threshold
        return -(kept * found).mean(dim=0)

    def _threshold(self, column: int) -> tuple[Tensor, bool]:
        """Return the loss above which a positive is dropped, and whether any can be."""
        seen = self._seen[column]
        losses = self._losses[column, : min(seen, self.window)]
        if not len(losses):
            return self._losses.new_zeros(()), False
        reached = min(1.0, seen / self.warm_up) if self.warm_up else 1.0
        rank = int(self._rates[column] * reached * (len(losses) + 1))
        return losses.kthvalue(len(losses) + 1 - max(1, rank)).values, rank > 0

    def _extend(self, column: int, losses: Tensor, dropped: Tensor) -> None:
        """Add losses to a window, in place of its oldest."""
        first = self._seen[column] + max(0, len(losses) - self.window)
        self._seen[column] += len(losses)
        places = torch.arange(first, self._seen[column], device=losses.device) % self.window
        self._losses[column, places] = losses[-self.window :]
        self._dropped[column, places] = dropped[-self.window :]
