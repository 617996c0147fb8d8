"""Inverse propensities of clicks, as weights of rows, and how much they can be trusted."""

import math

import torch
from torch import Tensor


def inverse_propensities(
    log_propensities: Tensor, observed: Tensor, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """Return the weights of the observed rows, and whether each is clipped, ``(B,)`` each.

    The weight is ``min(1 / p, clip_ratio / mean(observed))``, and 0 of the other rows. The bound is
    relative, since ``1 / p`` is about ``1 / mean(observed)``: a fixed bound of 10 or 20 would make
    all weights of a log with a CTR of 2 % equal.

    Args:
        log_propensities: ``log p``, ``(B,)``; no gradient reaches it.
        observed: 1 or 0, ``(B,)``.
        clip_ratio: At least 1.
    """
    logs = -log_propensities.detach()
    bound = math.log(clip_ratio) - observed.mean().log()  # infinite without an observed row
    is_observed = observed > 0
    weights = torch.where(is_observed, torch.minimum(logs, bound).exp(), 0)
    return weights, is_observed & (logs > bound)


@torch.no_grad()
def measure_weights(
    weights: Tensor, clipped: Tensor, clicks: Tensor, cvr_logits: Tensor
) -> dict[str, Tensor]:
    """Return diagnostics of a batch; those over clicked rows are 0 without any.

    ``clipped_share`` of the clicked rows; ``largest_weight``; ``effective_share``, the effective
    sample size divided by the clicks; ``mean_weight`` over all rows, 1 if CTR is calibrated;
    ``mean_cvr`` over all rows and ``mean_clicked_cvr`` over clicked ones.

    Args:
        weights: Weights of the clicked rows, 0 of the others, ``(B,)``.
        clipped: Whether each is clipped, ``(B,)``.
        clicks: 1 or 0, ``(B,)``.
        cvr_logits: ``(B, 1)``.
    """
    number = clicks.sum().clamp(min=1)
    cvr = cvr_logits.squeeze(1).to(clicks.dtype).sigmoid()
    tiny = torch.finfo(weights.dtype).tiny
    return {
        "clipped_share": clipped.sum() / number,
        "largest_weight": weights.max(),
        "effective_share": weights.sum() ** 2 / weights.square().sum().clamp(min=tiny) / number,
        "mean_weight": weights.mean(),
        "mean_cvr": cvr.mean(),
        "mean_clicked_cvr": (clicks * cvr).sum() / number,
    }
