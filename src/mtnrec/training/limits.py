"""Keys of Lightning's trainer that change what a run means: refused before it starts, or in reach.

The protocol needs a validation to choose an epoch by, and a test.
"""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtnrec.checks import InputError, check_number

_PASSED = {  # keys that the run itself passes to the trainer, and what to set instead
    "callbacks": "Set callbacks=…, whose callbacks run after those of the protocol",
    "logger": "Choose logger=csv, tensorboard or wandb",
    "default_root_dir": "Set hydra.run.dir",
}
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
_MIXED = ("16-mixed", "bf16-mixed", "16", "bf16")  # names of Lightning
_NEIGHBOURS = 8  # batch sizes tried around one that leaves a single row


def check_trainer_keys(trainer: Mapping[str, Any]) -> None:
    """Refuse trainer keys that would be ignored, or that leave nothing to train, choose or test.

    Args:
        trainer: ``cfg.trainer``.

    Raises:
        InputError: With the key and what to set instead.
    """
    for key, remedy in _PASSED.items():
        if key in trainer:
            raise InputError(f"trainer.{key} must be left out, got {trainer[key]}. {remedy}.")
    if trainer.get("fast_dev_run"):
        raise InputError(
            f"trainer.fast_dev_run must be false, got {trainer['fast_dev_run']}: it keeps no epoch "
            "to test. Set debug=fast, a run of a few batches."
        )
    if trainer.get("use_distributed_sampler"):
        raise InputError(
            "trainer.use_distributed_sampler must be false, got true. Leave it out: the data set "
            "deals the rows to the processes."
        )
    for key in _LIMITS:
        if key in trainer and trainer[key] == 0:
            raise InputError(
                f"trainer.{key} must be above 0, got {trainer[key]}: a run trains, chooses an "
                "epoch on validation rows and tests it. Set a number of batches, or debug=limit."
            )


def check_clipping(trainer: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Refuse gradient clipping that would be ignored, or that the optimiser cannot have.

    Args:
        trainer: ``cfg.trainer``.
        optimizer: ``cfg.optimizer``.

    Raises:
        InputError: With the key and what to set instead.
    """
    limit, precision = trainer.get("gradient_clip_val"), str(trainer.get("precision"))
    if limit is None:
        return
    check_number("trainer.gradient_clip_val", limit, minimum=0)
    if limit and optimizer.get("fused") and precision in _MIXED:
        raise InputError(
            "optimizer.fused must be false where gradients are clipped in mixed precision, got "
            f"true with trainer.gradient_clip_val={limit} and trainer.precision={precision}: the "
            "fused optimiser scales the gradients itself. Set optimizer.fused=false."
        )


def limit_batches(limit: float | None, batches: int) -> int:
    """Return how many of the batches a limit of Lightning leaves: a number, or a share."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(batches * limit)


def total_steps(trainer: L.Trainer) -> float:
    """Return the optimiser steps of a whole training; infinite for one without an end.

    Lightning's estimate would set the loader up before the position in a checkpoint is restored, so
    that a run resumed within an epoch would repeat batches.

    Args:
        trainer: The trainer about to fit.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:  # plain loaders, whose position is not saved
        return trainer.estimated_stepping_batches
    steps = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        batches = limit_batches(trainer.limit_train_batches, len(data.train_dataloader()))
        steps = -(-batches // trainer.accumulate_grad_batches) * trainer.max_epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def check_first_validation(trainer: L.Trainer, batches: int) -> None:
    """Refuse a training that would end before its first validation.

    Args:
        trainer: The trainer about to fit.
        batches: Training batches of an epoch, without limits.

    Raises:
        InputError: If it would.
    """
    interval: Any = trainer.val_check_interval
    every = trainer.check_val_every_n_epoch
    if not isinstance(interval, int | float):  # a time
        return
    batches = limit_batches(trainer.limit_train_batches, batches)
    if not batches:
        raise InputError(
            "trainer.limit_train_batches must leave a batch, got "
            f"{trainer.limit_train_batches}. Set a number of batches, or a larger share."
        )
    if isinstance(interval, int) and every is not None and interval > batches:
        raise InputError(
            f"trainer.val_check_interval must be at most {batches}, the batches of an epoch, got "
            f"{interval}. Set a share of the epoch, for example 0.5, or leave it out."
        )
    within = interval if isinstance(interval, int) else max(1, int(interval * batches))
    first = within if every is None else (every - 1) * batches + within
    full, rest = divmod(first - 1, batches)  # epochs and batches before that of the validation
    accumulated = trainer.accumulate_grad_batches
    steps = full * -(-batches // accumulated) + rest // accumulated
    epochs, most = trainer.max_epochs, trainer.max_steps
    if (epochs is not None and 0 <= epochs <= full) or 0 <= most <= steps:
        raise InputError(
            f"training would end before its first validation, after {steps + 1} steps in epoch "
            f"{full}, so there would be no epoch to test: trainer.max_epochs={epochs}, "
            f"trainer.max_steps={most}. Set more epochs or steps, or validate earlier."
        )


def check_batch_norm(
    network: nn.Module, *, rows: int, batch_size: int, world_size: int, limited: bool
) -> None:
    """Refuse a training batch of a single row per process, which batch norm cannot normalise.

    Args:
        network: The network to train.
        rows: Training rows.
        batch_size: Rows per batch in each process.
        world_size: Processes.
        limited: Whether the last batch of an epoch is left out.

    Raises:
        InputError: With batch sizes that leave no such batch.
    """
    if not any(isinstance(part, _BatchNorm) for part in network.modules()):
        return

    def smallest(size: int) -> int:
        each = rows // world_size
        return size if limited and each > size else each % size or size

    if smallest(batch_size) > 1:
        return
    near = range(max(2, batch_size - _NEIGHBOURS), batch_size + _NEIGHBOURS + 1)
    fits = [size for size in near if smallest(size) > 1]
    nearest = [s for s in fits if s < batch_size][-1:] + [s for s in fits if s > batch_size][:1]
    sizes = " or ".join(map(str, nearest))
    other = f"data.batch_size={sizes}, or " if sizes else ""
    raise InputError(
        "data.batch_size must not leave a batch of one row per process for batch norm, got "
        f"{batch_size} with {rows} training rows and {world_size} process"
        f"{'' if world_size == 1 else 'es'}. Set {other}model.batch_norm=false."
    )
