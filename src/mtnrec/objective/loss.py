"""Loss of each label."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mtnrec.batch import LogProbabilities
from mtnrec.checks import InputError, check_number
from mtnrec.model.loss import cross_entropies


class Loss(Protocol):
    """Interface of the group ``loss``; an ``nn.Module``, whose buffers are part of a checkpoint.

    Some members are optional:

    ``prepare(labels)``
        Called with the label names before training.
    ``set_rates(rates)``
        Called before training with the share of positives of each label in the training rows,
        ``(T,)``, label noise included. It is None if the trainer has no data module; a loss that
        needs the rates then raises an :class:`~mtnrec.checks.InputError`.
    ``measured``
        Scalars of the last call by name, for example a share of rows; their mean over an epoch's
        rows is logged as ``train/name``.
    ``rank_state()``, ``load_rank_state(state)``
        Tensors and plain values that each process has for itself, which a buffer cannot hold: DDP
        copies the buffers of rank 0 to the others. Each process finds its own in a checkpoint.
    ``supports_cuda_graphs``
        Whether it launches the same kernels for every batch of a size and changes nothing that a
        later call reads; without it no step is captured.

    As batch norm, a loss changes its state in training mode only.
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

    supports_cuda_graphs = True

    def forward(self, output: LogProbabilities, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of each label, ``(T,)``."""
        return cross_entropies(output, labels)


def check_shares(name: str, value: Any) -> None:
    """Refuse anything but a number in [0, 1), or a list of them.

    Raises:
        InputError: If the value is something else.
    """
    if isinstance(value, list | tuple):
        for position, item in enumerate(value):
            check_number(f"{name}[{position}]", item, minimum=0, maximum=1, open_maximum=True)
    else:
        check_number(name, value, minimum=0, maximum=1, open_maximum=True)


def one_per_label(name: str, value: float | Sequence[float], labels: Sequence[str]) -> list[float]:
    """Return a setting of each label, from one for all or one for each.

    Raises:
        InputError: If there are more or fewer than labels.
    """
    values = [value] * len(labels) if isinstance(value, int | float) else list(value)
    if len(values) != len(labels):
        raise InputError(
            f"{name} must be one number, or one for each label ({', '.join(labels)}), got "
            f"{len(values)}. Set {name}=[{','.join(['0.1'] * len(labels))}]."
        )
    return [float(one) for one in values]
