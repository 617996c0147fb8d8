"""W&B and TensorBoard: the identity of a run when it starts, its results when it ends.

Runs that differ only in their seed are an *arm* and share a W&B group.
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
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from mtnrec.checks import InputError
from mtnrec.run.identity import RunIdentity, flatten
from mtnrec.run.record import RunRecord
from mtnrec.run.secrets import redact_text
from mtnrec.tracking.tables import record_tables

_logger = logging.getLogger(__name__)


def make_loggers(node: DictConfig, identity: RunIdentity) -> list[Logger]:
    """Build the loggers, with a name, group and tags for the run where the config has none.

    Args:
        node: ``cfg.logger``; null ``name`` and ``group`` are filled in, and tags are added.
        identity: Identity of the run, which has the name, the group (its arm) and the tags.
    """
    return [_make_logger(part, identity) for part in _split(node)]


def _make_logger(node: DictConfig, identity: RunIdentity) -> Logger:
    labels = {"name": identity.name, "group": identity.group}
    filled: dict[str, Any] = {k: v for k, v in labels.items() if k in node and node[k] is None}
    if "tags" in node:
        filled["tags"] = [*node.tags, *_experiment(), *identity.tags]
    return instantiate(node, **filled, _convert_="all")


def _split(node: DictConfig) -> list[DictConfig]:
    """Return the config of each logger.

    Hydra merges the files of ``logger=[csv,wandb]`` into one node. The loggers of most files are
    under their own name in it; the keys of one, W&B's, are those of the node itself.
    """
    keys = [str(key) for key in node]
    named = [
        key
        for key in keys
        if not OmegaConf.is_interpolation(node, key) and _builds_logger(node[key])
    ]
    own = OmegaConf.masked_copy(node, [key for key in keys if key not in named])
    own._set_parent(node._get_parent())  # its interpolations are relative to the whole config
    return [*(node[key] for key in named), *([own] if "_target_" in own else [])]


def _builds_logger(node: Any) -> bool:
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return False
    made = get_object(node._target_)
    return isinstance(made, type) and issubclass(made, Logger)


def check_login(node: DictConfig) -> None:
    """Refuse a W&B logger without an API key, before any work; in a terminal W&B asks for it.

    Args:
        node: ``cfg.logger``.

    Raises:
        InputError: If there is no key.
    """
    for part in _split(node):
        online = os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")
        settings = part.get("settings") or {}
        if not part._target_.endswith("WandbLogger") or part.get("offline") or not online:
            continue
        if settings.get("api_key") or settings.get("mode"):
            continue
        import wandb

        try:
            wandb.login(verify=False)
        except wandb.errors.Error as error:
            raise _no_key(error) from error


def _no_key(error: Exception) -> InputError:
    return InputError(
        f"logger=wandb must have an API key, got none ({error}). Run `wandb login`, set "
        "WANDB_API_KEY, or set logger.offline=true."
    )


def _experiment() -> list[str]:
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return [choices["experiment"]] if choices.get("experiment") else []


@contextmanager
def closing_wandb_run() -> Iterator[None]:
    """Close the W&B run that the block opens, as failed if the block raises.

    Lightning leaves the run open, and the next job of a sweep would continue it.
    """
    try:
        yield
    except BaseException:  # Ctrl-C too
        _finish(exit_code=1)
        raise
    _finish(exit_code=0)


def _finish(*, exit_code: int) -> None:
    wandb = sys.modules.get("wandb")  # not imported if the run logs elsewhere
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)


def describe_run(loggers: Iterable[Logger], identity: RunIdentity) -> None:
    """Log the settings to each logger before training starts."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _start(logger)
            # Nested: W&B still shows, filters and groups by `mtn.lam`.
            logger.log_hyperparams(identity.shown_settings)
            logger.experiment.define_metric("epoch")
            for part in ("train", "val", "mtn", "regularizer"):
                logger.experiment.define_metric(f"{part}/*", step_metric="epoch")
        elif isinstance(logger, TensorBoardLogger):
            # For hparams.yaml; the HParams page gets the settings in `report_run`.
            logger.hparams = dict(flatten(identity.shown_settings))
        else:
            logger.log_hyperparams(dict(identity.config))


def _start(logger: WandbLogger) -> None:
    """Start the W&B run, offline if the server does not answer."""
    import wandb

    try:
        with _hidden_arguments():
            _ = logger.experiment
    except wandb.errors.UsageError as error:
        raise _no_key(error) from error
    except wandb.errors.CommError as error:
        _logger.warning(
            "W&B does not answer (%s). The run is written to %s/wandb only; send it later with "
            "`wandb sync`.",
            error,
            logger.save_dir,
        )
        wandb.teardown()  # ends its service, which still holds the run
        os.environ["WANDB_MODE"] = "offline"
        try:
            with _hidden_arguments():
                _ = logger.experiment
        finally:
            del os.environ["WANDB_MODE"]


@contextmanager
def _hidden_arguments() -> Iterator[None]:
    """Hide secrets in ``sys.argv``, which W&B stores, during the block."""
    arguments = sys.argv[:]
    sys.argv[:] = map(redact_text, arguments)
    try:
        yield
    finally:
        sys.argv[:] = arguments


def report_run(loggers: Iterable[Logger], record: RunRecord) -> None:
    """Log the results to W&B and TensorBoard, on rank 0.

    If W&B does not answer, its run has no tables.

    Args:
        loggers: Loggers of the trainer.
        record: Record of the run.
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
    # Each takes a second to import, which runs that log elsewhere save.
    import wandb

    from mtnrec.reporting.figure.catalogue import drawn_figures
    from mtnrec.reporting.runs import read_runs

    run = logger.experiment
    for name in _names(record):
        if name.count("/") > 1:  # not matched by the * of define_metric
            run.define_metric(name, step_metric="epoch")
    folder = Path(record.config["output_dir"])
    if record.is_tested:
        figures = (found for found in drawn_figures(read_runs(folder)) if found[2] is not None)
        run.log({f"figures/{kind}": wandb.Image(figure) for kind, _, figure in figures})
    # Of the best epoch; those of W&B are of the last.
    run.summary.update({"best_epoch": record.best_epoch, **metrics})
    tables = {
        f"tables/{name}": wandb.Table(columns=columns, data=rows)
        for name, (columns, rows) in record_tables(record).items()
    }
    try:
        run.log(tables)  # contacts the server
    except wandb.errors.Error as error:
        _logger.warning("W&B does not answer (%s). Its run has no tables.", error)


def _names(record: RunRecord) -> list[str]:
    return sorted({name for entry in record.history for name in entry})
