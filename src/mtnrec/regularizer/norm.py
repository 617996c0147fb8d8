"""Norms of stacked weights ``W``, ``(T, O, I)``, and their gradients: rivals of the trace norm.

Where a norm has no gradient, at 0, the subgradient 0 is taken.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ValueAndGradient = tuple[Tensor, Tensor]


def l2(stack: Tensor) -> ValueAndGradient:
    """Return ``||W||_F^2 / 2`` and its gradient ``W``."""
    return stack.square().sum() / 2, stack


def frobenius(stack: Tensor) -> ValueAndGradient:
    """Return ``||W||_F`` and its gradient: MTN's second term alone."""
    norm = torch.linalg.vector_norm(stack)
    return norm, stack / _above_zero(norm)


def soft_sharing(stack: Tensor) -> ValueAndGradient:
    """Return ``sum_{s<t} ||W_s - W_t||_F^2 / 2`` and its gradient (Duong et al., ACL 2015).

    The sum equals ``T / 2`` times the squared distances from the mean.
    """
    apart = stack - stack.mean(dim=0)
    return len(stack) * apart.square().sum() / 2, len(stack) * apart


def group_lasso(stack: Tensor) -> ValueAndGradient:
    """Return ``sum_i ||W[:, :, i]||_F`` and its gradient: inputs that no task uses vanish."""
    norms = torch.linalg.vector_norm(stack, dim=(0, 1))
    return norms.sum(), stack / _above_zero(norms)


def _above_zero(norms: Tensor) -> Tensor:
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


NORMS: dict[str, Callable[[Tensor], ValueAndGradient]] = {
    "l2": l2,
    "frobenius": frobenius,
    "soft_sharing": soft_sharing,
    "group_lasso": group_lasso,
}
