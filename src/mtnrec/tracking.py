"""What W&B and TensorBoard are told of a run: who it is when it starts, what came of it at the end.

Runs that differ in their seed alone are an *arm*: they share W&B's group.
"""

import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from mtnrec.cell import cell_of, flatten, settings_of

METRICS = ("auc", "log_loss", "calibration", "ece", "grouped_auc", "bayes_auc")
Table = tuple[list[Any], list[Any]]  # columns, rows

_logger = logging.getLogger(__name__)

_OF_AN_UNFOLDING = re.compile(r"mtn/layer_(\d+)/alpha_(\w+)")


def make_logger(
    node: DictConfig, config: Mapping[str, Any], checksum: str, of_seed: Sequence[str]
) -> Logger:
    """Build the logger, and name, group and tag its run where the config leaves that open.

    Args:
        node: ``cfg.logger``; ``name`` and ``group`` are filled if they are null, tags are added,
            and W&B's ``resume`` is null where the run is to start anew.
        config: The resolved config.
        checksum: Of the data set.
        of_seed: Keys of the config that change with the seed.
    """
    labels = run_labels(config, checksum, of_seed)
    filled = {key: labels[key] for key in ("name", "group") if key in node and node[key] is None}
    if "resume" in node and not config["resume"]:
        filled["resume"] = None
    if "tags" in node:
        filled["tags"] = [*node.tags, *_experiment(), *labels["tags"]]
    return instantiate(node, **filled, _convert_="all")


def _experiment() -> list[str]:
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return [choices["experiment"]] if choices.get("experiment") else []


def run_labels(config: Mapping[str, Any], checksum: str, of_seed: Sequence[str]) -> dict[str, Any]:
    """Return ``group``, the same for every seed of an arm, ``name`` and ``tags`` of a run."""
    settings = shown_settings(config)
    arm = _without(config, of_seed)
    mtn, proportion = settings["mtn"], settings["noise"]["proportion"]
    words = [str(settings["data"]), settings["model"], "mtn" if mtn["enabled"] else "baseline"]
    noise = f"noise_{proportion:g}" if proportion else "clean"
    strength = [f"lam={mtn['lam']:g}"] if mtn["enabled"] else []
    group = " ".join([*words, *strength, noise, cell_of(arm, checksum)[:8]])
    return {"group": group, "name": f"{group} seed={config['seed']}", "tags": [*words, noise]}


