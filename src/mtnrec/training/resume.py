"""The checkpoint from which an interrupted run resumes."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint

from mtnrec.batch import Batch
from mtnrec.checkpoint.io import check_format, check_weights, read_checkpoint
from mtnrec.checks import InputError, check_integer
from mtnrec.run.environment import describe_changes
from mtnrec.run.folder import BEST_CHECKPOINT, LAST_CHECKPOINT
from mtnrec.system.files import remove_leftovers
from mtnrec.training.selection import has_stopped

_FORMAT = 1  # of the state of callbacks and module; raised when older files no longer work

_logger = logging.getLogger(__name__)


class ResumePoint(Checkpoint):
    """Saves the state that a resumed run needs, after each epoch and on request within one.

    A run resumed from ``last.ckpt`` ends with the bits of an uninterrupted one. The file is
    replaced atomically, so that a complete one exists whenever the process is killed, and deleted
    by :meth:`discard` when it is no longer needed.

    Args:
        directory: Folder of the run; the file is ``checkpoints/last.ckpt`` in it.
        cell: Hash of everything that determines the result.
        code: Versions, threads and own sources, :func:`~mtnrec.run.environment.code_of_run`. A run
            whose own sources have changed restarts; other changes are warned about.
        every_n_steps: Optimiser steps after which it is also written within an epoch; None writes
            it only at the end of epochs.

    Raises:
        InputError: If ``every_n_steps`` is not an integer above 0, or, when fit starts, if
            validation also runs within epochs.
    """

    def __init__(
        self,
        directory: Path,
        cell: str,
        every_n_steps: int | None = None,
        *,
        code: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if every_n_steps is not None:
            check_integer("trainer.checkpoint_every_n_steps", every_n_steps, minimum=1)
        self.path = directory / LAST_CHECKPOINT
        self._best = directory / BEST_CHECKPOINT
        self._cell = cell
        self._code = dict(code)
        self._every_n_steps = every_n_steps
        self._step = 0
        self._random_state: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._every_n_steps is not None and trainer.val_check_interval != 1.0:
            # Lightning would skip a validation that was due at the checkpoint.
            raise InputError(
                "trainer.val_check_interval must be 1.0 with trainer.checkpoint_every_n_steps, got "
                f"{trainer.val_check_interval}. Set the first to 1.0, or the second to null."
            )
        if trainer.is_global_zero:
            for path in (self._best, self.path):
                remove_leftovers(path)

    def state_dict(self) -> dict[str, Any]:
        # Dropout draws from the global random streams, which are the same on all ranks.
        state = {
            "format": _FORMAT,
            "origin": self._origin(),
            "code": self._code,
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "cpu": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_state = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        if not self._random_state:
            return
        torch.set_rng_state(self._random_state["cpu"])
        if torch.cuda.is_available() and "cuda" in self._random_state:
            torch.cuda.set_rng_state(self._random_state["cuda"])
        # Lightning does not restore that the last epoch ended the training.
        trainer.should_stop = any(map(has_stopped, trainer.early_stopping_callbacks))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        has_stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if self._every_n_steps is None or not has_stepped or trainer.is_last_batch:
            return
        if self._step % self._every_n_steps == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)

    def _origin(self) -> list[str]:
        return [self._cell, str(self.path.parent.resolve())]

    def find(self, trainer: L.Trainer, module: L.LightningModule) -> Path | None:
        """Return the file if this run can resume from it, else None.

        It cannot in a folder that was moved: Lightning looks for the best epoch at the old path.

        Args:
            trainer: The trainer about to fit.
            module: The module to train.

        Raises:
            InputError: If it is damaged, not a checkpoint of a run, or of another version of
                mtnrec, model or schema.
        """
        if not self.path.is_file():
            return None
        remedy = (
            f"Delete {self.path.name}, set resume=false to restart, or choose another "
            "hydra.run.dir."
        )
        checkpoint = read_checkpoint(self.path, remedy)
        state = checkpoint["callbacks"].get(self.state_key)
        if not isinstance(state, dict):
            raise InputError(f"{self.path} is not a checkpoint of an mtnrec run. {remedy}")
        check_format(self.path, state.get("format"), _FORMAT, remedy)
        check_weights(self.path, checkpoint["state_dict"], module.state_dict(), remedy)
        if (state.get("origin"), state.get("ranks")) != (self._origin(), trainer.world_size):
            _logger.warning(
                "%s has other settings, a different world size, or was moved: training restarts",
                self.path,
            )
            return None
        changes = describe_changes(state.get("code", {}), self._code)
        if changes:
            own = any(change.startswith("source") for change in changes)
            _logger.warning(
                "%s was written by other code (%s): training %s",
                self.path,
                ", ".join(changes),
                "restarts" if own else "resumes, and may end with other bits",
            )
            if own:
                return None
        if any(kept.get("best_model_path") for kept in checkpoint["callbacks"].values()):
            if not self._best.is_file():
                raise InputError(f"{self._best} is missing, and {self.path} needs it. {remedy}")
            read_checkpoint(self._best, remedy, keys=("state_dict",))
        _logger.info(
            "resumes from %s, after epoch %d, step %d",
            self.path,
            checkpoint["epoch"],
            checkpoint["global_step"],
        )
        return self.path

    def discard(self) -> None:
        """Delete the file if it exists."""
        self.path.unlink(missing_ok=True)
