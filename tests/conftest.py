"""Tiny data in the real formats, written by code."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from mtnrec.batch import Batch
from mtnrec.config import CONF_DIR
from mtnrec.data.aliexpress import CATEGORICAL, LABELS, NUMERICAL
from mtnrec.data.datamodule import DataModule
from mtnrec.schema import CategoricalField, Schema


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTNREC_DATA", str(tmp_path / "data"))


@pytest.fixture
def funnel_schema() -> Schema:
    fields = tuple(CategoricalField(f"categorical_{i}", size) for i, size in enumerate((3, 40, 2)))
    return Schema(fields, ("price", "age"), ("click", "conversion"), funnel=True)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Draw ``rows`` rows of a schema; labels follow the funnel if there is one."""

    def make(schema: Schema, rows: int = 16, seed: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        sizes = [field.vocabulary_size for field in schema.categorical]
        categorical = rng.integers(0, sizes, (rows, len(sizes)), dtype=np.int32)
        numerical = rng.random((rows, len(schema.numerical)), dtype=np.float32)
        labels = rng.integers(0, 2, (rows, len(schema.labels)))
        if schema.funnel:
            labels[:, 1] &= labels[:, 0]
        tensors = categorical, numerical, labels.astype(np.float32)
        return Batch(*map(torch.from_numpy, tensors), torch.from_numpy(rng.integers(0, 4, rows)))

    return make


@pytest.fixture
def compose_config() -> Callable[..., DictConfig]:
    """Compose ``conf/<name>.yaml`` as the command line does."""

    def make(*overrides: str, name: str = "train") -> DictConfig:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(name, overrides=list(overrides))

    return make


@pytest.fixture
def make_datamodule(compose_config: Callable[..., DictConfig]) -> Callable[..., DataModule]:
    """Build the DataModule of ``data=<name>`` with overrides of its keys."""

    def make(name: str, *overrides: str) -> DataModule:
        keys = [f"data.{override}" for override in overrides]
        return instantiate(compose_config(f"data={name}", *keys).data, _convert_="all")

    return make


@pytest.fixture
def write_aliexpress() -> Callable[..., Path]:
    """Write ``train.csv`` and ``test.csv`` in MTReclib's layout."""

    def make(folder: Path, rows: int = 60, seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        header = ",".join(["search_id", *CATEGORICAL, *NUMERICAL, *LABELS])
        for number, split in enumerate(("train", "test")):
            rng = np.random.default_rng([seed, number])
            lines = [header]
            for row in range(rows):
                click = row % 3 == 0
                conversion = row % 6 == 0
                cells = [
                    row // 4,
                    8,
                    *rng.integers(0, [9, 3, 6, 1, 20, 6, 49, 7, 6, 1, 1, 1, 1, 1, 1]),
                    *(f"{value:.6f}" for value in rng.random(60)),
                    *rng.integers(0, 3, 3),
                    int(click),
                    int(conversion),
                ]
                lines.append(",".join(map(str, cells)))
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make
