"""Commands: functions of the composed config, run by Hydra."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig
from rich import get_console
from rich.logging import RichHandler

from mtnrec.command.config import CONF_DIR
from mtnrec.command.errors import find_input_error
from mtnrec.command.job import is_rank_zero, is_sweep_job, name_callbacks, owns_screen
from mtnrec.run.secrets import redact_log, redact_text

_logger = logging.getLogger(__name__)

_INTERRUPTED = 130  # exit status of shells after Ctrl-C
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

    An input error ends the command with one message and exit status 1. In a sweep every error is
    logged and raised for the sweeper.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)
        def command(cfg: DictConfig) -> Any:
            _quiet()
            try:
                return task(cfg)
            except KeyboardInterrupt:
                sys.stderr.write("mtnrec: interrupted\n")
                sys.exit(_INTERRUPTED)
            except Exception as error:
                known = find_input_error(error)
                if is_sweep_job():
                    _logger.error("%s", error if known is None else known, exc_info=known is None)
                    raise
                if known is None:
                    raise
                sys.exit(redact_text(f"mtnrec: {known}"))

        def main() -> None:
            sys.argv[1:] = map(name_callbacks, sys.argv[1:])
            command()

        main.__doc__ = task.__doc__
        return main

    return decorate


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
