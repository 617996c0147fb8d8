"""The penalty ``sum_i w_i R_i`` of a model's layers, and its direction during training.

``R_i``'s gradient is its *direction* ``D_i = sum_s alpha_s P_s + W_i / ||W_i||_F``, with the polar
factors ``P_s`` of the unfoldings. Decomposing at every step (``refresh_every=1``, the exact method)
costs more than the step itself. Otherwise:

1. Every few steps the unfoldings are decomposed and their left singular vectors are cached.
2. At each step in between, everything else comes from the current weights: the rows of ``U^T M``,
   normalised and rotated back (:func:`~mtnrec.mtn.polar.add_polar_from_vectors`).
3. That matters most for weights without a data gradient, for example behind a dead unit: under Adam
   the penalty alone moves them at the full rate. The exact method brings their singular values to
   zero and holds them there; a stale direction carries them past zero and back.
4. A layer for which step 2 would cost too much is recomputed every few steps. In between, where the
   penalty outweighs the data gradient, the direction changes linearly with the weight, with the
   slope between the last two recomputations, so it fades as a weight comes to rest.
5. Training moves the weights most at its start, so both intervals start at one step and grow.
6. At the end of an epoch the kept vectors give the norms and the spectra as well
   (:meth:`Penalty.refresh`), and every so many epochs an exact decomposition does.
7. Each decomposition compares the direction that would have been used with the new one, dead
   weights included: angle, length, and the relative error of ``R_i``. The largest are logged.

With several processes, rank 0 broadcasts its directions, norms and penalty weights: computed on
different machines they would differ by rounding, and so would the models.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtnrec.mtn.mixing import MixingWeights
from mtnrec.mtn.polar import (
    PolarFactor,
    add_polar_from_vectors,
    capped_factor,
    capped_norm,
    largest_magnitude,
    left_vectors,
    polar_factors,
    tower_factors,
    tower_side,
    tower_vectors,
    unfolding_spectra,
)
from mtnrec.mtn.schedule import RefreshPolicy
from mtnrec.mtn.trace_norm import frobenius_norm, layer_norms
from mtnrec.mtn.unfolding import Modes, short_sides, unfold, unfoldings
from mtnrec.optimizer.layers import stack_weights, weight_of

UNFOLDINGS = unfoldings(3)
_TINY = torch.finfo(torch.float32).tiny
_SAFE = 1e-12, 1e12  # magnitudes of weights whose squares, summed, keep their precision
_SMALLEST = 3e-4  # relative; singular values held at zero by the exact method lie below it


class Deviation(NamedTuple):
    """Deviation of a direction from the exact one, or the largest of several.

    Args:
        gap: Relative error of ``R_i`` along the direction, ``|<D, W> / R_i - 1|``.
        angle: Angle between the two directions, in degrees.
        length: Relative error of the direction's length, ``| ||D|| / ||D_exact|| - 1 |``.
    """

    gap: float
    angle: float
    length: float

    @classmethod
    def of(cls, used: Tensor, exact: Tensor, stack: Tensor) -> "Deviation":
        """Compare a direction with the exact one, at the weights ``stack``."""
        products = [used * exact, used * used, exact * exact, used * stack, exact * stack]
        found = torch.stack([p.sum(dtype=torch.float64) for p in products]).tolist()
        dot, used_square, exact_square, norm, exact_norm = found
        # The sine as well, since near 1 the cosine alone is lost in rounding.
        cross = math.sqrt(max(used_square * exact_square - dot * dot, 0.0))
        return cls(
            abs(norm / exact_norm - 1) if exact_norm else 0.0,
            math.degrees(math.atan2(cross, dot)),
            abs(math.sqrt(used_square / exact_square) - 1) if exact_square else 0.0,
        )


@dataclass
class _Stack:
    """Cached state of a depth between two decompositions."""

    vectors: dict[Modes, Tensor] = field(default_factory=dict)  # left singular vectors by side
    least: dict[Modes, float] = field(default_factory=dict)  # shorter rows are only rounding
    norms: Tensor | None = None  # of the unfoldings, (S,), float64, on the CPU
    frobenius: float = 0.0
    scale: float = 1.0  # divides the weights; not 1 where their squares would over- or underflow
    alpha: list[float] = field(default_factory=list)
    direction: Tensor | None = None  # without slope * W if there is a slope
    slope: Tensor | None = None
    previous: tuple[Tensor, Tensor] | None = None  # earlier direction and weights, for the slope
    decomposed: int = 0  # step of the last decomposition
    updated: int = 0  # step of the last update


class Penalty:
    """Penalised layers, their weights, and their directions.

    Keeps one tensor the size of the penalised weights, four for large layers, and a square matrix
    of left singular vectors per unfolding.

    Args:
        depths: Layers to stack by depth: at least two, equal in shape.
        weights: Alpha and layer weights.
        frobenius: Whether ``R_i`` includes the Frobenius term.
        policy: Schedule of the recomputations; ``longest=1`` is the exact method.
        cap: Threshold of the capped trace norm, relative to the largest singular value, for the
            exact method only; None for the trace norm.
        per_tower: Whether the sum of the towers' own trace norms takes the place of those of the
            unfoldings; ``weights`` then has a single alpha.
    """

    def __init__(
        self,
        depths: Mapping[int, Sequence[nn.Linear]],
        weights: MixingWeights,
        *,
        frobenius: bool,
        policy: RefreshPolicy,
        cap: float | None = None,
        per_tower: bool = False,
    ) -> None:
        self.depths = depths
        self.weights = weights
        self._frobenius = frobenius
        self._policy = policy
        self._cap = cap
        self._per_tower = per_tower
        self._stacks = {depth: _Stack() for depth in depths}
        self._layer_weights: list[float] = []
        self._largest: dict[int, Deviation] = {}
        self._compared: set[int] = set()  # depths decomposed since the deviations were popped
        self._is_exact = True  # whether measure(), not refresh(), was called last

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save after :meth:`measure` or :meth:`refresh`.

        The one that was called last recomputes everything else; only :meth:`refresh` needs the
        singular vectors.
        """
        kept = {} if self._is_exact else self._stacks
        return {
            "deviations": {depth: tuple(largest) for depth, largest in self._largest.items()},
            "compared": sorted(self._compared),
            "slopes": {depth: kept.slope for depth, kept in self._stacks.items()},
            "vectors": {depth: stack.vectors for depth, stack in kept.items()},
            "scales": {depth: (stack.least, stack.scale) for depth, stack in kept.items()},
            "decomposed": {depth: stack.decomposed for depth, stack in kept.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], step: int) -> None:
        """Restore the state and recompute the rest, as at the checkpoint: to the same bits.

        Args:
            state_dict: State.
            step: Optimiser steps so far.
        """
        self._largest = {d: Deviation(*found) for d, found in state_dict["deviations"].items()}
        # Checkpoints of earlier versions lack two keys.
        self._compared = {*state_dict.get("compared", self._largest)}
        vectors = state_dict.get("vectors", {})
        for depth, slope in state_dict["slopes"].items():
            kept, device = self._stacks[depth], self.depths[depth][0].weight.device
            kept.slope = None if slope is None else slope.to(device)
            if vectors:
                kept.vectors = {side: found.to(device) for side, found in vectors[depth].items()}
                kept.least, kept.scale = state_dict["scales"][depth]
                kept.decomposed = state_dict["decomposed"][depth]
        if vectors:
            self.refresh(step)
        else:
            self.measure(step)

    def parameters(self) -> list[nn.Parameter]:
        """Return the penalised parameters of the model, without frozen ones."""
        found = [weight_of(layer) for layers in self.depths.values() for layer in layers]
        return [weight for weight in found if weight.requires_grad]

    def stack(self, depth: int) -> Tensor:
        """Return the stacked weights of a depth, ``(T, O, I)``, in float32 or wider."""
        return stack_weights(self.depths[depth])

    def is_due(self, step: int) -> bool:
        """Return whether :meth:`update` would decompose a stack, and so read alpha."""
        return any(self._is_decomposition_due(depth, step) for depth in self.depths)

    @torch.no_grad()
    def update(self, step: int, strength: float | None) -> None:
        """Update the directions to the current weights.

        Call it while the parameters hold the unchanged gradients of the loss.

        Args:
            step: Optimiser steps so far.
            strength: Factor of the penalty's gradient when it is added to that of the loss; None if
                it is not added, and so does not move weights at the full rate.
        """
        decomposed = False
        for depth, kept in self._stacks.items():
            interval = self._update_interval(depth, step)
            is_due = self._is_decomposition_due(depth, step)
            if not is_due and step - kept.updated < interval:
                continue
            stack = self.stack(depth)
            if is_due:
                self._decompose(depth, stack, step, exact=self._policy.longest == 1)
                decomposed = True
            else:
                kept.direction = self._direction(depth, stack)
                self._follow_rank_0(kept.direction)
            if interval > 1:
                self._keep_slope(depth, stack, self._slope(depth, stack, strength))
            kept.updated = step
        if decomposed:
            self._layer_weights = self.weights.layer_weights(self.norms()).tolist()

    @torch.no_grad()
    def measure(self, step: int) -> list[list[Tensor]]:
        """Decompose all stacks exactly and return the spectra of their unfoldings.

        Returns:
            ``L`` lists of ``S`` spectra, each descending, float64, on the CPU.
        """
        spectra = []
        for depth, kept in self._stacks.items():
            stack = self.stack(depth)
            found = self._decompose(depth, stack, step, exact=True)
            if self._per_tower:
                found = [spectrum.cpu() for spectrum in unfolding_spectra(stack)]
            spectra.append(found)
            kept.updated = step
            if self._update_interval(depth, step) > 1:
                self._keep_slope(depth, stack, kept.slope)
        self._layer_weights = self.weights.layer_weights(self.norms()).tolist()
        self._is_exact = True
        return spectra

    @torch.no_grad()
    def refresh(self, step: int) -> list[list[Tensor]]:
        """Recompute norms and directions with the kept singular vectors; return the spectra.

        Costs one recomputation of each direction. ``benchmarks/mtn_accuracy.py`` compares the
        spectra with those of :meth:`measure`.

        Returns:
            As :meth:`measure`; under ``per_tower`` exact, else lengths along the kept vectors.
        """
        spectra = []
        for depth, kept in self._stacks.items():
            stack, sides = self.stack(depth), self._sides(depth)
            kept.alpha = self.weights.alpha()[self._layer_index(depth)].tolist()
            lengths: dict[Modes, Tensor] = {}
            kept.direction = self._direction(depth, stack, lengths)
            self._keep_norms(kept, [lengths[side].sum() for side in sides], frobenius_norm(stack))
            if self._per_tower:
                spectra.append([spectrum.cpu() for spectrum in unfolding_spectra(stack)])
            else:
                found = {side: own.sort(descending=True).values for side, own in lengths.items()}
                spectra.append([found[side].cpu() for side in sides])
            kept.updated = step
            if self._update_interval(depth, step) > 1:
                self._keep_slope(depth, stack, kept.slope)
        self._layer_weights = self.weights.layer_weights(self.norms()).tolist()
        self._is_exact = False
        return spectra

    def _update_interval(self, depth: int, step: int) -> int:
        return self._policy.update_interval(self._shape(depth), step)

    def _is_decomposition_due(self, depth: int, step: int) -> bool:
        since = step - self._stacks[depth].decomposed
        return since >= self._policy.decomposition_interval(self._shape(depth), step)

    def _shape(self, depth: int) -> tuple[int, int, int]:
        layers = self.depths[depth]
        outputs, inputs = layers[0].weight.shape
        return len(layers), outputs, inputs

    def _layer_index(self, depth: int) -> int:
        return list(self.depths).index(depth)

    def _decompose(self, depth: int, stack: Tensor, step: int, *, exact: bool) -> list[Tensor]:
        """Decompose a stack; return its spectra if ``exact``."""
        kept, sides = self._stacks[depth], self._sides(depth)
        used = None
        if kept.vectors and kept.updated < step and self._policy.longest > 1:
            is_kept = self._update_interval(depth, step) > 1
            used = self.current(depth) if is_kept else self._direction(depth, stack)
        kept.alpha = self.weights.alpha()[self._layer_index(depth)].tolist()
        largest = largest_magnitude(stack).item()
        kept.scale = 1.0 if _SAFE[0] < largest < _SAFE[1] else largest
        frobenius, spectra = frobenius_norm(stack), list[Tensor]()
        if exact:
            spectra = self._decompose_exactly(depth, stack, frobenius)
            norms = [capped_norm(spectrum, self._cap) for spectrum in spectra]
        else:
            for side in dict.fromkeys(sides):
                self._cache_vectors(depth, side, *self._left_vectors(stack, side))
            found: dict[Modes, Tensor] = {}
            kept.direction = self._direction(depth, stack, found)
            norms = [found[side].sum() for side in sides]
        self._keep_norms(kept, norms, frobenius)
        kept.decomposed = step
        if used is not None:
            self._compare(depth, used, stack)
        return spectra

    def _decompose_exactly(self, depth: int, stack: Tensor, frobenius: Tensor) -> list[Tensor]:
        """Cache the vectors and the direction of an exact decomposition; return its spectra."""
        kept, sides = self._stacks[depth], self._sides(depth)
        factors = dict(zip(sides, self._factors(stack), strict=True))
        kept.direction = self._frobenius_gradient(depth, stack, frobenius.to(stack.dtype))
        for side, factor in factors.items():
            self._cache_vectors(depth, side, factor.vectors, factor.singular_values[0])
            gradient = factor.factor
            if self._cap is not None:
                gradient = capped_factor(factor, side, self._cap)
            kept.direction.add_(gradient, alpha=self._alpha(depth, side))
        return [factors[side].singular_values.cpu() for side in sides]

    def _compare(self, depth: int, used: Tensor, stack: Tensor) -> None:
        """Note how far the direction that would have been used is from the new one."""
        deviation = Deviation.of(used, _required(self._stacks[depth].direction), stack)
        if depth in self._compared:
            pairs = zip(deviation, self._largest[depth], strict=True)
            deviation = Deviation(*map(max, pairs))
        self._largest[depth] = deviation
        self._compared.add(depth)

    def _keep_norms(self, kept: _Stack, norms: Sequence[Tensor], frobenius: Tensor) -> None:
        """Store the norms of the unfoldings, and follow rank 0 in what was computed with them."""
        found = torch.stack([norm.cpu() for norm in (*norms, frobenius)])
        self._follow_rank_0(_required(kept.direction), found, *self.weights.parameters())
        kept.frobenius = found[-1].item()
        kept.norms = found[: self.weights.subsets]

    def _sides(self, depth: int) -> tuple[Modes, ...]:
        """Return the side that each norm is computed from."""
        shape = self._shape(depth)
        return (tower_side(shape),) if self._per_tower else short_sides(shape)

    def _factors(self, stack: Tensor) -> list[PolarFactor]:
        return [tower_factors(stack)] if self._per_tower else polar_factors(stack)

    def _left_vectors(self, stack: Tensor, side: Modes) -> tuple[Tensor, Tensor]:
        if self._per_tower:
            return tower_vectors(stack)
        return left_vectors(unfold(stack, side))

    def _cache_vectors(self, depth: int, side: Modes, vectors: Tensor, largest: Tensor) -> None:
        """Cache the vectors of a side, and the length below which a row is only rounding."""
        kept = self._stacks[depth]
        kept.vectors[side] = vectors
        kept.least[side] = max(_SMALLEST * largest.item() / kept.scale, _TINY)

    def _direction(
        self, depth: int, stack: Tensor, lengths: dict[Modes, Tensor] | None = None
    ) -> Tensor:
        """Return the direction at ``stack``, computed with the cached singular vectors.

        Args:
            depth: Depth of the stack.
            stack: ``(T, O, I)``.
            lengths: Receives the row lengths of each side, float64.
        """
        kept = self._stacks[depth]
        scaled = stack if kept.scale == 1 else stack / kept.scale
        direction = self._frobenius_gradient(depth, scaled, torch.linalg.vector_norm(scaled))
        for side, vectors in kept.vectors.items():
            weight, least = self._alpha(depth, side), kept.least[side]
            found = add_polar_from_vectors(direction, weight, scaled, side, vectors, least)
            if lengths is not None:
                lengths[side] = found.double() * kept.scale
        return direction

    def _alpha(self, depth: int, side: Modes) -> float:
        """Return the total alpha of the unfoldings that share a side."""
        sides = self._sides(depth)
        alpha = self._stacks[depth].alpha
        return sum(weight for weight, other in zip(alpha, sides, strict=False) if other == side)

    def _frobenius_gradient(self, depth: int, stack: Tensor, frobenius: Tensor) -> Tensor:
        """Return the gradient of the Frobenius terms, a part of the direction."""
        # If alpha weights the full set of modes, its norm is ||W||_F as well.
        share = self._frobenius + sum(self._stacks[depth].alpha[len(UNFOLDINGS) :])
        return stack * (share / frobenius.clamp(min=torch.finfo(stack.dtype).tiny))

    def _slope(self, depth: int, stack: Tensor, strength: float | None) -> Tensor | None:
        """Return the slope of a freshly recomputed direction, or None if it is not available.

        A secant per weight, from the changes of direction and weights since the last recomputation,
        summed over the weight's row and column.
        """
        kept = self._stacks[depth]
        if kept.previous is None or strength is None:
            return None
        direction = _required(kept.direction)
        weighted = strength * self._layer_weights[self._layer_index(depth)]
        outweighs = self._gradient(depth, stack).abs() <= weighted * direction.abs()
        moved = (stack - kept.previous[1]).mul_(outweighs)
        turned = (direction - kept.previous[0]).mul_(moved)
        moved = moved.square_()
        rise = turned.sum(2, keepdim=True) + turned.sum(1, keepdim=True)
        run = moved.sum(2, keepdim=True) + moved.sum(1, keepdim=True)
        slope = (rise / run.clamp(min=_TINY)).clamp_(min=0).mul_(outweighs)
        self._follow_rank_0(slope)
        return slope

    def _keep_slope(self, depth: int, stack: Tensor, slope: Tensor | None) -> None:
        """Store a slope and subtract it from the direction; :meth:`gradients` adds it back."""
        kept, direction = self._stacks[depth], _required(self._stacks[depth].direction)
        kept.previous, kept.slope = (direction, stack), slope
        if slope is not None:
            kept.direction = direction - slope * stack

    def _gradient(self, depth: int, like: Tensor) -> Tensor:
        """Return the gradient of the loss for a stack."""
        found = torch.zeros_like(like)
        for index, layer in enumerate(self.depths[depth]):
            if layer.weight.grad is not None:
                found[index] = layer.weight.grad
        return found

    def current(self, depth: int) -> Tensor:
        """Return the direction of a depth at its current weights, ``(T, O, I)``."""
        kept = self._stacks[depth]
        direction = _required(kept.direction)
        return direction if kept.slope is None else direction + kept.slope * self.stack(depth)

    def norms(self) -> Tensor:
        """Return ``R_i`` at the last decomposition, float64 ``(L,)``, differentiable in alpha."""
        return layer_norms(*self._norms(), self._frobenius_norms())

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Return the unfoldings' norms, and alpha, ``(L, S)`` each."""
        norms = [kept.norms for kept in self._stacks.values() if kept.norms is not None]
        return torch.stack(norms), self.weights.alpha()

    def _frobenius_norms(self) -> Tensor:
        found = [self._frobenius * kept.frobenius for kept in self._stacks.values()]
        return torch.tensor(found, dtype=torch.float64)

    def set_gradients_of_weights(self, scale: float) -> None:
        """Set the learned weights' gradients of ``scale * sum_i w_i R_i``."""
        self.weights.set_gradients(self._norms()[0], self._frobenius_norms(), scale=scale)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """Yield each parameter, its gradient of ``R_i`` (the current direction), and ``w_i``."""
        for (depth, layers), weight in zip(self.depths.items(), self._layer_weights, strict=True):
            kept = self._stacks[depth]
            for index, layer in enumerate(layers):
                gradient = _required(kept.direction)[index]
                if kept.slope is not None:
                    # Two operations, which round the same way on every machine.
                    gradient = gradient + kept.slope[index] * layer.weight.detach()
                yield weight_of(layer), gradient, weight

    def pop_deviations(self) -> list[Deviation] | None:
        """Return each depth's largest deviations since the last call.

        Those of its last decomposition if there was none since; None if a depth has none yet. All
        are zero under the exact method.
        """
        if self._policy.longest == 1:
            return [Deviation(0.0, 0.0, 0.0)] * len(self.depths)
        if any(depth not in self._largest for depth in self.depths):
            return None
        found = [self._largest[depth] for depth in self.depths]
        self._compared.clear()
        return found

    def _follow_rank_0(self, *tensors: Tensor) -> None:
        if dist.is_initialized():
            _broadcast(tensors, next(iter(self.depths.values()))[0].weight.device)


def _required(direction: Tensor | None) -> Tensor:
    if direction is None:
        raise RuntimeError("measure() must run first")
    return direction


def _broadcast(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Overwrite tensors with those of rank 0, in one float64 message that holds them exactly.

    Args:
        tensors: Tensors to overwrite, on any device.
        device: Device of the message; NCCL sends from GPUs only.
    """
    message = torch.cat([tensor.detach().flatten().double().to(device) for tensor in tensors])
    dist.broadcast(message, src=0)
    parts = message.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def mean_distance(stack: Tensor) -> Tensor:
    """Return the mean distance between two slices over their mean norm; 0 if all are equal.

    >>> mean_distance(torch.ones(2, 3, 4))
    tensor(0.)
    """
    scaled = (stack / largest_magnitude(stack)).flatten(start_dim=1)
    pairs = combinations(scaled, 2)
    distances = torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs])
    norm = torch.linalg.vector_norm(scaled, dim=1).mean()
    return distances.mean() / norm
