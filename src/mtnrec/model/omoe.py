"""OMoE: MMoE with one gate for all tasks (J. Ma et al., KDD 2018)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import check_integer
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.mixture import MOST_EXPERTS, mix_experts
from mtnrec.model.mlp import ParallelMLPs, check_sizes, init_towers
from mtnrec.schema import Schema


class OMoE(nn.Module):
    """Shared experts; the input of all towers is their mean, weighted by one softmax gate.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one tower per label.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        experts: Number of experts, ``E``.
        expert_widths: Output widths of each expert's layers.
        tower_widths: Output widths of each tower's hidden layers.
        tower_init: ``independent``, or ``equal`` as in :func:`~mtnrec.model.mlp.init_towers`.
        dropout: Dropout probability in [0, 1); the paper uses 0.
        batch_norm: Whether to use batch norm; the paper does not.
    """

    supports_cuda_graphs = True

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int | Mapping[Any, int] = 128,
        embedding_init: str = "joint",
        bag_mode: str = "mean",
        experts: int = 8,
        expert_widths: Sequence[int] = (512, 256),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.experts", experts, minimum=1, maximum=MOST_EXPERTS)
        check_sizes(
            dropout=dropout,
            batch_norm=batch_norm,
            expert_widths=expert_widths,
            tower_widths=tower_widths,
        )
        self.input = FeatureInput(schema, embedding_dim, bag_mode, embedding_init)
        width = self.input.out_features
        self.experts = ParallelMLPs(
            experts, width, expert_widths, dropout=dropout, batch_norm=batch_norm
        )
        self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
        self.gate = nn.Linear(width, experts)
        self.towers = ParallelMLPs(
            len(schema.labels),
            expert_widths[-1],
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )
        init_towers(self.task_layers(), tower_init)

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        # (E, B, O) of the experts' first layers, (1, B, E) of the gate
        hidden, logits = self.input.first_layers(batch, self.experts.first_layers(), [self.gate])
        experts = self.experts.after_first_layer(hidden)  # (E, B, O)
        experts = self.expert_outputs(experts.transpose(0, 1))  # (B, E, O)
        mixture = mix_experts(experts, logits)  # (1, B, O)
        return label_log_probabilities(self.towers(mixture.expand(len(self.towers), -1, -1)))

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the experts, the ``E`` linear layers."""
        return self.experts.by_depth()
