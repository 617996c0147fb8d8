"""The penalty ``sum_i w_i R_i`` of a model's layers, and its direction while training moves them.

``R_i``'s gradient is its *direction* ``D_i = sum_s alpha_s P_s + W_i / ||W_i||_F``, with the polar
factors ``P_s`` of the unfoldings. A decomposition at each step (``refresh_every=1``, the exact
method) costs more than the step. Otherwise:

1. Every few steps the unfoldings are decomposed, and their left singular vectors kept.
2. At each step in between, all else is taken from the weights as they are: the rows of ``U^T M``,
   normalised and rotated back (:func:`~mtnrec.mtn.polar.polar_from_vectors`).
3. That matters most for weights without a data gradient, behind a dead unit for example: under Adam
   they move at the full rate by the penalty alone. The exact method brings their singular values to
   zero and holds them there; a direction that is some steps old carries them past zero and back.
4. A layer for which step 2 would cost too much is recomputed every few steps. In between, where the
   penalty outweighs the data gradient, the direction changes linearly with the weight, with the
   slope that the last two recomputations show; so it fades as a weight comes to rest.
5. Training moves the weights most at its start, so both intervals start at one step and grow.
6. At each decomposition the direction that would have been used is compared with the new one, dead
   weights included: angle, length, and the relative error of ``R_i``. The largest are logged.

Several processes follow rank 0, which sends its directions, norms and weights of the penalty: on
different machines theirs would differ by rounding, and so would the models.
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
from mtnrec.mtn.polar import largest_magnitude, left_vectors, polar_factors, polar_from_vectors
from mtnrec.mtn.schedule import RefreshPolicy
from mtnrec.mtn.trace_norm import frobenius_norm, layer_norms
from mtnrec.mtn.unfolding import Modes, short_sides, unfold, unfoldings

UNFOLDINGS = unfoldings(3)
_TINY = torch.finfo(torch.float32).tiny
_SMALLEST = 3e-4  # the singular values that the exact method holds at zero lie below


class Deviation(NamedTuple):
    """How far a direction was from the exact one; the largest of several where it is accumulated.

    Args:
        gap: Relative error of ``R_i`` along it, ``|<D, W> / R_i - 1|``.
        angle: Between the two, in degrees.
        length: Relative error of its length, ``| ||D|| / ||D_exact|| - 1 |``.
    """

    gap: float
    angle: float
    length: float

    @classmethod
    def of(cls, used: Tensor, exact: Tensor, stack: Tensor) -> "Deviation":
        """Compare a direction with the exact one, at the weights ``stack``."""
        products = [used * exact, used * used, exact * exact, used * stack, exact * stack]
        found = torch.stack([p.sum(dtype=torch.float64) for p in products]).tolist()
        both, of_used, of_exact, norm, exact_norm = found
        # From the sine as well: near 1 the cosine alone is rounding.
        across = math.sqrt(max(of_used * of_exact - both * both, 0.0))
        return cls(
            abs(norm / exact_norm - 1) if exact_norm else 0.0,
            math.degrees(math.atan2(across, both)),
            abs(math.sqrt(of_used / of_exact) - 1) if of_exact else 0.0,
        )


@dataclass
class _Stack:
    """What is kept of a depth between two decompositions."""

    vectors: dict[Modes, Tensor] = field(default_factory=dict)  # by the side that they span
    least: dict[Modes, float] = field(default_factory=dict)  # length of a row that counts as one
    norms: Tensor | None = None  # of the unfoldings, (S,), float64, on the CPU
    frobenius: float = 0.0
    scale: float = 1.0  # of the weights: their norms are taken at magnitudes near 1
    alpha: list[float] = field(default_factory=list)
    direction: Tensor | None = None  # of a layer with a slope, but for slope * W
    slope: Tensor | None = None
    previous: tuple[Tensor, Tensor] | None = None  # direction and weights before, for the slope
    decomposed: int = 0  # at which step
    updated: int = 0


class Penalty:
    """The layers that are penalised, their weights, and their directions.

    Keeps a tensor of the size of the penalised weights, four for large layers, and the left
    singular vectors of each unfolding, square.

    Args:
        depths: By depth, the layers that are stacked: equal in shape, at least two.
        weights: Alpha and layer weights.
        frobenius: Whether ``R_i`` has its Frobenius term.
        policy: When directions are recomputed; ``longest=1`` is the exact method.
    """

    def __init__(
        self,
        depths: Mapping[int, Sequence[nn.Linear]],
        weights: MixingWeights,
        *,
        frobenius: bool,
        policy: RefreshPolicy,
    ) -> None:
        self.depths = depths
        self.weights = weights
        self._frobenius = frobenius
        self._policy = policy
        self._stacks = {depth: _Stack() for depth in depths}
        self._layer_weights: list[float] = []
        self._largest: dict[int, Deviation] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs after :meth:`measure`; the rest follows from it."""
        return {
            "deviations": {depth: tuple(largest) for depth, largest in self._largest.items()},
            "slopes": {depth: kept.slope for depth, kept in self._stacks.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state; :meth:`measure` is to follow."""
        self._largest = {d: Deviation(*found) for d, found in state_dict["deviations"].items()}
        for depth, slope in state_dict["slopes"].items():
            weight = self.depths[depth][0].weight
            self._stacks[depth].slope = None if slope is None else slope.to(weight.device)

    def parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters that the penalty acts on; frozen ones are left alone."""
        found = [_weight(layer) for layers in self.depths.values() for layer in layers]
        return [weight for weight in found if weight.requires_grad]

    @torch.no_grad()
    def stack(self, depth: int) -> Tensor:
        """Return the stack of a depth, ``(T, O, I)``, at least in float32."""
        stack = torch.stack([layer.weight for layer in self.depths[depth]])
        return stack.to(torch.promote_types(stack.dtype, torch.float32))

    def is_due(self, step: int) -> bool:
        """Return whether :meth:`update` would decompose a stack, and look at the alphas."""
        return any(self._decomposes(depth, step) for depth in self.depths)

    @torch.no_grad()
    def update(self, step: int, strength: float | None) -> None:
        """Bring the directions up to date with the weights.

        Called with the gradients of the loss in place, before they are changed.

        Args:
            step: Steps of the optimiser so far.
            strength: What the penalty's gradient is multiplied by when it is added to that of the
                loss; None if it is not added there, and so does not move weights at the full rate.
        """
        decomposed = False
        for depth, kept in self._stacks.items():
            interval = self._update_interval(depth, step)
            decomposes = self._decomposes(depth, step)
            if not decomposes and step - kept.updated < interval:
                continue
            stack = self.stack(depth)
            if decomposes:
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
        """Decompose all stacks exactly and return the spectra.

        Returns:
            ``L`` times ``S``, descending, float64, on the CPU.
        """
        spectra = []
        for depth, kept in self._stacks.items():
            stack = self.stack(depth)
            spectra.append(self._decompose(depth, stack, step, exact=True))
            kept.updated = step
            if self._update_interval(depth, step) > 1:
                self._keep_slope(depth, stack, kept.slope)
        self._layer_weights = self.weights.layer_weights(self.norms()).tolist()
        return spectra

    def _update_interval(self, depth: int, step: int) -> int:
        return self._policy.update_interval(self._shape(depth), step)

    def _decomposes(self, depth: int, step: int) -> bool:
        since = step - self._stacks[depth].decomposed
        return since >= self._policy.decomposition_interval(self._shape(depth), step)

    def _shape(self, depth: int) -> tuple[int, int, int]:
        layers = self.depths[depth]
        outputs, inputs = layers[0].weight.shape
        return len(layers), outputs, inputs

    def _row(self, depth: int) -> int:
        return list(self.depths).index(depth)

    def _decompose(self, depth: int, stack: Tensor, step: int, *, exact: bool) -> list[Tensor]:
        """Decompose a stack; return its spectra if ``exact``."""
        kept = self._stacks[depth]
        used = None
        if kept.vectors and kept.updated < step and self._policy.longest > 1:
            is_kept = self._update_interval(depth, step) > 1
            used = self.current(depth) if is_kept else self._direction(depth, stack)
        sides = short_sides(self._shape(depth))
        kept.alpha = self.weights.alpha()[self._row(depth)].tolist()
        kept.scale = largest_magnitude(stack).item()
        frobenius = frobenius_norm(stack)
        spectra: list[Tensor] = []
        if exact:
            factors = dict(zip(sides, polar_factors(stack), strict=True))
            for side, factor in factors.items():
                self._keep(depth, side, factor.vectors, factor.singular_values[0])
            spectra = [factors[side].singular_values.cpu() for side in sides]
            norms = torch.stack([spectrum.sum() for spectrum in spectra])
            kept.direction = self._start(depth, stack, frobenius.to(stack.dtype))
            for side, factor in factors.items():
                kept.direction.add_(factor.factor, alpha=self._alpha(depth, side))
        else:
            for side in dict.fromkeys(sides):
                self._keep(depth, side, *left_vectors(unfold(stack, side)))
            found: dict[Modes, Tensor] = {}
            kept.direction = self._direction(depth, stack, found)
            norms = torch.stack([found[side] for side in sides]).cpu()
        kept.norms = torch.cat([norms, frobenius.cpu()[None]])
        self._follow_rank_0(kept.direction, kept.norms, *self.weights.parameters())
        kept.frobenius = kept.norms[-1].item()
        kept.norms = kept.norms[: self.weights.subsets]
        kept.decomposed = step
        if used is not None:
            deviation = Deviation.of(used, kept.direction, stack)
            before = self._largest.get(depth, deviation)
            self._largest[depth] = Deviation(*map(max, zip(deviation, before, strict=True)))
        return spectra

    def _keep(self, depth: int, side: Modes, vectors: Tensor, largest: Tensor) -> None:
        """Keep the vectors of a decomposition, and the length below which a row is rounding."""
        kept = self._stacks[depth]
        kept.vectors[side] = vectors
        kept.least[side] = max(_SMALLEST * largest.item() / kept.scale, _TINY)

    def _direction(
        self, depth: int, stack: Tensor, norms: dict[Modes, Tensor] | None = None
    ) -> Tensor:
        """Return the direction at ``stack`` by the vectors of the last decomposition.

        Args:
            depth: Of the stack.
            stack: ``(T, O, I)``.
            norms: Where the sums of the rows' lengths go, by side.
        """
        kept = self._stacks[depth]
        scaled = stack / kept.scale
        direction = self._start(depth, scaled, torch.linalg.vector_norm(scaled))
        for side, vectors in kept.vectors.items():
            factor, lengths = polar_from_vectors(scaled, side, vectors, kept.least[side])
            direction.add_(factor, alpha=self._alpha(depth, side))
            if norms is not None:
                norms[side] = lengths.sum(dtype=torch.float64) * kept.scale
        return direction

    def _alpha(self, depth: int, side: Modes) -> float:
        """Return the weight of the unfoldings whose factor is found by a side."""
        sides = short_sides(self._shape(depth))
        alpha = self._stacks[depth].alpha
        return sum(weight for weight, other in zip(alpha, sides, strict=False) if other == side)

    def _start(self, depth: int, stack: Tensor, frobenius: Tensor) -> Tensor:
        """Return the part of a direction that is the gradient of the Frobenius norm."""
        # The full set of modes, if it is one of the subsets, has the norm ||W||_F as well.
        share = self._frobenius + sum(self._stacks[depth].alpha[len(UNFOLDINGS) :])
        return stack * (share / frobenius.clamp(min=torch.finfo(stack.dtype).tiny))

    def _slope(self, depth: int, stack: Tensor, strength: float | None) -> Tensor | None:
        """Return the slope of a direction that was just recomputed; None if there is none yet.

        A secant for each weight, from the change of direction and weights since the last
        recomputation, summed over its row and its column.
        """
        kept = self._stacks[depth]
        if kept.previous is None or strength is None:
            return None
        direction = _required(kept.direction)
        weighted = strength * self._layer_weights[self._row(depth)]
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
        """Take a slope out of the direction at ``stack``, to which :meth:`gradients` adds it."""
        kept, direction = self._stacks[depth], _required(self._stacks[depth].direction)
        kept.previous, kept.slope = (direction, stack), slope
        if slope is not None:
            kept.direction = direction - slope * stack

    def _gradient(self, depth: int, like: Tensor) -> Tensor:
        """Return the gradient of the loss by a stack."""
        found = torch.zeros_like(like)
        for index, layer in enumerate(self.depths[depth]):
            if layer.weight.grad is not None:
                found[index] = layer.weight.grad
        return found

    def current(self, depth: int) -> Tensor:
        """Return the direction of a depth at its weights, ``(T, O, I)``."""
        kept = self._stacks[depth]
        direction = _required(kept.direction)
        return direction if kept.slope is None else direction + kept.slope * self.stack(depth)

    def norms(self) -> Tensor:
        """Return ``R_i`` at the last decomposition, float64 ``(L,)``, differentiable in alpha."""
        return layer_norms(*self._norms(), self._frobenius_norms())

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Return the norms of the unfoldings and alpha, ``(L, S)`` each."""
        norms = [kept.norms for kept in self._stacks.values() if kept.norms is not None]
        return torch.stack(norms), self.weights.alpha()

    def _frobenius_norms(self) -> Tensor:
        found = [self._frobenius * kept.frobenius for kept in self._stacks.values()]
        return torch.tensor(found, dtype=torch.float64)

    def set_gradients_of_weights(self, scale: float) -> None:
        """Set the gradient of ``scale * sum_i w_i R_i`` by what the penalty's weights learn."""
        self.weights.set_gradients(self._norms()[0], self._frobenius_norms(), scale=scale)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """Yield each parameter, ``dR_i`` by it along the current direction, and ``w_i``."""
        for (depth, layers), weight in zip(self.depths.items(), self._layer_weights, strict=True):
            kept = self._stacks[depth]
            for index, layer in enumerate(layers):
                gradient = _required(kept.direction)[index]
                if kept.slope is not None:
                    # Two operations, each rounded in the same way on every machine.
                    gradient = gradient + kept.slope[index] * layer.weight.detach()
                yield _weight(layer), gradient, weight

    def pop_deviations(self) -> list[Deviation] | None:
        """Return the largest deviations of each depth since the last call; None if some has none.

        Zeros with the exact method.
        """
        if self._policy.longest == 1:
            return [Deviation(0.0, 0.0, 0.0)] * len(self.depths)
        if any(depth not in self._largest for depth in self.depths):
            return None
        found = [self._largest[depth] for depth in self.depths]
        self._largest.clear()
        return found

    def _follow_rank_0(self, *tensors: Tensor) -> None:
        if dist.is_initialized():
            _broadcast(tensors, next(iter(self.depths.values()))[0].weight.device)


def _weight(layer: nn.Linear) -> nn.Parameter:
    return layer.get_parameter("weight")


def _required(direction: Tensor | None) -> Tensor:
    if direction is None:
        raise RuntimeError("measure() comes first")
    return direction


def _broadcast(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Fill tensors with those of rank 0, in one message; float64 holds all of them exactly.

    Args:
        tensors: On any device.
        device: From which the message is sent; NCCL sends what a GPU holds alone.
    """
    message = torch.cat([tensor.detach().flatten().double().to(device) for tensor in tensors])
    dist.broadcast(message, src=0)
    parts = message.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def mean_distance(stack: Tensor) -> Tensor:
    """Return the mean distance of two slices of a stack over their mean norm; 0 if all are equal.

    >>> mean_distance(torch.ones(2, 3, 4))
    tensor(0.)
    """
    scaled = (stack / largest_magnitude(stack)).flatten(start_dim=1)
    pairs = combinations(scaled, 2)
    distances = torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs])
    norm = torch.linalg.vector_norm(scaled, dim=1).mean()
    return distances.mean() / norm
