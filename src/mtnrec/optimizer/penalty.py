"""Gradient of a penalty: added to that of the loss, or applied as a separate step (decoupled)."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COUPLINGS = ("gradient", "decoupled")
SAMPLED_EVERY_N_STEPS = 16  # for figures that take a pass over the gradients

Gradients = Iterable[tuple[nn.Parameter, Tensor, float]]  # parameter, gradient of R, weight of R


def apply_penalty(
    gradients: Gradients, optimizer: Optimizer, *, lam: float, coupling: str, gradient_scale: float
) -> None:
    """Apply ``lam`` times the penalty's gradients, once per optimiser step and before it.

    Args:
        gradients: Each parameter, its gradient and a weight.
        optimizer: Optimiser of the parameters.
        lam: Strength of the penalty.
        coupling: ``gradient`` adds to the gradient of the loss; ``decoupled`` moves the weights by
            ``lr * lam`` times the gradient, as AdamW does with weight decay.
        gradient_scale: Scale of the loss's gradients, :func:`gradient_scale`.
    """
    if coupling == "gradient":
        add_to_gradients(gradients, scale=lam * gradient_scale)
    else:
        move_parameters(gradients, optimizer, strength=lam)


def add_to_gradients(gradients: Gradients, *, scale: float) -> None:
    """Add the penalty's gradients, each times its weight and ``scale``, to those of the loss.

    Frozen parameters are skipped.
    """
    for parameter, gradient, weight in gradients:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(gradient, alpha=scale * weight)


@torch.no_grad()
def move_parameters(gradients: Gradients, optimizer: Optimizer, *, strength: float) -> None:
    """Step against the penalty's gradients, at the learning rate of each parameter's group.

    Parameters that are frozen or not in the optimiser are skipped.
    """
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter, gradient, weight in gradients:
        if parameter.requires_grad and id(parameter) in rates:
            parameter.sub_(gradient, alpha=rates[id(parameter)] * strength * weight)


def gradient_scale(trainer: L.Trainer, optimizer: Optimizer) -> float:
    """Return the scale of the gradients when ``on_before_optimizer_step`` is called.

    It is 1 except for fused optimisers in fp16, which unscale inside their step, after the hook.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return scaler.get_scale()


def loss_share(penalty: Tensor, loss: Tensor) -> Tensor:
    """Return the share of a penalty in the sum of penalty and loss."""
    return penalty / (loss + penalty)


class Push:
    """Push of a penalty: the norm of its gradient relative to that of the loss's gradient.

    Both norms are root mean squares over sampled steps of an epoch, on the penalised weights. So
    penalties whose gradients differ in norm can be compared.
    """

    def __init__(self) -> None:
        self.samples: list[Tensor] = []  # squared norms of both gradients, (2,)

    def is_due(self, step: int) -> bool:
        """Return whether to sample this step: at least one in each epoch."""
        return step % SAMPLED_EVERY_N_STEPS == 0 or not self.samples

    @torch.no_grad()
    def sample(self, gradients: Gradients, *, lam: float, gradient_scale: float) -> None:
        """Measure a step; call it while the parameters hold the gradients of the loss alone."""
        found = []
        for parameter, gradient, weight in gradients:
            own = torch.linalg.vector_norm(gradient) * (lam * weight)
            data = parameter.grad
            data_norm = own.new_zeros(()) if data is None else torch.linalg.vector_norm(data)
            found.append(torch.stack([own, data_norm / gradient_scale]))
        self.samples.append(torch.stack(found).double().square().sum(dim=0))

    def pop(self) -> dict[str, Tensor]:
        """Return ``push`` of the sampled steps, empty without a gradient of the loss; forget them.

        >>> push = Push()
        >>> push.samples += [torch.tensor([1.0, 100.0]), torch.tensor([3.0, 300.0])]
        >>> push.pop(), push.pop()
        ({'push': tensor(0.1000)}, {})
        """
        if not self.samples:
            return {}
        own, data = torch.stack(self.samples).sum(dim=0)
        self.samples = []
        return {"push": (own / data).sqrt()} if data > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the samples of this epoch."""
        return {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Restore the samples, on a device."""
        self.samples = [sample.to(device) for sample in state_dict["samples"]]
