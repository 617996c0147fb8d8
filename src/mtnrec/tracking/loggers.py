"""What W&B and TensorBoard are told of a run: who it is when it starts, what came of it at the end.

Runs that differ in their seed alone are an *arm*: they share W&B's group.
"""

import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from mtnrec.run.identity import RunIdentity, flatten
from mtnrec.run.record import RunRecord
from mtnrec.tracking.tables import record_tables

_logger = logging.getLogger(__name__)


def make_logger(node: DictConfig, identity: RunIdentity) -> Logger:
    """Build the logger, and name, group and tag its run where the config leaves that open.

    Args:
        node: ``cfg.logger``; ``name`` and ``group`` are filled if they are null, tags are added,
            and W&B's ``resume`` is null where the run is to start anew.
        identity: Of the run; its name, its group (the arm) and its tags are taken.
    """
    labels = {"name": identity.name, "group": identity.group}
    filled: dict[str, Any] = {k: v for k, v in labels.items() if k in node and node[k] is None}
    if "resume" in node and not identity.config["resume"]:
        filled["resume"] = None
    if "tags" in node:
        filled["tags"] = [*node.tags, *_experiment(), *identity.tags]
    return instantiate(node, **filled, _convert_="all")


def _experiment() -> list[str]:
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return [choices["experiment"]] if choices.get("experiment") else []


@contextmanager
def closing_wandb_run() -> Iterator[None]:
    """Close the W&B run that the block opens, as a failed one if the block raises.

    Lightning leaves the run open, and the next job of a sweep would go on in it.
    """
    try:
        yield
    except BaseException:  # Ctrl-C too
        _finish(exit_code=1)
        raise
    _finish(exit_code=0)


def _finish(*, exit_code: int) -> None:
    wandb = sys.modules.get("wandb")  # a run that logs elsewhere does not import it
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)


def describe_run(loggers: Iterable[Logger], identity: RunIdentity) -> None:
    """Tell each logger the settings, before the training starts."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _begin(logger)
            # Nested: W&B shows, filters and groups by `mtn.lam` all the same.
            logger.log_hyperparams(identity.shown_settings)
            logger.experiment.define_metric("epoch")
            for part in ("train", "val", "mtn"):
                logger.experiment.define_metric(f"{part}/*", step_metric="epoch")
        elif isinstance(logger, TensorBoardLogger):
            # Its HParams page takes the settings with the results; this is for hparams.yaml.
            logger.hparams = dict(flatten(identity.shown_settings))
        else:
            logger.log_hyperparams(dict(identity.config))


def _begin(logger: WandbLogger) -> None:
    """Begin the run of W&B; it is an offline one where the server does not answer."""
    import wandb

    try:
        _ = logger.experiment
    except wandb.errors.CommError as error:
        _logger.warning(
            "W&B does not answer (%s): the run is written to %s/wandb alone, and `wandb sync` "
            "sends it later",
            error,
            logger.save_dir,
        )
        wandb.teardown()  # its service still holds the run
        os.environ["WANDB_MODE"] = "offline"
        try:
            _ = logger.experiment
        finally:
            del os.environ["WANDB_MODE"]


def report_run(loggers: Iterable[Logger], record: RunRecord) -> None:
    """Give W&B and TensorBoard what came out; for the global rank zero.

    Where W&B does not answer it lacks the tables.

    Args:
        loggers: The trainer's.
        record: Of the run.
    """
    metrics = {
        name: value
        for name, value in record.metrics.items()
        if value is not None and math.isfinite(value)
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _report_to_wandb(logger, record, metrics)
        elif isinstance(logger, TensorBoardLogger):
            best = {f"best/{name}": value for name, value in metrics.items()}
            settings = dict(flatten(record.identity.shown_settings))
            logger.log_hyperparams(settings, best)
            logger.finalize("success")


def _report_to_wandb(logger: WandbLogger, record: RunRecord, metrics: Mapping[str, float]) -> None:
    # They take a second each, which a run that logs elsewhere need not wait.
    import wandb

    from mtnrec.reporting.figure.catalogue import drawn_figures
    from mtnrec.reporting.runs import read_runs

    run = logger.experiment
    for name in _names(record):
        if name.count("/") > 1:  # which the * of define_metric does not match
            run.define_metric(name, step_metric="epoch")
    folder = Path(record.config["output_dir"])
    figures = (found for found in drawn_figures(read_runs(folder)) if found[2] is not None)
    run.log({f"figures/{kind}": wandb.Image(figure) for kind, _, figure in figures})
    # Of the best epoch: W&B's own are of the last.
    run.summary.update({"best_epoch": record.best_epoch, **metrics})
    tables = {
        f"tables/{name}": wandb.Table(columns=columns, data=rows)
        for name, (columns, rows) in record_tables(record).items()
    }
    try:
        run.log(tables)  # asks the server
    except wandb.errors.Error as error:
        _logger.warning("W&B does not answer (%s): its run has no tables", error)


def _names(record: RunRecord) -> list[str]:
    return sorted({name for entry in record.history for name in entry})
