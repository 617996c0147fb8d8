"""Panel printed before training; table, warnings and places printed after it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn

from mtnrec.metric.catalogue import metric_key
from mtnrec.model.network import count_parameters
from mtnrec.run.folder import BEST_CHECKPOINT
from mtnrec.run.identity import label_flips, result_settings
from mtnrec.run.record import RECORD_FILE, RunRecord
from mtnrec.schema import Schema

_GROUPS = ("regularizer", "loss", "balance", "scheduler")  # shown where they are not the default
_PLACES = {  # what a run leaves, by its path in the run folder
    "folder": ".",
    "model": BEST_CHECKPOINT,
    "epochs": "csv/metrics.csv",
    "TensorBoard": "tensorboard",
    "W&B": "wandb",
    "spectra": "spectra",
}

_logger = logging.getLogger(__name__)


def opening_panel(
    config: Mapping[str, Any],
    network: nn.Module,
    rows: Mapping[str, int],
    *,
    device: str,
    threads: int,
) -> Panel:
    """Return the panel that names what is about to be trained, on what, and where.

    Args:
        config: Resolved config of the run.
        network: Network to train.
        rows: Rows by split.
        device: Device of this process, and how many processes there are.
        threads: Threads of this process.
    """
    parameters = count_parameters(network)
    splits = {"train": "training", "val": "validation"} | {
        split: split for split in rows if split not in ("train", "val")
    }
    counts = ", ".join(f"{rows[split]:,} {name}" for split, name in splits.items())
    mtn, proportion = config["mtn"], config["noise"]["proportion"]
    lines = {
        "model": f"{type(network).__name__}: {parameters['network']:,} parameters, "
        f"{parameters['embeddings']:,} more in embeddings",
        "data": f"{config['data']['name']}: {counts} rows",
        "device": f"{device}, {threads} thread{'' if threads == 1 else 's'}",
        "MTN": f"lam={mtn['lam']:g} on {mtn['target']}" if mtn["enabled"] else "off",
    }
    settings = result_settings(config)
    lines |= {group: _call(settings[group]) for group in _GROUPS if group in settings}
    lines["folder"] = str(Path(config["output_dir"]).absolute())
    where = f"the {', '.join(config['noise']['splits'])} rows"
    noise = [f"{proportion:.0%} of {where}"] if proportion else []
    flips = label_flips(config["noise"]).items()
    noise += [f"{label}=1 flipped with probability {p:g} in {where}" for label, p in flips]
    if noise:
        lines["noise"] = "; ".join(noise)
    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        grid.add_row(name, Text(text, overflow="fold"))
    return Panel(grid, title="mtnrec.train", title_align="left", box=box.ROUNDED, expand=False)


def _call(settings: Mapping[str, Any]) -> str:
    """Return the settings of an object as a call of its class."""
    name = str(settings["_target_"]).rpartition(".")[2]
    given = [f"{key}={v}" for key, v in settings.items() if key[0] != "_" and v is not None]
    return f"{name}({', '.join(given)})"


def summary_tables(schema: Schema, record: RunRecord) -> Group:
    """Return the table of results of each test set, or of the validation rows without a test."""
    splits = list(dict.fromkeys(place.partition("/")[0] for place in record.counts))
    tables = [split for split in splits if split != "val"] or splits
    return Group(*(summary_table(schema, record, split) for split in tables))


def summary_table(schema: Schema, record: RunRecord, split: str = "test") -> Table:
    """Return the table of results, one row per task.

    Args:
        schema: The tasks.
        record: Record of the run.
        split: The test set, or ``val``.
    """
    metrics, counts = record.metrics, record.counts
    shown = {"log loss": "log_loss", "Bayes AUC": "bayes_auc"}
    shown = shown if split == "val" else {f"{split} AUC": "auc", **shown}
    monitor = record.config["monitor"]
    title = f"Best epoch {record.best_epoch}, chosen by {monitor}"
    if (value := metrics[monitor]) is None or math.isnan(value):
        title = f"Last epoch {record.best_epoch}: {monitor} is undefined"
    table = Table(
        title=title,
        title_justify="left",
        caption=f"rows, positives and log loss: {'validation' if split == 'val' else split} set",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    if metric_key(split, schema.tasks[0].name, "bayes_auc") not in metrics:
        del shown["Bayes AUC"]
    else:
        table.caption = f"{table.caption}\nBayes AUC: of the true probabilities on its rows"
    table.add_column("task", no_wrap=True)
    table.add_column("definition")  # the only column that wraps in a narrow window
    for header in ("rows", "positives", "val AUC", *shown):
        table.add_column(header, justify="right", no_wrap=True)
    for task in schema.tasks:
        count = counts[f"{split}/{task.name}"]
        keys = [metric_key("val", task.name, "auc")]
        keys += [metric_key(split, task.name, metric) for metric in shown.values()]
        table.add_row(
            schema.title(task),
            schema.definition(task).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"),
            f"{count['rows']:,}",
            f"{count['positives']:,}",
            *(f"{metrics[key]:.4f}" for key in keys),
        )
    return table


def warn_of_weak_scores(schema: Schema, record: RunRecord) -> None:
    """Warn of tasks whose test scores are worse than chance, or than one constant for all rows.

    Without a test there is nothing to warn of: a trial with a high learning rate is expected to
    score badly.

    The constant is the share of positives in the test rows, which has the least log loss.
    """
    low, high = [], []
    for task in schema.tasks if record.is_tested else ():
        auc, loss = (record.metrics[metric_key("test", task.name, m)] for m in ("auc", "log_loss"))
        count = record.counts[f"test/{task.name}"]
        share = count["positives"] / count["rows"] if count["rows"] else 0
        constant = -sum(p * math.log(p) for p in (share, 1 - share) if p)
        if auc is None or loss is None:  # undefined with labels of one class
            continue
        if auc < 0.5:
            low.append(f"{task.name} {auc:.4f}")
        if loss > constant:
            high.append(f"{task.name} {loss:.4f} > {constant:.4f}")
    problems = [f"the test AUC is below the 0.5 of chance ({', '.join(low)})"] if low else []
    if high:
        problems.append(
            "the test log loss is above that of the share of positives as the score of every row "
            f"({', '.join(high)})"
        )
    if problems:
        _logger.warning(
            "%s. Check the learning rate, the number of epochs, and whether the numerical "
            "features are scaled",
            ", and ".join(problems),
        )


def closing_lines(folder: Path, record: RunRecord) -> list[str]:
    """Return the lines below the table: why the training ended, and links to what it left."""
    folder = folder.absolute()
    links = [
        f"{name:<12}{path.as_uri()}"
        for name, path in ((name, folder / place) for name, place in _PLACES.items())
        if path.exists()
    ]
    return [
        f"Training {record.stopped}.",
        f"The record of the run is {folder / RECORD_FILE}",
        *links,
    ]
