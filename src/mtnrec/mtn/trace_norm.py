"""Trace norms of tensors, their gradients, and the penalty of the paper (section 2).

A matrix ``M = U diag(sigma) V^T`` has the trace norm ``||M||_* = <P, M>``, where ``P = U V^T`` is
its polar factor on its range. ``P`` is also the gradient, and a subgradient where ``M`` loses rank.
So one factor gives value and gradient, and no graph through a decomposition is needed.

References:
    Yang and Hospedales, *Trace norm regularised deep multi-task learning*, 2016 (the norm).
    Higham, *Functions of Matrices*, 2008, chapter 8 (the polar factor).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtnrec.mtn.polar import PolarFactor, largest_magnitude, polar_factors


def frobenius_norm(tensor: Tensor) -> Tensor:
    """Return ``||W||_F`` as a float64 scalar, at any magnitude of the weights.

    >>> frobenius_norm(torch.full((4,), 1e30)), frobenius_norm(torch.full((4,), 1e-30))
    (tensor(2.0000e+30, dtype=torch.float64), tensor(2.0000e-30, dtype=torch.float64))
    """
    scale = largest_magnitude(tensor)
    return torch.linalg.vector_norm(tensor / scale).double() * scale.double()


def norms_along(factors: Sequence[PolarFactor], stack: Tensor) -> Tensor:
    """Return ``<P_s, W>`` for each unfolding, ``(S,)``, differentiable in ``stack``.

    These are the trace norms if the factors belong to ``stack``, and lower bounds if they belong to
    another stack, since a polar factor has spectral norm 1.
    """
    # Not vdot, which is single-threaded.
    return torch.stack([(p.factor * stack).sum() for p in factors])


def tensor_trace_norm(stack: Tensor, alpha: Tensor) -> Tensor:
    """Return ``|||W|||_* = sum_s alpha_s ||W_{s}||_*`` (eq. 2).

    Differentiable once in both arguments.

    Args:
        stack: ``(T, O, I)``.
        alpha: Non-negative weights of the distinct unfoldings, ``(S,)``, that sum to 1.

    >>> stack = torch.ones(2, 3, 4)  # rank one, so every norm is sqrt(24)
    >>> round(tensor_trace_norm(stack, torch.tensor([0.2, 0.3, 0.5])).item(), 4)
    4.899
    """
    return alpha @ norms_along(polar_factors(stack), stack)


def layer_norms(norms: Tensor, alpha: Tensor, frobenius: Tensor) -> Tensor:
    """Return ``R_i = |||W_i|||_* + ||W_i||_F`` of each layer (eq. 4), ``(L,)``.

    Args:
        norms: Trace norms of the unfoldings, ``(L, S)``.
        alpha: ``(L, S)``.
        frobenius: ``||W_i||_F``, ``(L,)``; zeros leave the term out.
    """
    return (alpha * norms).sum(dim=1) + frobenius


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return ``exp(H(p))`` with ``p = sigma / sum(sigma)`` (Roy & Vetterli, EUSIPCO 2007).

    Between 1 (rank one) and the number of singular values (all equal); NaN for a zero matrix.

    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
    tensor(2.)
    """
    shares = singular_values / singular_values.sum()
    return torch.special.entr(shares).sum().exp()
