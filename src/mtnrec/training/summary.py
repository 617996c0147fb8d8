"""Table printed after training."""

import math

from rich import box
from rich.table import Table

from mtnrec.metric.catalogue import metric_key
from mtnrec.run.record import RunRecord
from mtnrec.schema import Schema


def summary_table(schema: Schema, record: RunRecord) -> Table:
    """Return the table of results, one row per task.

    Args:
        schema: The tasks.
        record: Record of the run.
    """
    metrics, counts = record.metrics, record.counts
    shown = {"test\nAUC": "auc", "log\nloss": "log_loss", "Bayes\nAUC": "bayes_auc"}
    monitor = record.config["monitor"]
    title = f"Best epoch {record.best_epoch}, chosen by {monitor}"
    if math.isnan(metrics[monitor]):
        title = f"Last epoch {record.best_epoch}: {monitor} is undefined"
    table = Table(
        title=title,
        caption="rows, positives and log loss: test set",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    if metric_key("test", schema.tasks[0].name, "bayes_auc") not in metrics:
        del shown["Bayes\nAUC"]
    else:
        table.caption = f"{table.caption}; Bayes AUC: of the true probabilities on its rows"
    table.add_column("task")
    table.add_column("definition")
    for header in ("rows", "positives", "val\nAUC", *shown):
        table.add_column(header, justify="right")
    for task in schema.tasks:
        count = counts[f"test/{task.name}"]
        keys = [metric_key("val", task.name, "auc")]
        keys += [metric_key("test", task.name, metric) for metric in shown.values()]
        table.add_row(
            task.name.upper() if schema.funnel else task.name,
            schema.definition(task),
            f"{count['rows']:,}",
            f"{count['positives']:,}",
            *(f"{metrics[key]:.4f}" for key in keys),
        )
    return table
