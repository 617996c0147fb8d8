"""Location of the configuration, and the typed root of each command."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mtnrec.run.identity import CHECKPOINTS, flatten, folder_name

_package = Path(__file__).resolve().parents[1]
_packaged = _package / "conf"  # only in an installed wheel; see force-include in pyproject.toml
EMBEDDING_DECAY = "embedding_weight_decay"  # for a parameter group, not for torch's optimiser
_KEYS_IN_NAMES: ContextVar[Collection[str] | None] = ContextVar("keys_in_names", default=None)
CONF_DIR = _packaged if _packaged.is_dir() else _package.parents[1] / "conf"


def lightning_keys(trainer: DictConfig) -> DictConfig:
    """Return the trainer config without the keys that Lightning does not take."""
    return OmegaConf.masked_copy(trainer, [str(key) for key in trainer if key != CHECKPOINTS])


def optimizer_keys(optimizer: DictConfig) -> DictConfig:
    """Return the optimiser's config without the keys of its parameter groups."""
    return OmegaConf.masked_copy(optimizer, [str(k) for k in optimizer if k != EMBEDDING_DECAY])


def resolve_settings(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain containers, without keys that depend on the run folder."""
    return {
        str(key): OmegaConf.to_container(config[key], resolve=True)
        if OmegaConf.is_config(config[key])
        else config[key]
        for key in config
        if key not in ("hydra", "output_dir", "logger")
    }


def seed_keys(config: DictConfig) -> list[str]:
    """Return the dotted config keys that change with the seed, including ``seed``.

    They are not settings of an arm; see :class:`~mtnrec.run.identity.RunIdentity`.
    """
    other = cast(DictConfig, OmegaConf.merge(config, {"seed": config.seed + 1}))
    one, two = (dict(flatten(resolve_settings(c))) for c in (config, other))
    return sorted(key for key, value in one.items() if two[key] != value)


def override_key(override: str) -> str:
    """Return the dotted key or the group that an override changes.

    >>> [override_key(line) for line in ("seed=0", "++data.name=a=b", "~mtn", "model@_here_=esmm")]
    ['seed', 'data.name', 'mtn', 'model']
    """
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


@contextmanager
def naming_folders_after(keys: Collection[str]) -> Iterator[None]:
    """Name the folders of runs that are composed in the block after these overridden keys only."""
    token = _KEYS_IN_NAMES.set(keys)
    try:
        yield
    finally:
        _KEYS_IN_NAMES.reset(token)


def named_settings(config: DictConfig) -> dict[str, Any]:
    """Return what a run's folder is named after: overridden keys, dotted, and groups' choices."""
    choices, found = config.hydra.runtime.choices, {}
    keys = _KEYS_IN_NAMES.get()
    for override in config.hydra.overrides.task:
        key = override_key(override)
        if keys is not None and key not in keys:
            continue
        value = choices[key] if key in choices else OmegaConf.select(config, key)
        found[key] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    return found


def _folder_of_run(_root_: DictConfig) -> str:
    """Return the name of a run's folder: that of a run with the same settings, if there is one."""
    name = folder_name(resolve_settings(_root_), named_settings(_root_))
    end = name[name.rindex("-seed") :]
    same = sorted(path.name for path in Path(_root_.hydra.sweep.dir).glob(f"*{end}"))
    return same[0] if same and name not in same else name


# Hydra resolves the folder of a job before the keys that depend on it.
OmegaConf.register_new_resolver("cell_folder", _folder_of_run, replace=True)


def _seed_of_repeat(_root_: DictConfig) -> int:
    """Return the seed of the validation rows and of the noise."""
    is_drawn = OmegaConf.select(_root_, "repeats") == "seed_split_noise"
    return int(_root_.seed) if is_drawn else 0


OmegaConf.register_new_resolver("seed_of_repeat", _seed_of_repeat, replace=True)


@dataclass
class Train:
    """Keys of ``conf/train.yaml``."""

    data: Any = MISSING
    noise: Any = MISSING
    model: Any = MISSING
    mtn: Any = MISSING
    regularizer: Any = MISSING
    loss: Any = MISSING
    balance: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: Any = None
    metrics: Any = None
    seed: int = 0
    monitor: str = MISSING
    stop: str = MISSING
    patience: int = MISSING
    task_loss: str = MISSING
    min_group_rows: int = 1
    repeats: str = MISSING
    resume: bool = True
    test: bool = True
    dry_run: bool = False
    cuda_graphs: bool = False
    keep_scores: bool = False
    threads: int | None = None
    data_root: str = MISSING
    output_dir: str = MISSING


@dataclass
class Prepare:
    """Keys of ``conf/prepare.yaml``."""

    data: Any = MISSING
    overwrite: bool = False
    data_root: str = MISSING


@dataclass
class Describe:
    """Keys of ``conf/describe.yaml``."""

    data: Any = MISSING
    noise: Any = MISSING
    data_root: str = MISSING
    out: str = MISSING


@dataclass
class Status:
    """Keys of ``conf/status.yaml``."""

    runs: str = MISSING
    refresh: float = MISSING
    watch: bool = MISSING


@dataclass
class Report:
    """Keys of ``conf/report.yaml``."""

    runs: str = MISSING
    out: str = MISSING
    metric: str = MISSING
    split: str = MISSING
    baseline: str | None = None
    margin: float = MISSING
    resamples: int = MISSING
    records: str | None = None
    leaderboard: str | None = None


@dataclass
class Dashboard:
    """Keys of ``conf/dashboard.yaml``."""

    entity: str = MISSING
    project: str = MISSING
    experiment: str | None = None
    kind: str = MISSING
    tasks: list[str] = MISSING
    offline: bool = False
    out: str = MISSING


@dataclass
class Predict:
    """Keys of ``conf/predict.yaml``."""

    checkpoint: str = MISSING
    data: Any = None
    table: str | None = None
    keep: list[str] = MISSING
    separator: str | None = None
    decimal: str | None = None
    split: str = MISSING
    out: str = MISSING
    batch_size: int = MISSING
    device: str | None = None
    allow: Any = MISSING
    data_root: str = MISSING


@dataclass
class Evaluate:
    """Keys of ``conf/evaluate.yaml``."""

    checkpoint: str = MISSING
    data: Any = None
    table: str | None = None
    group: str | None = None
    min_group_rows: int = 1
    separator: str | None = None
    decimal: str | None = None
    split: str = MISSING
    out: str | None = None
    batch_size: int = MISSING
    device: str | None = None
    allow: Any = MISSING
    data_root: str = MISSING


@dataclass
class Export:
    """Keys of ``conf/export.yaml``."""

    checkpoint: str = MISSING
    format: str = MISSING
    out: str | None = None
    allow: Any = MISSING


for root in (Train, Prepare, Describe, Predict, Evaluate, Export, Status, Report, Dashboard):
    ConfigStore.instance().store(name=f"{root.__name__.lower()}_schema", node=root)
