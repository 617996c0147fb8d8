"""Trace norms of tensors, their gradients, and the penalty of the paper (section 2).

A matrix ``M = U diag(sigma) V^T`` has the trace norm ``||M||_* = <P, M>``, where ``P = U V^T`` is
its polar factor on its range. ``P`` is also the gradient, and a subgradient where ``M`` loses rank.
So one factor gives value and gradient, and no graph through a decomposition is needed.

References:
    Yang and Hospedales, *Trace norm regularised deep multi-task learning*, 2016 (the norm).
    Higham, *Functions of Matrices*, 2008, chapter 8 (the polar factor).
"""

import math
from collections.abc import Sequence
from functools import cache
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


def short_side(shape: Sequence[int], rows: Modes) -> Modes:
    """Return ``rows`` or the other modes, whichever make the unfolding with fewer rows.

    Where both have as many, ``rows``.

    >>> short_side((2, 512, 2176), (2,)), short_side((2, 128, 256), (2,))
    ((0, 1), (2,))
    >>> short_side((2, 512, 2176), (1,)), short_side((2, 512, 100), (2,))
    ((1,), (2,))
    """
    others = tuple(mode for mode in range(len(shape)) if mode not in rows)
    return min(rows, others, key=lambda modes: math.prod(shape[m] for m in modes))


@cache
def short_sides(shape: tuple[int, ...]) -> tuple[Modes, ...]:
    """Return the shorter side of each of the distinct unfoldings, by which its factor is found.

    A mode of size 1 makes unfoldings transposes of each other; those have the same side.

    Args:
        shape: Of the tensor.

    >>> short_sides((2, 512, 2176)), short_sides((2, 1, 64))
    (((0,), (1,), (0, 1)), ((0,), (1,), (0,)))
    """
    wide = frozenset(mode for mode, size in enumerate(shape) if size > 1)
    known: dict[frozenset[frozenset[int]], Modes] = {}
    return tuple(
        known.setdefault(frozenset({wide & set(rows), wide - set(rows)}), short_side(shape, rows))
        for rows in unfoldings(len(shape))
    )


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


