"""Parts of a training step, and the time that Lightning adds to it.

``python benchmarks/step.py``

Rows shaped like AliExpress, batches of 2,048. *Literal*: floating-point operations of the literal
program for the same step; their ratio to those of the step bounds the ratio of the speeds, where
the literal program reaches the same share of the peak. *Of the peak*: the rate of the step's matrix
products, relative to that of a product of two 2,048 x 2,048 matrices on this machine. *Products*,
*optimiser*, *others*: shares of the time by torch's profiler. *Lightning*: extra time of the second
epoch of a trainer with callbacks, logger and progress bar over an epoch of bare steps; in the first
epoch the optimiser creates its state.
"""

import argparse
import importlib
import io
import logging
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
from _setup import compose_train, make_data, make_module, take_step
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from train import MODELS, TESTS

from mtnrec.batch import Batch
from mtnrec.command.config import lightning_keys
from mtnrec.schema import Schema
from mtnrec.system.performance import tune_process
from mtnrec.training.recorder import RunRecorder

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ROUNDS = 8


class EpochTimer(L.Callback):
    """Records the seconds per batch of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._started = perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seconds.append((perf_counter() - self._started) / trainer.num_training_batches)


def peak(repetitions: int = 20) -> float:
    """Return the floating-point operations per second of a large float32 product."""
    a, b = torch.randn(2, 2048, 2048)
    seconds = []
    for _ in range(repetitions):
        started = perf_counter()
        a @ b
        seconds.append(perf_counter() - started)
    return 2 * 2048**3 / median(seconds)


def literal_operations(model: str, schema: Schema, batch: Batch) -> float:
    """Return the floating-point operations of a step of the literal program."""
    literal: Any = importlib.import_module("reference.literal")
    sizes = [field.vocabulary_size for field in schema.categorical]
    network = literal.MODELS[model](sizes, len(schema.numerical))
    with FlopCounterMode(display=False) as counter:
        outputs = network(batch.categorical, batch.numerical)
        literal.entropies(outputs, batch.labels).backward()
    return counter.get_total_flops()


def measure(model: str, data_root: str, best: float) -> list[str]:
    """Return the columns of a model's row."""
    cfg = compose_train(f"model={model}", f"data_root={data_root}")
    datamodule = make_data(cfg)
    datamodule.setup()
    module = make_module(cfg, datamodule.schema)
    optimizer = module.configure_optimizers()
    step = partial(take_step, module, optimizer)

    def epoch() -> float:
        started = perf_counter()
        loader = datamodule.train_dataloader()
        for batch in loader:
            step(batch)
        return (perf_counter() - started) / len(loader)

    batches: Iterator[Batch] = cycle(islice(datamodule.train_dataloader(), 8))
    for batch in islice(batches, 8):
        step(batch)
    with FlopCounterMode(display=False) as counter:
        step(next(batches))
    literal = literal_operations(model, datamodule.schema, next(batches))
    with profile() as trace:
        for batch in islice(batches, 8):
            step(batch)
    times = {row.key: row.self_cpu_time_total for row in trace.key_averages()}
    products = sum(times.get(name, 0) for name in PRODUCTS) / sum(times.values())
    adam = sum(t for name, t in times.items() if "adam" in name.lower()) / sum(times.values())

    bare, timer = [], EpochTimer()
    # Draws the bar as on a terminal, but into memory.
    screen = {"file": io.StringIO(), "force_terminal": True, "width": 120}
    keys = {"num_sanity_val_steps": 0, "enable_checkpointing": False, "limit_val_batches": 0}
    for _ in range(ROUNDS):
        bare.append(epoch())
        with tempfile.TemporaryDirectory() as folder:
            trainer = instantiate(
                lightning_keys(cfg.trainer),
                accelerator="cpu",
                max_epochs=2,
                callbacks=[timer, RunRecorder(), RichProgressBar(10, console_kwargs=screen)],
                logger=CSVLogger(folder),
                default_root_dir=folder,
                **keys,
            )
            trainer.fit(module, datamodule=datamodule)
    seconds = median(bare)
    pairs = zip(timer.seconds[1::2], bare, strict=True)
    shares = sorted(with_it / without - 1 for with_it, without in pairs)
    return [
        f"{seconds * 1e3:.1f} ms",
        f"{counter.get_total_flops() / 1e9:.1f}",
        f"{literal / 1e9:.1f}",
        f"{counter.get_total_flops() / seconds / best:.0%}",
        f"{products:.0%}",
        f"{adam:.0%}",
        f"{1 - products - adam:.0%}",
        f"**{median(shares):.1%}** ({shares[0]:.1%} to {shares[-1]:.1%})",
    ]


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    tune_process(torch.device("cpu"))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    sys.path.append(str(TESTS))
    best = peak()
    print(f"Peak: {best / 1e9:.0f} GFLOP/s in float32, {torch.get_num_threads()} threads.\n")
    columns = "step | GFLOP | literal | of the peak | products | optimiser | others | Lightning"
    print(f"| model | {columns} |\n|{'---|' * 9}")
    with tempfile.TemporaryDirectory() as data_root:
        for model in arguments.models:
            print(f"| `{model}` | {' | '.join(measure(model, data_root, best))} |", flush=True)


if __name__ == "__main__":
    main()
