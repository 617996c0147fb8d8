"""The point that an interrupted run goes on from."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint

from mtnrec.batch import Batch
from mtnrec.checkpoint.io import check_format, check_weights, read_checkpoint
from mtnrec.checks import InputError, check_integer
from mtnrec.files import remove_leftovers

BEST, _LAST = "best.ckpt", "last.ckpt"
_FORMAT = 1  # of what the callbacks and the module keep; raised where older files do not serve

_logger = logging.getLogger(__name__)


class ResumePoint(Checkpoint):
    """Keeps, at the end of each epoch and on request within, what the rest of a training needs.

    A run that goes on from ``last.ckpt`` ends with the bits of an uninterrupted one. The file is
    replaced in one step, so that there is a whole one whenever the process is killed, and removed
    by :meth:`discard` when it has served.

    Args:
        directory: Folder of the run; the file is ``checkpoints/last.ckpt`` in it.
        cell: Hash of what determines the result.
        every_n_steps: Steps of the optimiser after which it is written within an epoch too; None
            writes it at the end of epochs alone.

    Raises:
        InputError: If ``every_n_steps`` is no integer above 0; when fit starts, if validation runs
            within the epochs too.
    """

    def __init__(self, directory: Path, cell: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            check_integer("trainer.checkpoint_every_n_steps", every_n_steps, minimum=1)
        self.path = directory / "checkpoints" / _LAST
        self._cell = cell
        self._every_n_steps = every_n_steps
        self._step = 0
        self._random_state: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._every_n_steps is not None and trainer.val_check_interval != 1.0:
            # Lightning would leave out a validation that was due at the checkpoint.
            raise InputError(
                "trainer.checkpoint_every_n_steps needs trainer.val_check_interval=1.0, got "
                f"{trainer.val_check_interval}: set the one to 1.0 or the other to null"
            )
        if trainer.is_global_zero:
            for name in (BEST, _LAST):
                remove_leftovers(self.path.with_name(name))

    def state_dict(self) -> dict[str, Any]:
        # Dropout draws from the global streams, which are the same on all ranks.
        state = {
            "format": _FORMAT,
            "origin": self._origin(),
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
        # Lightning forgets that the last epoch had ended the training.
        trainer.should_stop = any(
            callback is not None and callback.wait_count >= callback.patience
            for callback in trainer.early_stopping_callbacks
        )

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
        """Return the file if this run can go on from it.

        It cannot in a folder that was moved: Lightning looks for the best epoch where it was.

        Args:
            trainer: What is to train.
            module: What is to be trained.

        Raises:
            InputError: If it is damaged, no checkpoint of a run, of another version of mtnrec, or
                of another model or schema.
        """
        if not self.path.is_file():
            return None
        remedy = "remove it or set resume=false to train anew, or choose another hydra.run.dir"
        checkpoint = read_checkpoint(self.path, remedy)
        state = checkpoint["callbacks"].get(self.state_key)
        if not isinstance(state, dict):
            raise InputError(f"{self.path} is no checkpoint of a run of mtnrec: {remedy}")
        check_format(self.path, state.get("format"), _FORMAT, remedy)
        check_weights(self.path, checkpoint["state_dict"], module.state_dict(), remedy)
        if (state.get("origin"), state.get("ranks")) != (self._origin(), trainer.world_size):
            _logger.warning(
                "%s is of other settings, of other processes or was moved: training starts anew",
                self.path,
            )
            return None
        best = self.path.with_name(BEST)
        if any(of.get("best_model_path") for of in checkpoint["callbacks"].values()):
            if not best.is_file():
                raise InputError(f"{best}, which {self.path} goes on with, is gone: {remedy}")
            read_checkpoint(best, remedy, keys=("state_dict",))
        _logger.info(
            "goes on from %s, after epoch %d, step %d",
            self.path,
            checkpoint["epoch"],
            checkpoint["global_step"],
        )
        return self.path

    def discard(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)
