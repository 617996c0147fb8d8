"""Cross entropies whose rows are weighted by the predicted probability of their label."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtnrec.batch import LogProbabilities
from mtnrec.checks import InputError, check_flag
from mtnrec.model.loss import row_cross_entropies
from mtnrec.objective.loss import check_shares, one_per_label


class Reweighted(nn.Module):
    r"""Generalised cross entropy, which trusts labels less the less the model expects them.

    With ``p`` the predicted probability of the observed label and ``r`` its share in the training
    rows, a row costs ``(1 - p ** beta) / beta / r ** beta``. Its gradient is that of the cross
    entropy, weighted by ``(p / r) ** beta``. Without ``r`` (``normalise=False``) this is the
    generalised cross entropy of Zhang and Sabuncu (NeurIPS 2018), whose gradient is also that of
    R-CE (Wang et al., *Denoising Implicit Feedback for Recommendation*, WSDM 2021), and it moves
    rare labels far from their rates: a constant prediction for a rate ``q`` ends at ``logit p =
    logit q / (1 - beta)``, which is 0.014 for a rate of 0.04 and ``beta=0.25``. Normalised, it ends
    at ``logit p = (logit q - beta logit r) / (1 - beta)``, so that the training rate stays.

    Args:
        beta: Strength, in [0, 1): one for all labels, or one for each, ``[0, 0.2]``. 0 is the cross
            entropy, to the bit.
        normalise: Whether to divide by the rates of the training rows.

    Raises:
        InputError: If a value is out of range, in :meth:`prepare`, if there are not as many as
            labels, or, in :meth:`set_rates`, if a rate is missing, 0 or 1.
    """

    supports_cuda_graphs = True
    _beta: Tensor
    _scales: Tensor

    def __init__(self, beta: float | Sequence[float] = 0.25, *, normalise: bool = True) -> None:
        super().__init__()
        check_shares("loss.beta", beta)
        check_flag("loss.normalise", normalise)
        self.beta = beta
        self.normalise = normalise
        self._labels: tuple[str, ...] = ()
        self._has_rates = False

    def prepare(self, labels: Sequence[str]) -> None:
        """Take the strength of each label."""
        self._labels = tuple(labels)
        beta = torch.tensor(one_per_label("loss.beta", self.beta, labels))
        self.register_buffer("_beta", beta, persistent=False)
        # r ** -beta, of the label 0 and of the label 1.
        self.register_buffer("_scales", torch.ones(2, len(beta)), persistent=False)

    def set_rates(self, rates: Tensor | None) -> None:
        """Take the share of positives of each label, ``(T,)``."""
        strong = self._beta > 0
        if not self.normalise or not strong.any():
            return
        if rates is None:
            if self._has_rates:
                return
            raise InputError(
                "loss=reweighted must know the share of positives of each label, got a trainer "
                "without an mtnrec data module. Fit with one, call loss.set_rates(shares) before, "
                "or set loss.normalise=false."
            )
        rates = rates.to(self._beta.device, torch.float64)
        for label, rate, is_weighted in zip(self._labels, rates, strong, strict=True):
            if is_weighted and not 0 < rate < 1:
                raise InputError(
                    "loss=reweighted must have both classes of each label in the training rows, "
                    f"got a share of positives of {rate:g} for {label}. Set loss.beta to 0 for it, "
                    "or loss.normalise=false."
                )
        logs = torch.stack([(1 - rates).log(), rates.log()])
        scales = torch.where(strong, -self._beta * logs, 0).exp()
        self._scales = scales.to(self._scales.dtype)
        self._has_rates = True

    def forward(self, output: LogProbabilities, labels: Tensor) -> Tensor:
        """Return the mean loss of each label, ``(T,)``."""
        found = -row_cross_entropies(output, labels)
        beta, (negative, positive) = self._beta.to(found.dtype), self._scales.to(found.dtype)
        divisor = torch.where(beta > 0, beta, 1)
        costs = -torch.expm1(divisor * found) / divisor
        costs = costs * torch.where(labels == 1, positive, negative)
        return torch.where(beta > 0, costs, -found).mean(dim=0)
