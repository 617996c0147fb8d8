"""Cross-entropy loss of the labels."""

from torch import Tensor

from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError


def cross_entropies(output: LogProbabilities, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each label, ``(T,)``; the loss is their sum (eq. 5).

    Args:
        output: Log-probabilities, ``(B, T)`` each.
        labels: 0 or 1, ``(B, T)``.
    """
    return row_cross_entropies(output, labels).mean(dim=0)


def row_cross_entropies(output: LogProbabilities, labels: Tensor) -> Tensor:
    """Return the cross entropy of each label and row, ``(B, T)``; a label may be any number."""
    return -(labels * output.positive + (1 - labels) * output.negative)


def require_labels(batch: Batch) -> Tensor:
    """Return the labels of a batch, ``(B, T)``.

    Raises:
        InputError: If it has none.
    """
    if batch.labels is None:
        raise InputError("a batch must have labels for training and evaluation, got none")
    return batch.labels
