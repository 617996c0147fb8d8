"""Polar factors: the gradients of trace norms, from decompositions or cached singular vectors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtnrec.mtn.unfolding import Modes, fold, short_sides, unfold


def largest_magnitude(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, at least the smallest normal number, as a scalar tensor.

    Squares of a tensor divided by it neither overflow nor underflow: norms and polar factors of
    ``c W`` follow from those of ``W``.
    """
    low, high = tensor.aminmax()
    return torch.maximum(-low, high).clamp(min=torch.finfo(tensor.dtype).tiny)


class PolarFactor(NamedTuple):
    """The polar factor of a matrix, its spectrum and its singular vectors.

    Args:
        factor: ``U V^T``, in the matrix's shape and dtype.
        singular_values: Descending singular values, float64, as many as the shorter side.
        vectors: ``U`` if the matrix has at most as many rows as columns, else ``V``, in the order
            of *ascending* singular values; square, in the matrix's dtype.
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
    work, scale = _scaled(matrix)
    eigenvalues, vectors = torch.linalg.eigh(work @ work.T)
    in_range = _in_range(eigenvalues, matrix)
    inverse_roots = torch.where(in_range, eigenvalues.rsqrt(), 0)
    factor = ((vectors * inverse_roots) @ vectors.T) @ work
    singular_values = torch.where(in_range, eigenvalues, 0).sqrt().flip(0) * scale
    return PolarFactor(factor.to(matrix.dtype), singular_values, vectors.to(matrix.dtype))


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix over its largest magnitude, and that, both in float64."""
    scale = largest_magnitude(matrix.detach())
    return (matrix.detach() / scale).double(), scale.double()


def _in_range(eigenvalues: Tensor, matrix: Tensor) -> Tensor:
    """Return which eigenvalues of the Gram matrix are above the rounding error of the largest."""
    rounding = max(matrix.shape) * torch.finfo(torch.float64).eps
    return eigenvalues > (eigenvalues[-1] * rounding).clamp(min=0)


def left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors, ``(m, m)``, and the largest singular value.

    The vectors are in ascending order of the singular values, decomposed in the precision of
    ``matrix``. In float32 this takes half the time of the exact decomposition and cannot separate
    singular values below about 1e-4 of the largest, which need not be separated
    (:func:`add_polar_from_vectors`).

    Args:
        matrix: ``(m, n)``, ``m <= n``.
    """
    scale = largest_magnitude(matrix)
    work = matrix / scale
    values, vectors = torch.linalg.eigh(work @ work.T)
    return vectors, values[-1].clamp(min=0).sqrt() * scale


def multiply_along(stack: Tensor, modes: Modes, matrix: Tensor) -> Tensor:
    """Return ``fold(matrix @ unfold(stack, modes))``; only ``(0, 2)`` copies the stack.

    Args:
        stack: ``(T, O, I)``, contiguous.
        modes: Modes of the unfolding's rows; ``m`` rows.
        matrix: ``(m, m)``; for ``(1,)`` and ``(2,)`` also one per tower, ``(T, m, m)``.
    """
    if modes == (1,):
        return matrix @ stack
    if matrix.dim() == 3:
        return stack @ matrix.mT
    if 0 not in modes:
        return (stack.view(-1, len(matrix)) @ matrix.T).view(stack.shape)
    return fold(matrix @ unfold(stack, modes), modes, stack.shape)


def _add_along(total: Tensor, stack: Tensor, modes: Modes, matrix: Tensor, weight: float) -> None:
    """Add ``weight * multiply_along(stack, modes, matrix)`` to ``total`` in place, in one pass."""
    if modes == (1,):
        total.baddbmm_(matrix.expand(len(stack), -1, -1), stack, alpha=weight)
    elif matrix.dim() == 3:
        total.baddbmm_(stack, matrix.mT, alpha=weight)
    elif 0 not in modes:
        rows = stack.view(-1, len(matrix))
        total.view(rows.shape).addmm_(rows, matrix.T, alpha=weight)
    elif modes == (0, 2):
        total.add_(multiply_along(stack, modes, matrix), alpha=weight)
    else:
        rows = stack.view(len(matrix), -1)
        total.view(rows.shape).addmm_(matrix, rows, alpha=weight)


def add_polar_from_vectors(
    total: Tensor, weight: float, stack: Tensor, side: Modes, vectors: Tensor, least: float
) -> Tensor:
    """Add a weighted polar factor of an unfolding, given left singular vectors of an earlier one.

    If ``U`` belongs to ``M``, ``U^T M`` is ``diag(sigma) V^T``: its rows are normalised and rotated
    back. If ``U`` is stale by some steps, the length, sign and right vector along each left vector
    still come from the current matrix. So a singular value that has passed zero pulls the other way
    at once, which no earlier factor does.

    Args:
        total: ``(T, O, I)``, contiguous; receives the sum.
        weight: Weight of the factor.
        stack: ``(T, O, I)``, contiguous.
        side: Modes of the unfolding's rows, its shorter side; ``m`` rows, ``n`` columns.
        vectors: ``(m, m)``, orthonormal columns; or ``(T, m, m)``, those of each tower's own
            matrix, whose polar factors are then added.
        least: Length, positive, below which a row is not lengthened to 1: it is the rounding error
            of a zero singular value.

    Returns:
        The lengths of the rows, ``(m,)`` or ``(T * m,)``: the singular values if the vectors are
        those of the unfolding. Costs two products of ``m^2 n`` multiplications.
    """
    rows = multiply_along(stack, side, vectors.mT)
    towers = range(stack.dim() - 2) if vectors.dim() == 3 else ()
    others = [mode for mode in range(stack.dim()) if mode not in (*side, *towers)]
    lengths = torch.linalg.vector_norm(rows, dim=others)
    # Divide the columns of the vectors, not the rows: fewer numbers.
    divisors = lengths.clamp(min=least).view(*vectors.shape[:-2], 1, -1)
    _add_along(total, rows, side, vectors / divisors, weight)
    return lengths.flatten()


def polar_factors(stack: Tensor) -> list[PolarFactor]:
    """Return the polar factors of the unfoldings, folded back to the shape of ``stack``.

    Args:
        stack: ``(T, O, I)``, or a tensor of any order.

    Returns:
        One entry per unfolding, in the order of ``unfoldings``; the vectors are those of
        ``short_sides``, and unfoldings with the same side share one decomposition.
    """
    sides = short_sides(tuple(stack.shape))
    factors = {}
    for side in dict.fromkeys(sides):
        polar = polar_factor(unfold(stack, side))
        factors[side] = polar._replace(factor=fold(polar.factor, side, stack.shape).contiguous())
    return [factors[side] for side in sides]


def unfolding_spectra(stack: Tensor) -> list[Tensor]:
    """Return the singular values of the unfoldings alone, as :func:`polar_factors` does.

    Without singular vectors and factors this takes about a third of the time.
    """
    sides = short_sides(tuple(stack.shape))
    spectra = {side: _singular_values(unfold(stack, side)) for side in dict.fromkeys(sides)}
    return [spectra[side] for side in sides]


def _singular_values(matrix: Tensor) -> Tensor:
    work, scale = _scaled(matrix)
    eigenvalues = torch.linalg.eigvalsh(work @ work.T)
    return torch.where(_in_range(eigenvalues, matrix), eigenvalues, 0).sqrt().flip(0) * scale


def tower_side(shape: Sequence[int]) -> Modes:
    """Return the shorter side of each tower's matrix in a stack of shape ``(T, O, I)``."""
    return (1,) if shape[1] <= shape[2] else (2,)


