"""Schedule of the learning rate."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtnrec.checks import InputError

_STEPS = ("T_max", "total_steps")


def make_scheduler(
    build: Callable[[Optimizer], LRScheduler], optimizer: Optimizer, *, steps: float, mode: str
) -> LRScheduler:
    """Build a schedule, with the keywords that a partial call leaves at None filled in.

    Args:
        build: A class of :mod:`torch.optim.lr_scheduler`, or a partial call of one.
        optimizer: Optimiser whose rates change.
        steps: Optimiser steps of the whole training, for ``T_max`` and ``total_steps``; infinite if
            unknown.
        mode: ``max`` or ``min``, for ``mode``. ``max_lr`` is filled with the optimiser's own rates.

    Raises:
        InputError: If the steps are needed and unknown, or torch refuses a keyword.
    """
    known: dict[str, Any] = dict.fromkeys(_STEPS, steps) | {"mode": mode}
    known["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    given = build.keywords if isinstance(build, partial) else {}
    filled = {key: known[key] for key, value in given.items() if value is None and key in known}
    if not math.isfinite(max((filled[key] for key in _STEPS if key in filled), default=0)):
        raise InputError(
            "scheduler must know the number of steps, got a training without an end. Set "
            "trainer.max_epochs or trainer.max_steps."
        )
    try:
        return build(optimizer, **filled)
    except (ValueError, TypeError) as error:
        raise InputError(f"scheduler: {error}") from error
