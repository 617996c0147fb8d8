"""Train a model, test its best epoch once, and write the record of the run.

``python -m mtnrec.train model=esmm mtn.enabled=true``
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig, OmegaConf
from rich import get_console

from mtnrec.checks import InputError, check_integer
from mtnrec.config import entry_point
from mtnrec.leak import check_leaks
from mtnrec.metric.task_metrics import bayes_aucs
from mtnrec.model.module import MultiTaskModule
from mtnrec.protocol import make_callbacks
from mtnrec.record import (
    RECORD_FILE,
    RunRecorder,
    cell_of,
    closing_table,
    peak_memory_bytes,
    split_counts,
    versions,
    write_record,
)
from mtnrec.tracking import closing_wandb_run, describe_run, make_logger, report_run


@entry_point("train")
@closing_wandb_run()
def main(cfg: DictConfig) -> None:
    """Train a model, test its best epoch once, and write ``result.json``."""
    recorder = RunRecorder()
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, minimum=1)
    output_dir = Path(cfg.output_dir)
    datamodule = instantiate(cfg.data, _convert_="all")
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
    network = instantiate(cfg.model, _partial_=True, _convert_="all")(schema=schema)
    module = MultiTaskModule(network, schema=schema, optimizer=instantiate(cfg.optimizer))

    validation_labels = datamodule.column("val", "labels")
    checkpoint, followers = make_callbacks(
        cfg.monitor, cfg.patience, output_dir, schema=schema, validation_labels=validation_labels
    )
    callbacks = [recorder, mtn, *followers, RichProgressBar()]
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=make_logger(cfg.logger, config, datamodule.manifest.checksum),
        default_root_dir=output_dir,
    )
    describe_run(trainer.loggers, config)
    (output_dir / RECORD_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    trainer.fit(module, datamodule=datamodule)
    best = checkpoint.best_model_path
    if not best:
        raise InputError(
            "training ended before its first validation, so there is no epoch to test: allow more "
            "epochs or steps"
        )
    trainer.test(module, datamodule=datamodule, ckpt_path=best, weights_only=True, verbose=False)
    if not trainer.is_global_zero:
        return

    chosen = torch.load(best, weights_only=True, mmap=True)
    results = recorder.history[chosen["global_step"]] | module.results["test"]
    metrics, counts = split_counts(results)
    for split in ("val", "test"):
        probabilities = datamodule.column(split, "probabilities")
        if probabilities is not None:
            bayes = bayes_aucs(schema, probabilities, datamodule.column(split, "labels"))
            metrics |= {f"{split}/{name}": value for name, value in bayes.items()}
    manifest = datamodule.manifest
    record = {
        "status": "finished",
        "cell": cell_of(config, manifest.checksum),
        "seed": cfg.seed,
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
        "metrics": metrics,
        "counts": counts,
        "seconds": recorder.seconds,
        "samples_per_second": recorder.samples_per_second(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_record(output_dir, record)
    report_run(trainer.loggers, record)
    get_console().print(closing_table(schema, record))
    get_console().print(
        f"The record of the run is {output_dir / RECORD_FILE}", markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
