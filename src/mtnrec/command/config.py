"""Where the configuration lies, and the typed root of each command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mtnrec.run.identity import CHECKPOINTS, flatten, folder_name

_package = Path(__file__).resolve().parents[1]
_packaged = _package / "conf"  # there only in an installed wheel; see pyproject's force-include
CONF_DIR = _packaged if _packaged.is_dir() else _package.parents[1] / "conf"


def lightning_keys(trainer: DictConfig) -> DictConfig:
    """Return the config of the trainer without what Lightning's own does not take."""
    return OmegaConf.masked_copy(trainer, [str(key) for key in trainer if key != CHECKPOINTS])


def resolve_settings(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain containers, without what depends on the run's folder."""
    return {
        str(key): OmegaConf.to_container(config[key], resolve=True)
        if OmegaConf.is_config(config[key])
        else config[key]
        for key in config
        if key not in ("hydra", "output_dir", "logger")
    }


def seed_keys(config: DictConfig) -> list[str]:
    """Return the dotted keys of a config that change with the seed, the seed among them.

    They are not settings of an arm: with ``noise.seed=${seed}`` each repeat has its own noise, and
    the repeats remain repeats of one another.
    """
    other = cast(DictConfig, OmegaConf.merge(config, {"seed": config.seed + 1}))
    one, two = (dict(flatten(resolve_settings(c))) for c in (config, other))
    return sorted(key for key, value in one.items() if two[key] != value)


def _folder_of_run(_root_: DictConfig) -> str:
    return folder_name(resolve_settings(_root_))


# Hydra asks for the folder of a job before it has set the keys that depend on it.
OmegaConf.register_new_resolver("cell_folder", _folder_of_run, replace=True)


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
    cuda_graphs: bool = False
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


_store = ConfigStore.instance()
_store.store(name="train_schema", node=Train)
_store.store(name="prepare_schema", node=Prepare)
_store.store(name="describe_schema", node=Describe)
_store.store(name="predict_schema", node=Predict)
_store.store(name="export_schema", node=Export)
_store.store(name="status_schema", node=Status)
_store.store(name="report_schema", node=Report)
_store.store(name="dashboard_schema", node=Dashboard)
