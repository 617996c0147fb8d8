"""The point that an interrupted run goes on from."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

_logger = logging.getLogger(__name__)


class ResumePoint(Checkpoint):
    """Keeps, at the end of each epoch, all that the rest of a training depends on.

    A run that goes on from ``last.ckpt`` ends with the bits of an uninterrupted one. The file is
    replaced in one step, so that there is a whole one whenever the process is killed, and removed
    by :meth:`discard` when it has served.

    Args:
        directory: Folder of the run; the file is ``checkpoints/last.ckpt`` in it.
        cell: Hash of what determines the result.
    """

    def __init__(self, directory: Path, cell: str) -> None:
        self.path = directory / "checkpoints" / "last.ckpt"
        self._cell = cell
        self._random_state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        # Dropout draws from the global streams.
        state = {"origin": self._origin(), "cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_state = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        temporary = self.path.with_name(".last.ckpt.tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            temporary.replace(self.path)

    def _origin(self) -> list[str]:
        return [self._cell, str(self.path.parent.resolve())]

    def find(self) -> Path | None:
        """Return the file if this run can go on from it.

        It cannot in a folder that was moved: Lightning looks for the best epoch where it was.
        """
        if not self.path.is_file():
            return None
        checkpoint = torch.load(self.path, weights_only=True, mmap=True)
        if checkpoint["callbacks"][self.state_key]["origin"] != self._origin():
            _logger.warning("%s is of other settings or was moved: training starts anew", self.path)
            return None
        _logger.info("goes on from %s, after epoch %d", self.path, checkpoint["epoch"])
        return self.path

    def discard(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)
