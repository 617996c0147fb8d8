"""Single-task: a separate network per label, embeddings included."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.mlp import ParallelMLPs, check_sizes, init_towers
from mtnrec.schema import Schema


class SingleTask(nn.Module):
    """One network per label, which share nothing; trained together they equal separate trainings.

    Adam acts on each parameter alone, so the equality holds step by step, until training stops: the
    epoch is one for all. Clipping by the joint norm and MTN couple the networks. The embeddings
    take ``T`` times the memory of the other models'. On a funnel the networks give CTR and CTCVR;
    CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one network per label.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        tower_widths: Output widths of each network's hidden layers.
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
        tower_widths: Sequence[int] = (512, 256, 128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(dropout=dropout, batch_norm=batch_norm, tower_widths=tower_widths)
        inputs = [
            FeatureInput(schema, embedding_dim, bag_mode, embedding_init) for _ in schema.labels
        ]
        self.inputs = nn.ModuleList(inputs)
        self.towers = ParallelMLPs(
            len(schema.labels),
            inputs[0].out_features,
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )
        init_towers(self.task_layers(), tower_init)

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        inputs = [part for part in self.inputs if isinstance(part, FeatureInput)]
        pairs = zip(inputs, self.towers.first_layers(), strict=True)
        hidden = torch.stack([part.first_layer(batch, layer) for part, layer in pairs])
        return label_log_probabilities(self.towers.after_first_layer(hidden))

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the networks, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return an empty list: nothing is shared."""
        return []
