"""Fit a model by the protocol, test its best epoch once, and return the record of the run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from rich.panel import Panel
from torch import nn

from mtnrec.arrays import UInt8Array
from mtnrec.checkpoint.bundle import model_metadata
from mtnrec.checkpoint.io import AtomicCheckpointIO
from mtnrec.checks import InputError, check_choice, check_flag, check_integer, find_duplicates
from mtnrec.command.config import EMBEDDING_DECAY, lightning_keys, optimizer_keys, seed_keys
from mtnrec.command.job import is_rank_zero, owns_screen
from mtnrec.data.datamodule import DataModule
from mtnrec.inspection.leaks import LeakCheck, check_leaks
from mtnrec.metric.task_metrics import bayes_aucs
from mtnrec.model.network import build_network, count_parameters
from mtnrec.objective.objective import TASK_LOSSES
from mtnrec.run.environment import (
    code_of_run,
    describe_machine,
    find_commits,
    sources,
    versions,
)
from mtnrec.run.folder import clear_earlier_run, find_record
from mtnrec.run.identity import CHECKPOINTS, RunIdentity
from mtnrec.run.record import RECORD_FILE, RunRecord, warn_of_changes, warn_without_scores
from mtnrec.run.secrets import redact
from mtnrec.schema import Schema
from mtnrec.system.performance import tune_process
from mtnrec.tracking.loggers import check_login, describe_run, make_loggers, report_run
from mtnrec.training.divergence import Divergence
from mtnrec.training.expert_distances import ExpertDistances
from mtnrec.training.limits import (
    check_batch_norm,
    check_clipping,
    check_first_validation,
    check_trainer_keys,
    limit_batches,
)
from mtnrec.training.module import MultiTaskModule
from mtnrec.training.recorder import RunRecorder, gpu_names, peak_memory_bytes, split_counts
from mtnrec.training.resume import ResumePoint
from mtnrec.training.selection import STOPS, selection_callbacks, stop_reason
from mtnrec.training.summary import (
    closing_lines,
    opening_panel,
    summary_tables,
    warn_of_weak_scores,
)

_LARGEST_SEED = 2**32 - 1  # that numpy's global stream takes
_MOST_THREADS = 1024  # torch ends the process if there are too many
_REFRESHES_PER_SECOND = 10  # of the progress bar; Lightning's 100 would slow down the steps

_logger = logging.getLogger(__name__)


def find_or_fit(cfg: DictConfig, datamodule: DataModule, recorder: RunRecorder) -> RunRecord:
    """Return the record of a finished run in its folder, or fit; arguments as in :func:`fit`.

    Raises:
        InputError: If a setting is out of range.
    """
    check_settings(cfg)
    if used := datamodule.settings_used():
        cfg.data = OmegaConf.merge(cfg.data, used)
    config = _resolve(cfg)
    output_dir = Path(cfg.output_dir)
    record = find_record(output_dir, config, datamodule.find_checksum()) if cfg.resume else None
    if record is None:
        return fit(cfg, datamodule, recorder)
    _logger.info("%s is finished; resume=false trains again", output_dir)
    threads = torch.get_num_threads() if cfg.threads is None else cfg.threads
    warn_of_changes([(record, threads)])
    warn_without_scores([record] if cfg.keep_scores else [])
    return record


def _resolve(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as plain containers without secrets, for everything that is written."""
    return cast(dict[str, Any], redact(OmegaConf.to_container(cfg, resolve=True)))


