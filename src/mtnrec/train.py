"""Train a model, test its best epoch once, and write the record of the run.

``python -m mtnrec.train model=esmm mtn.enabled=true``
"""

import gc
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    gc.disable()  # the imports make a million objects and leave no garbage: a fifth of their time

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig, OmegaConf
from rich import get_console

from mtnrec.apart import run_apart
from mtnrec.card import make_card
from mtnrec.cell import (
    CHECKPOINTS,
    RECORD_FILE,
    cell_of,
    claim,
    find_record,
    keys_of_lightning,
    keys_of_seed,
    recording_failure,
)
from mtnrec.checkpoint import WholeCheckpointIO
from mtnrec.checks import InputError, check_choice, check_flag, check_integer
from mtnrec.config import (
    command_of_job,
    entry_point,
    has_the_screen,
    is_first_process,
    is_job_of_a_sweep,
    overrides_of_job,
)
from mtnrec.divergence import Divergence
from mtnrec.expert_distances import ExpertDistances
from mtnrec.files import write_json
from mtnrec.leak import check_leaks
from mtnrec.machine import compute_fast
from mtnrec.metric.task_metrics import bayes_aucs
from mtnrec.model.module import TASK_LOSSES, MultiTaskModule
from mtnrec.network import make_network
from mtnrec.protocol import STOPS, make_callbacks
from mtnrec.record import (
    RunRecorder,
    closing_table,
    peak_memory_bytes,
    split_counts,
    versions,
)
from mtnrec.resume import ResumePoint
from mtnrec.tracking import closing_wandb_run, describe_run, make_logger, report_run

_LARGEST_SEED = 2**32 - 1  # of numpy's global stream
_MOST_THREADS = 1024  # torch ends the process where there are too many
_DRAWS_A_SECOND = 10  # of the bar; Lightning's 100 would take time of a step

_logger = logging.getLogger(__name__)


@entry_point("train")
def main(cfg: DictConfig) -> float | None:
    """Train a model, test its best epoch once, and write ``result.json``.

    Returns:
        The monitor's value at the best epoch, for searches; None where it is undefined.
    """
    output_dir = Path(cfg.output_dir)
    if is_job_of_a_sweep() and cfg.trainer.devices != 1:
        return run_apart(output_dir)["metrics"][cfg.monitor]
    hold = claim if is_first_process() else recording_failure
    with hold(output_dir, overrides_of_job(), command_of_job(output_dir)), closing_wandb_run():
        recorder = RunRecorder()
        check_settings(cfg)
        config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        datamodule = instantiate(cfg.data, _convert_="all")
        finished = find_record(output_dir, config, datamodule.find_checksum())
        if cfg.resume and finished is not None:
            _logger.info("%s is finished; resume=false trains again", output_dir)
            record = finished
        else:
            record = _run(cfg, config, datamodule, recorder, output_dir)
    return record["metrics"][cfg.monitor]


