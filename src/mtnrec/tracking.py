"""What W&B and TensorBoard are told of a run: who it is when it starts, what came of it at the end.

Runs that differ in their seed alone are an *arm*: they share W&B's group.
"""

import math
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

from mtnrec.record import cell_of

METRICS = ("auc", "log_loss", "calibration", "ece", "grouped_auc", "bayes_auc")
Table = tuple[list[Any], list[Any]]  # columns, rows

_NO_SETTINGS = ("logger", "output_dir", "data_root")
_OF_AN_UNFOLDING = re.compile(r"mtn/layer_(\d+)/alpha_(\w+)")


def make_logger(node: DictConfig, config: Mapping[str, Any], checksum: str) -> Logger:
    """Build the logger, and name, group and tag its run where the config leaves that open.

    Args:
        node: ``cfg.logger``; ``name`` and ``group`` are filled if they are null, tags are added.
        config: The resolved config.
        checksum: Of the data set.
    """
    labels = run_labels(config, checksum)
    filled = {key: labels[key] for key in ("name", "group") if key in node and node[key] is None}
    if "tags" in node:
        filled["tags"] = [*node.tags, *_experiment(), *labels["tags"]]
    return instantiate(node, **filled, _convert_="all")


def _experiment() -> list[str]:
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return [choices["experiment"]] if choices.get("experiment") else []


def run_labels(config: Mapping[str, Any], checksum: str) -> dict[str, Any]:
    """Return ``group``, the same for every seed of an arm, ``name`` and ``tags`` of a run."""
    settings = settings_of(config)
    data = {**config["data"], "seed": None}  # the run's seed again
    arm = {**config, **{key: settings[key] for key in ("mtn", "noise")}, "seed": None, "data": data}
    mtn, proportion = settings["mtn"], settings["noise"]["proportion"]
    words = [settings["data"], settings["model"], "mtn" if mtn["enabled"] else "baseline"]
    noise = f"noise_{proportion:g}" if proportion else "clean"
    strength = [f"lam={mtn['lam']:g}"] if mtn["enabled"] else []
    group = " ".join([*words, *strength, noise, cell_of(arm, checksum)[:8]])
    return {"group": group, "name": f"{group} seed={config['seed']}", "tags": [*words, noise]}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, without its folders and without what means nothing.

    ``model`` and ``data`` are names, as on the command line; their keys are in ``model_settings``
    and ``data_settings``. MTN that is disabled and noise of proportion 0 have no other keys.
    """
    settings = {key: value for key, value in config.items() if key not in _NO_SETTINGS}
    settings |= {"model_settings": config["model"], "data_settings": config["data"]}
    settings["model"] = config["model"]["_target_"].split(".")[-2]
    settings["data"] = config["data"]["name"]
    if not config["mtn"]["enabled"]:
        settings["mtn"] = {"enabled": False}
    if not config["noise"]["proportion"]:
        settings["noise"] = {"proportion": 0.0}
    return settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested keys with dots.

    >>> flatten({"seed": 0, "mtn": {"lam": 1e-05}})
    {'seed': 0, 'mtn.lam': 1e-05}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
            # Nested: W&B shows, filters and groups by `mtn.lam` all the same.
            logger.log_hyperparams(settings_of(config))
            logger.experiment.define_metric("epoch")
            for part in ("train", "val", "mtn"):
                logger.experiment.define_metric(f"{part}/*", step_metric="epoch")
        elif isinstance(logger, TensorBoardLogger):
            # Its HParams page takes the settings with the results; this is for hparams.yaml.
            logger.hparams = flatten(settings_of(config))
        else:
            logger.log_hyperparams(dict(config))


def report_run(loggers: Iterable[Logger], record: Mapping[str, Any]) -> None:
    """Give W&B and TensorBoard what came out; for the global rank zero.

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
            logger.log_hyperparams(flatten(settings_of(record["config"])), best)
            logger.finalize("success")


def _report_to_wandb(
    logger: WandbLogger, record: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    import wandb  # takes a second, which a run that logs elsewhere need not wait

    run = logger.experiment
    for name in _names(record):
        if name.count("/") > 1:  # which the * of define_metric does not match
            run.define_metric(name, step_metric="epoch")
    tables = tables_of(record)
    run.log(
        {
            f"tables/{name}": wandb.Table(columns=columns, data=rows)
            for name, (columns, rows) in tables.items()
        }
    )
    # Of the best epoch: W&B's own are of the last.
    run.summary.update({"best_epoch": record["best_epoch"], **metrics})


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
