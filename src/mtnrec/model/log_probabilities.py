"""Heads: log-probabilities of labels and tasks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnrec.batch import LogProbabilities


def label_log_probabilities(logits: Tensor) -> LogProbabilities:
    """Convert tower logits, ``(T, B, 1)``, the log-odds of the labels, to log-probabilities."""
    joined = _at_least_float32(logits.squeeze(-1).T)
    return LogProbabilities(_log_sigmoid(joined), _log_sigmoid(-joined))


def funnel_log_probabilities(*logits: Tensor) -> LogProbabilities:
    """Convert logits of the stages, ``(B, 1)`` each, to ``P(y) = s(a)``, ``P(z) = s(a) s(b)``, ….

    Each logit is that of a label given the label before it (ESMM). At any logit the error is at
    most 2 eps for the values and 64 eps for the gradients of two stages.

    >>> click, conversion = torch.tensor([[60.0]]), torch.tensor([[-60.0]])
    >>> funnel_log_probabilities(click, conversion).positive
    tensor([[-8.7565e-27, -6.0000e+01]])
    """
    first, *later = map(_at_least_float32, logits)
    positive, negative, product = [_log_sigmoid(first)], [_log_sigmoid(-first)], _sigmoid(first)
    for logit in later:
        # log P(z = 0). Where P(z = 1) is small, log1p; else 1 - s(a) s(b) = s(-a) + s(a) s(-b),
        # which would cancel there. The constant keeps the gradient of the branch not taken finite.
        product = product * _sigmoid(logit)
        is_small = product < 0.5
        missed_here = positive[-1] + _log_sigmoid(-logit)
        missed = torch.where(
            is_small,
            torch.where(is_small, -product, -0.5).log1p(),
            torch.logaddexp(negative[-1], missed_here),
        )
        positive.append(positive[-1] + _log_sigmoid(logit))
        negative.append(missed)
    return LogProbabilities(torch.cat(positive, dim=1), torch.cat(negative, dim=1))


def mixture_log_probabilities(shares: Tensor, logits: Tensor) -> LogProbabilities:
    """Convert a mixture of heads to ``log sum_j g_j s(c_j)``, and the same of ``1 - s(c_j)``.

    Args:
        shares: Logits of the mixture's weights, whose softmax is ``g``, ``(T, B, J)``.
        logits: Log-odds ``c`` of the label by each head, ``(T, B, J)``.

    >>> output = mixture_log_probabilities(torch.zeros(1, 1, 2), torch.tensor([[[60.0, 0.0]]]))
    >>> output.positive.exp()
    tensor([[0.7500]])
    """
    log_shares = _at_least_float32(shares).log_softmax(dim=2)
    logits = _at_least_float32(logits)
    positive, negative = (
        (log_shares + _log_sigmoid(signed)).logsumexp(dim=2).T for signed in (logits, -logits)
    )
    return LogProbabilities(positive, negative)


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
