"""Where the configuration lies, the typed root of each entry point, and how one is run."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import get_console
from rich.logging import RichHandler

from mtnrec.checks import InputError

_package = Path(__file__).resolve().parent
_packaged = _package / "conf"  # there only in an installed wheel; see pyproject's force-include
CONF_DIR = _packaged if _packaged.is_dir() else _package.parents[1] / "conf"


def _seed_of_repeat(_root_: DictConfig) -> int:
    """Return the seed of the validation rows and of the noise."""
    is_drawn = OmegaConf.select(_root_, "repeats") == "seed_split_noise"
    return int(_root_.seed) if is_drawn else 0


OmegaConf.register_new_resolver("seed_of_repeat", _seed_of_repeat, replace=True)


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
        stop: Rule that ends the training: ``patience`` or ``decreased``.
        patience: Epochs in a row, without a better ``monitor`` than the best or each with a worse
            one than the epoch before, after which training stops.
        task_loss: ``sum`` or ``mean`` of the labels' cross entropies.
        repeats: What depends on the seed: ``seed`` (first weights, order of the rows), or
            ``seed_split_noise`` (validation rows and noise as well).
        resume: Whether a finished run is kept, and an interrupted one goes on where it was.
        threads: Of this process; None leaves it to torch.
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
    stop: str = MISSING
    patience: int = MISSING
    task_loss: str = MISSING
    repeats: str = MISSING
    resume: bool = True
    threads: int | None = None
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
class Status:
    """Keys of ``conf/status.yaml``.

    Args:
        runs: Folder of a sweep, or of several.
        refresh: Seconds between two looks.
    """

    runs: str = MISSING
    refresh: float = MISSING


@dataclass
class Report:
    """Keys of ``conf/report.yaml``.

    Args:
        runs: Folder of the runs, at any depth.
        out: Folder of the report.
        metric: Of the tables: ``auc``, ``log_loss``, ...
        split: Of the tables: ``test`` or ``val``.
    """

    runs: str = MISSING
    out: str = MISSING
    metric: str = MISSING
    split: str = MISSING


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


@dataclass
class Predict:
    """Keys of ``conf/predict.yaml``.

    Args:
        checkpoint: Of a run.
        data: Prepared data set to score; None if ``table`` is given.
        table: Table of raw values to score; None if ``data`` is given.
        keep: Columns of the table that go to the scores.
        split: Of the prepared data set.
        out: Parquet file of the scores.
        batch_size: Rows scored at a time.
        device: Of torch; a GPU if there is one, unless given.
        seed: Not used by a prediction; the data configs refer to it.
        data_root: Folder of the prepared data sets.
    """

    checkpoint: str = MISSING
    data: Any = None
    table: str | None = None
    keep: list[str] = MISSING
    split: str = MISSING
    out: str = MISSING
    batch_size: int = MISSING
    device: str | None = None
    seed: int = 0
    data_root: str = MISSING


@dataclass
class Export:
    """Keys of ``conf/export.yaml``.

    Args:
        checkpoint: Of a run.
        format: ``onnx`` or ``torch_export``.
        out: File of the model; beside the checkpoint unless given.
    """

    checkpoint: str = MISSING
    format: str = MISSING
    out: str | None = None


_logger = logging.getLogger(__name__)

_INTERRUPTED = 130  # what shells make of Ctrl-C
_store = ConfigStore.instance()
_store.store(name="train_schema", node=Train)
_store.store(name="prepare_schema", node=Prepare)
_store.store(name="describe_schema", node=Describe)
_store.store(name="predict_schema", node=Predict)
_store.store(name="export_schema", node=Export)
_store.store(name="status_schema", node=Status)
_store.store(name="report_schema", node=Report)
_store.store(name="dashboard_schema", node=Dashboard)


def entry_point(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command of a function of the composed config ``conf/<name>.yaml``.

    What the user got wrong ends the command with one message and exit status 1. In a sweep every
    error is the job's own: it is logged, and raised for the sweeper.
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
                if is_job_of_a_sweep():
                    _logger.error("%s", error if known is None else known, exc_info=known is None)
                    raise
                if known is None:
                    raise
                sys.exit(f"mtnrec: {known}")

        command.__doc__ = task.__doc__
        main: Callable[[], None] = command
        return main

    return decorate


def find_input_error(error: BaseException) -> InputError | None:
    """Return what the user got wrong, if an error is of that kind.

    Hydra wraps it. What it, Lightning or torch say of a value of the config is of that kind too.
    """
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, InputError):
        error = error.__cause__
    if isinstance(error, InstantiationException | OmegaConfBaseException):
        return InputError(" ".join(str(error).split()))
    return error if isinstance(error, InputError) else None


def is_job_of_a_sweep() -> bool:
    """Say whether Hydra's multirun started this run."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def has_the_screen() -> bool:
    """Say whether this process is the only one that draws on the screen."""
    alone = not is_job_of_a_sweep() or draws_on_the_screen(HydraConfig.get().launcher._target_)
    return alone and is_first_process()


def is_first_process() -> bool:
    """Say whether this process is the one that writes and speaks, of those that share a run."""
    # Lightning sets the rank when it is imported; a command that does without it has one process.
    return getattr(rank_zero_only, "rank", 0) == 0


def draws_on_the_screen(launcher: str) -> bool:
    """Say whether a launcher's runs draw on the screen, one after the other."""
    return launcher.endswith(".BasicLauncher")


def overrides_of_job() -> list[str]:
    """Return what the job's config overrides, of the keys that are not Hydra's own."""
    return list(HydraConfig.get().overrides.task)


def command_of_job(output_dir: Path) -> list[str]:
    """Return the command that makes this run, by itself and in the same folder."""
    return command_of(output_dir, overrides_of_job())


def command_of(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the command that makes a run of these overrides, by itself and in its folder."""
    place = ["hydra.mode=RUN", f"hydra.run.dir={folder}"]
    return ["python", "-m", "mtnrec.train", *place, *overrides]


def _quiet() -> None:
    # Lightning asks for worker processes; batches are gathered by one index, in this process.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 on torch 2.13; https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings(
        "ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning
    )
    # Of a folder that is gone on in, or whose run is replaced.
    warnings.filterwarnings("ignore", message=".*exists and is not empty")
    # Of DDP, about the gradient of a layer with one output.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Which keeps the buckets of the gradients: see trainer=ddp.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified in DDP")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for talkative in ("fontTools", "onnx_ir", "onnxscript"):  # of every font, of every constant
        logging.getLogger(talkative).setLevel(logging.WARNING)
    # Warns of torchvision, which no model here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if not has_the_screen():
        get_console().quiet = True
        logging.captureWarnings(capture=True)
        root = logging.getLogger()
        root.handlers = [one for one in root.handlers if not isinstance(one, RichHandler)]
    if not is_first_process():  # the first says the same; an error is raised all the same
        logging.getLogger().handlers = [logging.NullHandler()]
