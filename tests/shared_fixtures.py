"""Fixtures for tiny data in the real formats, configs and commands."""

import copy
import dataclasses
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich import get_console

from mtnrec.batch import Bags, Batch
from mtnrec.command.config import CONF_DIR
from mtnrec.data.datamodule import DataModule
from mtnrec.data.preparation.aliexpress import CATEGORICAL, LABELS, NUMERICAL
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.describe import main as describe_main
from mtnrec.evaluate import main as evaluate_main
from mtnrec.export import main as export_main
from mtnrec.predict import main as predict_main
from mtnrec.prepare import main as prepare_main
from mtnrec.report import main as report_main
from mtnrec.run.override import quote_value
from mtnrec.schema import CategoricalField, Schema
from mtnrec.status import main as status_main
from mtnrec.train import main as train_main
from mtnrec.training.recorder import RunRecorder

_SMALL_MODELS = {
    "aitm": ["model.tower_widths=[16,8]"],
    "dcmt": ["model.experts=3", "model.expert_widths=[16]", "model.tower_widths=[8]"],
    "escm2": ["model.experts=3", "model.expert_widths=[16]", "model.tower_widths=[8]"],
    "shared_bottom": ["model.bottom_widths=[16]", "model.tower_widths=[8]"],
    "esmm": ["model.tower_widths=[16,8]"],
    "mmoe": ["model.experts=3", "model.expert_widths=[16]", "model.tower_widths=[8]"],
    "single_task": ["model.tower_widths=[16,8]"],
    "omoe": ["model.experts=3", "model.expert_widths=[16]", "model.tower_widths=[8]"],
    "ple": ["model.experts=2", "model.levels=[[16],[12]]", "model.tower_widths=[8]"],
    "adatt": ["model.task_experts=2", "model.levels=[[16],[12]]", "model.tower_widths=[8]"],
    "naive_cvr": ["model.tower_widths=[16,8]"],
    "mmoe_cross": ["model.experts=3", "model.expert_widths=[16]", "model.tower_widths=[8]"],
    "heac": ["model.experts=3", "model.expert_widths=[16]", "model.gate_widths=[8]"],
    "stem": [
        *("model.experts=2", "model.task_experts=1", "model.expert_widths=[16]"),
        *("model.gate_widths=[8]", "model.tower_widths=[8]"),
    ],
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a second thread costs more than it gains on tiny tensors


@pytest.fixture(scope="session", autouse=True)
def _parsed_once() -> Iterator[None]:
    """Parse equal YAML texts once: Hydra reads about thirty files again for each command."""
    load = OmegaConf.load
    parse = functools.cache(lambda text: load(io.StringIO(text)))

    def load_copy(file: Any) -> Any:
        return copy.deepcopy(parse(file.read())) if hasattr(file, "read") else load(file)

    with mock.patch.object(OmegaConf, "load", load_copy):
        yield


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
    """Draw ``rows`` rows of a schema; labels follow its funnel, if any."""

    def make(schema: Schema, rows: int = 16, seed: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        sizes = [field.vocabulary_size for field in schema.categorical]
        categorical = rng.integers(0, sizes, (rows, len(sizes)), dtype=np.int32)
        numerical = rng.random((rows, len(schema.numerical)), dtype=np.float32)
        labels = rng.integers(0, 2, (rows, len(schema.labels)))
        if schema.funnel:
            labels[:, 1] &= labels[:, 0]
        arrays = categorical, numerical, labels.astype(np.float32), rng.integers(0, 4, rows)
        bags = []
        for field in schema.multivalued:
            lengths = rng.integers(0, 5, rows)
            tokens = rng.integers(0, field.vocabulary_size, lengths.sum(), dtype=np.int32)
            weights = rng.random(lengths.sum(), dtype=np.float32)
            offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
            bags.append(Bags(*map(torch.from_numpy, (tokens, weights, offsets))))
        return Batch(*map(torch.from_numpy, arrays), tuple(bags))

    return make


@pytest.fixture
def compose_config() -> Callable[..., DictConfig]:
    """Compose ``conf/<name>.yaml`` as the command line does."""
    return lambda *overrides, name="train": _compose(name, *overrides)


def _compose(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


_compose_once = functools.cache(_compose)


@pytest.fixture
def make_datamodule() -> Callable[..., DataModule]:
    """Build the DataModule of ``data=<name>`` with overrides of its keys."""

    def make(name: str, *overrides: str) -> DataModule:
        config = _compose_once("train", f"data={name}").copy()
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(config.data, override.key_or_group, override.value())
        return instantiate(config.data, _convert_="all")

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


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run the training command in this process with a tiny model; return the run folder."""
    data_root = tmp_path_factory.mktemp("data")

    def run(*overrides: str, model: str = "esmm", folder: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp("run") if folder is None else folder
        _call(
            train_main,
            f"data_root={data_root}",
            f"hydra.run.dir={quote_value(str(folder))}",
            f"hydra.sweep.dir={quote_value(str(folder))}",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=2",
            "data.batch_size=512",
            f"model={model}",
            "model.embedding_dim=4",
            *_SMALL_MODELS[model],
            *overrides,
        )
        return folder

    return run


def write_shop(path: Path, rows: int = 600, seed: int = 0) -> pd.DataFrame:
    """A log with texts, integers, numbers, missing cells and values that only few rows have."""
    rng = np.random.default_rng(seed)
    click = rng.random(rows) < 0.4
    frame = pd.DataFrame(
        {
            "id": np.arange(rows),
            "brand": rng.choice(["zeta", "Älpha", "beta", None], rows),
            "shop": rng.integers(-5, 30, rows),
            "price": np.where(rng.random(rows) < 0.1, np.nan, rng.lognormal(3, 1, rows)),
            "age": rng.random(rows) * 80,
            "click": click.astype(int),
            "buy": (click & (rng.random(rows) < 0.5)).astype(int),
        }
    )
    frame.to_csv(path, index=False)
    return frame


@pytest.fixture(scope="session")
def shop(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model trained on a table of one's own: the run, the test rows and the data's overrides."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "train.csv")
    rows = write_shop(folder / "test.csv", rows=90, seed=1)
    data = [
        *("data=table", f"data.train={folder}/train.csv", f"data.test={folder}/test.csv"),
        *("data.labels=[click,buy]", "data.exclude=[id]", "data.fill=mean", "data.min_count=5"),
        "data.funnel=true",
        f"data.dir={folder}/prepared",
    ]
    run = train(*data, model="shared_bottom")
    return run, rows, data


@pytest.fixture
def prepare() -> Callable[..., None]:
    """Run the preparation command in this process."""
    return lambda *overrides: _call(prepare_main, *overrides)


@pytest.fixture(scope="session")
def export() -> Callable[..., None]:
    """Run the export command in this process."""
    return lambda *overrides: _call(export_main, *overrides)


@pytest.fixture(scope="session")
def predict() -> Callable[..., None]:
    """Run the prediction command in this process."""
    return lambda *overrides: _call(predict_main, *overrides)


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., None]:
    """Run the evaluation command in this process."""
    return lambda *overrides: _call(evaluate_main, *overrides)


@pytest.fixture
def describe() -> Callable[..., None]:
    """Run the describe command in this process."""
    return lambda *overrides: _call(describe_main, *overrides)


@pytest.fixture
def status() -> Callable[..., None]:
    """Run the status command in this process."""
    return lambda *overrides: _call(status_main, *overrides)


@pytest.fixture(scope="session")
def report() -> Callable[..., None]:
    """Run the report command in this process."""
    return lambda *overrides: _call(report_main, *overrides)


def _call(main: Callable[[], None], *arguments: str) -> None:
    """Call an entry point like the command line, and restore the process state afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with (
            mock.patch.object(sys, "argv", ["mtnrec", *arguments]),
            mock.patch.dict(os.environ),
            _known_mode(arguments),
        ):
            os.environ["HYDRA_FULL_ERROR"] = "1"
            main()
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(capture=False)
        get_console().quiet = False
        torch.use_deterministic_algorithms(mode=False)


def _known_mode(arguments: Sequence[str]) -> AbstractContextManager[Any]:
    """Give Hydra its mode, so that it composes no config for it, unless an experiment sets it."""
    if any(argument.startswith("experiment=") for argument in arguments):
        return nullcontext()
    mode = RunMode.MULTIRUN if "hydra.mode=MULTIRUN" in arguments else None  # -m, or a single run
    return mock.patch.object(Hydra, "get_mode", return_value=mode)


@pytest.fixture
def write_tiny(funnel_schema: Schema) -> Callable[..., Manifest]:
    """Write a prepared data set whose first numerical feature is the row number in the split.

    With ``multivalued``, it has two multi-valued fields of 5 bags each; the first bag is empty.
    """

    def make(
        folder: Path, *, train: int = 23, test: int = 7, seed: int = 0, multivalued: bool = False
    ) -> Manifest:
        rng = np.random.default_rng(seed)
        schema = funnel_schema
        if multivalued:
            histories = (CategoricalField("brands", 9), CategoricalField("shops", 30))
            schema = dataclasses.replace(schema, multivalued=histories)
        sizes = [field.vocabulary_size for field in schema.categorical]
        with write_prepared(folder, ("train", "test")) as writer:
            for split, rows in (("train", train), ("test", test)):
                click = rng.random(rows) < 0.5
                conversion = click & (rng.random(rows) < 0.5)
                for label in (click, conversion):
                    label[:2] = [False, True][:rows]  # both occur
                arrays = {
                    "categorical": rng.integers(0, sizes, (rows, len(sizes))),
                    "numerical": np.stack([np.arange(rows), rng.random(rows)], axis=1),
                    "labels": np.stack([click, conversion], axis=1),
                    "group": rng.integers(0, 4, rows),
                }
                if multivalued:
                    arrays["bag"] = rng.integers(0, 5, (rows, 2))
                writer.append(split, arrays)
                for field in schema.multivalued:
                    lengths = np.array([0, *rng.integers(1, 6, 4)])
                    tokens = rng.integers(0, field.vocabulary_size, lengths.sum())
                    writer.append_bags(split, field.name, lengths, tokens, rng.random(len(tokens)))
            return writer.finish(source="tiny", parameters={"seed": seed}, schema=schema, report={})

    return make


class Killed(BaseException):
    """Raised to simulate a killed process; no code catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, hook: str, number: int) -> None:
    """Kill the next run at the n-th call of a hook."""
    original, calls = getattr(RunRecorder, hook), []

    def dying(self, *arguments):
        calls.append(hook)
        if len(calls) == number:
            monkeypatch.setattr(RunRecorder, hook, original)
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(RunRecorder, hook, dying)


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Kill the next run at the n-th call of a hook."""
    return partial(kill_at, monkeypatch)


@pytest.fixture
def product_setting():
    """Set torch's float32 matmul precision on the CPU to ``ieee``; restore it at the end."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch has this setting since 2.9")
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    yield setting
    setting.fp32_precision = before
