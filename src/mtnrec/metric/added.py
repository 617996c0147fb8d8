"""Metrics that a run adds to those of the catalogue: of torchmetrics, or the user's own."""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mtnrec.checks import InputError
from mtnrec.metric.catalogue import COUNTS, METRICS

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class AddedMetrics:
    """Metrics of probabilities and labels, computed once on all rows of a task.

    Args:
        metrics: Metrics by name. Each takes float64 probabilities in [0, 1] and int64 labels, both
            ``(n,)``, and returns a number. Its ``higher_is_better`` tells the report and
            ``monitor`` the better direction.

    Raises:
        InputError: If a name or a metric does not fit.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        for name, metric in metrics.items():
            _check_name(name)
            _check_metric(name, metric)
        # In one process, since the predictions of all processes are gathered before.
        self._metrics = {name: _in_one_process(metric) for name, metric in metrics.items()}

    @property
    def directions(self) -> dict[str, str]:
        """Better direction of each metric, ``higher`` or ``lower``."""
        return {
            name: "higher" if metric.higher_is_better else "lower"
            for name, metric in self._metrics.items()
        }

    def measure(self, probabilities: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return each metric as a float64 scalar; NaN without rows.

        Args:
            probabilities: ``(n,)``, at most 1.
            labels: 0 or 1, ``(n,)``.
        """
        if not len(labels):
            return dict.fromkeys(self._metrics, torch.tensor(torch.nan, dtype=torch.float64))
        return {
            name: _value(metric, probabilities, labels.long()).double()
            for name, metric in self._metrics.items()
        }


def _check_name(name: str) -> None:
    own = (*METRICS, *COUNTS)
    if _NAME.fullmatch(str(name)) and not any(f"_{name}".endswith(f"_{other}") for other in own):
        return
    raise InputError(
        "metrics must have names of lower-case letters, digits and _ that do not end in "
        f"{', '.join(own)}, got {name!r}. Rename it, for example precision_at_10."
    )


def _check_metric(name: str, metric: Any) -> None:
    if not isinstance(metric, Metric):
        raise InputError(
            f"metrics.{name} must be a torchmetrics.Metric, got {metric!r}. Give it a _target_, "
            "the import path of its class."
        )
    if metric.higher_is_better is None:
        raise InputError(
            f"metrics.{name} must say which direction is better, got higher_is_better=None of "
            f"{type(metric).__name__}. Set the class attribute higher_is_better in a subclass."
        )
    probabilities = torch.tensor([0.25, 0.75, 0.5, 0.125], dtype=torch.float64)
    try:
        value: Any = _value(_in_one_process(metric), probabilities, torch.tensor([0, 1, 1, 0]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"metrics.{name} must take probabilities and labels, both (n,): {error}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(f"metrics.{name} must return one number, got {value!r}.")


def _value(metric: Metric, probabilities: Tensor, labels: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undefined values, which are NaN in the record
        metric.reset()
        metric.update(probabilities, labels)
        found: Tensor = metric.compute()
    return found


def _in_one_process(metric: Metric) -> Metric:
    own = copy.deepcopy(metric)
    own.distributed_available_fn = _not_distributed
    return own


def _not_distributed() -> bool:
    return False
