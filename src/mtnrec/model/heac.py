"""HEAC: the network of MetaHeac (Y. Zhu et al., KDD 2021), without its meta-learning."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError, check_integer
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import mixture_log_probabilities
from mtnrec.model.mixture import MOST_EXPERTS, mix_experts
from mtnrec.model.mlp import MLP, ParallelMLPs, check_sizes
from mtnrec.schema import Schema


class HEAC(nn.Module):
    """Shared experts and shared critics, each mixed by a gate that knows the row and the task.

    A gate reads the mean of the fields' vectors and the vector of the task. The experts' mean with
    its softmax is the input of the critics, logistic regressions whose mean probability, with that
    of another gate, is the label's. No layer belongs to a task, so MTN can act on the experts
    alone. MetaHeac's meta-learning needs tasks on different rows, which labels are not.

    On a funnel the labels are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data.
        embedding_dim: ``D``, the same for all fields and the tasks.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        experts: Number of experts, ``E``.
        critics: Number of critics.
        expert_widths: Output widths of each expert's layers.
        gate_widths: Output widths of each gate's hidden layers.
        dropout: Dropout probability in [0, 1); the paper uses 0.
        batch_norm: Whether to use batch norm in the experts; the paper does not.

    Raises:
        InputError: If fields have different widths, or a value is out of range.
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
        critics: int = 5,
        expert_widths: Sequence[int] = (512, 256),
        gate_widths: Sequence[int] = (128,),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_integer("model.experts", experts, minimum=1, maximum=MOST_EXPERTS)
        check_integer("model.critics", critics, minimum=1, maximum=MOST_EXPERTS)
        check_sizes(
            dropout=dropout,
            batch_norm=batch_norm,
            expert_widths=expert_widths,
            gate_widths=gate_widths,
        )
        if isinstance(embedding_dim, Mapping):
            raise InputError(
                "model.embedding_dim of HEAC, which averages the vectors of all fields, must be "
                f"one width, got {dict(embedding_dim)}. Set model.embedding_dim=128."
            )
        self.input = FeatureInput(schema, embedding_dim, bag_mode, embedding_init)
        self.experts = ParallelMLPs(
            experts,
            self.input.out_features,
            expert_widths,
            dropout=dropout,
            batch_norm=batch_norm,
        )
        self.expert_outputs = nn.Identity()  # for forward hooks on the outputs
        self.tasks = nn.Parameter(torch.empty(len(schema.labels), embedding_dim))
        nn.init.xavier_uniform_(self.tasks)
        self.expert_gate = _gate(2 * embedding_dim, gate_widths, experts)
        self.critic_gate = _gate(2 * embedding_dim, gate_widths, critics)
        self.critics = nn.Linear(expert_widths[-1], critics)

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        (hidden,) = self.input.first_layers(batch, self.experts.first_layers())
        experts = self.experts.after_first_layer(hidden)  # (E, B, O)
        experts = self.expert_outputs(experts.transpose(0, 1))  # (B, E, O)
        contexts = self._contexts(batch)
        mixtures = mix_experts(experts, self.expert_gate(contexts))  # (T, B, O)
        return mixture_log_probabilities(self.critic_gate(contexts), self.critics(mixtures))

    def _contexts(self, batch: Batch) -> Tensor:
        """Return the inputs of the gates, ``(T, B, 2 D)``."""
        row = torch.stack(self.input.vectors(batch)).mean(dim=0)  # (B, D)
        rows = row.expand(len(self.tasks), -1, -1)
        return torch.cat([rows, self.tasks.unsqueeze(1).expand_as(rows)], dim=2)

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return an empty list: no layer belongs to a task."""
        return []

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the experts, the ``E`` linear layers."""
        return self.experts.by_depth()


def _gate(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    hidden = MLP(inputs, widths, dropout=0, batch_norm=False)
    return nn.Sequential(hidden, nn.Linear(hidden.out_features, outputs))
