"""MTN's schedule: when to recompute a direction, and when to decompose its stack."""

import math
from dataclasses import dataclass
from functools import cache

from mtnrec.mtn.unfolding import short_sides

_LAM = 1e-5  # the paper's lambda, for which the intervals were chosen


@dataclass(frozen=True)
class RefreshPolicy:
    """Intervals between two decompositions of a stack, and between two recomputed directions.

    Both begin at one step, since training moves the weights most at its start, and grow.
    ``benchmarks/mtn_accuracy.py`` measures how far the defaults are from decomposing at every step.

    Args:
        longest: Largest number of steps between two decompositions; 1 decomposes at every step.
        decomposition_range: Bounds, in steps, of a stack's longest interval, which its cost sets.
        decomposition_cost: Cost, rows of a side cubed, that is worth one step of the interval.
        decomposition_growth: Steps in which the interval grows by one.
        cheap: Multiplications of a recomputation that is worth one step; the first tower layers of
            shared-bottom and MMoE take 5e7 and are recomputed at every step.
        longest_update: Largest number of steps between two recomputations of a costly direction.
        update_growth: Steps in which that interval grows by one.
        updates: Recomputations of such a direction per decomposition.
    """

    longest: int = 128
    decomposition_range: tuple[int, int] = (4, 32)
    decomposition_cost: int = 2**18
    decomposition_growth: int = 64
    cheap: int = 2**26
    longest_update: int = 32
    update_growth: int = 8
    updates: int = 4

    @classmethod
    def for_lambda(cls, lam: float, longest: int) -> "RefreshPolicy":
        """Return the policy for a penalty that is added to the gradient of the loss.

        The larger ``lam``, the more weights are moved by the penalty rather than by the data, and
        the sooner a direction is stale. In three epochs of ESMM's first layer at full size, nuclear
        norms were off by 1 % at ``lam=1e-5`` with 32 steps; at ``lam=1e-3`` by 265 % with 32 steps,
        44 % with 4 and 7 % with 1.

        >>> [RefreshPolicy.for_lambda(lam, 128).longest_update for lam in (0, 1e-5, 1e-4, 1e-3)]
        [32, 32, 3, 1]
        """
        most = cls.longest_update
        by_strength = most if lam <= _LAM else max(1, round(most * _LAM / lam))
        return cls(longest=longest, longest_update=by_strength)

    def update_interval(self, shape: tuple[int, ...], step: int) -> int:
        """Return the steps between two recomputations of a direction.

        Args:
            shape: Shape of the stack, ``(T, O, I)``.
            step: Optimiser steps so far.

        >>> policy = RefreshPolicy()
        >>> [policy.update_interval((2, 128, 256), step) for step in (0, 1000)]
        [1, 1]
        >>> [policy.update_interval((2, 512, 2176), step) for step in (0, 8, 1000)]
        [1, 2, 32]
        """
        by_cost = max(1, round(recomputation_cost(shape) / self.cheap))
        return min(by_cost, self.longest_update, self.longest, 1 + step // self.update_growth)

    def decomposition_interval(self, shape: tuple[int, ...], step: int) -> int:
        """Return the steps between two decompositions; arguments as in :meth:`update_interval`.

        >>> policy = RefreshPolicy()
        >>> [policy.decomposition_interval((2, 128, 256), step) for step in (0, 320, 10_000)]
        [1, 6, 32]
        >>> [policy.decomposition_interval((2, *wide), 10_000) for wide in ((16, 32), (64, 128))]
        [4, 9]
        """
        least, most = self.decomposition_range
        by_cost = min(max(least, decomposition_cost(shape) // self.decomposition_cost), most)
        grown = 1 + step // self.decomposition_growth
        update = self.update_interval(shape, step)
        updates = min(self.updates, grown) if update > 1 else 1
        return max(min(by_cost, self.longest, grown), min(updates * update, self.longest))


@cache
def decomposition_cost(shape: tuple[int, ...]) -> int:
    """Return the cubed number of rows, summed over the decomposed sides.

    Args:
        shape: Shape of the stack, ``(T, O, I)``.
    """
    return sum(rows**3 for rows in _side_lengths(shape))


@cache
def recomputation_cost(shape: tuple[int, ...]) -> int:
    """Return the number of multiplications that recomputing a direction takes.

    Args:
        shape: Shape of the stack, ``(T, O, I)``.

    >>> recomputation_cost((2, 128, 256)), recomputation_cost((2, 512, 2176))
    (50593792, 6854017024)
    """
    size = math.prod(shape)
    return sum(2 * rows * size for rows in _side_lengths(shape))


def _side_lengths(shape: tuple[int, ...]) -> list[int]:
    """Return the number of rows of each decomposed side."""
    return [math.prod(shape[mode] for mode in side) for side in dict.fromkeys(short_sides(shape))]
