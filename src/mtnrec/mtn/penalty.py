"""The penalty ``sum_i w_i R_i`` of a model's layers, with factors that may be some steps old.

``R_i`` is convex, and the factors of an earlier ``W'`` give a direction ``D_i = dR_i/dW'`` with
``<D_i, W> <= R_i(W)``: between two decompositions ``R_i`` is replaced by that bound, whose gradient
costs one addition. How far it was below is measured whenever a factor is replaced, and the next one
serves the shorter, the further it was.

An old direction acts only on weights that had a data gradient when it was taken. Adam moves the
others (behind a dead unit, say) by the penalty alone and at its full rate, so that ``k`` steps
along one direction would carry them ``k`` rates past zero; they feel the penalty at the steps at
which a factor is new, and shrink the more slowly. The model's outputs do not depend on them.

Several processes compute all of this from equal weights, and go by the results of rank 0: on unlike
machines theirs would differ by rounding, and with it the steps at which they take new factors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtnrec.mtn.trace_norm import (
    PolarFactor,
    layer_norms,
    norms_along,
    polar_factor,
    polar_factors,
    polar_iteration,
    unfoldings,
)
from mtnrec.mtn.weights import PenaltyWeights

ROWS = unfoldings(3)
_SHORT_SIDE = 64  # an H100 takes 1.3 ms to decompose as to iterate there


def longest_service(shape: Sequence[int], column: int) -> int:
    """Return how many steps a factor of a stack's unfolding may serve: the more, the more it costs.

    Args:
        shape: Of the stack, ``(T, O, I)``.
        column: Which of the unfoldings.

    >>> [longest_service((2, 512, 2176), column) for column in range(3)]
    [136, 136, 136]
    >>> [longest_service((2, 512, 1024), column) for column in range(3)]
    [64, 88, 128]
    >>> [longest_service((2, 1, 64), column) for column in range(3)]
    [32, 32, 32]
    """
    side, size = _side_and_size(shape, column)
    # The spectrum of a few weights may turn all at once.
    return max(64 if size >= 2**12 else 32, 4 * math.isqrt(side), size // 2**14)


def tolerance(shape: Sequence[int]) -> float:
    """Return what share of a layer's norm its old factors may miss; services are chosen for it.

    Single steps miss up to twice as much where a layer is small and its spectrum turns quickly, and
    large ones are dear, so that these are closer to the 1 % which the whole is to stay below.

    Args:
        shape: Of the stack, ``(T, O, I)``.
    """
    return 0.004 if math.prod(shape) < 2**18 else 0.007


def cost(shape: Sequence[int], column: int) -> float:
    """Return about what a new factor of an unfolding costs, in multiplications.

    Two products, a decomposition, which reaches a tenth of their speed, and the passes over the
    stack that a new direction takes.

    Args:
        shape: Of the stack, ``(T, O, I)``.
        column: Which of the unfoldings.
    """
    side, size = _side_and_size(shape, column)
    return 2 * side * size + 12 * side**3 + 1000 * size


def _side_and_size(shape: Sequence[int], column: int) -> tuple[int, int]:
    """Return the shorter side of an unfolding and how many weights it has."""
    size = math.prod(shape)
    side = shape[ROWS[column][0]]
    return min(side, size // side), size


def next_service(service: int, served: int, missed: float, allowed: float) -> int:
    """Return how many steps the next factor of an unfolding is to serve.

    What is missed grows about with the cube of the steps: the bound falls behind with the square of
    how far the weights have moved, and faster where they gather speed. The next factor serves twice
    as long at most, and no longer than the old one was to where an epoch's end came before: how the
    weights move changes there, as rows come a second time.

    Args:
        service: Steps that the old factor was to serve.
        served: Steps that it has served; fewer when an epoch's end or a checkpoint came before.
        missed: The share of the layer's norm that it misses now.
        allowed: What it may miss.

    >>> [next_service(16, 16, missed, allowed=0.002) for missed in (0.0, 0.001, 0.002, 0.015)]
    [32, 21, 16, 8]
    >>> [next_service(16, 8, missed, allowed=0.002) for missed in (0.0, 0.001, 0.015)]
    [16, 11, 4]
    """
    longest = service if served < service else 2 * service
    growth = math.cbrt(allowed / missed) if missed > 0 else math.inf
    steps = min(longest, served * growth)
    # Rounded up where little was missed, lest a factor of one step be followed by such for good.
    return math.ceil(steps) if growth > 1 else max(1, int(steps))


def quick_polar_factor(matrix: Tensor) -> PolarFactor:
    """Return a factor that is to serve many steps, in the precision of ``matrix``.

    On a CPU the one in float32 takes half the time of the exact one, and misses 1e-4 of the norm of
    trained towers: what lies below a few thousandths of the largest singular value. A GPU
    decomposes the Gram matrix of a short side exactly in half a millisecond; where both sides are
    longer, decompositions wait for latency and matrix products do not.
    """
    if matrix.device.type == "cpu":
        # What rounding does make of an eigenvalue; the most that it could would cut off too much.
        rounding = math.sqrt(max(matrix.shape)) * torch.finfo(matrix.dtype).eps
        return polar_factor(matrix, matrix.dtype, rounding)
    return polar_factor(matrix) if min(matrix.shape) < _SHORT_SIDE else polar_iteration(matrix)


@dataclass(frozen=True)
class _InService:
    """A factor, the step at which it was taken, and the norm then, on the CPU."""

    polar: PolarFactor
    step: int
    norm: Tensor


class Penalty:
    """The layers that are penalised, their weights, and their factors.

    Keeps five tensors of the size of the penalised weights: a factor of each unfolding and two
    directions.

    Args:
        depths: By depth, the layers that are stacked: alike in shape, at least two.
        weights: Alpha and layer weights.
        frobenius: Whether ``R_i`` has its Frobenius term.
        biases: Whether a bias counts as one more input of its layer.
        refresh_every: Most steps that a factor serves; 1 is the exact method.

    Attributes:
        services: How many steps the factors at hand serve, ``L`` times ``S``.
    """

    def __init__(
        self,
        depths: Mapping[int, Sequence[nn.Linear]],
        weights: PenaltyWeights,
        *,
        frobenius: bool,
        biases: bool,
        refresh_every: int,
    ) -> None:
        self.depths = depths
        self.weights = weights
        self._frobenius = frobenius
        self._names = ("weight", "bias") if biases else ("weight",)
        self._refresh_every = refresh_every
        self._factors: dict[int, dict[int, _InService]] = {depth: {} for depth in depths}
        self.services = [[1] * len(ROWS) for _ in depths]
        self._frobenius_norms: dict[int, Tensor] = {}
        self._table: tuple[Tensor, Tensor] | None = None  # the norms above, side by side
        self._new: dict[int, Tensor] = {}
        self._old: dict[int, Tensor] = {}
        self._layer_weights: list[float] = []
        self._largest_gaps: dict[int, dict[int, float]] = {depth: {} for depth in depths}
        self._next_step = 0  # the first one at which there is a new factor

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs after :meth:`measure`; the factors follow from it."""
        return {"services": self.services, "largest_gaps": self._largest_gaps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state; :meth:`measure` is to follow."""
        self.services = state_dict["services"]
        self._largest_gaps = state_dict["largest_gaps"]

    def parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters that the penalty acts on; frozen ones are left alone."""
        layers = [layer for depth in self.depths.values() for layer in depth]
        found = [layer.get_parameter(name) for layer in layers for name in self._names]
        return [parameter for parameter in found if parameter.requires_grad]

    @torch.no_grad()
    def stack(self, depth: int) -> Tensor:
        """Return the stack of a depth, ``(T, O, I)``, at least in float32."""
        layers = self.depths[depth]
        stack = torch.stack([layer.weight for layer in layers])
        if "bias" in self._names:
            bias = torch.stack([layer.bias for layer in layers])
            stack = torch.cat([stack, bias.unsqueeze(-1)], dim=-1)
        return stack.to(torch.promote_types(stack.dtype, torch.float32))

    def is_due(self, step: int) -> bool:
        """Say whether :meth:`refresh` would have new factors to go by."""
        return step >= self._next_step

    def refresh(self, step: int) -> bool:
        """Take new factors where they have served their steps; say whether any is new.

        Called with the gradients of the loss at hand, before they are changed.

        Args:
            step: Steps of the optimiser so far.
        """
        self._new.clear()
        if not self.is_due(step):
            return False
        for depth in self.depths:
            due = self._due(depth, step)
            fresh = [c in due or f.step == step for c, f in enumerate(self._of(depth))]
            if any(fresh):
                stack = self.stack(depth)
                self._take(depth, stack, due, step, exact=False)
                self._aim(depth, stack, fresh)
        with torch.no_grad():
            self._layer_weights = self.weights.layer_weights(self.norms()).tolist()
        self._next_step = min(
            factor.step + service
            for depth, services in zip(self.depths, self.services, strict=True)
            for factor, service in zip(self._of(depth), services, strict=True)
        )
        return bool(self._new)

    def measure(self, step: int) -> list[list[Tensor]]:
        """Take all factors anew and return the spectra.

        Returns:
            ``L`` times ``S``, descending, float64, on the CPU.
        """
        for depth in self.depths:
            self._take(depth, self.stack(depth), range(len(ROWS)), step, exact=True)
        self._next_step = step
        return [
            [factor.polar.singular_values.cpu() for factor in self._of(depth)]
            for depth in self.depths
        ]

    def _of(self, depth: int) -> list[_InService]:
        return [self._factors[depth][column] for column in range(len(ROWS))]

    def _due(self, depth: int, step: int) -> list[int]:
        services = self.services[self._row(depth)]
        return [
            column
            for column, (factor, service) in enumerate(zip(self._of(depth), services, strict=True))
            if step - factor.step >= service
        ]

    def _row(self, depth: int) -> int:
        return list(self.depths).index(depth)

    @torch.no_grad()
    def _take(
        self, depth: int, stack: Tensor, columns: Sequence[int], step: int, *, exact: bool
    ) -> None:
        """Take new factors, and choose how long they serve by how much the old ones missed."""
        if not columns:
            return
        polar = polar_factor if exact or self._refresh_every == 1 else quick_polar_factor
        known = self._factors[depth]
        missed: dict[int, tuple[int, float]] = {}
        new = polar_factors(stack, [ROWS[column] for column in columns], polar)
        replaced = [c for c in columns if c in known and known[c].step < step]
        along = norms_along([*new, *(known[column].polar for column in replaced)], stack)
        # All at once: to fetch a number is to wait for the accelerator.
        found = torch.cat([along, torch.linalg.vector_norm(stack)[None]]).double().cpu()
        norms, bounds, (frobenius,) = found.split([len(new), len(replaced), 1])
        bound_of = dict(zip(replaced, bounds, strict=True))
        for column, factor, norm in zip(columns, new, norms, strict=True):
            if column in bound_of:
                missed[column] = step - known[column].step, (norm - bound_of[column]).item()
            known[column] = _InService(factor, step, norm)
        self._frobenius_norms[depth] = frobenius * self._frobenius
        self._table = None
        self._choose_services(depth, missed)
        if dist.is_initialized():
            self._follow_rank_0(depth, columns)

    def _follow_rank_0(self, depth: int, columns: Sequence[int]) -> None:
        """Replace the new factors of a depth, their services and the weights by those of rank 0."""
        row = self._row(depth)
        frobenius = self._frobenius_norms[depth]
        services = frobenius.new_tensor(self.services[row])
        new = [self._factors[depth][column] for column in columns]
        of_factors = [t for f in new for t in (f.polar.factor, f.polar.singular_values, f.norm)]
        mine = [services, frobenius, *of_factors, *self.weights.parameters()]
        _broadcast(mine, new[0].polar.factor.device)
        self.services[row] = services.long().tolist()

    def _choose_services(self, depth: int, missed: Mapping[int, tuple[int, float]]) -> None:
        """Choose how long the factors that took the place of others are to serve.

        Notes the largest share of the layer's norm that each unfolding misses.

        Args:
            depth: Of the layer.
            missed: By unfolding, the steps that the old one served, and what it missed.
        """
        services, alphas = self.services[self._row(depth)], self._alphas(depth)
        gaps = self._largest_gaps[depth]
        norm = sum(a * f.norm.item() for a, f in zip(alphas, self._of(depth), strict=True))
        shape = self._factors[depth][0].polar.factor.shape
        # The least time in all is where each misses in proportion to the time it takes a step.
        times = [cost(shape, column) / services[column] for column in range(len(ROWS))]
        for column, (served, amount) in missed.items():
            share = alphas[column] * amount / norm if norm else 0.0
            gaps[column] = max(share, gaps.get(column, share))
            allowed = tolerance(shape) * times[column] / sum(times)
            chosen = next_service(services[column], served, share, allowed)
            services[column] = min(chosen, longest_service(shape, column), self._refresh_every)

    def _alphas(self, depth: int) -> list[float]:
        with torch.no_grad():
            alphas: list[float] = self.weights.alpha()[self._row(depth)].tolist()
        return alphas

    @torch.no_grad()
    def _aim(self, depth: int, stack: Tensor, fresh: Sequence[bool]) -> None:
        """Set the directions of a depth, some of whose factors are new."""
        frobenius = self._frobenius_norms[depth].item()
        new = stack / frobenius if frobenius else torch.zeros_like(stack)
        kept = torch.zeros_like(stack)
        for factor, alpha, is_new in zip(self._of(depth), self._alphas(depth), fresh, strict=True):
            (new if is_new else kept).add_(factor.polar.factor, alpha=alpha)
        if all(fresh) and self._refresh_every == 1:
            self._new[depth] = new
            return
        has_gradient = self._has_gradient(depth, stack)
        kept.mul_(has_gradient)
        self._old[depth] = (new * has_gradient).add_(kept)
        self._new[depth] = new.add_(kept)

    def _has_gradient(self, depth: int, stack: Tensor) -> Tensor:
        """Say of each weight of a stack, as 1 or 0, whether the loss has a gradient there."""
        found = torch.zeros_like(stack)
        for layer, part in zip(self.depths[depth], found, strict=True):
            places = {"weight": part[:, : layer.in_features], "bias": part[:, -1]}
            for name in self._names:
                gradient = layer.get_parameter(name).grad
                if gradient is not None:
                    torch.ne(gradient, 0, out=places[name])
        return found

    def norms(self) -> Tensor:
        """Return ``R_i`` when its factors were taken, float64 ``(L,)``, differentiable in alpha."""
        norms, frobenius = self._norms()
        return layer_norms(norms, self.weights.alpha(), frobenius)

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Return the norms of the unfoldings, ``(L, S)``, and of the stacks, ``(L,)``."""
        if self._table is None:
            of_factors = [torch.stack([f.norm for f in self._of(depth)]) for depth in self.depths]
            frobenius = [self._frobenius_norms[depth] for depth in self.depths]
            self._table = torch.stack(of_factors), torch.stack(frobenius)
        return self._table

    def set_gradients_of_weights(self, scale: float) -> None:
        """Set the gradient of ``scale * sum_i w_i R_i`` by what the penalty's weights learn."""
        self.weights.set_gradients(*self._norms(), scale=scale)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """Yield each parameter, ``dR_i`` by it along the direction at hand, and ``w_i``."""
        for (depth, layers), weight in zip(self.depths.items(), self._layer_weights, strict=True):
            directions = self._new if depth in self._new else self._old
            for layer, direction in zip(layers, directions[depth], strict=True):
                yield layer.get_parameter("weight"), direction[:, : layer.in_features], weight
                if "bias" in self._names:
                    yield layer.get_parameter("bias"), direction[:, layer.in_features], weight

    def take_gaps(self) -> list[float] | None:
        """Return the largest share of each layer's norm that was missed since the last call.

        The largest of each unfolding, added up: as if they were at the same step. None if some
        factor was not replaced.
        """
        if any(len(gaps) < len(ROWS) for gaps in self._largest_gaps.values()):
            return None
        found = [sum(gaps.values()) for gaps in self._largest_gaps.values()]
        for gaps in self._largest_gaps.values():
            gaps.clear()
        return found


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
    pairs = combinations(stack.flatten(start_dim=1), 2)
    distances = torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs])
    norm = torch.linalg.vector_norm(stack.flatten(start_dim=1), dim=1).mean()
    return distances.mean() / norm
