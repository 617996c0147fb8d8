"""Commands: functions of the composed config, run by Hydra."""

import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich import get_console
from rich.console import Console
from rich.logging import RichHandler

from mtnrec.command.config import CONF_DIR
from mtnrec.command.defer import defer_keys
from mtnrec.command.errors import find_input_error
from mtnrec.command.help import print_help, print_version
from mtnrec.command.interrupt import INTERRUPTED, exit_on_sigterm, interrupt_status
from mtnrec.command.job import (
    is_rank_zero,
    is_sweep_job,
    job_command,
    job_overrides,
    name_callbacks,
    name_sweeper_keys,
    owns_screen,
)
from mtnrec.command.keys import check_choices, check_keys
from mtnrec.run.folder import describe_kept
from mtnrec.run.secrets import redact_files, redact_log, redact_text

_logger = logging.getLogger(__name__)

_SPINS = "1000"  # of a thread that waits for others, before it leaves its core to another process


def limit_spinning() -> None:
    """Keep OpenMP's waiting threads from spinning on cores that other processes need.

    GNU's OpenMP reads the variable when torch loads it, so this has no effect later. Child
    processes inherit it. ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` of the user have precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


limit_spinning()


def entry_point(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turn a function of the composed config ``conf/<name>.yaml`` into a command.

    An input error ends the command with one message and exit status 1, Ctrl-C with status 130 and
    SIGTERM with 143. In a sweep every error is logged and raised for the sweeper.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def job(cfg: DictConfig) -> Any:  # Hydra's launchers send it to other processes
            return _run_job(task, cfg, name)

        job.__doc__ = task.__doc__
        run = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)(job)

        @wraps(job)
        def main() -> None:
            arguments = sys.argv[1:]
            if {"--help", "-h"} & {*arguments}:
                print_help(name, arguments)
            elif "--version" in arguments:
                print_version()
            else:
                sys.argv[1:] = [name_sweeper_keys(name_callbacks(line)) for line in arguments]
                _run_command(run, name)

        return main

    return decorate


def _run_job(task: Callable[[DictConfig], Any], cfg: DictConfig, name: str) -> Any:
    """Run one job; in a sweep its errors are logged and raised."""
    _quiet()
    exit_on_sigterm()
    _hide_secrets(cfg)
    try:
        check_choices(job_overrides())
        check_keys(cfg, name)
        return task(cfg)
    except Exception as error:
        known = find_input_error(error)
        if is_sweep_job():
            _logger.error("%s", error if known is None else known, exc_info=known is None)
            raise
        if known is None:
            raise
        sys.exit(redact_text(f"mtnrec: {known}"))
    except BaseException as error:
        status = interrupt_status(error)
        if status is None:
            raise
        if is_sweep_job():
            raise KeyboardInterrupt if status == INTERRUPTED else SystemExit(status) from error
        if is_rank_zero():
            sys.stderr.write(f"mtnrec: {_explain_interrupt(cfg)}\n")
        sys.exit(status)


def _hide_secrets(cfg: DictConfig) -> None:
    if "output_dir" in cfg and is_rank_zero():
        redact_files(Path(cfg.output_dir) / ".hydra")
        if is_sweep_job():
            redact_files(Path(HydraConfig.get().sweep.dir))  # Hydra's own sweepers write a file


def _run_command(run: Callable[[], None], name: str) -> None:
    """Run Hydra, and end with one message if it refuses the command line."""
    _keep_writing()
    exit_on_sigterm()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, to be explained here
    try:
        try:
            run()
        except HydraException:
            if not defer_keys(name):
                raise
            run()
    except KeyboardInterrupt:
        sys.stderr.write("mtnrec: interrupted\n")
        sys.exit(INTERRUPTED)
    except Exception as error:
        known = find_input_error(error, name)
        if known is None:
            raise
        sys.exit(redact_text(f"mtnrec: {known}"))


def _explain_interrupt(cfg: DictConfig) -> str:
    if "output_dir" not in cfg:
        return "interrupted"
    folder = Path(cfg.output_dir)
    command = redact_text(shlex.join(job_command(folder)))
    return f"interrupted. {describe_kept(folder)}. To resume:\n  {command}"


def _keep_writing() -> None:
    """Keep running when stdout cannot write a character, or is a pipe that was closed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    Console.on_broken_pipe = _write_to_nothing  # type: ignore[method-assign, assignment]


def _write_to_nothing(console: Console) -> None:
    console.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stderr.write("mtnrec: stdout was closed; continuing without it\n")


def silence_libraries() -> None:
    """Silence library warnings and messages that do not apply here; changes global filters."""
    # Lightning suggests worker processes; here one index gathers a batch, in this process.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 on torch 2.13; https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings(
        "ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning
    )
    # A folder whose run is resumed or replaced.
    warnings.filterwarnings("ignore", message=".*exists and is not empty")
    # DDP, about the gradient of a layer with one output.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Set on purpose, to keep the gradient buckets: see trainer=ddp.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified in DDP")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for verbose in ("fontTools", "onnx_ir", "onnxscript"):  # log every font, every constant
        logging.getLogger(verbose).setLevel(logging.WARNING)
    # Warns about torchvision, which no model here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _quiet() -> None:
    silence_libraries()
    if not owns_screen():
        get_console().quiet = True
        logging.captureWarnings(capture=True)
        root = logging.getLogger()
        root.handlers = [found for found in root.handlers if not isinstance(found, RichHandler)]
    for handler in logging.getLogger().handlers:
        handler.addFilter(redact_log)
    if not is_rank_zero():  # rank 0 logs the same; errors are still raised
        logging.getLogger().handlers = [logging.NullHandler()]
