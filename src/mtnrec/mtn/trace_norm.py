"""Trace norms of tensors, their gradients, and the penalty of the paper (section 2).

A matrix ``M`` has the trace norm ``||M||_* = <P, M>``, where ``P`` is its polar factor on its range
(``U V^T`` of the thin SVD). ``P`` is also the gradient, and where ``M`` loses rank it is a
subgradient. So one factor gives value and gradient, and no graph through a decomposition is
needed. The norm is convex and ``P`` has spectral norm 1: at a later ``M'`` the same ``P`` gives a
lower bound ``<P, M'> <= ||M'||_*``, whose gap can be measured. All of the penalty is built on that
product.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

Modes = tuple[int, ...]


def unfoldings(order: int) -> list[Modes]:
    """Return the row modes of the distinct proper unfoldings of a tensor, ``2^(order-1) - 1``.

    A set of modes and its complement give transposes; the smaller of the two stands for both.

    >>> unfoldings(3)
    [(0,), (1,), (2,)]
    >>> len(unfoldings(4))
    7
    """
    return [
        rows
        for size in range(1, order // 2 + 1)
        for rows in combinations(range(order), size)
        if 2 * size < order or 0 in rows
    ]


def unfold(tensor: Tensor, rows: Modes) -> Tensor:
    """Lay the modes ``rows`` out as rows and the others as columns (eq. 3).

    >>> unfold(torch.zeros(2, 3, 4), (1,)).shape
    torch.Size([3, 8])
    """
    columns = [mode for mode in range(tensor.dim()) if mode not in rows]
    sizes = [tensor.shape[mode] for mode in rows]
    return tensor.permute(*rows, *columns).reshape(math.prod(sizes), -1)


def fold(matrix: Tensor, rows: Modes, shape: torch.Size) -> Tensor:
    """Undo :func:`unfold`: return the tensor of ``shape`` that ``matrix`` is laid out from."""
    columns = [mode for mode in range(len(shape)) if mode not in rows]
    order = [*rows, *columns]
    inverse = [order.index(mode) for mode in range(len(shape))]
    return matrix.reshape([shape[mode] for mode in order]).permute(inverse)


class PolarFactor(NamedTuple):
    """The polar factor of a matrix and its spectrum.

    Args:
        factor: ``U V^T``, of the matrix's shape and dtype.
        singular_values: Descending, float64, as many as the shorter side; empty where they are not
            known.
    """

    factor: Tensor
    singular_values: Tensor


def polar_factor(
    matrix: Tensor, dtype: torch.dtype = torch.float64, smallest: float | None = None
) -> PolarFactor:
    """Return the polar factor on the range of ``matrix``, from one eigen-decomposition.

    With the Gram matrix ``M M^T = Q diag(e) Q^T`` of the shorter side, the singular values are
    ``sqrt(e)`` and ``U V^T = Q diag(1 / sqrt(e)) Q^T M``. Eigenvalues below the rounding error of
    the largest count as zero, which makes the factor finite, and a subgradient, everywhere.

    Args:
        matrix: ``(m, n)``.
        dtype: Of the Gram matrix and its decomposition. In float32 it would lose the small singular
            values (an error of about 1e-3 on a square Gaussian matrix).
        smallest: Share of the largest eigenvalue below which one counts as zero; if not given, the
            most that rounding can make of it.

    Returns:
        Factor and spectrum. Costs ``O(min(m, n)^2 max(m, n))``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        transposed = polar_factor(matrix.T, dtype, smallest)
        return PolarFactor(transposed.factor.T, transposed.singular_values)
    work = matrix.detach().to(dtype)
    eigenvalues, vectors = torch.linalg.eigh(work @ work.T)
    share = max(matrix.shape) * torch.finfo(dtype).eps if smallest is None else smallest
    in_range = eigenvalues > (eigenvalues[-1] * share).clamp(min=0)
    inverse_roots = torch.where(in_range, eigenvalues.rsqrt(), 0)
    factor = ((vectors * inverse_roots) @ vectors.T) @ work
    singular_values = torch.where(in_range, eigenvalues, 0).double().sqrt().flip(0)
    return PolarFactor(factor.to(matrix.dtype), singular_values)


