"""ESCM2 (H. Wang et al., Entire Space Counterfactual Multi-task Modelling, SIGIR 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtnrec.batch import Batch
from mtnrec.checks import InputError, check_choice, check_flag, check_number
from mtnrec.model.esmm import ESMM, check_funnel, logit_cross_entropies
from mtnrec.model.log_probabilities import funnel_log_probabilities, label_log_probabilities
from mtnrec.model.loss import cross_entropies, require_labels
from mtnrec.model.mlp import MLP
from mtnrec.model.propensity import inverse_propensities, measure_weights
from mtnrec.schema import Schema


class ESCM2(ESMM):
    """ESMM with a loss of CVR whose clicked rows stand for all: weighted by ``1 / pCTR``.

    ``ips``: the mean over all rows of ``y w CE(z, b)``, with ``b`` the logit of CVR and ``w`` the
    clipped ``1 / pCTR`` without a gradient.

    ``dr``: the mean of ``CE(t, b)`` with the pseudo-label ``t = r + y w (z - r)``, where ``r`` is
    the CVR of an imputation tower; doubly robust joint learning (X. Wang et al., ICML 2019). In the
    paper's form the tower of CVR has exactly the gradient of ``ips``, since the imputed error does
    not depend on it. The imputation tower minimises the mean of ``y w (CE(z, b) - CE(r, b))^2``.

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
        estimator: ``ips`` or ``dr``.
        self_normalise: Whether ``ips`` divides by the sum of the weights in place of ``B``.
        clip_ratio: Largest weight as a multiple of ``1 / mean(y)``, at least 1.
        cvr_weight: Weight of the losses of CVR and of the imputation.
        ctcvr_weight: Weight of the loss of CTCVR.

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
        estimator: str = "ips",
        self_normalise: bool = False,
        clip_ratio: float = 10.0,
        cvr_weight: float = 0.1,
        ctcvr_weight: float = 1.0,
    ) -> None:
        check_funnel("ESCM2", schema, two_labels=True)
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
        check_choice("model.estimator", estimator, ["ips", "dr"])
        check_flag("model.self_normalise", self_normalise)
        check_number("model.clip_ratio", clip_ratio, minimum=1)
        check_number("model.cvr_weight", cvr_weight, minimum=0)
        check_number("model.ctcvr_weight", ctcvr_weight, minimum=0)
        if self_normalise and estimator == "dr":
            raise InputError(
                "model.self_normalise must be false for estimator=dr, got true. Choose "
                "model.estimator=ips, or set model.self_normalise=false."
            )
        click, conversion = schema.labels
        self.loss_weights = {click: 1.0, conversion: ctcvr_weight, "weighted_cvr": cvr_weight}
        self.measured: dict[str, Tensor] = {}
        self._self_normalise = self_normalise
        self._clip_ratio = clip_ratio
        if estimator == "dr":
            width = self.input.out_features
            if self.experts is not None:
                self.gates.append(nn.Linear(width, experts))
                width = expert_widths[-1]
            imputation = MLP(width, tower_widths, dropout=dropout, batch_norm=batch_norm, head=True)
            self.towers.append(imputation)
            self.loss_weights["imputation"] = cvr_weight

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the labels' cross entropies, the loss of CVR and any loss of the imputation."""
        labels = require_labels(batch)
        clicks, conversions = labels.unbind(dim=1)
        click, conversion, *imputation = self.logits(batch)
        output = funnel_log_probabilities(click, conversion)
        weights, clipped = inverse_propensities(output.positive[:, 0], clicks, self._clip_ratio)
        self.measured = measure_weights(weights, clipped, clicks, conversion)
        named = dict(zip(self.labels, cross_entropies(output, labels), strict=True))
        if not imputation:
            rows = weights * logit_cross_entropies(conversion, conversions)
            total = weights.sum().clamp(min=1) if self._self_normalise else len(batch)
            return named | {"weighted_cvr": rows.sum() / total}
        imputed = label_log_probabilities(imputation[0].unsqueeze(0)).positive.exp().squeeze(1)
        targets = imputed.detach() + weights * (conversions - imputed.detach())
        self.measured["outside_share"] = ((targets < 0) | (targets > 1)).float().mean()
        # CE(z, b) - CE(r, b) = (r - z) b
        errors = (imputed - conversions) * conversion.detach().squeeze(1)
        return named | {
            "weighted_cvr": logit_cross_entropies(conversion, targets).mean(),
            "imputation": (weights * errors.square()).mean(),
        }

    def task_layers(self) -> list[list[nn.Linear]]:
        """Return, for each depth of the towers of CTR and CVR, the two linear layers."""
        return [depth[:2] for depth in super().task_layers()]
