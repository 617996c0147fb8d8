"""AdaTT-sp (D. Li et al., Adaptive Task-to-Task Fusion Network, KDD 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import check_integer
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.mixture import (
    MOST_EXPERTS,
    Levels,
    check_levels,
    linear_layers,
    mix,
    spread_own,
)
from mtnrec.model.mlp import ParallelMLPs, apply_together, check_sizes, init_towers
from mtnrec.schema import Schema


class AdaTT(nn.Module):
    """Levels of experts per task; a task adds a gated mean of all experts to a sum of its own.

    The gates are softmax functions of the task's stream; the weights of the own experts are learned
    parameters, or 1 with one expert per task. The result is the task's stream, which its experts
    and gate of the next level read, and after the last level its tower.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one tower per label.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        task_experts: Number of experts per task and level.
        levels: Output widths of each expert's layers, level by level.
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
        task_experts: int = 4,
        levels: Sequence[Sequence[int]] = ((512,), (256,)),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.task_experts", task_experts, minimum=1, maximum=MOST_EXPERTS)
        check_levels(levels, dropout=dropout, batch_norm=batch_norm)
        check_sizes(dropout=dropout, batch_norm=batch_norm, tower_widths=tower_widths)
        self.input = FeatureInput(schema, embedding_dim, bag_mode, embedding_init)
        inputs = [self.input.out_features, *(widths[-1] for widths in levels)]
        self.levels = Levels(
            _Level(
                width,
                widths,
                tasks=len(schema.labels),
                own=task_experts,
                dropout=dropout,
                batch_norm=batch_norm,
            )
            for width, widths in zip(inputs, levels, strict=False)
        )
        self.towers = ParallelMLPs(
            len(schema.labels),
            inputs[-1],
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )
        init_towers(self.task_layers(), tower_init)

    @property
    def expert_outputs(self) -> nn.Module:
        """Module that the outputs ``(B, E, O)`` of the last level's experts pass through."""
        return self.levels.expert_outputs

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        return label_log_probabilities(self.towers(self.levels(self.input, batch)))

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of all levels, the linear layers of all experts."""
        return self.levels.by_depth()


class _Level(nn.Module):
    """One level: the experts task by task, a gate per task on all of them, and own weights.

    Args:
        width: Columns of a stream.
        widths: Output widths of each expert's layers.
        tasks: Number of tasks, ``T``.
        own: Number of experts per task.
        dropout: Dropout probability in [0, 1).
        batch_norm: Whether a batch norm follows each linear layer.
    """

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        *,
        tasks: int,
        own: int,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        experts = tasks * own
        self.experts = ParallelMLPs(experts, width, widths, dropout=dropout, batch_norm=batch_norm)
        self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
        self.gates = nn.ModuleList(nn.Linear(width, experts) for _ in range(tasks))
        self._own = own
        bound = own**-0.5
        drawn = torch.empty(tasks, own).uniform_(-bound, bound)
        self.own_weights = nn.Parameter(drawn) if own > 1 else None

    def first_layers(self) -> list[list[nn.Linear]]:
        """Return the layers that read the streams: those of the experts, and the gates."""
        return [self.experts.first_layers(), linear_layers(self.gates)]

    def forward(self, streams: Tensor) -> Tensor:
        """Return the streams of the next level, from ``(T, B, I)``."""
        experts, gates = self.first_layers()
        inputs = streams.repeat_interleave(self._own, dim=0)
        return self.after_first_layers(
            apply_together(experts, inputs), apply_together(gates, streams)
        )

    def after_first_layers(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return the streams of the next level, ``(T, B, O)``.

        Args:
            hidden: Outputs of the experts' first layers.
            logits: Outputs of the gates, ``(T, B, E)``.
        """
        experts = self.experts.after_first_layer(hidden).transpose(0, 1)  # (B, E, O)
        shares = logits.transpose(0, 1).softmax(dim=2)  # (B, T, E)
        own = shares.new_ones(shares.shape[1], 1) if self.own_weights is None else self.own_weights
        return mix(shares + spread_own(own.unsqueeze(0)), self.expert_outputs(experts))
