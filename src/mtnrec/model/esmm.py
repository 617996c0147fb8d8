"""ESMM (X. Ma et al., Entire Space Multi-Task Model, SIGIR 2018)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.log_probabilities import funnel_log_probabilities
from mtnrec.model.mlp import ParallelMLPs, check_sizes
from mtnrec.schema import Schema


class ESMM(nn.Module):
    """Shared embeddings, a CTR tower and a CVR tower; ``pCTCVR = pCTR * pCVR``.

    CVR has no separate loss: both losses are over all impressions. A funnel of more stages has a
    tower for each label given the one before it, and the probabilities are their products.

    Args:
        schema: Fields and labels of the data, which must be a funnel.
        embedding_dim: ``D``, or a width per field as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        bag_mode: ``mean`` or ``sum`` of a multi-valued field's weighted tokens.
        embedding_init: ``joint`` or ``per_field``, as in
            :class:`~mtnrec.model.feature_input.FeatureInput`.
        tower_widths: Output widths of each tower's hidden layers, which comprise the bottom and
            tower of other models.
        dropout: Dropout probability in [0, 1); the paper uses 0.
        batch_norm: Whether to use batch norm; the paper does not.

    Raises:
        InputError: If the labels are not a funnel.
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
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if not schema.funnel:
            raise InputError(
                "ESMM needs a funnel, such as click and conversion, got the independent "
                f"labels {', '.join(schema.labels)}. Choose model=shared_bottom or model=mmoe."
            )
        check_sizes(dropout=dropout, batch_norm=batch_norm, tower_widths=tower_widths)
        self.input = FeatureInput(schema, embedding_dim, bag_mode, embedding_init)
        self.towers = ParallelMLPs(
            len(schema.labels),
            self.input.out_features,
            tower_widths,
            dropout=dropout,
            batch_norm=batch_norm,
            head=True,
        )

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        (hidden,) = self.input.first_layers(batch, self.towers.first_layers())
        return funnel_log_probabilities(*self.towers.after_first_layer(hidden))

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers, the ``T`` linear layers."""
        return self.towers.by_depth()

    def shared_layers(self) -> list[list[nn.Linear]]:
        """Return an empty list: only the embeddings are shared."""
        return []
