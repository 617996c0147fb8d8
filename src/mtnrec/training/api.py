"""Training from Python, by the same protocol as ``python -m mtnrec.train``."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import pandas as pd
from omegaconf import DictConfig
from torch import nn

from mtnrec.checks import InputError
from mtnrec.command.compose import compose_run, describe_config, group_config
from mtnrec.command.config import resolve_settings
from mtnrec.command.entry_point import silence_libraries
from mtnrec.command.errors import find_input_error
from mtnrec.data.datamodule import DataModule
from mtnrec.data.noise import Noise
from mtnrec.data.raw.tabular import ArrowStream
from mtnrec.mtn.callback import MTN
from mtnrec.run.folder import lock_run_folder
from mtnrec.run.identity import folder_name
from mtnrec.run.record import RunRecord
from mtnrec.serving.scorer import Scorer, load_checkpoint
from mtnrec.tracking.loggers import closing_wandb_run
from mtnrec.training.fit import find_or_fit
from mtnrec.training.recorder import RunRecorder


class FinishedRun:
    """A trained and tested run.

    Args:
        folder: Folder of the run.
        record: Record of the run, ``result.json``.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record

    def __repr__(self) -> str:
        return f"<finished run in {self.folder}>"

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Metrics by key, for example ``test/ctcvr_auc``."""
        return self.record.metrics

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per epoch: ``epoch``, ``step`` and the logged values by key."""
        return pd.DataFrame(list(self.record.history))

    @cached_property
    def scorer(self) -> Scorer:
        """The model of the best epoch."""
        # The model is the one that `fit` was given, so its module is trusted.
        module = str(self.record.config["model"]["_target_"]).rpartition(".")[0]
        return load_checkpoint(self.folder, allow=[module])

    def score(self, frame: pd.DataFrame | ArrowStream) -> pd.DataFrame:
        """Return the probability of each task for rows of raw values; see ``Scorer.score``."""
        return self.scorer.score(frame)


