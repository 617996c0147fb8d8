"""CVR trained on clicked rows alone: the control of the debiased models."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mtnrec.batch import Batch
from mtnrec.model.esmm import ESMM, check_funnel, logit_cross_entropies
from mtnrec.model.log_probabilities import funnel_log_probabilities
from mtnrec.model.loss import cross_entropies, require_labels
from mtnrec.schema import Schema


class NaiveCVR(ESMM):
    """ESMM's network, with the mean cross entropy of CVR over clicked rows in place of CTCVR's.

    Args:
        schema: Fields and labels of the data, which must be a funnel of two.
        embedding_dim: As in :class:`ESMM`, like the other keys.
        embedding_init: As in :class:`ESMM`.
        bag_mode: As in :class:`ESMM`.
        experts: As in :class:`ESMM`.
        expert_widths: As in :class:`ESMM`.
        tower_widths: As in :class:`ESMM`.
        tower_init: As in :class:`ESMM`.
        dropout: As in :class:`ESMM`.
        batch_norm: As in :class:`ESMM`.

    Raises:
        InputError: If the labels are not a funnel of two, or a value is out of range.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int | Mapping[Any, int] = 128,
        embedding_init: str = "joint",
        bag_mode: str = "mean",
        experts: int = 0,
        expert_widths: Sequence[int] = (512, 256),
        tower_widths: Sequence[int] = (512, 256, 128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        check_funnel("NaiveCVR", schema, two_labels=True)
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            embedding_init=embedding_init,
            bag_mode=bag_mode,
            experts=experts,
            expert_widths=expert_widths,
            tower_widths=tower_widths,
            tower_init=tower_init,
            dropout=dropout,
            batch_norm=batch_norm,
        )
        click, conversion = schema.labels
        self.loss_weights = {click: 1.0, conversion: 0.0, "clicked_cvr": 1.0}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the labels' cross entropies and that of CVR over clicked rows, 0 without any."""
        labels = require_labels(batch)
        click, conversion = self.logits(batch)
        entropies = cross_entropies(funnel_log_probabilities(click, conversion), labels)
        clicks = labels[:, 0]
        rows = clicks * logit_cross_entropies(conversion, labels[:, 1])
        return dict(zip(self.labels, entropies, strict=True)) | {
            "clicked_cvr": rows.sum() / clicks.sum().clamp(min=1)
        }
