"""Balance of several losses in one objective, by their values."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from mtnrec.checks import InputError, check_number, format_names

_LEAST = 1e-8  # of a loss whose logarithm is taken


class Balance(Protocol):
    """Interface of the group ``balance``; an ``nn.Module``, whose state is part of a checkpoint.

    Its parameters are trained by the optimiser of the network at their own rate ``lr``, without
    weight decay or clipping. Three attributes are optional. ``backward(scale, losses, parameters)``
    adds the gradient of the sum of the losses, as ``__call__`` returned them, times ``scale``
    to the parameters in place of autograd's; ``after_step(losses)`` is called after each optimiser
    step with the losses of the same batch. With either, training needs a single process, and with
    ``backward`` dense gradients. ``measured`` is as in :class:`~mtnrec.objective.loss.Loss`, of the
    last call of ``backward`` if there is one.
    """

    def prepare(
        self, names: Sequence[str], parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Check the settings against the losses, and make the state for them.

        Args:
            names: Names of the losses.
            parameters: Parameters of the network, ``embeddings`` and ``layers``, frozen ones
                included; ``backward`` gets the same.

        Raises:
            InputError: If they do not fit.
        """
        ...

    def __call__(self, losses: Tensor) -> Tensor:
        """Return the terms of the objective, ``(K,)``, from the losses, ``(K,)``."""
        ...


def check_several(balance: str, names: Sequence[str]) -> None:
    """Refuse a single loss, which has nothing to be balanced with."""
    if len(names) < 2:
        raise InputError(
            f"balance={balance} needs at least two losses, got one ({', '.join(names)}). Choose "
            "balance=sum."
        )


def weigh(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the losses times their weights, ``(K,)``, without a tensor from the host."""
    return torch.stack([loss * weight for loss, weight in zip(losses, weights, strict=True)])


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
        self._weights: list[float] | None = None

    def prepare(
        self, names: Sequence[str], parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Check that the weighted losses exist."""
        if unknown := [name for name in self.weights if name not in names]:
            raise InputError(
                f"balance.weights must name losses of the model ({', '.join(names)}), got "
                f"{format_names(unknown)}"
            )
        if self.weights:
            self._weights = [float(self.weights.get(name, 1)) for name in names]

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted losses, ``(K,)``."""
        return losses if self._weights is None else weigh(losses, self._weights)


class Uncertainty(nn.Module):
    """Learned log variances ``s``: the terms are ``exp(-s) L + s`` (Kendall et al., CVPR 2018).

    They start at the plain sum. For constant losses ``s`` tends to ``log L``, and the gradient to
    that of the sum of ``log L``. It logs the weights ``exp(-s)``.

    Args:
        lr: Learning rate of ``s``, at least 0. At 1e-3, a usual rate of weights, ``s`` needs
            thousands of steps to reach the logarithm of a conversion loss.

    Raises:
        InputError: If ``lr`` is out of range, or, in :meth:`prepare`, if there is a single loss.
    """

    log_variances: Tensor

    def __init__(self, *, lr: float = 2.5e-2) -> None:
        super().__init__()
        check_number("balance.lr", lr, minimum=0)
        self.lr = lr
        self.measured: dict[str, Tensor] = {}

    def prepare(
        self, names: Sequence[str], parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Make the log variances."""
        check_several("uncertainty", names)
        self._names = tuple(names)
        self.log_variances = nn.Parameter(torch.zeros(len(names)))

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted losses, each plus its log variance, ``(K,)``."""
        weights = torch.exp(-self.log_variances)
        self.measured = _named_weights(self._names, weights)
        return weights * losses + self.log_variances


class FAMO(nn.Module):
    """Weights that make all losses decrease at the same rate (Liu et al., NeurIPS 2023).

    The gradient is that of ``c sum(z log L)`` with ``z`` a softmax and ``c`` such that the losses'
    weights ``c z / L`` sum to 1. After each step Adam moves the logits by the decrease of each
    ``log L``. The losses after the step cost one more forward pass of the batch, in training mode.
    It logs the weights.

    Args:
        lr: Learning rate of the logits, at least 0.
        weight_decay: Weight of the logits' L2 penalty, at least 0; the paper's, while its code
            has 1e-5.

    Raises:
        InputError: If a value is out of range, or, in :meth:`prepare`, if there is a single loss.
    """

    logits: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    def __init__(self, *, lr: float = 2.5e-2, weight_decay: float = 1e-3) -> None:
        super().__init__()
        check_number("balance.lr", lr, minimum=0)
        check_number("balance.weight_decay", weight_decay, minimum=0)
        self.lr, self.weight_decay = lr, weight_decay
        self.measured: dict[str, Tensor] = {}
        self._log_before: Tensor | None = None

    def prepare(
        self, names: Sequence[str], parameters: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Make the logits and the state of their Adam."""
        check_several("famo", names)
        self._names = tuple(names)
        for name in ("logits", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros(len(names)))
        self.register_buffer("step", torch.zeros(()))

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted losses, ``(K,)``."""
        before = losses.detach().clamp(min=_LEAST)
        shares = self.logits.softmax(dim=0) / before
        weights = shares / shares.sum()
        self._log_before = before.log()
        self.measured = _named_weights(self._names, weights)
        return weights * losses

    @torch.no_grad()
    def after_step(self, losses: Tensor) -> None:
        """Move the logits, from the losses of the same batch after the step, ``(K,)``."""
        assert self._log_before is not None
        decrease = self._log_before - losses.clamp(min=_LEAST).log()
        shares = self.logits.softmax(dim=0)
        gradient = shares * (decrease - shares @ decrease.to(shares.dtype))
        adam(
            [self.logits],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def _named_weights(names: Sequence[str], weights: Tensor) -> dict[str, Tensor]:
    return {f"weight_{name}": weight for name, weight in zip(names, weights, strict=True)}