def fit(cfg: DictConfig, datamodule: DataModule, recorder: RunRecorder) -> RunRecord:
    """Train, test the best epoch once unless ``cfg.test`` is false, and write the record.

    Args:
        cfg: The composed config, ``conf/train.yaml``.
        datamodule: Data set that its group ``data`` describes.
        recorder: Recorder, which times the run from its start.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if is_rank_zero():
        check_login(cfg.logger)
    config = _resolve(cfg)
    commits, own_sources, packages = find_commits(), sources(config), versions()
    output_dir = Path(cfg.output_dir)
    datamodule.seed, datamodule.noise = cfg.seed, instantiate(cfg.noise, _convert_="all")
    datamodule.reads_test = cfg.test
    penalties = _penalties(cfg)
    datamodule.prepare_data()
    datamodule.setup()
    identity = RunIdentity(config, datamodule.manifest.checksum, seed_keys(cfg))
    leaks = check_leaks(*datamodule.stored("train"), datamodule.schema)
    leaks.warn()

    module = _make_module(cfg, datamodule)
    checkpoint, followers = selection_callbacks(
        cfg.monitor,
        cfg.patience,
        output_dir,
        stop=cfg.stop,
        schema=datamodule.schema,
        validation_labels=_validation_labels(cfg, datamodule),
        added=module.added_metrics.directions,
    )
    code = code_of_run(packages, own_sources, torch.get_num_threads())
    resume_point = ResumePoint(output_dir, identity.id, cfg.trainer[CHECKPOINTS], code=code)
    divergence, experts = Divergence(), ExpertDistances()
    callbacks = [
        *penalties,
        divergence,
        recorder,
        experts,
        *followers,
        *_more_callbacks(cfg),
        resume_point,
    ]
    trainer = _make_trainer(cfg, callbacks)
    _check_batches(trainer, datamodule, module.network)
    tune_process(trainer.strategy.root_device)
    (output_dir / RECORD_FILE).unlink(missing_ok=True)  # from an earlier run in this folder
    start = resume_point.find(trainer, module) if cfg.resume else None
    if start is None:
        resume_point.discard()  # it does not belong to the run that starts now
    if trainer.is_global_zero:
        clear_earlier_run(output_dir, resumes=start is not None)
        get_console().print(_panel(config, trainer, datamodule, module.network))
    trainer.loggers = make_loggers(cfg.logger, identity)
    describe_run(trainer.loggers, identity)
    with divergence.explain_failures(trainer), _one_message():
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    stopped = stop_reason(trainer, len(recorder.epochs))
    best = checkpoint.best_model_path
    if not best:
        raise InputError(
            "training ended before its first validation, so there is no epoch to test. Set more "
            "epochs or steps."
        )
    if cfg.test:
        _test(trainer, module, datamodule, best)

    chosen = torch.load(best, map_location="cpu", weights_only=True, mmap=True)
    results = recorder.validations[chosen["global_step"]] | module.test_results
    metrics, counts = split_counts(results)
    record = RunRecord(
        cell=identity.id,
        seed=cfg.seed,
        keys_of_seed=list(identity.seed_keys),
        config=config,
        versions=packages,
        data=_describe_data(datamodule, leaks),
        noise=datamodule.record_noise(),
        mtn=config["mtn"],
        best_epoch=chosen["epoch"],
        metrics=metrics | _bayes_aucs(datamodule, counts),
        counts=counts,
        history=recorder.epochs,
        calibration_curves=module.calibration_curves,
        expert_distances=experts.distances,
        threads=torch.get_num_threads(),
        machine=describe_machine() | {"gpus": gpu_names()},
        commits=commits,
        sources=own_sources,
        stopped=stopped,
        added_metrics=module.added_metrics.directions,
        scores=_keep_scores(trainer, module, datamodule),
        seconds=recorder.seconds,
        samples_per_second=recorder.samples_per_second(),
        peak_memory_bytes=peak_memory_bytes(),
        parameters=count_parameters(module.network),
    )
    if trainer.is_global_zero:
        record.write(output_dir)
        resume_point.discard()
        report_run(trainer.loggers, record)
        _print_results(output_dir, datamodule.schema, record)
    return record


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Leave torch's process group together after the block, if the block has joined one.

    Lightning leaves gloo's open, and its threads may then abort a process that ends before another.
    After an error the other ranks do not wait.
    """
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _print_results(folder: Path, schema: Schema, record: RunRecord) -> None:
    get_console().print(summary_tables(schema, record))
    warn_of_weak_scores(schema, record)
    for line in closing_lines(folder, record):
        get_console().print(line, markup=False, soft_wrap=True)


