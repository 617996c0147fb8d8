"""MMoE (J. Ma et al., Multi-gate Mixture-of-Experts, KDD 2018)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import check_integer
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.mixture import MOST_EXPERTS, linear_layers, mix_experts
from mtnrec.model.mlp import ParallelMLPs, check_sizes, init_towers
from mtnrec.model.personal_gates import PersonalGates
from mtnrec.schema import Schema


class MMoE(nn.Module):
    """Shared experts; each tower's input is their mean, weighted by its own softmax gate.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one gate and one tower per label.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        cross_layers: Number of layers of a :class:`~mtnrec.model.cross.CrossNetwork` on the input;
            0 for none.
        cross_rank: Rank of its matrices.
        experts: Number of experts, ``E``.
        expert_widths: Output widths of each expert's layers.
        tower_widths: Output widths of each tower's hidden layers.
        tower_init: ``independent``, or ``equal`` as in :func:`~mtnrec.model.mlp.init_towers`.
        personal_fields: Fields, such as the user's id, whose vectors gate the towers as in
            :class:`~mtnrec.model.personal_gates.PersonalGates`; None for no gates.
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
        cross_layers: int = 0,
        cross_rank: int = 64,
        experts: int = 8,
        expert_widths: Sequence[int] = (512, 256),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        personal_fields: Sequence[str] | None = None,
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
        self.input = FeatureInput(
            schema,
            embedding_dim,
            bag_mode,
            embedding_init,
            cross_layers=cross_layers,
            cross_rank=cross_rank,
        )
        width = self.input.out_features
        self.experts = ParallelMLPs(
            experts, width, expert_widths, dropout=dropout, batch_norm=batch_norm
        )
        self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
        self.gates = nn.ModuleList(nn.Linear(width, experts) for _ in schema.labels)
        self.towers = ParallelMLPs(
            len(schema.labels),
            expert_widths[-1],
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )
        init_towers(self.task_layers(), tower_init)
        self.personal_gates = (
            None
            if personal_fields is None
            else PersonalGates(schema, self.input, personal_fields, expert_widths[-1], tower_widths)
        )

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        gates = linear_layers(self.gates)
        # (E, B, O) of the experts' first layers, (T, B, E) of the gates
        hidden, logits = self.input.first_layers(batch, self.experts.first_layers(), gates)
        experts = self.experts.after_first_layer(hidden)  # (E, B, O)
        experts = self.expert_outputs(experts.transpose(0, 1))  # (B, E, O)
        mixtures = mix_experts(experts, logits)  # (T, B, O)
        if self.personal_gates is None:
            return label_log_probabilities(self.towers(mixtures))
        gates = self.personal_gates(self.input, batch, mixtures)
        return label_log_probabilities(self.towers.gated(mixtures, gates))

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the experts, the ``E`` linear layers."""
        return self.experts.by_depth()
