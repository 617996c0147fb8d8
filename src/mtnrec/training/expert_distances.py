"""Distances between the outputs of a network's experts (paper, figure 3)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def output_distances(outputs: Tensor) -> Tensor:
    """Return the Euclidean distance of each pair of experts' outputs, row by row.

    Args:
        outputs: ``(B, E, O)``.

    Returns:
        ``(B, E, E)``, symmetric, float32 at least.

    >>> output_distances(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]))
    tensor([[[0., 5.],
             [5., 0.]]])
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    # By differences: a matrix product would cancel where two experts are close. Each pair once,
    # where `cdist` computes both orders.
    distances = outputs.new_zeros(len(outputs), outputs.shape[1], outputs.shape[1])
    for expert in range(outputs.shape[1] - 1):
        differences = outputs[:, expert + 1 :] - outputs[:, expert, None]
        pairwise = torch.linalg.vector_norm(differences, dim=2)
        distances[:, expert, expert + 1 :] = distances[:, expert + 1 :, expert] = pairwise
    return distances


class ExpertDistances(L.Callback):
    """Measures the mean distance between two experts' outputs over all rows of the first test set.

    It hooks into the network's own forward pass, so that no expert is computed twice. After the
    test ``distances`` is an ``E x E`` matrix, the same on all ranks; None for a network without
    ``expert_outputs``, the module that the outputs ``(B, E, O)`` of its experts pass through.
    """

    def __init__(self) -> None:
        self.distances: list[list[float]] | None = None
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._rows = 0
        self._hook: RemovableHandle | None = None
        self._counts = True

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._counts = dataloader_idx == 0

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network: Any = pl_module.network
        self.distances = None
        if hasattr(network, "expert_outputs"):
            experts = len(network.shared_layers()[0])
            self._sums, self._rows = torch.zeros(experts, experts, dtype=torch.float64), 0
            self._hook = network.expert_outputs.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
        if not self._counts:
            return
        # Summed on the CPU: not every accelerator has float64.
        self._sums += output_distances(outputs.detach()).cpu().sum(dim=0, dtype=torch.float64)
        self._rows += len(outputs)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        totals = torch.cat([self._sums.flatten(), self._sums.new_tensor([self._rows])])
        if trainer.world_size > 1:  # NCCL sums on the GPU only
            totals = trainer.strategy.reduce(totals.to(pl_module.device), reduce_op="sum").cpu()
        self.distances = (totals[:-1] / totals[-1]).view_as(self._sums).tolist()