def _penalties(cfg: DictConfig) -> list[L.Callback]:
    """Return MTN and the regulariser, if there is one."""
    return [instantiate(c, _convert_="all") for c in (cfg.mtn, cfg.regularizer) if c]


def _test(trainer: L.Trainer, module: MultiTaskModule, data: DataModule, best: str) -> None:
    """Test the checkpoint of the best epoch."""
    with _one_message():
        trainer.test(module, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)


@contextmanager
def _one_message() -> Iterator[None]:
    """Turn an error of Lightning about its settings into an input error."""
    try:
        yield
    except MisconfigurationException as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error


def _more_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """Build the callbacks of ``cfg.callbacks``, a mapping by name or a list."""
    if not cfg.callbacks:
        return []
    made = instantiate(cfg.callbacks, _convert_="all")
    named = made if isinstance(made, Mapping) else dict(enumerate(made))
    for name, callback in named.items():
        if not isinstance(callback, L.Callback):
            raise InputError(
                f"callbacks.{name} must be a Lightning callback, got {callback!r}. Give it a "
                "_target_, the import path of its class, and the keywords of its constructor."
            )
    keys = [callback.state_key for callback in named.values()]
    if repeated := find_duplicates(keys):
        raise InputError(
            f"callbacks must have different state keys, got {', '.join(repeated)} twice. Override "
            "the property state_key in the class, so that each keeps its state in a checkpoint."
        )
    return list(named.values())


