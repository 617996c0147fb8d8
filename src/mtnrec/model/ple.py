"""PLE and CGC (H. Tang et al., Progressive Layered Extraction, RecSys 2020)."""

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


class PLE(nn.Module):
    """Levels of shared experts and experts per task, mixed by a softmax gate per task.

    A task's gate sees its own and the shared experts. Its mixture is the input of the task's
    experts and gate at the next level, and after the last level of its tower. A gate on all experts
    makes the input of the shared experts; the last level has none, since nothing would read it. One
    level is CGC: ``levels=[[512, 256]]``.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one tower per label.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        experts: Number of shared experts per level.
        task_experts: Number of experts per task and level; 0 leaves the shared ones, as in MMoE.
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
        experts: int = 4,
        task_experts: int = 2,
        levels: Sequence[Sequence[int]] = ((512,), (256,)),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.experts", experts, minimum=1, maximum=MOST_EXPERTS)
        check_integer("model.task_experts", task_experts, minimum=0, maximum=MOST_EXPERTS)
        check_levels(levels, dropout=dropout, batch_norm=batch_norm)
        check_sizes(dropout=dropout, batch_norm=batch_norm, tower_widths=tower_widths)
        self.input = FeatureInput(schema, embedding_dim, bag_mode, embedding_init)
        inputs = [self.input.out_features, *(widths[-1] for widths in levels)]
        self.levels = Levels(
            _Level(
                width,
                widths,
                tasks=len(schema.labels),
                shared=experts,
                own=task_experts,
                is_last=number == len(levels),
                dropout=dropout,
                batch_norm=batch_norm,
            )
            for number, (width, widths) in enumerate(zip(inputs, levels, strict=False), start=1)
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
    """One level: the experts task by task, then the shared ones, and the gates.

    Streams are its inputs and outputs, one per task and, except after the last level, the shared
    one.

    Args:
        width: Columns of a stream.
        widths: Output widths of each expert's layers.
        tasks: Number of tasks, ``T``.
        shared: Number of shared experts.
        own: Number of experts per task.
        is_last: Whether no level follows.
        dropout: Dropout probability in [0, 1).
        batch_norm: Whether a batch norm follows each linear layer.
    """

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        *,
        tasks: int,
        shared: int,
        own: int,
        is_last: bool,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self._shared, self._own = shared, own
        experts = tasks * own + shared
        self.experts = ParallelMLPs(experts, width, widths, dropout=dropout, batch_norm=batch_norm)
        self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
        self.gates = nn.ModuleList(nn.Linear(width, own + shared) for _ in range(tasks))
        self.shared_gate = None if is_last else nn.Linear(width, experts)

    def first_layers(self) -> list[list[nn.Linear]]:
        """Return the layers that read the streams: experts', task gates, shared gate if any."""
        groups = [self.experts.first_layers(), linear_layers(self.gates)]
        return groups if self.shared_gate is None else [*groups, [self.shared_gate]]

    def forward(self, streams: Tensor) -> Tensor:
        """Return the streams of the next level, from ``(T + 1, B, I)``."""
        *tasks, shared = streams.unbind()
        own = [stream for stream in tasks for _ in range(self._own)]
        inputs = [own + [shared] * self._shared, tasks, [shared]]
        groups = self.first_layers()  # without a shared gate the third input is not read
        pairs = zip(groups, inputs, strict=False)
        return self.after_first_layers(*(apply_together(g, torch.stack(i)) for g, i in pairs))

    def after_first_layers(self, hidden: Tensor, *logits: Tensor) -> Tensor:
        """Return the streams of the next level, ``(T + 1, B, O)``, or ``(T, B, O)`` after the last.

        Args:
            hidden: Outputs of the experts' first layers.
            logits: Outputs of the task gates, and of the shared gate if there is one.
        """
        experts = self.experts.after_first_layer(hidden).transpose(0, 1)  # (B, E, O)
        task_shares, *shared = (group.transpose(0, 1).softmax(dim=2) for group in logits)
        own, common = task_shares.split([self._own, self._shared], dim=2)
        weights = torch.cat([spread_own(own), common], dim=2)  # (B, T, E)
        return mix(torch.cat([weights, *shared], dim=1), self.expert_outputs(experts))
