"""Shared-bottom (R. Caruana, Multitask Learning, 1997): one bottom network, one tower per label."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import label_log_probabilities
from mtnrec.model.mlp import MLP, ParallelMLPs, check_sizes, init_towers
from mtnrec.schema import Schema


class SharedBottom(nn.Module):
    """A bottom network that all towers share.

    On a funnel the towers are CTR and CTCVR; CVR is their quotient (paper, eq. 1).

    Args:
        schema: Fields and labels of the data; one tower per label.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        cross_layers: Number of layers of a :class:`~mtnrec.model.cross.CrossNetwork` on the input;
            0 for none.
        cross_rank: Rank of its matrices.
        bottom_widths: Output widths of the bottom's layers.
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
        cross_layers: int = 0,
        cross_rank: int = 64,
        bottom_widths: Sequence[int] = (512, 256),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            dropout=dropout,
            batch_norm=batch_norm,
            bottom_widths=bottom_widths,
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
        self.bottom = MLP(
            self.input.out_features, bottom_widths, dropout=dropout, batch_norm=batch_norm
        )
        self.towers = ParallelMLPs(
            len(schema.labels),
            bottom_widths[-1],
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )
        init_towers(self.task_layers(), tower_init)

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        hidden = self.input.first_layer(batch, self.bottom.linear_layers()[0])
        hidden = self.bottom.after_first_layer(hidden)
        return label_log_probabilities(self.towers(hidden.expand(len(self.towers), -1, -1)))

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return an empty list: the bottom is one network, without parallel layers."""
        return []
