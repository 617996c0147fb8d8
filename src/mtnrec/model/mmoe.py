"""MMoE (J. Ma et al., Multi-gate Mixture-of-Experts, KDD 2018)."""

from collections.abc import Sequence

import torch
from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import check_integer
from mtnrec.model.layer import (
    MLP,
    FeatureInput,
    check_sizes,
    label_log_probabilities,
    layers_by_depth,
)
from mtnrec.schema import Schema


class MMoE(nn.Module):
    """Shared experts; each tower's input is their mean, weighted by a softmax gate of its own.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one gate and one tower a label.
        embedding_dim: ``D``.
        experts: ``E``.
        expert_widths: Outputs of each expert's layers.
        tower_widths: Outputs of each tower's hidden layers.
        dropout: In [0, 1); the paper uses 0.
        batch_norm: The paper uses none.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int,
        experts: int,
        expert_widths: Sequence[int],
        tower_widths: Sequence[int],
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        check_integer("model.experts", experts, minimum=1)
        check_sizes(
            dropout=dropout,
            batch_norm=batch_norm,
            expert_widths=expert_widths,
            tower_widths=tower_widths,
        )
        self.input = FeatureInput(schema, embedding_dim)
        width = self.input.out_features
        self.experts = nn.ModuleList(
            MLP(width, expert_widths, dropout=dropout, batch_norm=batch_norm)
            for _ in range(experts)
        )
        self.gates = nn.ModuleList(nn.Linear(width, experts) for _ in schema.labels)
        self.towers = nn.ModuleList(
            MLP(expert_widths[-1], tower_widths, dropout=dropout, batch_norm=batch_norm, head=True)
            for _ in schema.labels
        )

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        first_layers = [expert.first for expert in self.experts]
        firsts = self.input.feed(batch, [*first_layers, *self.gates])
        experts = [e.rest(x) for e, x in zip(self.experts, firsts, strict=False)]
        outputs = torch.stack(experts, dim=1)
        logits = [
            tower(torch.einsum("be,beo->bo", gate.softmax(dim=1), outputs))
            for tower, gate in zip(self.towers, firsts[len(experts) :], strict=True)
        ]
        return label_log_probabilities(logits)

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return layers_by_depth(list(self.towers))

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the experts, the ``E`` linear layers."""
        return layers_by_depth(list(self.experts))
