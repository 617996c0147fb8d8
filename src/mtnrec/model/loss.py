"""Cross-entropy loss of the labels."""

from torch import Tensor

from mtnrec.batch import LogProbabilities


def cross_entropies(output: LogProbabilities, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each label, ``(T,)``; the loss is their sum (eq. 5).

    Args:
        output: Log-probabilities, ``(B, T)`` each.
        labels: 0 or 1, ``(B, T)``.
    """
    return -(labels * output.positive + (1 - labels) * output.negative).mean(dim=0)
