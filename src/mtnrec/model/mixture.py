"""Mixtures of experts, shared or of a task."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtnrec.checks import InputError
from mtnrec.model.mlp import check_sizes


def mix(weights: Tensor, experts: Tensor) -> Tensor:
    """Return the weighted sums of the experts' outputs, one per stream.

    Args:
        weights: Of each of ``S`` streams and each expert, ``(B, S, E)``.
        experts: ``(B, E, O)``.

    Returns:
        ``(S, B, O)``.
    """
    return torch.bmm(weights, experts).transpose(0, 1)


def mix_experts(experts: Tensor, logits: Tensor) -> Tensor:
    """Return the mean of the experts' outputs with each gate's softmax weights, ``(S, B, O)``.

    Args:
        experts: Outputs of the experts, ``(B, E, O)``.
        logits: Outputs of the gates, ``(S, B, E)``.
    """
    return mix(logits.transpose(0, 1).softmax(dim=2), experts)


def spread_own(weights: Tensor) -> Tensor:
    """Return weights of each task's own experts as weights of all tasks' experts, 0 elsewhere.

    Args:
        weights: ``(B, T, E)``, of the ``E`` experts of each task.

    Returns:
        ``(B, T, T * E)``, the experts task by task.

    >>> spread_own(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[1., 2., 0., 0.],
             [0., 0., 3., 4.]]])
    """
    tasks = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    return (tasks.unsqueeze(2) * weights.unsqueeze(2)).flatten(2)


def linear_layers(layers: nn.ModuleList) -> list[nn.Linear]:
    """Return the linear layers of a list of modules."""
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def check_levels(levels: Sequence[Sequence[int]], *, dropout: float, batch_norm: bool) -> None:
    """Check the widths of the experts' layers, level by level, and the keys of all networks.

    Raises:
        InputError: If there is no level, or a level's widths are not a list of widths.
    """
    if isinstance(levels, str | int) or not len(levels):
        raise InputError(
            "model.levels must be a list with the expert widths of each level, as in "
            f"[[512], [256]], got {levels!r}"
        )
    for widths in levels:
        check_sizes(dropout=dropout, batch_norm=batch_norm, levels=widths)