def _without(config: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with null in the place of the leaves that dotted keys name."""
    return {
        key: _without(value, keys, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else (None if f"{prefix}{key}" in keys else value)
        for key, value in config.items()
    }


def shown_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines the result, with ``model`` and ``data`` by name.

    They are called as on the command line; their keys are in ``model_settings`` and
    ``data_settings``.
    """
    settings = settings_of(config)
    return settings | {
        "model_settings": settings["model"],
        "data_settings": settings["data"],
        "model": config["model"]["_target_"].split(".")[-2],
        "data": config["data"]["name"],
    }


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


def describe_run(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Tell each logger the settings, before the training starts."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _begin(logger)
            # Nested: W&B shows, filters and groups by `mtn.lam` all the same.
            logger.log_hyperparams(shown_settings(config))
            logger.experiment.define_metric("epoch")
            for part in ("train", "val", "mtn"):
                logger.experiment.define_metric(f"{part}/*", step_metric="epoch")
        elif isinstance(logger, TensorBoardLogger):
            # Its HParams page takes the settings with the results; this is for hparams.yaml.
            logger.hparams = dict(flatten(shown_settings(config)))
        else:
            logger.log_hyperparams(dict(config))


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


def report_run(loggers: Iterable[Logger], record: Mapping[str, Any]) -> None:
    """Give W&B and TensorBoard what came out; for the global rank zero.

    Where W&B does not answer it lacks the tables.

    Args:
        loggers: The trainer's.
        record: Content of ``result.json``; keys that it lacks are left out.
    """
    metrics = {
        name: value
        for name, value in record["metrics"].items()
        if value is not None and math.isfinite(value)
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _report_to_wandb(logger, record, metrics)
        elif isinstance(logger, TensorBoardLogger):
            best = {f"best/{name}": value for name, value in metrics.items()}
            settings = dict(flatten(shown_settings(record["config"])))
            logger.log_hyperparams(settings, best)
            logger.finalize("success")


def _report_to_wandb(
    logger: WandbLogger, record: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    # They take a second each, which a run that logs elsewhere need not wait.
    import wandb

    from mtnrec.reporting.figures import drawn_figures
    from mtnrec.reporting.runs import read_runs

    run = logger.experiment
    for name in _names(record):
        if name.count("/") > 1:  # which the * of define_metric does not match
            run.define_metric(name, step_metric="epoch")
    folder = Path(record["config"]["output_dir"])
    figures = (found for found in drawn_figures(read_runs(folder)) if found[2] is not None)
    run.log({f"figures/{kind}": wandb.Image(figure) for kind, _, figure in figures})
    # Of the best epoch: W&B's own are of the last.
    run.summary.update({"best_epoch": record["best_epoch"], **metrics})
    tables = {
        f"tables/{name}": wandb.Table(columns=columns, data=rows)
        for name, (columns, rows) in tables_of(record).items()
    }
    try:
        run.log(tables)  # asks the server
    except wandb.errors.Error as error:
        _logger.warning("W&B does not answer (%s): its run has no tables", error)


def _names(record: Mapping[str, Any]) -> list[str]:
    return sorted({name for entry in record.get("history", []) for name in entry})


def tables_of(record: Mapping[str, Any]) -> dict[str, Table]:
    """Lay out what the record has: ``metrics``, and ``alphas``, ``spectra``, ``calibration``, ….

    Spectra are those of the best epoch, from the run's folder.
    """
    best = f"epoch_{record['best_epoch']:03d}.npz"
    tables = {
        "metrics": _metrics_table(record),
        "alphas": _alphas_table(record.get("history", [])),
        "spectra": _spectra_table(Path(record["config"]["output_dir"]) / "spectra" / best),
        "calibration": _calibration_table(record.get("calibration_curves") or {}),
        "expert_distances": _distances_table(record.get("expert_distances") or []),
    }
    return {name: (columns, rows) for name, (columns, rows) in tables.items() if rows}


def _metrics_table(record: Mapping[str, Any]) -> Table:
    metrics = record["metrics"]
    rows = [
        [*where.split("/", 1), count["rows"], count["positives"]]
        + [metrics.get(f"{where}_{metric}") for metric in METRICS]
        for where, count in record["counts"].items()
    ]
    return ["split", "task", "rows", "positives", *METRICS], rows


def _alphas_table(history: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for entry in history:
        for name, alpha in entry.items():
            if found := _OF_AN_UNFOLDING.fullmatch(name):
                rank = entry[name.replace("/alpha_", "/effective_rank_")]
                rows.append([entry["epoch"], int(found[1]), found[2], alpha, rank])
    return ["epoch", "layer", "unfolding", "alpha", "effective_rank"], rows


def _spectra_table(path: Path) -> Table:
    rows: list[list[Any]] = []
    if path.exists():
        with np.load(path) as spectra:
            for name in spectra.files:
                values = enumerate(spectra[name].tolist())
                rows += [[*name.split("/"), index, value] for index, value in values]
    return ["layer", "unfolding", "index", "singular_value"], rows


def _calibration_table(curves: Mapping[str, Mapping[str, Sequence[Any]]]) -> Table:
    columns = ["predicted", "observed", "rows"]
    rows = [
        [*where.split("/", 1), *values]
        for where, curve in curves.items()
        for values in zip(*(curve[column] for column in columns), strict=True)
    ]
    return ["split", "task", *columns], rows


def _distances_table(distances: Sequence[Sequence[float]]) -> Table:
    rows = [[expert, *row] for expert, row in enumerate(distances)]
    return ["expert", *(f"to_{expert}" for expert in range(len(distances)))], rows
