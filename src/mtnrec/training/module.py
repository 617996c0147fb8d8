"""LightningModule that trains any network."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric

from mtnrec.arrays import Int64Array
from mtnrec.batch import Batch, LogProbabilities
from mtnrec.checks import InputError, check_flag, check_number
from mtnrec.data.datamodule import DataModule
from mtnrec.metric.added import AddedMetrics
from mtnrec.metric.task_metrics import MeasuredRows, TaskMetrics
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.loss import require_labels
from mtnrec.model.network import require_network, split_parameters
from mtnrec.objective.objective import Objective
from mtnrec.optimizer.lazy_adam import LazyAdam
from mtnrec.optimizer.scheduler import make_scheduler
from mtnrec.schema import Schema
from mtnrec.training.cuda_graph import CudaGraphLoss, can_be_captured
from mtnrec.training.divergence import HUGE
from mtnrec.training.limits import total_steps
from mtnrec.training.selection import monitor_mode

_ADAM = partial(torch.optim.Adam, lr=1e-3, weight_decay=0.0, fused=True)
_SHOWN_ROWS = 5
_SUM_EVERY_N_STEPS = 16  # reading a value waits for the accelerator


class MultiTaskModule(L.LightningModule):
    """Trains a network on the sum, or the mean, of its losses.

    These are the labels' cross entropies, unless ``loss`` or the network has others. Each epoch
    logs ``train/loss`` (the sum, or mean, of the cross entropies, without any penalty),
    ``train/loss_name`` of each loss and ``val/task_metric``; the test logs ``test/task_metric``,
    and the same of each further test set. ``results`` keeps the last values of each split in full
    precision, and ``calibration_curves`` the columns of each task's curve after a test, under
    ``test/task``. Every checkpoint carries ``metadata``, which describes the model.

    Checkpoints of weights that are not finite are refused.

    Args:
        network: A :class:`~mtnrec.model.network.Network`.
        schema: Fields and labels of the data.
        optimizer: Makes the optimiser from the parameters.
        embedding_weight_decay: The optimiser's ``weight_decay`` of the embedding tables, which then
            are a parameter group of their own; None leaves them with the others.
        scheduler: Makes a schedule of :mod:`torch.optim.lr_scheduler` from the optimiser. It is
            updated after each step; ``ReduceLROnPlateau`` after each validation. Some keywords may
            be None: ``T_max`` and ``total_steps`` are then the steps of the whole training,
            ``max_lr`` the optimiser's rate and ``mode`` the better direction of the monitor. The
            learning rate of each epoch's last step is logged as ``train/learning_rate``.
        monitor: Validation metric for ``ReduceLROnPlateau``.
        loss: A :class:`~mtnrec.objective.loss.Loss`; the cross entropy by default. A network with
            its own ``losses`` takes no other.
        balance: A :class:`~mtnrec.objective.balance.Balance` of the losses; their plain sum by
            default.
        task_loss: ``sum``, as in eq. 5, or ``mean``, as in MTReclib, with which the same ``lambda``
            weighs as much as ``lambda * T`` with the sum.
        metrics: More metrics by name, as in :class:`~mtnrec.metric.added.AddedMetrics`.
        min_group_rows: Minimum number of a task's rows that a group must have to count in its
            grouped AUC.
        cuda_graphs: Whether a GPU captures the passes of the network and replays them, if network
            and loss have ``supports_cuda_graphs``; no effect on a CPU.
        keep_scores: Whether ``tested_rows`` keeps the predictions of each test set.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        schema: Schema,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = _ADAM,
        embedding_weight_decay: float | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        monitor: str = "val/cvr_auc",
        loss: nn.Module | None = None,
        balance: nn.Module | None = None,
        task_loss: str = "sum",
        metrics: Mapping[str, Metric] | None = None,
        min_group_rows: int = 1,
        cuda_graphs: bool = False,
        keep_scores: bool = False,
    ) -> None:
        super().__init__()
        require_network(network)
        check_flag("cuda_graphs", cuda_graphs)
        self.network = network
        self.objective = Objective(
            network, schema.labels, loss=loss, balance=balance, task_loss=task_loss
        )
        if cuda_graphs and not self.objective.has_fixed_balance:
            raise InputError(
                "cuda_graphs must be false for a balance that adapts, got true with "
                f"{type(self.objective.balance).__name__}. Set it to false, or choose balance=sum."
            )
        self._optimizer = optimizer
        if embedding_weight_decay is not None:
            check_number("optimizer.embedding_weight_decay", embedding_weight_decay, minimum=0)
        self._embedding_weight_decay = embedding_weight_decay
        self._scheduler = scheduler
        self._monitor = monitor
        self._schema = schema
        self.added_metrics = AddedMetrics(metrics or {})
        self._make_metrics = partial(
            TaskMetrics, schema, self.added_metrics, min_group_rows=min_group_rows
        )
        self.val_metrics = self._make_metrics()
        self.test_metrics: list[tuple[str, TaskMetrics]] = []  # by test set
        self._values: list[tuple[int, Tensor]] = []  # row counts and latest values to log
        self._sums: list[float] = []  # of the values times the row counts, in this epoch
        self._rows = 0
        self.results: dict[str, dict[str, float]] = {}
        self.calibration_curves: dict[str, dict[str, list[float]]] = {}
        self.metadata: dict[str, Any] = {}
        self._keep_scores = keep_scores
        self.tested_rows: dict[str, MeasuredRows] = {}
        self._cuda_graphs = cuda_graphs
        self._graph: CudaGraphLoss | None = None
        self._batch: Batch | None = None  # for the losses after the step

    def forward(self, batch: Batch) -> LogProbabilities:
        """Return the log-probabilities of the labels, ``(B, T)`` each."""
        return self.network(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = self._objective(batch) if self._graph is None else self._graph(batch)
        self._values.append((len(batch), found[1:].detach()))
        if self.objective.is_adapted_after_steps:
            self._batch = batch
        return found[0]

    def _objective(self, batch: Batch) -> Tensor:
        return self.objective(self.network, batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.objective.is_balanced_by_gradients:
            rows, values = self._values.pop()
            measured = self.objective.backward(self.network, loss)
            self._values.append((rows, torch.cat([values, measured])))
        else:
            super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        if len(self._values) == _SUM_EVERY_N_STEPS:
            self._sum_values()
        if self.trainer.is_last_batch or self.trainer.global_step + 1 == self.trainer.max_steps:
            self._log_values()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._batch is not None:
            # Not at the end of the batch, since a checkpoint may be saved before that.
            with self.trainer.precision_plugin.train_step_context():
                self.objective.after_step(self.network, self._batch)
            self._batch = None

    def on_train_start(self) -> None:
        steps_alone = self.trainer.accumulate_grad_batches == 1
        captures = self._cuda_graphs and steps_alone and can_be_captured(self.network)
        captures = captures and self.objective.supports_cuda_graphs
        self._graph = CudaGraphLoss(self.network, self._objective) if captures else None

    def on_train_end(self) -> None:
        self._graph = None  # the parameters leave the GPU

    def _sum_values(self) -> None:
        if not self._values:
            return
        rows, values = zip(*self._values, strict=True)
        # One by one, so that the sum does not depend on where a checkpoint splits it.
        for count, found in zip(rows, torch.stack(values).tolist(), strict=True):
            sums = self._sums or [0.0] * len(found)
            self._sums = [total + count * one for total, one in zip(sums, found, strict=True)]
            self._rows += count
        self._values.clear()

    def _log_values(self) -> None:
        self._sum_values()
        for name, total in zip(self.objective.value_names, self._sums, strict=True):
            self.log(
                f"train/{name}",
                total / self._rows,
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                sync_dist=True,
                batch_size=self._rows,
            )
        if self._scheduler is not None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("train/learning_rate", rate, on_step=False, on_epoch=True, batch_size=1)
        self._sums, self._rows = [], 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        floats = [w for w in checkpoint["state_dict"].values() if w.is_floating_point()]
        if not get_total_norm(floats, norm_type=math.inf).isfinite():
            raise InputError(
                "a checkpoint must have finite weights, got NaN or infinity after step "
                f"{checkpoint['global_step']}. Set a lower optimizer.lr, set "
                "trainer.gradient_clip_val, or choose trainer.precision=32-true. The last "
                "checkpoint stays."
            )
        checkpoint["mtnrec"] = self.metadata
        self._sum_values()
        if self._rows:  # within an epoch
            own = [self._sums, self._rows]
            checkpoint["train_values"] = _gather_ranks(own)
        if hasattr(self.objective.loss, "rank_state"):
            checkpoint["loss"] = _gather_ranks(self.objective.loss.rank_state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint.get("train_values")
        self._sums, self._rows = ranks[self.global_rank] if ranks else ([], 0)
        states = checkpoint.get("loss")
        if states and hasattr(self.objective.loss, "load_rank_state"):
            self.objective.loss.load_rank_state(states[self.global_rank])

    def validation_step(self, batch: Batch) -> None:
        self.val_metrics.update(self(batch), require_labels(batch), batch.group)

    def on_test_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DataModule):
            names = data.test_splits
        else:
            count = len(self.trainer.num_test_batches)
            names = ["test", *(f"test_{number}" for number in range(1, count))]
        self.test_metrics = [(name, self._make_metrics().to(self.device)) for name in names]

    def test_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        _, metrics = self.test_metrics[dataloader_idx]
        metrics.update(self(batch), require_labels(batch), batch.group)

    def on_validation_start(self) -> None:
        if dist.is_initialized():  # batch norm's statistics come from each rank's own rows
            for buffer in self.network.buffers():
                dist.broadcast(buffer, src=0)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)
        if not self.trainer.sanity_checking:
            # Here, since Lightning would do it after the checkpoint of the epoch.
            for config in self.trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, ReduceLROnPlateau):
                    config.scheduler.step(self.results["val"][self._monitor])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    @property
    def test_results(self) -> dict[str, float]:
        """``results`` of all test sets of the last test."""
        return {
            key: value
            for split, _ in self.test_metrics
            for key, value in self.results[split].items()
        }

    def on_test_epoch_end(self) -> None:
        for split, metrics in self.test_metrics:
            self._log_metrics(split, metrics)
        self.calibration_curves = {
            f"{split}/{task}": {name: column.tolist() for name, column in curve._asdict().items()}
            for split, metrics in self.test_metrics
            for task, curve in metrics.curves.items()
        }

    def _log_metrics(self, split: str, metrics: TaskMetrics) -> None:
        data = getattr(self.trainer, "datamodule", None)
        true = data.column(split, "probabilities") if isinstance(data, DataModule) else None
        found = metrics.compute(true)
        values = {f"{split}/{name}": value.item() for name, value in found.items()}
        if self._keep_scores and split != "val" and metrics.rows is not None:
            self.tested_rows[split] = metrics.rows
        metrics.reset()
        if len(metrics.nan_rows):
            raise self._nan_scores(split, metrics.nan_rows.numpy())
        self.results[split] = values
        for name, value in values.items():
            if not name.endswith(("_rows", "_positives")):
                self.log(name, value, sync_dist=True)

    def _nan_scores(self, split: str, positions: Int64Array) -> InputError:
        """Return the error that names rows whose scores are NaN, as a feature of them may be."""
        if (data := getattr(self.trainer, "datamodule", None)) is None:
            return InputError(f"scores must be numbers, got NaN for {len(positions)} {split} rows")
        arrays, rows = data.stored(split)
        numbers = rows[positions]
        values = np.abs(arrays["numerical"][numbers]).max(initial=0)
        name = "training" if split == "val" else split
        shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
        remedy = (
            f"Their numerical features reach {values:g}. Scale them, or leave these rows out."
            if not values <= HUGE
            else "Set a lower optimizer.lr, or choose trainer.precision=32-true."
        )
        return InputError(
            f"{split} scores must be numbers, got NaN for {len(numbers)} of {len(rows)} rows (row "
            f"{shown}{', …' if len(numbers) > _SHOWN_ROWS else ''} of the {name} file, from 0). "
            f"{remedy}"
        )

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_processes()
            # DDP checks for sparse gradients before Lightning configures the optimiser.
            self._make_optimizer()
            self._set_rates()

    def _check_processes(self) -> None:
        objective = self.objective
        alone = objective.is_balanced_by_gradients or objective.is_adapted_after_steps
        if alone and (processes := self.trainer.world_size) > 1:
            raise InputError(
                f"balance must be sum, weights or uncertainty for several processes, got "
                f"{type(objective.balance).__name__} with {processes}: each would balance the "
                "losses of its own rows. Set trainer.devices=1, or choose another balance."
            )

    def _set_rates(self) -> None:
        if not hasattr(self.objective.loss, "set_rates"):
            return
        labels = getattr(getattr(self.trainer, "datamodule", None), "split_labels", None)
        rates = None if labels is None else torch.from_numpy(labels("train").mean(axis=0))
        self.objective.loss.set_rates(rates)

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer()
        if self._scheduler is None:
            return optimizer
        scheduler = make_scheduler(
            self._scheduler,
            optimizer,
            steps=total_steps(self.trainer),
            mode=monitor_mode(self._monitor, self._schema, self.added_metrics.directions),
        )
        # Without a monitor Lightning leaves a plateau's step to `lr_scheduler_step`.
        kept = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": kept}

    def _make_optimizer(self) -> Optimizer:
        balance = self.objective.balance
        try:
            optimizer = self._optimizer(self._parameter_groups())
            _check_weight_decay(optimizer, self._embedding_weight_decay)
            if own := list(balance.parameters()):
                # A weight of a loss does not decay.
                optimizer.add_param_group({"params": own, "lr": balance.lr, "weight_decay": 0.0})
        # For example a rate out of range; torch names rule and value.
        except (ValueError, TypeError) as error:
            raise InputError(f"optimizer: {error}") from error
        lazy = isinstance(optimizer, LazyAdam)
        if lazy and self.objective.is_balanced_by_gradients:
            raise InputError(
                f"balance={type(balance).__name__} needs dense gradients, and optimizer=lazy_adam "
                "has sparse ones. Choose optimizer=adam, or another balance."
            )
        if lazy and dist.is_initialized() and dist.get_backend() == "nccl":
            raise InputError(
                "optimizer=lazy_adam has sparse gradients, which NCCL cannot sum over processes. "
                "Choose trainer.devices=1, optimizer=adam, or a strategy with "
                "process_group_backend=gloo."
            )
        for part in self.network.modules():
            if isinstance(part, FeatureInput):
                part.make_gradients(sparse=lazy)
        return optimizer

    def _parameter_groups(self) -> Iterable[Any]:
        if self._embedding_weight_decay is None:
            return self.network.parameters()
        parts = split_parameters(self.network)
        own = {"params": parts["embeddings"], "weight_decay": self._embedding_weight_decay}
        return [{"params": parts["network"]}, own]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and isinstance(optimizer, LazyAdam):
            optimizer = optimizer.gradients_to_clip()
        # The balance's gradients are of another scale, and must not shrink those of the network.
        own = list(self.objective.balance.parameters())
        gradients = [parameter.grad for parameter in own]
        for parameter in own:
            parameter.grad = None
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient


def _gather_ranks(own: Any) -> list[Any]:
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _check_weight_decay(optimizer: Optimizer, embedding_weight_decay: float | None) -> None:
    """Refuse a decay of the embeddings that the optimiser would ignore."""
    if embedding_weight_decay is not None and "weight_decay" not in optimizer.defaults:
        raise InputError(
            f"optimizer.embedding_weight_decay must be null for {type(optimizer).__name__}, which "
            f"has no weight decay, got {embedding_weight_decay}. Choose optimizer=adam."
        )
