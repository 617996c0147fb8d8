"""Weights of the penalty: alpha of the unfoldings, and layer weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtnrec.mtn.trace_norm import layer_norms

LAYER_WEIGHTINGS = ("mean", "exponential_decay", "learned", "gated")
_DECAY = 0.5  # exponential_decay: ratio of a layer's weight to the previous one


class MixingWeights(nn.Module):
    """Alpha (eq. 2) and layer weights, learned or fixed; all start uniform and sum to 1.

    Learned weights are a softmax of parameters that start at zero, so no random number is drawn.
    All weights are float64, whatever the precision of the model, and stay on the CPU: launching
    their few operations on a GPU would take longer than computing them.
    A learned alpha drifts to the smallest norm, since the loss that it weights is linear in it.

    Args:
        layers: Number of layers, ``L``.
        multiplicities: For each of the ``S`` norms that alpha weights, the number of subsets in
            eq. 2 that have it; alpha starts proportional to that number, and each subset learns at
            its own rate. ``(1, 1, 1)`` for the distinct unfoldings; ``(2, 2, 2, 1)`` for all
            subsets: a set of modes and its complement share an unfolding, and the full set's norm
            is ``||W||_F``.
        alpha: ``learned``, ``uniform``, or ``S`` fixed weights.
        layer_weighting: ``mean``; ``exponential_decay``, weights proportional to ``0.5 ** i`` with
            ``i = 0`` next to the input; ``learned``; ``gated``, a softmax of an affine map of
            the layers' shares of the norm (the shares are taken as given, not differentiated).
    """

    def __init__(
        self,
        *,
        layers: int,
        multiplicities: Sequence[int],
        alpha: str | Sequence[float],
        layer_weighting: str,
    ) -> None:
        super().__init__()
        self._layers = layers
        self.subsets = len(multiplicities)
        self.alpha_logits = _zero_parameter(layers, self.subsets) if alpha == "learned" else None
        counts = torch.tensor(multiplicities, dtype=torch.float64)
        self.register_buffer("multiplicities", counts, persistent=False)
        fixed = (counts / counts.sum()).tolist() if isinstance(alpha, str) else list(alpha)
        fixed += [0.0] * (self.subsets - len(fixed))
        fixed_alpha = torch.tensor([fixed], dtype=torch.float64)
        self.register_buffer("fixed_alpha", fixed_alpha, persistent=False)

        is_gated = layer_weighting == "gated"
        is_learned = layer_weighting == "learned" or is_gated
        self.layer_logits = _zero_parameter(layers) if is_learned else None
        self.gate = _zero_parameter(layers, layers) if is_gated else None
        ratio = _DECAY if layer_weighting == "exponential_decay" else 1.0
        decayed = ratio ** torch.arange(layers, dtype=torch.float64)
        self.register_buffer("fixed_layer_weights", decayed / decayed.sum(), persistent=False)

    def alpha(self) -> Tensor:
        """Return alpha, ``(L, S)``; rows sum to 1."""
        learned = self.alpha_logits
        if learned is None:
            return self.get_buffer("fixed_alpha").expand(self._layers, -1)
        return (learned + self.get_buffer("multiplicities").log()).softmax(dim=1)

    def layer_weights(self, norms: Tensor) -> Tensor:
        """Return the weight of each layer, ``(L,)``, summing to 1.

        Args:
            norms: ``R_i``, ``(L,)``; only ``gated`` uses them.
        """
        if self.layer_logits is None:
            return self.get_buffer("fixed_layer_weights")
        logits: Tensor = self.layer_logits
        if self.gate is not None:
            logits = logits + self.gate @ _shares(norms.detach())
        return logits.softmax(dim=0)

    @torch.no_grad()
    def set_gradients(self, norms: Tensor, frobenius: Tensor, *, scale: float) -> None:
        """Set each parameter's gradient of ``scale * sum_i w_i R_i``, as autograd would.

        For so few numbers an autograd graph costs several times as much as the formulas.

        Args:
            norms: Trace norms of the unfoldings, ``(L, S)``.
            frobenius: ``||W_i||_F``, ``(L,)``; zeros leave the term out.
            scale: Lambda.
        """
        alpha = self.alpha()
        totals = layer_norms(norms, alpha, frobenius)
        layer_weights = self.layer_weights(totals)
        if self.alpha_logits is not None:
            gradient = _through_softmax(alpha, scale * layer_weights.unsqueeze(1) * norms)
            self.alpha_logits.grad = gradient / self.get_buffer("multiplicities")
        if self.layer_logits is not None:
            self.layer_logits.grad = _through_softmax(layer_weights, scale * totals)
            if self.gate is not None:
                shares = _shares(totals)
                self.gate.grad = torch.outer(self.layer_logits.grad, shares)


def _through_softmax(probabilities: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a softmax's logits, given that of its probabilities."""
    centre = (probabilities * gradient).sum(dim=-1, keepdim=True)
    return probabilities * (gradient - centre)


def _shares(norms: Tensor) -> Tensor:
    return norms / norms.sum().clamp(min=torch.finfo(norms.dtype).tiny)


def _zero_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))
