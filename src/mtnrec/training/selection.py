"""Protocol: validation chooses the epoch and stops the training; the test set is read once."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mtnrec.arrays import UInt8Array
from mtnrec.checks import InputError, check_choice, check_integer
from mtnrec.metric.catalogue import (
    ALL_TASKS,
    MEAN_AUC,
    METRICS,
    metric_key,
    parse_metric_key,
)
from mtnrec.run.folder import BEST_CHECKPOINT
from mtnrec.schema import Schema

STOPS = ("patience", "decreased")

_logger = logging.getLogger(__name__)


def monitor_mode(monitor: str, schema: Schema, added: Mapping[str, str] | None = None) -> str:
    """Check the monitor and return ``max`` or ``min``.

    Args:
        monitor: Metric of the validation set.
        schema: The tasks.
        added: Better direction of the metrics that the catalogue lacks, by name.

    Raises:
        InputError: If it is on the test set, or not a metric of the data set's tasks.
    """
    split, _, metric = monitor.partition("/")
    if split == "test" or split.startswith("test_"):
        raise InputError(
            f"monitor={monitor} would choose the epoch on the test set, whose result would then "
            f"estimate nothing. Choose monitor=val/{metric}."
        )
    better: dict[str, str] = {n: m.better for n, m in METRICS.items() if m.can_monitor}
    modes = {
        metric_key("val", task.name, name): "min" if direction == "lower" else "max"
        for task in schema.tasks
        for name, direction in (better | dict(added or {})).items()
    }
    modes[metric_key("val", ALL_TASKS, MEAN_AUC)] = "max"
    if monitor not in modes:
        raise InputError(f"monitor must be one of {', '.join(modes)}; got {monitor!r}")
    return modes[monitor]


class StopAfterDecreases(EarlyStopping):
    """Stops when the monitor got worse in each of ``patience`` epochs in a row.

    The paper's rule: "the training process stopped if AUC of CVR decreased for 3 consecutive
    epochs" (section 3.1). Each epoch is compared with the one before, while ``EarlyStopping``
    compares it with the best: a curve that jumps, as the AUC of CVR does on few positives, seldom
    falls three times in a row, so training continues.

    Args:
        monitor: Metric of the validation set.
        patience: Number of such epochs.
        mode: ``max`` or ``min``, the better direction of the metric.
    """

    def __init__(self, monitor: str, *, patience: int, mode: str) -> None:
        super().__init__(monitor, patience=patience, mode=mode)
        self.previous: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous": self.previous}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.previous = state_dict["previous"]

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> tuple[bool, str | None]:
        if not current.isfinite():
            return super()._evaluate_stopping_criteria(current)
        got_worse = self.previous is not None and self.monitor_op(self.previous, current)
        self.wait_count = self.wait_count + 1 if got_worse else 0
        self.previous = current
        if self.wait_count < self.patience:
            return False, None
        return True, f"{self.monitor} got worse in each of the last {self.patience} epochs"


def has_stopped(stopping: EarlyStopping | None) -> bool:
    """Return whether an early stopping has asked the training to stop, at any epoch so far.

    ``trainer.min_epochs`` may let the training continue; it stops as soon as it may.
    """
    if stopping is None:
        return False
    return stopping.wait_count >= stopping.patience or stopping.stopped_epoch > 0


def stop_reason(trainer: L.Trainer, epochs_done: int) -> str:
    """Describe why the training of a trainer ended after so many epochs."""
    epochs = f"{epochs_done} epoch{'' if epochs_done == 1 else 's'}"
    for stopping in filter(has_stopped, trainer.early_stopping_callbacks):
        assert stopping is not None
        if stopping.wait_count < stopping.patience:
            problem = f"{stopping.monitor} called for it in epoch {stopping.stopped_epoch}"
        elif isinstance(stopping, StopAfterDecreases):
            problem = f"{stopping.monitor} got worse {stopping.patience} times in a row"
        else:
            problem = f"{stopping.monitor} had no new best value {stopping.patience} times in a row"
        return f"stopped early after {epochs}: {problem}"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"ended after trainer.max_steps={trainer.max_steps} steps, {epochs}"
    if epochs_done == trainer.max_epochs:
        return f"ended after all {epochs} of trainer.max_epochs"
    return f"stopped early after {epochs}: a callback or trainer.max_time called for it"


def selection_callbacks(
    monitor: str,
    patience: int,
    directory: Path,
    *,
    stop: str,
    schema: Schema,
    validation_labels: UInt8Array,
    added: Mapping[str, str] | None = None,
) -> tuple[ModelCheckpoint, list[L.Callback]]:
    """Return the callback that keeps the best epoch, and all callbacks that follow the monitor.

    If the validation rows have only one class, an AUC is undefined: the last epoch is kept instead,
    training runs to ``max_epochs``, and a warning says what to do.

    Args:
        monitor: Metric of the validation set, for example ``val/cvr_auc``.
        patience: Epochs in a row after which training stops.
        directory: Folder of the run; the checkpoint is ``checkpoints/best.ckpt`` in it.
        stop: Rule for those epochs: ``patience``, none has a better value than the best so far;
            ``decreased``, each has a worse one than the epoch before (the paper's rule).
        schema: The tasks.
        validation_labels: ``(rows, T)``.
        added: Better direction of the metrics that the catalogue lacks, by name.

    Raises:
        InputError: If a value is out of range.
    """
    check_choice("stop", stop, STOPS)
    mode = monitor_mode(monitor, schema, added)
    check_integer("patience", patience, minimum=1)
    path = directory / BEST_CHECKPOINT
    # Without a version counter a second run in the same folder replaces the first one's checkpoint.
    checkpoint = partial(
        ModelCheckpoint,
        dirpath=path.parent,
        filename=path.stem,
        save_weights_only=True,  # `ResumePoint` saves the rest for resuming
        enable_version_counter=False,
    )
    if (problem := _undefined(monitor, schema, validation_labels)) is not None:
        _logger.warning(
            "%s is undefined: the validation set has %s. No epoch can be chosen by it and nothing "
            "stops the training early; the last epoch is tested. Choose another monitor, a larger "
            "data.validation_share, or more rows",
            monitor,
            problem,
        )
        last = checkpoint()
        return last, [last]
    best = checkpoint(monitor=monitor, mode=mode)
    stopping = StopAfterDecreases if stop == "decreased" else EarlyStopping
    return best, [best, stopping(monitor, patience=patience, mode=mode)]


def _undefined(monitor: str, schema: Schema, labels: UInt8Array) -> str | None:
    """Describe the validation rows of the first task whose metric is undefined on them."""
    key = parse_metric_key(monitor, {task.name for task in schema.tasks})
    if key is None:
        raise ValueError(f"{monitor} is not the key of a metric")
    of_all = key.metric == MEAN_AUC
    needs_both = of_all or (key.metric in METRICS and METRICS[key.metric].needs_both_classes)
    for task in schema.tasks:
        if not of_all and task.name != key.task:
            continue
        of_task = labels if task.given is None else labels[labels[:, task.given] == 1]
        rows, positives = len(of_task), int(of_task[:, task.label].sum())
        if not rows or (needs_both and not 0 < positives < rows):
            return f"{positives} positives among {rows} rows ({schema.definition(task)})"
    return None
