"""Cross-entropy loss of the labels."""

from torch import Tensor

from mtnrec.batch import LogProbabilities


def log_likelihoods(output: LogProbabilities, labels: Tensor) -> Tensor:
    """Return the log-probability of each observed label, ``(B, T)``; arguments as below."""
    return labels * output.positive + (1 - labels) * output.negative


def cross_entropies(output: LogProbabilities, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each label, ``(T,)``; the loss is their sum (eq. 5).

    Args:
        output: Log-probabilities, ``(B, T)`` each.
        labels: 0 or 1, ``(B, T)``.
    """
    return -log_likelihoods(output, labels).mean(dim=0)