def _run(
    cfg: DictConfig,
    config: dict[str, Any],
    datamodule: Any,
    recorder: RunRecorder,
    output_dir: Path,
) -> dict[str, Any]:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    datamodule.noise = noise = instantiate(cfg.noise, _convert_="all")
    mtn = instantiate(cfg.mtn, _convert_="all")
    datamodule.prepare_data()
    datamodule.setup()
    schema = datamodule.schema
    arrays, rows = datamodule.stored("train")
    leaks = check_leaks(arrays, rows, schema)
    leaks.warn()

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    # In two steps, since Hydra would take the schema, a dataclass, for a part of the config.
    model = instantiate(cfg.model, _partial_=True, _convert_="all")
    network = make_network(partial(model, schema=schema))
    optimizer = instantiate(cfg.optimizer)
    module = MultiTaskModule(network, schema=schema, optimizer=optimizer, task_loss=cfg.task_loss)
    module.card = make_card(config["model"], datamodule.manifest, datamodule.dir)

    validation_labels = datamodule.column("val", "labels")
    checkpoint, followers = make_callbacks(
        cfg.monitor,
        cfg.patience,
        output_dir,
        stop=cfg.stop,
        schema=schema,
        validation_labels=validation_labels,
    )
    cell = cell_of(config, datamodule.manifest.checksum)
    of_seed = keys_of_seed(cfg)
    resume_point = ResumePoint(output_dir, cell, cfg.trainer[CHECKPOINTS])
    divergence = Divergence()
    experts = ExpertDistances()
    callbacks = [mtn, divergence, recorder, experts, *followers, resume_point]
    trainer: L.Trainer = instantiate(
        keys_of_lightning(cfg.trainer),
        callbacks=[*callbacks, RichProgressBar(_DRAWS_A_SECOND)] if has_the_screen() else callbacks,
        enable_progress_bar=has_the_screen(),
        logger=make_logger(cfg.logger, config, datamodule.manifest.checksum, of_seed),
        default_root_dir=output_dir,
    )
    trainer.strategy.checkpoint_io = WholeCheckpointIO()
    compute_fast(trainer.strategy.root_device)
    describe_run(trainer.loggers, config)
    (output_dir / RECORD_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    start = resume_point.find(trainer, module) if cfg.resume else None
    if start is None:
        resume_point.discard()  # what is written from now on does not belong to it
    with divergence.explaining(trainer):
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    best = checkpoint.best_model_path
    if not best:
        raise InputError(
            "training ended before its first validation, so there is no epoch to test: allow more "
            "epochs or steps"
        )
    trainer.test(module, datamodule=datamodule, ckpt_path=best, weights_only=True, verbose=False)

    chosen = torch.load(best, map_location="cpu", weights_only=True, mmap=True)
    results = recorder.validations[chosen["global_step"]] | module.results["test"]
    metrics, counts = split_counts(results)
    manifest = datamodule.manifest
    record = {
        "status": "finished",
        "cell": cell,
        "seed": cfg.seed,
        "keys_of_seed": of_seed,
        "config": config,
        "versions": versions(),
        "data": {
            "name": manifest.source,
            "checksum": manifest.checksum,
            "parameters": manifest.parameters,
            "rows": datamodule.split_rows,
            "suspected_leaks": [asdict(leak) for leak in leaks.leaks],
            "leaks_not_judged": leaks.not_judged,
        },
        "noise": noise.record(datamodule.row_numbers),
        "mtn": config["mtn"],
        "best_epoch": chosen["epoch"],
        "metrics": metrics | _bayes_aucs(datamodule),
        "counts": counts,
        "history": recorder.epochs,
        "calibration_curves": module.calibration_curves,
        "expert_distances": experts.distances,
        "threads": torch.get_num_threads(),
        "seconds": recorder.seconds,
        "samples_per_second": recorder.samples_per_second(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if trainer.is_global_zero:
        write_json(output_dir / RECORD_FILE, record)
        resume_point.discard()
        report_run(trainer.loggers, record)
        get_console().print(closing_table(schema, record))
        get_console().print(
            f"The record of the run is {output_dir / RECORD_FILE}", markup=False, soft_wrap=True
        )
    return record


def check_settings(cfg: DictConfig) -> None:
    """Refuse what no constructor checks, or only after the data are prepared.

    Raises:
        InputError: If a value is out of its range.
    """
    check_flag("resume", cfg.resume)
    check_choice("stop", cfg.stop, STOPS)
    check_choice("task_loss", cfg.task_loss, TASK_LOSSES)
    _check_repeats(cfg)
    check_integer("seed", cfg.seed, minimum=0, maximum=_LARGEST_SEED)
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
                "repeats=seed_split_noise draws validation rows and noise for each seed, so "
                f"{key} must be the seed {cfg.seed}, got {value}: leave {key} out, or set "
                "repeats=seed"
            )


def _bayes_aucs(datamodule: Any) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for split in ("val", "test"):
        probabilities = datamodule.column(split, "probabilities")
        if probabilities is not None:
            labels = datamodule.column(split, "labels")
            bayes = bayes_aucs(datamodule.schema, probabilities, labels)
            metrics |= {f"{split}/{name}": value for name, value in bayes.items()}
    return metrics


if __name__ == "__main__":
    gc.enable()
    gc.freeze()  # what was imported stays: no collection goes through it again
    main()