def fit(
    data: DataModule,
    model: str | Mapping[str, Any] | Callable[..., nn.Module] = "esmm",
    *,
    mtn: MTN | str | Mapping[str, Any] | None = None,
    regularizer: str | L.Callback | Mapping[str, Any] = "none",
    loss: str | Mapping[str, Any] | Callable[..., nn.Module] = "cross_entropy",
    balance: str | Mapping[str, Any] | Callable[..., nn.Module] = "sum",
    noise: Noise | Mapping[str, Any] | None = None,
    optimizer: str | Mapping[str, Any] | Callable[..., Any] = "adam",
    scheduler: str | Mapping[str, Any] | None = None,
    trainer: str | Mapping[str, Any] = "default",
    logger: str | Sequence[str] | Mapping[str, Any] = "csv",
    callbacks: Sequence[L.Callback | Callable[..., L.Callback] | str | Mapping[str, Any]]
    | None = None,
    metrics: Sequence[str] | Mapping[str, Any] | None = None,
    seed: int = 0,
    monitor: str = "val/cvr_auc",
    stop: str = "decreased",
    patience: int = 3,
    task_loss: str = "sum",
    min_group_rows: int = 1,
    resume: bool = True,
    cuda_graphs: bool = False,
    keep_scores: bool = False,
    threads: int | None = None,
    output_dir: str | Path | None = None,
) -> FinishedRun:
    """Train, test the best epoch once, and record the run, as ``python -m mtnrec.train`` does.

    The same settings give the same bits and the same record as the command. A run whose folder
    already has a record is read, not trained again. Like the command, this sets torch's thread
    count, deterministic algorithms and the global seed of the process.

    Args:
        data: Data set; it is copied, so that one object can be used for several runs.
        model: A choice of ``conf/model``, keys of the default choice, a class, or a
            ``functools.partial`` of one: ``partial(mtnrec.MMoE, experts=4)``. Not a built network,
            whose weights would not follow from ``seed``.
        mtn: The callback, a choice of ``conf/mtn``, which is then enabled, or keys of the default
            choice; None trains without MTN.
        regularizer: Another penalty on the weights: a choice of ``conf/regularizer``, keys with
            their ``_target_``, or a callback.
        loss: Loss of each label: a choice of ``conf/loss``, keys, or a class or partial call.
        balance: How the losses join: a choice of ``conf/balance``, keys, or a class or partial
            call.
        noise: Feature noise, or keys of ``conf/noise``; None adds none.
        optimizer: A choice of ``conf/optimizer``, keys of the default choice, or a class or partial
            call that takes the parameters.
        scheduler: Schedule of the learning rate: a choice of ``conf/scheduler``, or keys with their
            ``_target_``; None keeps it constant.
        trainer: A choice of ``conf/trainer``, or keys of the default choice: ``{"max_epochs": 5}``.
        logger: A choice of ``conf/logger``, a list of them, or keys with their ``_target_``.
        callbacks: More Lightning callbacks, which run in order after those of the protocol. Each
            is built from its constructor's arguments, which are settings of the run: an object
            that stores them under their names, a class or a ``functools.partial`` of one, keys
            with their ``_target_``, or a choice of ``conf/callbacks``.
        metrics: More metrics of every task: choices of ``conf/metrics``, or a mapping from names to
            keys with their ``_target_``, classes or partial calls of :class:`torchmetrics.Metric`.
        seed: Seed of the initial weights and the row order.
        monitor: Validation metric that chooses the epoch and stops the training.
        stop: ``decreased`` or ``patience``, as in ``conf/train.yaml``.
        patience: Number of epochs in that rule.
        task_loss: ``sum`` or ``mean`` of the labels' cross entropies.
        min_group_rows: Minimum number of a task's rows that a group (user, search) must have to
            count in its grouped AUC.
        resume: Whether to keep a finished run in the folder, and to resume an interrupted one.
        cuda_graphs: Whether a GPU replays a captured step.
        keep_scores: Whether to store the scores of the test rows, for intervals over users in
            reports.
        threads: Number of torch threads in this process; None leaves it unchanged.
        output_dir: Folder of the run; by default one in ``runs`` named after the settings.

    Raises:
        InputError: If a value is out of range, or another process has locked the folder.
    """
    if isinstance(model, nn.Module):
        raise InputError(
            f"model must be a name, keys, a class or a partial call, got a built "
            f"{type(model).__name__}, whose weights do not follow from seed={seed}. Pass the class "
            "or a functools.partial of it with keywords."
        )
    data.prepare_data()
    data = data.copy_for_run()
    groups = {
        "data": _describe_data(data),
        "model": _describe_model(model) if callable(model) else model,
        "mtn": {} if mtn is None else _enabled(mtn),
        "regularizer": regularizer,
        "loss": loss,
        "balance": balance,
        "noise": {} if noise is None else noise,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "trainer": trainer,
        "logger": logger,
        "callbacks": callbacks,
        "metrics": metrics,
    }
    keys = {
        "seed": seed,
        "monitor": monitor,
        "stop": stop,
        "patience": patience,
        "task_loss": task_loss,
        "min_group_rows": min_group_rows,
        "resume": resume,
        "cuda_graphs": cuda_graphs,
        "keep_scores": keep_scores,
        "threads": threads,
        "output_dir": "",
    }
    cfg = compose_run(groups, keys)
    folder = Path("runs", folder_name(resolve_settings(cfg))) if output_dir is None else output_dir
    cfg.output_dir = str(folder)
    return FinishedRun(Path(folder), _fit_in_folder(cfg, data, Path(folder)))


def _fit_in_folder(cfg: DictConfig, data: DataModule, folder: Path) -> RunRecord:
    command = ["mtnrec.fit"]
    with (
        warnings.catch_warnings(),
        lock_run_folder(folder, [], command, find_input_error),
        closing_wandb_run(),
    ):
        silence_libraries()
        return find_or_fit(cfg, data, RunRecorder(cfg.monitor))


def _describe_data(data: DataModule) -> dict[str, Any]:
    """Return the config of a data set; only the checksum identifies a table in memory."""
    settings = {f.name: getattr(data, f.name) for f in fields(data) if f.init and f.name != "seed"}
    return describe_config("data", type(data), _without_tables(settings))


def _without_tables(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace tables in memory with the names of their types."""
    return {
        key: f"<{type(value).__name__}>"
        if hasattr(value, "__arrow_c_stream__")
        else _without_tables(value)
        if isinstance(value, Mapping)
        else value
        for key, value in settings.items()
    }


def _describe_model(model: Callable[..., nn.Module]) -> dict[str, Any]:
    """Return the config of a model, defaults of its constructor included, as in ``conf``."""
    constructor, given = (model.func, model.keywords) if isinstance(model, partial) else (model, {})
    if isinstance(model, partial) and model.args:
        raise InputError(f"model must be a partial call with keywords only, got {model}")
    parameters = inspect.signature(constructor).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return describe_config("model", constructor, defaults | given)


def _enabled(mtn: MTN | str | Mapping[str, Any]) -> MTN | dict[str, Any]:
    if isinstance(mtn, str):
        return {**cast(Mapping[str, Any], group_config("mtn", mtn, "mtn")), "enabled": True}
    return {"enabled": True, **mtn} if isinstance(mtn, Mapping) else mtn
