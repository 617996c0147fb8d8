"""STEM (L. Su et al., Shared and Task-specific EMbeddings, AAAI 2024)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError, check_integer
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.mixture import MOST_EXPERTS, mix_and_train
from mtnrec.model.mlp import ParallelMLPs, apply_together, check_sizes, init_towers
from mtnrec.schema import Schema


class STEM(nn.Module):
    """Embeddings per task, each read by its task's experts, and shared ones.

    A task's gate sees the experts of all tasks, those of the others without a gradient: their
    outputs count, but a task's loss trains its own and the shared embeddings and experts alone. The
    network has one layer of experts; with more, gradients of other tasks would pass through the
    shared experts between them.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one tower per label.
        embedding_dim: Total width of a value's vectors, for all fields or by field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`. Each of its ``T + 1`` vectors has
            ``D // (T + 1)`` columns; the paper's have ``D``.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        experts: Number of shared experts.
        task_experts: Number of experts per task.
        expert_widths: Output widths of each expert's layers.
        gate_widths: Output widths of each gate's hidden layers.
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
        task_experts: int = 6,
        expert_widths: Sequence[int] = (512, 256),
        gate_widths: Sequence[int] = (128, 64),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.experts", experts, minimum=1, maximum=MOST_EXPERTS)
        check_integer("model.task_experts", task_experts, minimum=1, maximum=MOST_EXPERTS)
        check_sizes(
            dropout=dropout,
            batch_norm=batch_norm,
            expert_widths=expert_widths,
            gate_widths=gate_widths,
            tower_widths=tower_widths,
        )
        tasks = len(schema.labels)
        make_mlps = partial(ParallelMLPs, dropout=dropout, batch_norm=batch_norm)
        own_width = _share(embedding_dim, tasks + 1)
        self.inputs = nn.ModuleList(  # of the tasks, then the shared one
            FeatureInput(schema, own_width, bag_mode, embedding_init) for _ in range(tasks + 1)
        )
        width = self._inputs()[0].out_features
        self._counts = [task_experts] * tasks + [experts]
        self.experts = make_mlps(sum(self._counts), width, expert_widths)
        self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
        self.gates = make_mlps(tasks, width, gate_widths)
        self.gate_outputs = nn.ModuleList(
            nn.Linear(gate_widths[-1], len(self.experts)) for _ in range(tasks)
        )
        self.towers = make_mlps(tasks, expert_widths[-1], tower_widths, head=True)
        init_towers(self.task_layers(), tower_init)
        owners = [owner for owner, count in enumerate(self._counts) for _ in range(count)]
        trained = [[owner in (task, tasks) for owner in owners] for task in range(tasks)]
        self.register_buffer("_trained", torch.tensor(trained), persistent=False)  # (T, E)

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        hidden, logits = self._first_layers(batch)
        experts = self.experts.after_first_layer(hidden)  # (E, B, O)
        experts = self.expert_outputs(experts.transpose(0, 1))  # (B, E, O)
        logits = apply_together(list(self.gate_outputs), self.gates.after_first_layer(logits))
        shares = logits.transpose(0, 1).softmax(dim=2)  # (B, T, E)
        mixtures = mix_and_train(shares, experts, self.get_buffer("_trained"))  # (T, B, O)
        return label_log_probabilities(self.towers(mixtures))

    def _first_layers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the outputs of the first layers of the experts and of the gates.

        A gate reads the sum of its task's input and the shared one; its layer is applied to each,
        so that both stay folded.
        """
        gates = self.gates.first_layers()
        experts = iter(self.experts.first_layers())
        groups = [[next(experts) for _ in range(count)] for count in self._counts]
        *own_inputs, shared_input = self._inputs()
        shared_hidden, shared_logits = shared_input.first_layers(batch, groups[-1], gates)
        pairs = [
            own_input.first_layers(batch, group, [gate])
            for own_input, group, gate in zip(own_inputs, groups[:-1], gates, strict=True)
        ]
        hidden = torch.cat([*(hidden for hidden, _ in pairs), shared_hidden])
        logits = torch.cat([logits for _, logits in pairs]) + shared_logits
        biases = torch.stack([gate.bias for gate in gates])  # counted twice
        return hidden, logits - biases.unsqueeze(1)

    def _inputs(self) -> list[FeatureInput]:
        return [part for part in self.inputs if isinstance(part, FeatureInput)]

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the experts, the linear layers of all experts."""
        return self.experts.by_depth()


def _share(embedding_dim: int | Mapping[Any, int], parts: int) -> int | dict[Any, int]:
    """Divide the total width, or each one, by the number of tables."""
    if isinstance(embedding_dim, Mapping):
        return {key: _share_of_one(width, parts) for key, width in embedding_dim.items()}
    return _share_of_one(embedding_dim, parts)


def _share_of_one(width: int, parts: int) -> int:
    check_integer("model.embedding_dim", width, minimum=1)
    if width < parts:
        raise InputError(
            f"model.embedding_dim of STEM must be at least {parts}, a column per task and a shared "
            f"one, got {width}. Set at least {parts}."
        )
    return width // parts
