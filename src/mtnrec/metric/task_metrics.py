"""Metrics of every task over a whole split."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mtnrec.arrays import Float64Array, UInt8Array
from mtnrec.batch import LogProbabilities
from mtnrec.checks import check_integer
from mtnrec.metric import calibration, ranking
from mtnrec.metric.added import AddedMetrics
from mtnrec.metric.catalogue import MEAN_AUC, METRICS
from mtnrec.schema import Schema, Task

# CVR can exceed 1 where it is a quotient; its log loss, undefined there, uses this value instead.
# Calibration, its curve and its error use the quotient: the excess over 1 is part of the error.
_LARGEST_LOG_QUOTIENT = math.log(1 - 1e-7)


@dataclass(frozen=True)
class TaskRows:
    """Scores, labels and groups of the rows that a task is measured on, all ``(n,)``.

    Args:
        positive: ``log P(label = 1)``.
        negative: ``log P(label = 0)``.
        labels: 0 or 1.
        groups: Group ids; None if the data has none.
        min_group_rows: Minimum number of rows of a group in the grouped AUC.
    """

    positive: Tensor
    negative: Tensor
    labels: Tensor
    groups: Tensor | None
    min_group_rows: int = 1

    def metrics(self) -> dict[str, Tensor]:
        """Return every metric that is measured on predictions and defined for this data set."""
        names = [name for name, metric in METRICS.items() if metric.is_measured]
        values = {name: getattr(self, name)() for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def probabilities(self) -> Tensor:
        """Return the probabilities, float64, at most 1."""
        return self.positive.double().clamp(max=0).exp()

    @cached_property
    def scores(self) -> ranking.SortedScores:
        """Sorted scores, for everything that needs them in order."""
        return ranking.sort_scores(self.positive, self.labels)

    @cached_property
    def curve(self) -> calibration.CalibrationCurve:
        """Calibration curve."""
        # The probabilities have the order of the scores, so they are already sorted.
        probabilities = (part.double().exp() for part in self.scores)
        return calibration.curve_of_sorted(ranking.SortedScores(*probabilities))

    def auc(self) -> Tensor:
        """Area under the ROC curve."""
        return ranking.auc_of_sorted(self.scores)

    def log_loss(self) -> Tensor:
        """Mean cross entropy, at least 0."""
        # A quotient above 1 must not be rewarded on the rows that convert.
        return calibration.log_loss(self.positive.clamp(max=0), self.negative, self.labels)

    def calibration(self) -> Tensor:
        """Sum of the probabilities over the positives."""
        return calibration.calibration(self.curve)

    def ece(self) -> Tensor:
        """Expected calibration error."""
        return calibration.expected_calibration_error(self.curve)

    @cached_property
    def _grouped(self) -> ranking.GroupedAUC | None:
        if self.groups is None:
            return None
        return ranking.grouped_auc(
            self.positive, self.labels, self.groups, min_rows=self.min_group_rows
        )

    def grouped_auc(self) -> Tensor | None:
        """AUC within groups; None if the data has no groups."""
        return None if self._grouped is None else self._grouped.mean

    def grouped_share(self) -> Tensor | None:
        """Share of the rows whose group counts in the grouped AUC; None without groups."""
        return None if self._grouped is None else self._grouped.share


class MeasuredRows(NamedTuple):
    """Predictions of a split, in its order.

    Args:
        positive: ``log P(label = 1)``, ``(n, T)``.
        labels: 0 or 1, ``(n, T)``.
        groups: Group ids, ``(n,)``; None if the data has none.
    """

    positive: Tensor
    labels: Tensor
    groups: Tensor | None


def log_probability(task: Task, positive: Tensor) -> Tensor:
    """Return the log-probability of a task, ``(n,)``.

    For CVR it is ``log pCTCVR - log pCTR`` (paper, eq. 1): a difference ranks as the quotient does
    and never divides by zero. It can exceed 0 in a model with independent towers.

    Args:
        task: The task.
        positive: Log-probabilities of the labels, ``(n, T)``.
    """
    if task.given is None:
        return positive[:, task.label]
    return positive[:, task.label] - positive[:, task.given]


def task_probabilities(schema: Schema, positive: Tensor) -> list[Tensor]:
    """Return the probability of each task, ``(n,)`` each, at most 1.

    Args:
        schema: The tasks.
        positive: Log-probabilities of the labels, ``(n, T)``.
    """
    return [log_probability(task, positive).clamp(max=0).exp() for task in schema.tasks]


def rows_of_task(
    task: Task,
    output: LogProbabilities,
    labels: Tensor,
    groups: Tensor | None,
    min_group_rows: int = 1,
) -> TaskRows:
    """Pick the rows, scores and labels that a task is measured on.

    CVR is measured on the clicked rows.

    Args:
        task: The task.
        output: Log-probabilities of the labels, ``(n, T)`` each.
        labels: 0 or 1, ``(n, T)``.
        groups: ``(n,)`` or None.
        min_group_rows: Minimum number of rows of a group in the grouped AUC.
    """
    if task.given is None:
        positive, negative = (part[:, task.label] for part in output)
        return TaskRows(positive, negative, labels[:, task.label], groups, min_group_rows)
    chosen = labels[:, task.given].nonzero().squeeze(1)
    quotient = log_probability(task, output.positive[chosen])  # few rows, since clicks are rare
    _, complement = _bounded(quotient)
    chosen_groups = None if groups is None else groups[chosen]
    of_task = labels[chosen, task.label]
    return TaskRows(quotient, complement, of_task, chosen_groups, min_group_rows)


def _bounded(quotient: Tensor) -> LogProbabilities:
    """Return the float64 logs of a quotient below 1 and of its complement."""
    bounded = quotient.double().clamp(max=_LARGEST_LOG_QUOTIENT)
    return LogProbabilities(bounded, (-bounded.expm1()).log())


def all_rows_metrics(schema: Schema, positive: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """Return AUC and log loss of each conditional task (CVR) over all rows, as ``task_metric``.

    Labels show a conditional probability on the rows of its condition only: for CVR, on clicked
    rows. Where the truth ``p`` is known, these metrics compare the prediction with it on every row,
    without labels: the log loss is that expected of labels drawn from ``p``, and in the AUC each
    row is a positive with weight ``p`` and a negative with weight ``1 - p``.

    Args:
        schema: The tasks.
        positive: Log-probabilities of the labels, ``(n, T)``.
        probabilities: True ``P(label = 1)``, float64 ``(n, T)``, in the same order of rows.
    """
    values: dict[str, Tensor] = {}
    for task in schema.tasks:
        if task.given is None:
            continue
        true = probabilities[:, task.label] / probabilities[:, task.given]
        quotient = log_probability(task, positive)
        auc = ranking.weighted_auc(quotient, true, 1 - true)
        log_loss = calibration.expected_log_loss(*_bounded(quotient), true)
        values |= {f"{task.name}_all_rows_auc": auc, f"{task.name}_all_rows_log_loss": log_loss}
    return values


def bayes_aucs(schema: Schema, probabilities: Float64Array, labels: UInt8Array) -> dict[str, float]:
    """Return the AUC of the true probabilities for each task, as ``task_bayes_auc``.

    No scores have a larger AUC in expectation; a model is compared with it on the same rows.

    Args:
        schema: The tasks.
        probabilities: True ``P(label = 1)``, ``(n, T)``.
        labels: 0 or 1, ``(n, T)``.
    """
    true = torch.from_numpy(probabilities)
    output = LogProbabilities(true.log(), (-true).log1p())
    rows = {t.name: rows_of_task(t, output, torch.from_numpy(labels), None) for t in schema.tasks}
    return {f"{name}_bayes_auc": r.auc().item() for name, r in rows.items()}


class TaskMetrics(Metric):
    """Collects the predictions of a split and measures every task on all of them at once.

    Metrics are never averaged over batches; under DDP the predictions of all ranks are gathered
    first, in the order of the ranks, which is that of the split. Keeps ``9 T + 8`` bytes per row (8
    of them for groups); computing takes as many again plus about 25, and 80 more with true
    probabilities. ``curves`` holds the calibration curves of the last ``compute()`` by task; their
    bins are those of the calibration error, at no extra cost. ``nan_rows`` holds the positions of
    the rows that have a score that is not a number, as an int64 tensor. ``rows`` holds the
    predictions themselves until the next ``reset()``.

    Args:
        schema: Fields and labels of the data.
        added: Further metrics, measured on the same rows.
        min_group_rows: Minimum number of a task's rows that a group must have to count in its
            grouped AUC.

    Raises:
        InputError: If ``min_group_rows`` is below 1.
    """

    full_state_update = False
    positive: list[Tensor]
    negative: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(
        self, schema: Schema, added: AddedMetrics | None = None, *, min_group_rows: int = 1
    ) -> None:
        super().__init__()
        check_integer("min_group_rows", min_group_rows, minimum=1)
        self._min_group_rows = min_group_rows
        self._schema = schema
        self._added = AddedMetrics({}) if added is None else added
        self.curves: dict[str, calibration.CalibrationCurve] = {}
        self.nan_rows = torch.zeros(0, dtype=torch.long)
        self.rows: MeasuredRows | None = None
        for state in ("positive", "negative", "labels", "groups"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, output: LogProbabilities, labels: Tensor, group: Tensor | None) -> None:
        """Add a batch.

        Args:
            output: Log-probabilities of the labels, ``(B, T)`` each.
            labels: 0 or 1, ``(B, T)``.
            group: Group ids, ``(B,)``, or None.
        """
        self.positive.append(output.positive.detach())
        self.negative.append(output.negative.detach())
        self.labels.append(labels.to(torch.uint8))
        if group is not None:
            self.groups.append(group)

    def reset(self) -> None:
        super().reset()
        self.rows = None

    def compute(self, probabilities: Float64Array | None = None) -> dict[str, Tensor]:
        """Return every metric as a float64 scalar under ``task_metric``, and the counts.

        ``task_rows`` and ``task_positives`` are int64 scalars. ``mean_auc`` is the mean of the
        tasks' AUCs, NaN if one is undefined; a task called ``mean`` takes its place.

        Args:
            probabilities: True ``P(label = 1)`` of the split, ``(n, T)``, in its order, for the
                :func:`all_rows_metrics`. They are left out without it, and if rows of the split
                were not measured.
        """
        # On the CPU, since CUDA has no deterministic cumulative sum.
        output = LogProbabilities(
            dim_zero_cat(self.positive).cpu(), dim_zero_cat(self.negative).cpu()
        )
        groups = dim_zero_cat(self.groups).cpu() if len(self.groups) else None
        labels = dim_zero_cat(self.labels).cpu()
        self.nan_rows = output.positive.isnan().any(dim=1).nonzero().squeeze(1)
        self.rows = MeasuredRows(output.positive, labels, groups)
        values: dict[str, Tensor] = {}
        for task in self._schema.tasks:
            rows = rows_of_task(task, output, labels, groups, self._min_group_rows)
            self.curves[task.name] = rows.curve
            found = rows.metrics() | self._added.measure(rows.probabilities(), rows.labels)
            values |= {f"{task.name}_{name}": value for name, value in found.items()}
            values[f"{task.name}_rows"] = torch.tensor(len(rows.labels))
            values[f"{task.name}_positives"] = rows.labels.long().sum()
        aucs = torch.stack([values[f"{task.name}_auc"] for task in self._schema.tasks])
        values.setdefault(MEAN_AUC, aucs.mean())
        if probabilities is not None and len(probabilities) == len(labels):
            true = torch.from_numpy(probabilities)
            values |= all_rows_metrics(self._schema, output.positive, true)
        return values
