"""Heads: log-probabilities of labels and tasks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnrec.batch import LogProbabilities


def label_log_probabilities(logits: Tensor) -> LogProbabilities:
    """Convert tower logits, ``(T, B, 1)``, the log-odds of the labels, to log-probabilities."""
    joined = _at_least_float32(logits.squeeze(-1).T)
    return LogProbabilities(_log_sigmoid(joined), _log_sigmoid(-joined))


def funnel_log_probabilities(click_logit: Tensor, conversion_logit: Tensor) -> LogProbabilities:
    """Convert two logits ``(B, 1)`` to a funnel: ``P(y) = s(a)``, ``P(z) = s(a) s(b)`` (ESMM).

    At any logit the error is at most 2 eps for the values and 64 eps for the gradients.

    >>> click, conversion = torch.tensor([[60.0]]), torch.tensor([[-60.0]])
    >>> funnel_log_probabilities(click, conversion).positive
    tensor([[-8.7565e-27, -6.0000e+01]])
    """
    a, b = map(_at_least_float32, (click_logit, conversion_logit))
    click, no_click = _log_sigmoid(a), _log_sigmoid(-a)
    conversion = click + _log_sigmoid(b)
    # log P(z = 0). Where P(z = 1) is small, log1p; else 1 - s(a) s(b) = s(-a) + s(a) s(-b), which
    # would cancel there. The constant keeps the gradient of the branch not taken finite.
    product = _sigmoid(a) * _sigmoid(b)
    is_small = product < 0.5
    no_conversion = torch.where(
        is_small,
        torch.where(is_small, -product, -0.5).log1p(),
        torch.logaddexp(no_click, click + _log_sigmoid(-b)),
    )
    return LogProbabilities(
        torch.cat([click, conversion], dim=1), torch.cat([no_click, no_conversion], dim=1)
    )


def _sigmoid(logits: Tensor) -> Tensor:
    # The gradient of torch's sigmoid, s(x) (1 - s(x)), cancels where s(x) is near 1.
    return torch.where(logits > 0, 1 - (-logits).sigmoid(), logits.sigmoid())


def _log_sigmoid(logits: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return -F.softplus(-logits)  # in ONNX, whose log of a sigmoid is -inf below -104
    return F.logsigmoid(logits)


def _at_least_float32(logits: Tensor) -> Tensor:
    # Half-precision logits would round probabilities near 0 and 1 before the loss sees them.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
