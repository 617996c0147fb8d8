"""Train a model, test its best epoch once, and write the record of the run.

``python -m mtnrec.train model=esmm mtn.enabled=true``
"""

from pathlib import Path

from omegaconf import DictConfig

from mtnrec.checks import InputError
from mtnrec.command.entry_point import entry_point
from mtnrec.command.errors import find_input_error
from mtnrec.command.job import (
    is_rank_zero,
    is_sweep_job,
    job_command,
    job_overrides,
    make_datamodule,
    quote_for_ranks,
)
from mtnrec.run.folder import lock_run_folder, recording_failure
from mtnrec.sweep.subprocess_job import run_in_subprocess
from mtnrec.tracking.loggers import closing_wandb_run
from mtnrec.training.fit import find_or_fit, leaving_process_group
from mtnrec.training.recorder import RunRecorder


@entry_point("train")
def main(cfg: DictConfig) -> float | None:
    """Train a model, test its best epoch once, and write ``result.json``.

    Returns:
        Value of the monitor at the best epoch, for searches; None if undefined.
    """
    output_dir = Path(cfg.output_dir)
    if cfg.dry_run:
        raise InputError(
            "dry_run lists the runs of a sweep, got a single run or another sweeper's run. Set "
            "dry_run=false, or sweep: -m seed=0,1,2."
        )
    if is_sweep_job() and cfg.trainer.devices != 1:
        return run_in_subprocess(output_dir).metrics[cfg.monitor]
    quote_for_ranks(output_dir)
    hold = lock_run_folder if is_rank_zero() else recording_failure
    command = job_command(output_dir)
    held = hold(output_dir, job_overrides(), command, find_input_error)
    with leaving_process_group(), held, closing_wandb_run():
        recorder = RunRecorder(cfg.monitor)
        record = find_or_fit(cfg, make_datamodule(cfg.data, job_overrides()), recorder)
    return record.metrics[cfg.monitor]


if __name__ == "__main__":
    main()
