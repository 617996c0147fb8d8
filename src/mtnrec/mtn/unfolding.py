"""Unfoldings of a tensor (eq. 3)."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

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
    """Return ``rows`` or the other modes, whichever give the unfolding fewer rows; ties: ``rows``.

    >>> short_side((2, 512, 2176), (2,)), short_side((2, 128, 256), (2,))
    ((0, 1), (2,))
    >>> short_side((2, 512, 2176), (1,)), short_side((2, 512, 100), (2,))
    ((1,), (2,))
    """
    others = tuple(mode for mode in range(len(shape)) if mode not in rows)
    return min(rows, others, key=lambda modes: math.prod(shape[m] for m in modes))


@cache
def short_sides(shape: tuple[int, ...]) -> tuple[Modes, ...]:
    """Return the shorter side of each distinct unfolding, from which its factor is computed.

    A mode of size 1 makes unfoldings transposes of each other; those share a side.

    Args:
        shape: Shape of the tensor.

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
    """Undo :func:`unfold`: return the tensor of ``shape`` whose unfolding is ``matrix``."""
    columns = [mode for mode in range(len(shape)) if mode not in rows]
    order = [*rows, *columns]
    inverse = [order.index(mode) for mode in range(len(shape))]
    return matrix.reshape([shape[mode] for mode in order]).permute(inverse)
