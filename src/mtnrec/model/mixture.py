"""Mixtures of experts, shared or of a task."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtnrec.batch import Batch
from mtnrec.checks import InputError
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.mlp import check_sizes

MOST_EXPERTS = 10_000


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


def mix_and_train(weights: Tensor, experts: Tensor, trained: Tensor) -> Tensor:
    """Return the weighted sums of :func:`mix`, in which a stream trains only some experts.

    Args:
        weights: As in :func:`mix`.
        experts: As in :func:`mix`.
        trained: Whether a stream has a gradient with respect to an expert, ``(S, E)``.
    """
    weights = weights.to(experts.dtype)
    if torch.compiler.is_exporting():
        return mix(weights, experts)
    mixed: Tensor = _MixAndTrain.apply(weights, experts, trained)  # type: ignore[no-untyped-call]
    return mixed


class _MixAndTrain(torch.autograd.Function):
    """One product each way, where a sum of attached and detached mixtures would take two."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, experts: Tensor, trained: Tensor) -> Tensor:
        ctx.save_for_backward(weights, experts, trained)
        return torch.bmm(weights, experts).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, experts, trained = ctx.saved_tensors
        gradient = gradients[0].transpose(0, 1)  # (B, S, O)
        of_weights = torch.bmm(gradient, experts.transpose(1, 2))
        return of_weights, torch.bmm((weights * trained).transpose(1, 2), gradient), None


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


class Levels(nn.ModuleList):
    """Levels of experts, each of which turns streams into those of the next.

    A level has its ``experts`` and ``expert_outputs``, returns by ``first_layers()`` the groups of
    layers that read the streams, and continues by ``after_first_layers`` from their outputs, so
    that those of the first level stay folded into the input.
    """

    @property
    def expert_outputs(self) -> nn.Module:
        """Module that the outputs ``(B, E, O)`` of the last level's experts pass through."""
        return self._levels()[-1].expert_outputs

    def forward(self, features: FeatureInput, batch: Batch) -> Tensor:
        """Return the streams after the last level, ``(T, B, O)``."""
        first, *others = self._levels()
        streams = first.after_first_layers(*features.first_layers(batch, *first.first_layers()))
        for level in others:
            streams = level(streams)
        return streams

    def by_depth(self) -> list[list[nn.Linear]]:
        """Return, for each depth of all levels, the linear layers of all experts."""
        return list(chain.from_iterable(level.experts.by_depth() for level in self._levels()))

    def _levels(self) -> list[Any]:
        return list(cast(Any, self))


def linear_layers(layers: nn.ModuleList) -> list[nn.Linear]:
    """Return the linear layers of a list of modules."""
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def check_levels(levels: Sequence[Sequence[int]], *, dropout: float, batch_norm: bool) -> None:
    """Check the widths of the experts' layers, level by level, and the keys of all networks.

    Raises:
        InputError: If levels are missing, or a level's widths are not a list of widths.
    """
    if isinstance(levels, str | int) or not len(levels):
        raise InputError(
            "model.levels must be a list with the expert widths of each level, as in "
            f"[[512], [256]], got {levels!r}"
        )
    for widths in levels:
        check_sizes(dropout=dropout, batch_norm=batch_norm, levels=widths)
