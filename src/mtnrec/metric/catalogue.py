"""Metrics, and the keys under which values are logged and recorded.

A metric is an entry of ``METRICS`` and a method with its name on
:class:`~mtnrec.metric.task_metrics.TaskRows`; training, records, tables, figures and W&B follow
from the entry. This module does not import torch, so that reading runs does not need it.

Keys::

    val/ctcvr_auc                          split/task_metric
    val/mean_auc                           the mean over the tasks, which belongs to none
    mtn/layer_0/effective_rank_output      mtn/layer_<depth>/<quantity>[_<unfolding>]
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class MetricInfo:
    """Properties of a metric.

    Args:
        title: Title in tables and figures.
        better: Better direction: ``higher``, ``lower``, or ``one`` (closer to 1).
        can_monitor: Whether it can choose the epoch.
        needs_both_classes: Whether it is undefined on rows of one class.
        is_measured: Whether it is computed from predictions and labels; the others take the true
            probabilities, which synthetic logs have.
    """

    title: str
    better: Literal["higher", "lower", "one"]
    can_monitor: bool = False
    needs_both_classes: bool = False
    is_measured: bool = True

    def improves(self, value: Any, baseline: Any) -> Any:
        """Return whether a value beats the baseline's, for numbers, arrays or columns."""
        return self.cost(value) < self.cost(baseline)

    def cost(self, value: Any) -> Any:
        """Return values that are smaller the better, for numbers, arrays or columns."""
        if self.better == "one":
            return abs(value - 1)
        return value if self.better == "lower" else -value


METRICS = {
    "auc": MetricInfo("AUC", better="higher", can_monitor=True, needs_both_classes=True),
    "log_loss": MetricInfo("log loss", better="lower", can_monitor=True),
    "calibration": MetricInfo("calibration", better="one"),
    "ece": MetricInfo("expected calibration error", better="lower", can_monitor=True),
    "grouped_auc": MetricInfo("grouped AUC", better="higher"),
    "grouped_share": MetricInfo("share of rows in grouped AUC", better="higher"),
    "bayes_auc": MetricInfo("Bayes AUC", better="higher", is_measured=False),
    "all_rows_auc": MetricInfo(
        "AUC over all rows against the true probability", better="higher", is_measured=False
    ),
    "all_rows_log_loss": MetricInfo(
        "log loss over all rows against the true probability", better="lower", is_measured=False
    ),
}
COUNTS = ("rows", "positives")
MEAN_AUC = "mean_auc"  # of all tasks
ALL_TASKS = "all"  # in place of a task, for the mean


def metric_info(name: str, better: str = "higher") -> MetricInfo:
    """Return the properties of a metric.

    Args:
        name: Name of the metric.
        better: Better direction, used for metrics that a run adds to the catalogue's.

    >>> metric_info("auc").title, metric_info("average_precision").title
    ('AUC', 'average precision')
    """
    if name == MEAN_AUC:
        return MetricInfo("mean AUC of the tasks", better="higher")
    if name in METRICS:
        return METRICS[name]
    return MetricInfo(name.replace("_", " "), better="lower" if better == "lower" else "higher")


_LAYER_KEY = re.compile(r"mtn/layer_(\d+)/(alpha|effective_rank)_(\w+)")


class MetricKey(NamedTuple):
    """Parsed key of a metric or a count."""

    split: str
    task: str
    metric: str

    def __str__(self) -> str:
        return metric_key(*self)


def metric_key(split: str, task: str, metric: str) -> str:
    """Return the key of a metric or of a count.

    >>> metric_key("val", "ctcvr", "auc"), metric_key("val", ALL_TASKS, MEAN_AUC)
    ('val/ctcvr_auc', 'val/mean_auc')
    """
    return f"{split}/{metric}" if metric == MEAN_AUC else f"{split}/{task}_{metric}"


def parse_metric_key(key: str, tasks: Collection[str] | None = None) -> MetricKey | None:
    """Parse the key of a metric or a count; return None for any other key.

    Args:
        key: Key to parse, for example ``val/ctcvr_auc``.
        tasks: Task names. Task and metric names may contain underscores: without ``tasks`` the
            longest known metric name is taken.

    >>> parse_metric_key("test/ctr_grouped_auc")
    MetricKey(split='test', task='ctr', metric='grouped_auc')
    >>> parse_metric_key("test/ctr_grouped_auc", ["ctr_grouped"]).metric
    'auc'
    >>> parse_metric_key("val/mean_auc")
    MetricKey(split='val', task='all', metric='mean_auc')
    >>> parse_metric_key("train/loss")
    """
    split, _, rest = key.partition("/")
    if rest == MEAN_AUC and "mean" not in (tasks or ()):
        return MetricKey(split, ALL_TASKS, MEAN_AUC)
    if tasks is not None:
        found = [task for task in tasks if rest.startswith(f"{task}_")]
        task = max(found, key=len, default="")
        return MetricKey(split, task, rest.removeprefix(f"{task}_")) if found else None
    found = [metric for metric in (*METRICS, *COUNTS) if rest.endswith(f"_{metric}")]
    metric = max(found, key=len, default="")
    return MetricKey(split, rest.removesuffix(f"_{metric}"), metric) if found else None


class LayerKey(NamedTuple):
    """Parsed key of a quantity that a penalised layer has per unfolding."""

    layer: int
    quantity: str
    unfolding: str

    def __str__(self) -> str:
        return layer_key(self.layer, f"{self.quantity}_{self.unfolding}")


def layer_key(layer: int | str, quantity: str) -> str:
    """Return the key of a penalised layer's quantity.

    >>> layer_key(0, "norm"), layer_key(0, "alpha_task")
    ('mtn/layer_0/norm', 'mtn/layer_0/alpha_task')
    """
    return f"mtn/layer_{layer}/{quantity}"


def parse_layer_key(key: str) -> LayerKey | None:
    """Parse the key of an alpha or an effective rank; return None for any other key.

    >>> parse_layer_key("mtn/layer_0/effective_rank_output")
    LayerKey(layer=0, quantity='effective_rank', unfolding='output')
    """
    found = _LAYER_KEY.fullmatch(key)
    return None if found is None else LayerKey(int(found[1]), found[2], found[3])
