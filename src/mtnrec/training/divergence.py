"""Stop training when the loss or a gradient is not finite, and explain why."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mtnrec.batch import Batch
from mtnrec.checks import InputError

_CHECK_EVERY_N_STEPS = 16  # a check waits for the accelerator and reads all gradients
_SHOWN_ROWS = 5
HUGE = 1e4  # prepared features are of the order of 1


class Divergence(L.Callback):
    """Stops training when the loss or a gradient is not finite.

    The losses of all batches are checked in groups of 16, and the gradient (the penalty's included)
    at every 16th step and the last of an epoch, before it changes the weights. Under fp16 with a
    loss scaler the gradient is not checked, since the scaler skips such steps. Every rank checks
    the losses of all, so that all stop alike and name the rows of the first bad one. This callback
    must come after MTN.

    Raises:
        InputError: With the step, the rows of the batch and the likely cause.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, int, Tensor]] = []

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self._losses.append((trainer.fit_loop.batch_idx, trainer.global_step, loss.detach()))
        if len(self._losses) == _CHECK_EVERY_N_STEPS or trainer.is_last_batch:
            self._check(trainer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step % _CHECK_EVERY_N_STEPS and not trainer.is_last_batch:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        norm = largest(
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            for p in pl_module.parameters()
            if p.grad is not None
        )
        if not math.isfinite(norm):
            self._check(trainer)  # a bad loss says more: it names the rank's rows
            place = trainer.fit_loop.batch_idx, trainer.global_step
            raise _error(trainer, "gradient", norm, *place)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._check(trainer)

    @contextmanager
    def explain_failures(self, trainer: L.Trainer) -> Iterator[None]:
        """Report a loss that is not finite as the cause if a decomposition fails in the block."""
        try:
            yield
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            self._check(trainer)
            raise

    def _check(self, trainer: L.Trainer) -> None:
        seen, self._losses = self._losses, []
        if not seen:
            return
        gathered = trainer.strategy.all_gather(torch.stack([loss for *_, loss in seen]))
        for (batch, step, _), losses in zip(
            seen, gathered.view(-1, len(seen)).T.tolist(), strict=True
        ):
            for rank, value in enumerate(losses):
                if not math.isfinite(value):
                    raise _error(trainer, "loss", value, batch, step, rank)


def largest(tensors: Iterator[Tensor]) -> float:
    """Return the largest absolute value of some tensors; NaN if one is NaN.

    >>> largest(iter([torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor([2])]))
    3.0
    """
    found = [t for t in tensors if t.numel() and t.is_floating_point()]
    return get_total_norm(found, norm_type=math.inf).item()


def _error(
    trainer: L.Trainer, what: str, value: float, number: int, step: int, rank: int | None = None
) -> InputError:
    loader: Any = trainer.train_dataloader
    epoch = trainer.current_epoch
    positions = loader.sampler.batch_rows(epoch, number, rank)
    rows = trainer.datamodule.row_numbers["train"][positions]  # type: ignore[attr-defined]
    some = ", ".join(str(row) for row in rows[:_SHOWN_ROWS])
    return InputError(
        f"the {what} must be finite, got {value} at step {step} (epoch {epoch}, batch {number}: "
        f"{len(rows)} rows, {some}{', …' if len(rows) > _SHOWN_ROWS else ''} of the training "
        f"file). {_cause(trainer, loader.dataset[positions])} The last checkpoint stays."
    )


def _cause(trainer: L.Trainer, batch: Batch) -> str:
    values = largest(iter([batch.numerical, *(bag.weights for bag in batch.bags)]))
    if not values <= HUGE:
        return f"Its numerical features reach {values:g}. Scale them, or leave their rows out."
    if str(trainer.precision).startswith("16"):
        return "fp16 ends at 65504. Choose trainer.precision=bf16-mixed or 32-true."
    rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
    return (
        f"Its features reach only {values:g}, so the learning rate is the likely cause. Set "
        f"optimizer.lr below {rate:g}, or set trainer.gradient_clip_val."
    )
