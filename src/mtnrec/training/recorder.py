"""Times, metrics and versions of a run, for its record ``result.json``."""

import logging
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch

from mtnrec.batch import Batch
from mtnrec.metric.catalogue import COUNTS, parse_metric_key
from mtnrec.run.folder import report_progress

_logger = logging.getLogger(__name__)


class RunRecorder(L.Callback):
    """Times a run, keeps the metrics of each validation and epoch, and logs a line per validation.

    A resumed run includes the time spent until the checkpoint, and logs the earlier epochs again,
    so that each logger has them all. This callback must come after MTN, whose metrics it keeps.

    ``validations`` holds the metrics by global step; ``epochs`` holds each epoch's last values.

    Args:
        monitor: Metric that ``running.json`` shows after each epoch; None shows none.
    """

    def __init__(self, monitor: str | None = None) -> None:
        self._monitor = monitor
        self._started = time.perf_counter()
        self._stage_started = 0.0
        self._validated: dict[str, float] = {}
        self.seconds: dict[str, float] = {"fit": 0.0, "test": 0.0}
        self.validations: dict[int, dict[str, float]] = {}
        self.epochs: list[dict[str, float]] = []
        self._rows = {"train": 0, "evaluate": 0}
        self._spent = {"train": 0.0, "evaluate": 0.0}
        self._counted: str | None = None  # the stage that is timed now, and since when
        self._counted_since = 0.0

    def _count(self, stage: str | None) -> None:
        """Add the time since the last call to the running stage, then start ``stage``."""
        now = time.perf_counter()
        if self._counted is not None:
            self._spent[self._counted] += now - self._counted_since
        self._counted, self._counted_since = stage, now

    def state_dict(self) -> dict[str, Any]:
        self._count(self._counted)
        return {
            "fit_seconds": self.seconds["fit"] + time.perf_counter() - self._stage_started,
            "validations": self.validations,
            "epochs": self.epochs,
            "rows": self._rows,
            "spent": self._spent,
            "counted": self._counted,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds["fit"] = state_dict["fit_seconds"]
        self.validations = state_dict["validations"]
        self.epochs = state_dict["epochs"]
        self._rows = state_dict["rows"]
        self._spent = state_dict["spent"]
        self._counted = state_dict["counted"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counted_since = time.perf_counter()  # if the run resumes within an epoch
        for epoch in self.epochs:
            values = {name: value for name, value in epoch.items() if name != "step"}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=int(epoch["step"]) - 1)  # as Lightning counts

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds["setup"] = time.perf_counter() - self._started
        self._stage_started = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds["fit"] += time.perf_counter() - self._stage_started

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count("evaluate")
        self._stage_started = time.perf_counter()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds["test"] = time.perf_counter() - self._stage_started
        self._count(None)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count("train")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count(None)
        metrics = trainer.callback_metrics
        logged = {name: metrics[name].item() for name in metrics if _is_training_metric(name)}
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self.epochs.append(place | logged | self._validated)
        self._validated = {}
        if trainer.is_global_zero:
            found = [epoch for epoch in self.epochs if self._monitor in epoch]
            progress = {
                "epochs": len(self.epochs),
                "max_epochs": trainer.max_epochs,
                "monitor": self._monitor,
                "value": found[-1][self._monitor] if found and self._monitor else None,
            }
            report_progress(Path(trainer.default_root_dir), progress)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Validation runs inside the training epoch.
        self._count("evaluate")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count("train")
        values = cast(dict[str, dict[str, float]], pl_module.results)["val"]
        self.validations[trainer.global_step] = values
        self._validated = split_counts(values)[0]
        found = ((parse_metric_key(key), value) for key, value in values.items())
        aucs = ", ".join(f"{key.task} {v:.4f}" for key, v in found if key and key.metric == "auc")
        _logger.info("epoch %d, validation AUC: %s", trainer.current_epoch, aucs)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._rows["train"] += len(batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._rows["evaluate"] += len(batch)

    on_test_batch_end = on_validation_batch_end

    def samples_per_second(self) -> dict[str, float]:
        """Return this process's rows per second in ``train`` and ``evaluate``, with loading."""
        return {
            stage: rows / self._spent[stage]
            for stage, rows in self._rows.items()
            if self._spent[stage]
        }


def _is_training_metric(name: str) -> bool:
    return name.startswith(("train/", "mtn/", "regularizer/"))


def gpu_names() -> list[str]:
    """Return the names of the GPUs of this machine."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process plus its peak GPU memory."""
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + gpu


def split_counts(results: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``split/task_metric`` values into metrics and, by ``split/task``, counts."""
    metrics: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for name, value in results.items():
        task, _, last = name.rpartition("_")
        if last in COUNTS:
            counts.setdefault(task, {})[last] = int(value)
        else:
            metrics[name] = value
    return metrics, counts
