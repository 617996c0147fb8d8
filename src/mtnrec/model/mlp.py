"""Multi-layer perceptrons, one or several of equal widths in parallel."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtnrec.checks import (
    InputError,
    check_choice,
    check_flag,
    check_integer,
    check_number,
)


class MLP(nn.Sequential):
    """Linear, batch norm, ReLU and dropout for each width.

    Args:
        in_features: Columns of the input.
        widths: Outputs of each linear layer.
        dropout: Probability that an output is dropped in training, in [0, 1).
        batch_norm: Whether a batch norm follows each linear layer.
        head: Whether one more linear layer follows, with a single output (a logit).
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        *,
        dropout: float,
        batch_norm: bool,
        head: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        sizes = [in_features, *widths]
        for inputs, outputs in itertools.pairwise(sizes):
            layers.append(nn.Linear(inputs, outputs))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(nn.ReLU(inplace=True))  # backward needs no pre-activation
            if dropout:
                layers.append(nn.Dropout(dropout))
        if head:
            layers.append(nn.Linear(sizes[-1], 1))
        super().__init__(*layers)
        self.out_features = 1 if head else sizes[-1]

    def after_first_layer(self, hidden: Tensor) -> Tensor:
        """Apply all layers after the first linear layer to its output."""
        for layer in itertools.islice(self, 1, None):
            hidden = layer(hidden)
        return hidden

    def linear_layers(self) -> list[nn.Linear]:
        """Return the linear layers in order."""
        return [layer for layer in self if isinstance(layer, nn.Linear)]


class ParallelMLPs(nn.ModuleList):
    """MLPs of equal shape, computed together: the towers of the tasks, or the experts.

    Their layers at each depth are one batched matrix product; the parameters are those of separate
    MLPs.

    Args:
        count: Number of MLPs.
        in_features: Columns of the input of each MLP.
        widths: Outputs of each linear layer.
        dropout: Dropout probability in [0, 1).
        batch_norm: Whether a batch norm follows each linear layer.
        head: Whether each MLP ends in a logit.
    """

    def __init__(
        self,
        count: int,
        in_features: int,
        widths: Sequence[int],
        *,
        dropout: float,
        batch_norm: bool,
        head: bool = False,
    ) -> None:
        super().__init__(
            MLP(in_features, widths, dropout=dropout, batch_norm=batch_norm, head=head)
            for _ in range(count)
        )

    def mlps(self) -> list[MLP]:
        """Return the MLPs."""
        return [mlp for mlp in self if isinstance(mlp, MLP)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply each MLP to its own input, ``(E, B, I)``; return ``(E, B, O)``."""
        return self.apply_slice(inputs, None, None)

    def after_first_layer(self, hidden: Tensor) -> Tensor:
        """Apply all layers after the first linear layers to their outputs, ``(E, B, O)``."""
        return self.apply_slice(hidden, 1, None)

    def gated(self, inputs: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Apply each MLP with a head to its own input; ``gates`` multiply the hidden layers.

        Args:
            inputs: ``(E, B, I)``.
            gates: Factors of each hidden layer's outputs, ``(E, B, O)`` each.
        """
        hidden, factors = inputs, iter(gates)
        for depth, modules in enumerate(zip(*self.mlps(), strict=True)):
            if depth and isinstance(modules[0], nn.Linear):
                hidden = hidden * next(factors)
            hidden = apply_together(modules, hidden)
        return hidden

    def first_layers(self) -> list[nn.Linear]:
        """Return the first linear layer of each MLP."""
        return self.by_depth()[0]

    def apply_slice(self, hidden: Tensor, start: int | None, stop: int | None) -> Tensor:
        """Apply the modules ``[start:stop]`` of each MLP; with a head, it is the last module."""
        mlps = [list(mlp)[start:stop] for mlp in self.mlps()]
        for modules in zip(*mlps, strict=True):
            hidden = apply_together(modules, hidden)
        return hidden

    def by_depth(self) -> list[list[nn.Linear]]:
        """Return the linear layers, one list per depth."""
        return [
            list(depth) for depth in zip(*(mlp.linear_layers() for mlp in self.mlps()), strict=True)
        ]


def apply_together(modules: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Apply modules of one kind, each to its own slice of ``(E, B, I)``."""
    if isinstance(modules[0], nn.Linear):
        weights = torch.stack([layer.get_parameter("weight") for layer in modules])
        biases = torch.stack([layer.get_parameter("bias") for layer in modules])
        return _products(hidden, weights, biases)
    if isinstance(modules[0], nn.BatchNorm1d):
        slices = zip(modules, hidden.unbind(), strict=True)
        return torch.stack([norm(part) for norm, part in slices])
    return modules[0](hidden)  # ReLU and dropout act elementwise


def _products(hidden: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Return the outputs of ``E`` linear layers, ``(E, B, O)``, for inputs ``(E, B, I)``."""
    return torch.baddbmm(biases.unsqueeze(1), hidden, weights.transpose(1, 2))


def init_towers(depths: Sequence[Sequence[nn.Linear]], tower_init: str) -> None:
    """Let all towers start from the weights and biases of the first one, or leave them as drawn.

    The first tower and all other layers start from the same values either way.

    Args:
        depths: The layers of the towers, one list per depth.
        tower_init: ``independent`` leaves each tower its own values, ``equal`` copies the first's.

    Raises:
        InputError: If there is one tower only, or towers differ in shape.
    """
    check_choice("model.tower_init", tower_init, ["independent", "equal"])
    if tower_init == "independent":
        return
    rule = "model.tower_init must be independent where"
    for number, (first, *others) in enumerate(depths):
        if not others:
            raise InputError(f"{rule} there is one tower, got equal. Leave it out.")
        shapes = [tuple(layer.weight.shape) for layer in (first, *others)]
        if len({*shapes}) > 1:
            raise InputError(
                f"{rule} towers differ in shape, got equal and the shapes "
                f"{', '.join(map(str, shapes))} at depth {number}. Leave it out."
            )
        for layer in others:
            layer.load_state_dict(first.state_dict())


def check_sizes(*, dropout: float, batch_norm: bool, **widths: Sequence[int]) -> None:
    """Check the keys common to all networks; ``widths`` by key name.

    Raises:
        InputError: If a list of widths is empty, a width is below 1, or ``dropout`` is not
            a probability below 1.
    """
    check_number("model.dropout", dropout, minimum=0, maximum=1, open_maximum=True)
    check_flag("model.batch_norm", batch_norm)
    for name, sizes in widths.items():
        if isinstance(sizes, str | int) or not len(sizes):
            raise InputError(f"model.{name} must be a list of at least one width, got {sizes!r}")
        for size in sizes:
            check_integer(f"model.{name}", size, minimum=1)
