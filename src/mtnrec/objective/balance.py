"""Balance of several losses in one objective."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mtnrec.checks import InputError, check_number, format_names


class Balance(Protocol):
    """Interface of the group ``balance``; an ``nn.Module``, whose state is part of a checkpoint.

    Its parameters are trained by the optimiser of the network at their own rate ``lr``. Three
    attributes are optional. ``backward(scale, losses, parameters)`` adds the gradient of the
    objective, times ``scale``, to the parameters in place of autograd's; the balance then needs a
    single process and dense gradients. ``after_step(losses)`` is called after each optimiser step
    with the new losses of the same batch. ``measured`` is as in
    :class:`~mtnrec.objective.loss.Loss`.
    """

    def prepare(self, names: Sequence[str]) -> None:
        """Check the settings against the names of the losses, and make the state for them.

        Raises:
            InputError: If they do not fit.
        """
        ...

    def __call__(self, losses: Tensor) -> Tensor:
        """Return the terms of the objective, ``(K,)``, from the losses, ``(K,)``."""
        ...


class Weights(nn.Module):
    """Fixed weights of the losses.

    Args:
        weights: Weight by name of a loss, at least 0; 1 for the others. Without any, the objective
            is the plain sum.

    Raises:
        InputError: If a weight is out of range, or, in :meth:`prepare`, if a name is unknown.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        for name, weight in self.weights.items():
            check_number(f"balance.weights.{name}", weight, minimum=0)
        self.register_buffer("_weights", None, persistent=False)

    def prepare(self, names: Sequence[str]) -> None:
        """Check that the weighted losses exist."""
        if unknown := [name for name in self.weights if name not in names]:
            raise InputError(
                f"balance.weights must name losses of the model ({', '.join(names)}), got "
                f"{format_names(unknown)}"
            )
        if self.weights:
            self._weights = torch.tensor([float(self.weights.get(name, 1)) for name in names])

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted losses, ``(K,)``."""
        return losses if self._weights is None else losses * self._weights.to(losses.dtype)
