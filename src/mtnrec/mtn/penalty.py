"""The penalty ``sum_i w_i R_i`` of a model's layers, with factors that may be some steps old."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from mtnrec.mtn.trace_norm import PolarFactor, layer_norms, norms_along, polar_factors
from mtnrec.mtn.weights import PenaltyWeights


class Penalty:
    """The layers that are penalised, their weights, and their polar factors.

    Args:
        depths: By depth, the layers that are stacked: alike in shape, at least two.
        weights: Alpha and layer weights.
        frobenius: Whether ``R_i`` has its Frobenius term.
        biases: Whether a bias counts as one more input of its layer.
        refresh_every: Steps that the factors serve; 1 is the exact method.
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
        self._biases = biases
        self._refresh_every = refresh_every
        self.factors: list[list[PolarFactor]] = []
        self.age = 0
        self.gaps: list[Tensor] = []

    def parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters that the penalty acts on; frozen ones are left alone."""
        names = ("weight", "bias") if self._biases else ("weight",)
        layers = [layer for depth in self.depths.values() for layer in depth]
        found = [layer.get_parameter(name) for layer in layers for name in names]
        return [parameter for parameter in found if parameter.requires_grad]

    def stacks(self) -> list[Tensor]:
        """Return the stack of each depth, ``(T, O, I)``, at least in float32."""
        stacks = []
        for layers in self.depths.values():
            stack = torch.stack([layer.weight for layer in layers])
            if self._biases:
                bias = torch.stack([layer.bias for layer in layers])
                stack = torch.cat([stack, bias.unsqueeze(-1)], dim=-1)
            stacks.append(stack.to(torch.promote_types(stack.dtype, torch.float32)))
        return stacks

    def refresh_if_due(self) -> None:
        """Take new factors where there are none or they have served their steps."""
        if not self.factors or self.age >= self._refresh_every:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take new factors, and note by how much the old ones missed the norm."""
        stacks = self.stacks()
        old, self.factors = self.factors, [polar_factors(stack) for stack in stacks]
        if old and self.age:
            exact, bounds = (_norms(factors, stacks) for factors in (self.factors, old))
            alpha = self.weights.alpha()
            total = (alpha * exact).sum(dim=1)
            missed = total - (alpha * bounds).sum(dim=1)
            self.gaps.append(missed / total.clamp(min=torch.finfo(total.dtype).tiny))
        self.age = 0

    def layer_norms(self) -> Tensor:
        """Return ``R_i`` by the factors at hand, float64 ``(L,)``, differentiable throughout."""
        stacks = self.stacks()
        norms = _norms(self.factors, stacks)
        frobenius = torch.stack([torch.linalg.vector_norm(stack) for stack in stacks]).double()
        if not self._frobenius:
            frobenius = torch.zeros_like(frobenius)
        return layer_norms(norms, self.weights.alpha(), frobenius)

    def value(self) -> Tensor:
        """Return ``sum_i w_i R_i`` by the factors at hand, a float64 scalar."""
        norms = self.layer_norms()
        return self.weights.layer_weights(norms) @ norms


def _norms(factors: list[list[PolarFactor]], stacks: list[Tensor]) -> Tensor:
    pairs = zip(factors, stacks, strict=True)
    return torch.stack([norms_along(layer, stack) for layer, stack in pairs]).double()


def mean_distance(stack: Tensor) -> Tensor:
    """Return the mean distance of two slices of a stack over their mean norm; 0 if all are equal.

    >>> mean_distance(torch.ones(2, 3, 4))
    tensor(0.)
    """
    pairs = combinations(stack.flatten(start_dim=1), 2)
    distances = torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs])
    norm = torch.linalg.vector_norm(stack.flatten(start_dim=1), dim=1).mean()
    return distances.mean() / norm