def largest_magnitude(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, at least the smallest normal number; a scalar tensor.

    Divided by it, squares neither overflow nor underflow: norms and polar factors of ``c W`` follow
    from those of ``W``.
    """
    low, high = tensor.aminmax()
    return torch.maximum(-low, high).clamp(min=torch.finfo(tensor.dtype).tiny)


def frobenius_norm(tensor: Tensor) -> Tensor:
    """Return ``||W||_F`` as a float64 scalar, at any magnitude of the weights.

    >>> frobenius_norm(torch.full((4,), 1e30)), frobenius_norm(torch.full((4,), 1e-30))
    (tensor(2.0000e+30, dtype=torch.float64), tensor(2.0000e-30, dtype=torch.float64))
    """
    scale = largest_magnitude(tensor)
    return torch.linalg.vector_norm(tensor / scale).double() * scale.double()


class PolarFactor(NamedTuple):
    """The polar factor of a matrix, its spectrum and its singular vectors.

    Args:
        factor: ``U V^T``, of the matrix's shape and dtype.
        singular_values: Descending, float64, as many as the shorter side.
        vectors: ``U`` if the matrix has at most as many rows as columns, else ``V``, in the order
            of *ascending* singular values; square, of the matrix's dtype.
    """

    factor: Tensor
    singular_values: Tensor
    vectors: Tensor


def polar_factor(matrix: Tensor) -> PolarFactor:
    """Return the polar factor on the range of ``matrix``, from one eigen-decomposition in float64.

    With the Gram matrix ``M M^T = Q diag(e) Q^T`` of the shorter side, the singular values are
    ``sqrt(e)`` and ``U V^T = Q diag(1 / sqrt(e)) Q^T M``. In float32 the Gram matrix would lose the
    small singular values (an error of about 1e-3 on a square Gaussian matrix). Eigenvalues below
    the rounding error of the largest count as zero, which makes the factor finite, and a
    subgradient, everywhere.

    Args:
        matrix: ``(m, n)``.

    Returns:
        Factor, spectrum and vectors. Costs ``O(min(m, n)^2 max(m, n))``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        transposed = polar_factor(matrix.T)
        return transposed._replace(factor=transposed.factor.T)
    scale = largest_magnitude(matrix.detach())
    work = (matrix.detach() / scale).double()
    eigenvalues, vectors = torch.linalg.eigh(work @ work.T)
    rounding = max(matrix.shape) * torch.finfo(torch.float64).eps
    in_range = eigenvalues > (eigenvalues[-1] * rounding).clamp(min=0)
    inverse_roots = torch.where(in_range, eigenvalues.rsqrt(), 0)
    factor = ((vectors * inverse_roots) @ vectors.T) @ work
    singular_values = torch.where(in_range, eigenvalues, 0).sqrt().flip(0) * scale.double()
    return PolarFactor(factor.to(matrix.dtype), singular_values, vectors.to(matrix.dtype))


def left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors, ``(m, m)``, and the largest singular value.

    Decomposed in the precision of ``matrix``.

    In ascending order of the singular values. In float32 this takes half the time of the exact
    decomposition; singular values below about 1e-4 of the largest are told apart no more, which
    :func:`polar_from_vectors` does not need.

    Args:
        matrix: ``(m, n)``, ``m <= n``.
    """
    scale = largest_magnitude(matrix)
    work = matrix / scale
    values, vectors = torch.linalg.eigh(work @ work.T)
    return vectors, values[-1].clamp(min=0).sqrt() * scale


def multiply_along(stack: Tensor, modes: Modes, matrix: Tensor) -> Tensor:
    """Return ``fold(matrix @ unfold(stack, modes))``; only along ``(0, 2)`` the stack is copied.

    Args:
        stack: ``(T, O, I)``, contiguous.
        modes: The rows of the unfolding, ``m`` of them.
        matrix: ``(m, m)``.
    """
    if modes == (1,):
        return matrix @ stack
    if 0 not in modes:
        return (stack.view(-1, len(matrix)) @ matrix.T).view(stack.shape)
    return fold(matrix @ unfold(stack, modes), modes, stack.shape)


def polar_from_vectors(
    stack: Tensor, side: Modes, vectors: Tensor, least: float
) -> tuple[Tensor, Tensor]:
    """Return the polar factor of an unfolding, given the left singular vectors of an earlier one.

    ``U^T M`` is ``diag(sigma) V^T`` if ``U`` belongs to ``M``: its rows are normalised and rotated
    back. If ``U`` is that of a ``M`` some steps ago, what has changed since along each left vector,
    its length, its sign and its right vector, is taken from the matrix as it is now. So a singular
    value that has passed zero pulls the other way at once, which no earlier factor does.

    Args:
        stack: ``(T, O, I)``, contiguous.
        side: The modes of the unfolding's rows, its shorter side; ``m`` rows, ``n`` columns.
        vectors: ``(m, m)``, orthonormal columns.
        least: Rows shorter than this are not lengthened to 1: what is left of a singular value of
            zero is rounding. Positive.

    Returns:
        The factor, folded to the shape of the stack, and the lengths of the rows, ``(m,)``: the
        singular values if the vectors are those of the unfolding. Costs two products of ``m^2 n``
        multiplications.
    """
    rows = multiply_along(stack, side, vectors.T)
    others = [mode for mode in range(stack.dim()) if mode not in side]
    lengths = torch.linalg.vector_norm(rows, dim=others, keepdim=True)
    rows.div_(lengths.clamp(min=least))
    return multiply_along(rows, side, vectors), lengths.flatten()


def polar_factors(stack: Tensor) -> list[PolarFactor]:
    """Return the polar factors of the unfoldings, folded back to the shape of ``stack``.

    Args:
        stack: ``(T, O, I)``, or a tensor of any order.

    Returns:
        One entry for each of :func:`unfoldings`, in its order; the vectors are those of
        :func:`short_sides`, and unfoldings with the same side share one decomposition.
    """
    sides = short_sides(tuple(stack.shape))
    factors = {}
    for side in dict.fromkeys(sides):
        matrix = polar_factor(unfold(stack, side))
        factors[side] = matrix._replace(factor=fold(matrix.factor, side, stack.shape).contiguous())
    return [factors[side] for side in sides]


def norms_along(factors: Sequence[PolarFactor], stack: Tensor) -> Tensor:
    """Return ``<P_s, W>`` for each unfolding, ``(S,)``, differentiable in ``stack``.

    These are the trace norms where the factors are those of ``stack``, and lower bounds of them
    where they are those of another, since a polar factor has spectral norm 1.
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
