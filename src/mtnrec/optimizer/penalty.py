"""Gradient of a penalty: added to that of the loss, or applied as a separate step (decoupled)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def add_to_gradients(
    gradients: Iterable[tuple[nn.Parameter, Tensor, float]], *, scale: float
) -> None:
    """Add the penalty's gradients, each times its weight and ``scale``, to those of the loss.

    Frozen parameters are skipped.
    """
    for parameter, gradient, weight in gradients:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(gradient, alpha=scale * weight)


@torch.no_grad()
def move_parameters(
    gradients: Iterable[tuple[nn.Parameter, Tensor, float]],
    optimizer: Optimizer,
    *,
    strength: float,
) -> None:
    """Step against the penalty's gradients, at the learning rate of each parameter's group.

    Parameters that are frozen or not in the optimiser are skipped.
    """
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter, gradient, weight in gradients:
        if parameter.requires_grad and id(parameter) in rates:
            parameter.sub_(gradient, alpha=rates[id(parameter)] * strength * weight)
