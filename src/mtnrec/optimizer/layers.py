"""Layers that a penalty acts on: the chosen depths of a network's towers or experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtnrec.checks import InputError, check_choice, check_integer

_TARGETS = {"towers": "task_layers", "shared": "shared_layers"}
_CHOICES = ("all", "last_hidden")


@dataclass(frozen=True)
class LayerChoice:
    """Chosen depths of a network, each a list of parallel layers of equal shape.

    Args:
        group: Config group of the penalty, for messages.
        target: ``towers`` or ``shared`` (experts).
        layers: ``all``; ``last_hidden``, the deepest with more than one output; or depths, counted
            from 0 next to the input.
        least: Least number of parallel layers at a depth.

    Raises:
        InputError: If a value is out of range, or, in :meth:`find`, if the network lacks such
            layers or they differ in shape.
    """

    group: str
    target: str
    layers: str | Sequence[int]
    least: int = 2

    def __post_init__(self) -> None:
        check_choice(f"{self.group}.target", self.target, list(_TARGETS))
        key, layers = f"{self.group}.layers", self.layers
        if isinstance(layers, str):
            check_choice(key, layers, _CHOICES)
            return
        if not isinstance(layers, Sequence) or not len(layers) or len(set(layers)) < len(layers):
            raise InputError(
                f"{key} must be `all`, `last_hidden` or a list of different depths, e.g. [0, 2], "
                f"got {layers!r}"
            )
        for layer in layers:
            check_integer(key, layer, minimum=0)

    def find(self, network: Any) -> dict[int, list[nn.Linear]]:
        """Return the chosen layers of a network by depth."""
        depths = self._choose(self._depths(network))
        for depth, layers in depths.items():
            self._check(depth, layers)
        return depths

    def _depths(self, network: Any) -> list[list[nn.Linear]]:
        group, method, name = self.group, _TARGETS[self.target], type(network).__name__
        if not hasattr(network, method):
            raise InputError(
                f"{name} must have a method {method}() for {group} to act on. Add it, or set "
                f"{group}.enabled=false."
            )
        depths: list[list[nn.Linear]] = getattr(network, method)()
        if not depths and self.target == "shared":
            raise InputError(
                f"{name} must have parallel shared layers (experts) for {group}.target=shared, got "
                f"none. Choose {group}.target=towers, or model=mmoe."
            )
        if not depths:
            raise InputError(
                f"{name} must have layers per task for {group}.target=towers, got none. Choose "
                f"{group}.target=shared if it has experts, or {group}.enabled=false."
            )
        return depths

    def _choose(self, depths: list[list[nn.Linear]]) -> dict[int, list[nn.Linear]]:
        if self.layers == "all":
            return dict(enumerate(depths))
        if isinstance(self.layers, str):
            hidden = [d for d, layers in enumerate(depths) if layers[0].out_features > 1]
            if not hidden:
                raise InputError(
                    f"{self.group}.layers=last_hidden needs a layer with more than one output, got "
                    f"none. Choose {self.group}.layers=all."
                )
            return {hidden[-1]: depths[hidden[-1]]}
        if max(self.layers) >= len(depths):
            raise InputError(
                f"{self.group}.layers must be from 0 to {len(depths) - 1}, the layers of "
                f"{self.group}.target={self.target}, got {list(self.layers)}. Choose among those."
            )
        return {depth: depths[depth] for depth in self.layers}

    def _check(self, depth: int, layers: list[nn.Linear]) -> None:
        shapes = {tuple(layer.weight.shape) for layer in layers}
        if len(shapes) > 1:
            raise InputError(
                f"the {self.target} at layer {depth} must have equal shapes for {self.group} to "
                f"stack them, got {' and '.join(map(str, sorted(shapes)))}. Set equal widths, or "
                f"leave this layer out of {self.group}.layers."
            )
        if len(layers) < self.least:
            raise InputError(
                f"layer {depth} of {self.group}.target={self.target} must have at least two "
                f"parallel layers to stack, got one. Leave it out of {self.group}.layers, or set "
                f"{self.group}.enabled=false."
            )


@torch.no_grad()
def stack_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """Return the weights of parallel layers, ``(T, O, I)``, in float32 or wider."""
    stack = torch.stack([layer.weight for layer in layers])
    return stack.to(torch.promote_types(stack.dtype, torch.float32))


def weight_of(layer: nn.Linear) -> nn.Parameter:
    """Return the weight of a layer, typed as a parameter."""
    return layer.get_parameter("weight")
