"""The scores of the test rows, as a run keeps them."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mtnrec.metric.task_metrics import MeasuredRows, log_probability
from mtnrec.run.scores import Scores, write_scores
from mtnrec.schema import Schema


def keep_scores(folder: Path, schema: Schema, rows: Mapping[str, MeasuredRows]) -> dict[str, str]:
    """Write the scores of each test set, and return the SHA-256 of each file.

    Args:
        folder: Folder of the run.
        schema: The tasks.
        rows: Predictions by test set.
    """
    return {name: write_scores(folder, name, to_scores(schema, of)) for name, of in rows.items()}


def to_scores(schema: Schema, rows: MeasuredRows) -> Scores:
    """Return the scores that the AUC of each task is computed on, in float32."""
    scores, labels = {}, {}
    for task in schema.tasks:
        score = log_probability(task, rows.positive).float()
        label = rows.labels[:, task.label] > 0
        if task.given is not None:
            measured = rows.labels[:, task.given] > 0
            score = torch.where(measured, score, torch.nan)
            label &= measured
        scores[task.name], labels[task.name] = score.numpy(), label.numpy()
    return Scores(scores, labels, None if rows.groups is None else rows.groups.numpy())
