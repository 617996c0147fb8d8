"""Loss of each label."""

from typing import Protocol

from torch import Tensor, nn

from mtnrec.batch import LogProbabilities
from mtnrec.model.loss import cross_entropies


class Loss(Protocol):
    """Interface of the group ``loss``; an ``nn.Module``, whose buffers are part of a checkpoint.

    Three attributes are optional. ``prepare(labels)`` is called with the label names before
    training, ``set_rates(rates)`` with the share of positives of each label in the training rows,
    ``(T,)``. ``measured`` holds scalars of the last call by name, for example the share of dropped
    rows; their mean over an epoch's rows is logged as ``train/name``.
    """

    def __call__(self, output: LogProbabilities, labels: Tensor) -> Tensor:
        """Return the mean loss of each label, ``(T,)``.

        Args:
            output: Log-probabilities, ``(B, T)`` each.
            labels: 0 or 1, ``(B, T)``.
        """
        ...


class CrossEntropy(nn.Module):
    """The cross entropy of each label (eq. 5)."""

    def forward(self, output: LogProbabilities, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of each label, ``(T,)``."""
        return cross_entropies(output, labels)