def tower_factors(stack: Tensor) -> PolarFactor:
    """Return the polar factors of the towers' own matrices, stacked.

    Args:
        stack: ``(T, O, I)``.

    Returns:
        Factors ``(T, O, I)``, all singular values in descending order, and vectors ``(T, m, m)``.
    """
    towers = [polar_factor(matrix) for matrix in stack]
    return PolarFactor(
        torch.stack([tower.factor for tower in towers]),
        torch.cat([tower.singular_values for tower in towers]).sort(descending=True).values,
        torch.stack([tower.vectors for tower in towers]),
    )


def tower_vectors(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of each tower's own matrix, and the largest singular value.

    Args:
        stack: ``(T, O, I)``.

    Returns:
        As :func:`left_vectors`; the vectors are ``(T, m, m)``.
    """
    matrices = stack if tower_side(stack.shape) == (1,) else stack.mT
    vectors, largest = zip(*map(left_vectors, matrices), strict=True)
    return torch.stack(vectors), torch.stack(largest).max()


def capped_norm(singular_values: Tensor, cap: float | None) -> Tensor:
    """Return ``sum_i min(sigma_i, tau)`` with ``tau = cap * sigma_1``; the sum if ``cap`` is None.

    Args:
        singular_values: Descending.
        cap: Threshold relative to the largest.

    >>> spectrum = torch.tensor([4.0, 3.0, 1.0])
    >>> capped_norm(spectrum, 0.5), capped_norm(spectrum, None)
    (tensor(5.), tensor(8.))
    """
    if cap is None:
        return singular_values.sum()
    return singular_values.minimum(cap * singular_values[0]).sum()


def capped_factor(polar: PolarFactor, side: Modes, cap: float) -> Tensor:
    """Return the gradient of the capped norm, ``U diag(sigma < tau) V^T``, ``tau`` being fixed.

    Args:
        polar: Folded factor of an unfolding, ``(T, O, I)``.
        side: Modes of the unfolding's rows, its shorter side.
        cap: Threshold relative to the largest singular value.
    """
    values = polar.singular_values
    is_small = (values < cap * values[0]).flip(0)  # in the order of the vectors
    vectors = polar.vectors[:, is_small.to(polar.vectors.device)]
    return multiply_along(polar.factor, side, vectors @ vectors.T)