def _validation_labels(cfg: DictConfig, datamodule: DataModule) -> UInt8Array:
    """Return the labels of the validation rows that ``cfg.trainer`` leaves."""
    labels = datamodule.split_labels("val")
    size, limits = datamodule.batch_size, ("overfit_batches", "limit_val_batches")
    limit = next((cfg.trainer[key] for key in limits if cfg.trainer.get(key)), None)
    return labels[: size * limit_batches(limit, -(-len(labels) // size))]


def _check_batches(trainer: L.Trainer, datamodule: DataModule, network: nn.Module) -> None:
    rows, ranks = datamodule.split_rows["train"], trainer.world_size
    batches = -(-(rows // ranks) // datamodule.batch_size)
    check_first_validation(trainer, batches)
    check_batch_norm(
        network,
        rows=rows,
        batch_size=datamodule.batch_size,
        world_size=ranks,
        limited=limit_batches(trainer.limit_train_batches, batches) < batches,
    )


def _panel(
    config: Mapping[str, Any], trainer: L.Trainer, datamodule: DataModule, network: nn.Module
) -> Panel:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return opening_panel(
        config,
        network,
        datamodule.split_rows,
        device=name if trainer.world_size == 1 else f"{trainer.world_size} x {name}",
        threads=torch.get_num_threads(),
    )


def _make_module(cfg: DictConfig, datamodule: DataModule) -> MultiTaskModule:
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    schema = datamodule.schema
    # In two steps, since Hydra would treat the schema, a dataclass, as a part of the config.
    model = instantiate(cfg.model, _partial_=True, _convert_="all")
    network = build_network(partial(model, schema=schema))
    module = MultiTaskModule(
        network,
        schema=schema,
        optimizer=instantiate(optimizer_keys(cfg.optimizer)),
        embedding_weight_decay=OmegaConf.select(cfg.optimizer, EMBEDDING_DECAY),
        scheduler=instantiate(cfg.scheduler),
        monitor=cfg.monitor,
        loss=instantiate(cfg.loss, _convert_="all"),
        balance=instantiate(cfg.balance, _convert_="all"),
        task_loss=cfg.task_loss,
        metrics=instantiate(cfg.metrics, _convert_="all"),
        min_group_rows=cfg.min_group_rows,
        cuda_graphs=cfg.cuda_graphs,
        keep_scores=cfg.keep_scores,
    )
    settings = cast(dict[str, Any], OmegaConf.to_container(cfg.model, resolve=True))
    module.metadata = model_metadata(settings, datamodule.manifest, datamodule.folder)
    return module


def _make_trainer(cfg: DictConfig, callbacks: list[L.Callback]) -> L.Trainer:
    shown = owns_screen() and cfg.trainer.get("enable_progress_bar", True)
    trainer: L.Trainer = instantiate(
        lightning_keys(cfg.trainer),
        callbacks=[*callbacks, RichProgressBar(_REFRESHES_PER_SECOND)] if shown else callbacks,
        enable_progress_bar=shown,
        logger=False,  # until it is clear whether the run resumes
        default_root_dir=Path(cfg.output_dir),
    )
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer


def _keep_scores(
    trainer: L.Trainer, module: MultiTaskModule, datamodule: DataModule
) -> dict[str, str]:
    """Write the kept scores on rank 0; return the SHA-256 of the files there."""
    if not (module.tested_rows and trainer.is_global_zero):
        return {}
    from mtnrec.training.kept_scores import keep_scores  # loads pyarrow, slow and seldom needed

    return keep_scores(Path(trainer.default_root_dir), datamodule.schema, module.tested_rows)


def _describe_data(datamodule: DataModule, leaks: LeakCheck) -> dict[str, Any]:
    manifest = datamodule.manifest
    return {
        "name": manifest.source,
        "checksum": manifest.checksum,
        "parameters": manifest.parameters,
        "rows": datamodule.split_rows,
        "tasks": [task.name for task in datamodule.schema.tasks],
        "suspected_leaks": [asdict(leak) for leak in leaks.leaks],
        "leaks_not_judged": leaks.not_judged,
    }


def check_settings(cfg: DictConfig) -> None:
    """Refuse bad settings that no constructor checks, or only after the data are prepared.

    Raises:
        InputError: If a value is out of range.
    """
    check_trainer_keys(cfg.trainer)
    check_clipping(cfg.trainer, cfg.optimizer)
    check_flag("resume", cfg.resume)
    check_flag("keep_scores", cfg.keep_scores)
    check_flag("test", cfg.test)
    check_choice("stop", cfg.stop, STOPS)
    check_choice("task_loss", cfg.task_loss, TASK_LOSSES)
    _check_repeats(cfg)
    check_integer("seed", cfg.seed, minimum=0, maximum=_LARGEST_SEED)
    check_integer("min_group_rows", cfg.min_group_rows, minimum=1)
    if "seed" in cfg.data:
        raise InputError(
            f"data.seed must be left out, got {cfg.data.seed}. Set seed, which orders the rows."
        )
    accelerator = OmegaConf.select(cfg, "trainer.accelerator")
    if accelerator in ("cuda", "gpu", "mps") and not torch.accelerator.is_available():
        raise InputError(
            f"trainer.accelerator must be available on this machine, got {accelerator}, and torch "
            "finds no GPU. Set trainer.accelerator=auto, or install a torch built for your GPU."
        )
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, minimum=1)
    if cfg.threads is not None:
        check_integer("threads", cfg.threads, minimum=1, maximum=_MOST_THREADS)


def _check_repeats(cfg: DictConfig) -> None:
    check_choice("repeats", cfg.repeats, ["seed", "seed_split_noise"])
    if cfg.repeats == "seed":
        return
    for key in ("data.split_seed", "noise.seed"):
        value = OmegaConf.select(cfg, key)
        if value != cfg.seed:
            raise InputError(
                "repeats=seed_split_noise draws validation rows and noise per seed, so "
                f"{key} must be the seed {cfg.seed}, got {value}. Leave {key} out, or set "
                "repeats=seed."
            )


def _bayes_aucs(datamodule: DataModule, counts: Mapping[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for split in dict.fromkeys(place.partition("/")[0] for place in counts):
        probabilities = datamodule.column(split, "probabilities")
        measured = max(counts[f"{split}/{task.name}"]["rows"] for task in datamodule.schema.tasks)
        if probabilities is not None and measured == datamodule.split_rows[split]:
            bayes = bayes_aucs(datamodule.schema, probabilities, datamodule.split_labels(split))
            metrics |= {f"{split}/{name}": value for name, value in bayes.items()}
    return metrics