def polar_iteration(matrix: Tensor, smallest: float = 1e-5) -> PolarFactor:
    """Return the polar factor from matrix products alone, without the spectrum; for GPUs.

    Newton-Schulz steps ``X <- a X + b X X^T X`` whose coefficients bring an interval that holds
    the singular values as close to 1 as a cubic can (Higham, *Functions of Matrices*, section 8.6,
    scaled by the cubic's equioscillation). The result has no singular value above 1, so it gives a
    lower bound of the norm however far the iteration has come.

    Args:
        matrix: ``(m, n)``; the products are in its dtype.
        smallest: Singular values below this share of ``||M||_F`` come out below 1.

    Returns:
        The factor. Costs 17 steps in float32 and 18 in float64, of ``2 min(m, n) m n``
        multiplications each, and waits for nothing.
    """
    if matrix.shape[0] > matrix.shape[1]:
        transposed = polar_iteration(matrix.T, smallest)
        return PolarFactor(transposed.factor.T, transposed.singular_values)
    work = matrix.detach()
    eps = torch.finfo(work.dtype).eps
    work = work / torch.linalg.vector_norm(work).clamp(min=torch.finfo(work.dtype).tiny)
    low, high = smallest, 1.0
    while high - low > eps:
        scale = math.sqrt(3 / (low * low + low * high + high * high))
        high = 4 / (2 + low * high * (low + high) * scale**3)
        low = 2 - high
        work = _newton_schulz(scale * work, high)
    # Rounding leaves some above 1; there the plain step is below it.
    return PolarFactor(_newton_schulz(work, 1.0), work.new_empty(0, dtype=torch.float64))


def _newton_schulz(matrix: Tensor, scale: float) -> Tensor:
    """Return ``scale (3 X - X X^T X) / 2``."""
    gram = matrix @ matrix.T
    return torch.addmm(matrix, gram, matrix, beta=1.5 * scale, alpha=-0.5 * scale)


def polar_factors(
    stack: Tensor,
    which: Sequence[Modes] | None = None,
    polar: Callable[[Tensor], PolarFactor] = polar_factor,
) -> list[PolarFactor]:
    """Return the polar factors of unfoldings, folded back to the shape of ``stack``.

    A mode of size 1 makes unfoldings transposes of each other (the last layer has ``O = 1``); each
    is decomposed once.

    Args:
        stack: ``(T, O, I)``, or a tensor of any order.
        which: Row modes of the unfoldings; all of :func:`unfoldings` if not given.
        polar: :func:`polar_factor` or :func:`polar_iteration`.

    Returns:
        One entry for each of ``which``, in its order.
    """
    wide = frozenset(mode for mode, size in enumerate(stack.shape) if size > 1)
    known: dict[frozenset[frozenset[int]], PolarFactor] = {}
    factors = []
    for rows in unfoldings(stack.dim()) if which is None else which:
        row_side = wide.intersection(rows)
        sides = frozenset({row_side, wide - row_side})
        if sides not in known:
            matrix = polar(unfold(stack, rows))
            folded = fold(matrix.factor, rows, stack.shape).contiguous()
            known[sides] = PolarFactor(folded, matrix.singular_values)
        factors.append(known[sides])
    return factors


def norms_along(factors: list[PolarFactor], stack: Tensor) -> Tensor:
    """Return ``<P_s, W>`` for each unfolding, ``(S,)``, differentiable in ``stack``.

    These are the trace norms where the factors are those of ``stack``, and lower bounds of them
    where they are those of an earlier one.
    """
    # Not vdot, which one thread computes.
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
