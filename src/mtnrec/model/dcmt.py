"""DCMT (F. Zhu et al., Direct Entire-space Causal Multi-Task Framework, ICDE 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch
from mtnrec.checks import check_number
from mtnrec.model.esmm import ESMM, check_funnel, logit_cross_entropies
from mtnrec.model.log_probabilities import funnel_log_probabilities, label_log_probabilities
from mtnrec.model.loss import cross_entropies, require_labels
from mtnrec.model.propensity import inverse_propensities, measure_weights
from mtnrec.schema import Schema


class DCMT(ESMM):
    """ESMM whose CVR tower has a second, counterfactual head that learns from unclicked rows.

    The loss of CVR is the mean of ``y w CE(z, b) + (1 - y) v CE(1, b')``, with ``b`` and ``b'`` the
    logits of the two heads, ``w`` the clipped ``1 / pCTR`` and ``v`` the clipped
    ``1 / (1 - pCTR)``, both without a gradient. A further loss, ``agreement``, is the mean of
    ``|1 - s(b) - s(b')|``. As no unclicked row converts, the counterfactual label is always 1, so
    that both losses together push pCVR on unclicked rows towards 0.

    Args:
        schema: Fields and labels of the data, which must be a funnel of two.
        embedding_dim: As in :class:`ESMM`.
        embedding_init: As in :class:`ESMM`.
        bag_mode: As in :class:`ESMM`.
        experts: Number of shared experts; 0 for ESMM's towers on the embeddings.
        expert_widths: Output widths of each expert's layers.
        tower_widths: Output widths of each tower's hidden layers.
        tower_init: As in :class:`ESMM`.
        dropout: As in :class:`ESMM`.
        batch_norm: As in :class:`ESMM`.
        clip_ratio: Largest weights as multiples of ``1 / mean(y)`` and ``1 / mean(1 - y)``, at
            least 1.
        cvr_weight: Weight of the loss of CVR.
        ctcvr_weight: Weight of the loss of CTCVR.
        agreement_weight: Weight of the agreement of the heads.

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
        experts: int = 8,
        expert_widths: Sequence[int] = (512, 256),
        tower_widths: Sequence[int] = (128, 64),
        tower_init: str = "independent",
        dropout: float = 0.0,
        batch_norm: bool = False,
        clip_ratio: float = 10.0,
        cvr_weight: float = 1.0,
        ctcvr_weight: float = 1.0,
        agreement_weight: float = 1e-3,
    ) -> None:
        check_funnel("DCMT", schema, two_labels=True)
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
        check_number("model.clip_ratio", clip_ratio, minimum=1)
        check_number("model.cvr_weight", cvr_weight, minimum=0)
        check_number("model.ctcvr_weight", ctcvr_weight, minimum=0)
        check_number("model.agreement_weight", agreement_weight, minimum=0)
        click, conversion = schema.labels
        self.loss_weights = {
            click: 1.0,
            conversion: ctcvr_weight,
            "weighted_cvr": cvr_weight,
            "agreement": agreement_weight,
        }
        self.measured: dict[str, Tensor] = {}
        self._clip_ratio = clip_ratio
        self.counterfactual = nn.Linear(tower_widths[-1], 1)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of CTR, CVR and the counterfactual head, ``(3, B, 1)``."""
        hidden = self.last_hidden(batch)
        logits = self.towers.apply_slice(hidden, -1, None)
        return torch.cat([logits, self.counterfactual(hidden[1:])])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the labels' cross entropies, the loss of CVR and the heads' agreement."""
        labels = require_labels(batch)
        clicks, conversions = labels.unbind(dim=1)
        click, conversion, counterfactual = self.logits(batch)
        output = funnel_log_probabilities(click, conversion)
        weights, clipped = inverse_propensities(output.positive[:, 0], clicks, self._clip_ratio)
        others, _ = inverse_propensities(output.negative[:, 0], 1 - clicks, self._clip_ratio)
        self.measured = measure_weights(weights, clipped, clicks, conversion)
        rows = weights * logit_cross_entropies(conversion, conversions)
        rows = rows + others * logit_cross_entropies(counterfactual, torch.ones_like(clicks))
        heads = label_log_probabilities(torch.stack([-conversion, counterfactual])).positive.exp()
        return dict(zip(self.labels, cross_entropies(output, labels), strict=True)) | {
            "weighted_cvr": rows.mean(),
            "agreement": heads.diff(dim=1).abs().mean(),  # 1 - s(b) = s(-b)
        }
