"""The protocol: validation chooses the epoch and stops the training, the test is read once."""

import logging
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mtnrec.checks import InputError, check_integer
from mtnrec.schema import Schema

# Which way each metric that can choose an epoch gets better.
_MODES = {"auc": "max", "log_loss": "min", "ece": "min"}

_logger = logging.getLogger(__name__)


def monitor_mode(monitor: str, schema: Schema) -> str:
    """Check the monitor and return ``max`` or ``min``.

    Raises:
        InputError: If it is on the test set, or no metric of the data set's tasks.
    """
    if monitor.startswith("test/"):
        raise InputError(
            f"monitor={monitor} would choose the epoch on the test set, whose result then is no "
            f"estimate of anything: choose monitor=val/{monitor.removeprefix('test/')}"
        )
    modes = {
        f"val/{t.name}_{metric}": mode for t in schema.tasks for metric, mode in _MODES.items()
    }
    if monitor not in modes:
        raise InputError(f"monitor must be one of {', '.join(modes)}; got {monitor!r}")
    return modes[monitor]


def make_callbacks(
    monitor: str,
    patience: int,
    directory: Path,
    *,
    schema: Schema,
    validation_labels: npt.NDArray[np.uint8],
) -> tuple[ModelCheckpoint, list[L.Callback]]:
    """Return the callback that keeps the best epoch, and all that follow the monitor.

    Where the validation rows have one class only, an AUC is undefined: the last epoch is kept
    instead, training goes on to ``max_epochs``, and a warning says what to do.

    Args:
        monitor: Metric of the validation set, ``val/cvr_auc`` say.
        patience: Epochs without a better value after which training stops.
        directory: Folder of the run; the checkpoint is ``checkpoints/best.ckpt`` in it.
        schema: The tasks.
        validation_labels: ``(rows, T)``.
    """
    mode = monitor_mode(monitor, schema)
    check_integer("patience", patience, minimum=1)
    # Without a version counter a second run in the same folder replaces the first one's checkpoint.
    checkpoint = partial(
        ModelCheckpoint,
        dirpath=directory / "checkpoints",
        filename="best",
        save_weights_only=True,  # `ResumePoint` keeps what a training goes on from
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
    return best, [best, EarlyStopping(monitor, patience=patience, mode=mode)]


def _undefined(monitor: str, schema: Schema, labels: npt.NDArray[np.uint8]) -> str | None:
    task = next(t for t in schema.tasks if monitor.removeprefix(f"val/{t.name}_") in _MODES)
    if task.given is not None:
        labels = labels[labels[:, task.given] == 1]
    rows, positives = len(labels), int(labels[:, task.label].sum())
    needs_both_classes = monitor.endswith("_auc")
    if rows and (0 < positives < rows or not needs_both_classes):
        return None
    return f"{positives} positives among {rows} rows ({schema.definition(task)})"
