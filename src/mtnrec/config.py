"""Where the configuration lies, the typed root of each entry point, and how one is run."""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from omegaconf import MISSING, DictConfig

from mtnrec.checks import InputError

_package = Path(__file__).resolve().parent
_packaged = _package / "conf"  # there only in an installed wheel; see pyproject's force-include
CONF_DIR = _packaged if _packaged.is_dir() else _package.parents[1] / "conf"


@dataclass
class Train:
    """Keys of ``conf/train.yaml``.

    Args:
        data: Data set; a :class:`~mtnrec.data.datamodule.DataModule`.
        noise: What replaces features of the rows; a :class:`~mtnrec.data.noise.Noise`.
        model: Network.
        mtn: The MTN callback.
        optimizer: Optimiser, without its parameters.
        trainer: Lightning's trainer.
        logger: Where metrics go.
        seed: Seed of the initial weights and of the order of the rows.
        monitor: Validation metric that chooses the epoch and stops the training.
        patience: Epochs without a better ``monitor`` after which training stops.
        data_root: Folder of the prepared data sets.
        output_dir: Folder of the run; Hydra's unless given.
    """

    data: Any = MISSING
    noise: Any = MISSING
    model: Any = MISSING
    mtn: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    seed: int = 0
    monitor: str = MISSING
    patience: int = MISSING
    data_root: str = MISSING
    output_dir: str = MISSING


@dataclass
class Prepare:
    """Keys of ``conf/prepare.yaml``.

    Args:
        data: Data set to prepare.
        seed: Not used by a preparation; the data configs refer to it.
        data_root: Folder of the prepared data sets.
    """

    data: Any = MISSING
    seed: int = 0
    data_root: str = MISSING


@dataclass
class Describe:
    """Keys of ``conf/describe.yaml``.

    Args:
        data: Prepared data set to describe.
        noise: What noise would change; nothing at proportion 0.
        seed: Not used by a description; the data configs refer to it.
        data_root: Folder of the prepared data sets.
        out: Text file of the report.
    """

    data: Any = MISSING
    noise: Any = MISSING
    seed: int = 0
    data_root: str = MISSING
    out: str = MISSING


@dataclass
class Dashboard:
    """Keys of ``conf/dashboard.yaml``.

    Args:
        entity: W&B's user or team.
        project: W&B's project.
        experiment: Tag of the runs to show; all runs unless given.
        kind: ``workspace`` or ``report``.
        tasks: Names of the tasks.
        offline: Write the specification and send nothing.
        out: File of the specification.
    """

    entity: str = MISSING
    project: str = MISSING
    experiment: str | None = None
    kind: str = MISSING
    tasks: list[str] = MISSING
    offline: bool = False
    out: str = MISSING


_INTERRUPTED = 130  # what shells make of Ctrl-C
_store = ConfigStore.instance()
_store.store(name="train_schema", node=Train)
_store.store(name="prepare_schema", node=Prepare)
_store.store(name="describe_schema", node=Describe)
_store.store(name="dashboard_schema", node=Dashboard)


def entry_point(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command of a function of the composed config ``conf/<name>.yaml``.

    What the user got wrong ends the command with one message and exit status 1.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)
        def command(cfg: DictConfig) -> None:
            try:
                task(cfg)
            except InputError as error:
                sys.exit(f"mtnrec: {error}")
            except InstantiationException as error:
                if isinstance(error.__cause__, InputError):
                    sys.exit(f"mtnrec: {error.__cause__}")
                raise
            except KeyboardInterrupt:
                sys.stderr.write("mtnrec: interrupted\n")
                sys.exit(_INTERRUPTED)

        def main() -> None:
            _quiet()
            command()

        main.__doc__ = task.__doc__
        return main

    return decorate


def _quiet() -> None:
    # Lightning asks for worker processes; batches are gathered by one index, in this process.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 on torch 2.13; https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings(
        "ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
