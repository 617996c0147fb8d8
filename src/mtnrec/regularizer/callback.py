"""Lightning callback that trains a model with a penalty on its weights, a rival of MTN."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtnrec.checks import check_choice, check_flag, check_number
from mtnrec.optimizer.layers import LayerChoice, stack_weights, weight_of
from mtnrec.optimizer.penalty import COUPLINGS, Push, apply_penalty, gradient_scale, loss_share
from mtnrec.regularizer.norm import NORMS


class Regularizer(L.Callback):
    """Adds ``lam * mean_i R_i`` to the objective; ``R_i`` is a norm of the weights at depth ``i``.

    The gradient is applied as MTN's is: once per optimiser step, after accumulation, all-reduce and
    unscaling, and before clipping. It adds nothing to the model and its ``state_dict``.

    Each epoch logs, under ``regularizer/``: ``norm`` (``mean_i R_i``), ``loss_share`` (penalty over
    loss plus penalty) and ``push`` (norm of the penalty's gradient over that of the loss's, with
    that of MTN if both act, on the penalised weights). The gradients of the norms differ in length,
    so that equal ``lam`` push differently: search ``lam`` for each norm.

    Args:
        norm: ``l2`` (``||W||_F^2 / 2``), ``frobenius`` (``||W||_F``), ``soft_sharing`` (half the
            squared distances between tasks, Duong et al., 2015) or ``group_lasso`` (the sum over
            inputs of the norms of their weights), of the stacked weights ``W``.
        lam: Strength of the penalty. 0 measures without changing the training.
        target: Layers to penalise: the task ``towers``, or parallel ``shared`` layers (experts).
        layers: ``all``, ``last_hidden``, or depths, as for :class:`mtnrec.MTN`.
        coupling: ``gradient`` or ``decoupled``, as for :class:`mtnrec.MTN`; decoupled ``l2`` is
            AdamW's weight decay on these layers alone.
        enabled: Whether the callback is active.

    Raises:
        InputError: If a value is out of range, or, when fit starts, if the model lacks such layers
            or they differ in shape.
    """

    def __init__(
        self,
        *,
        norm: str = "l2",
        lam: float = 1e-5,
        target: str = "towers",
        layers: str | Sequence[int] = "all",
        coupling: str = "gradient",
        enabled: bool = True,
    ) -> None:
        check_choice("regularizer.norm", norm, list(NORMS))
        check_number("regularizer.lam", lam, minimum=0)
        check_choice("regularizer.coupling", coupling, COUPLINGS)
        check_flag("regularizer.enabled", enabled)
        least = 2 if norm == "soft_sharing" else 1
        self._choice = LayerChoice("regularizer", target, layers, least)
        self.norm = norm
        self.lam = lam
        self.target = target
        self.layers = layers
        self.coupling = coupling
        self.enabled = enabled

        self._depths: dict[int, list[nn.Linear]] = {}
        self._push = Push()
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.enabled and stage == "fit":
            self._depths = self._choice.find(pl_module.network)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored:
            self._push.load_state_dict(self._restored, pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        return self._push.state_dict() if self._depths else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._depths:
            return
        scale = gradient_scale(trainer, optimizer)
        if self._push.is_due(trainer.global_step):
            self._push.sample(self._gradients(), lam=self.lam, gradient_scale=scale)
        if self.lam:
            apply_penalty(
                self._gradients(),
                optimizer,
                lam=self.lam,
                coupling=self.coupling,
                gradient_scale=scale,
            )

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """Yield each parameter, its gradient of ``R_i``, and the weight of the mean."""
        for layers in self._depths.values():
            _, gradients = NORMS[self.norm](stack_weights(layers))
            for layer, gradient in zip(layers, gradients, strict=True):
                yield weight_of(layer), gradient, 1 / len(self._depths)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._depths:
            return
        norms = [NORMS[self.norm](stack_weights(layers))[0] for layers in self._depths.values()]
        values = {"norm": torch.stack(norms).mean(), **self._push.pop()}
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            values["loss_share"] = loss_share(self.lam * values["norm"], loss)
        # Several processes average the values on the model's device.
        pl_module.log_dict(
            {f"regularizer/{k}": v.float().to(pl_module.device) for k, v in values.items()},
            sync_dist=True,
        )
