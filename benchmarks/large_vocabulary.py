"""Time a training step on 1.3 million embedding rows of width 128: dense Adam against lazy_adam.

``python benchmarks/large_vocabulary.py [--rows 1300000] [--skew 1] [--steps 40] [--rounds 5]``

The fields are those of ``data=synthetic_ali_ccp``: 18 without numerical features, with AITM's
vocabularies; ``--rows`` scales the large ones. Value ``k`` of a field has a probability
proportional to ``(k + 1) ** -skew``; with 0, values hardly repeat within a batch. Each measurement
runs in a separate process that trains like ``python -m mtnrec.train``, except ``Adam()``, which
keeps torch's default memory and product settings, as a script does. A round measures each optimiser
once, and ratios are within a round. Needs an idle machine and 4 GiB of memory.
"""

import argparse
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import numpy as np
import torch
from _setup import compose_train, make_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from mtnrec.batch import Batch
from mtnrec.command.config import lightning_keys
from mtnrec.schema import CategoricalField, Schema
from mtnrec.system.performance import tune_process
from mtnrec.training.recorder import peak_memory_bytes

PLAIN = "Adam()"
OPTIMIZERS = {
    PLAIN: ("optimizer=adam", "++optimizer.fused=null"),
    "Adam(fused=True)": ("optimizer=adam", "++optimizer.fused=true"),
    "lazy_adam": ("optimizer=lazy_adam",),
}
ALI_CCP_ROWS = 1_300_000
WARM_UP = 5  # steps; the first one creates the moments


class _StepTimer(L.Callback):
    """Records the start of each step, so that step times include loading."""

    def __init__(self) -> None:
        self._starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._starts.append(perf_counter())

    def seconds_per_step(self) -> float:
        return (self._starts[-1] - self._starts[WARM_UP]) / (len(self._starts) - 1 - WARM_UP)


def _compose(arguments: argparse.Namespace, *overrides: str) -> DictConfig:
    own = ("data=synthetic_ali_ccp", f"model={arguments.model}", "trainer.accelerator=cpu")
    return compose_train(*own, *overrides)


def _schema(cfg: DictConfig, rows: int) -> Schema:
    """Return Ali-CCP's fields, index 0 for a missing value, with about ``rows`` values in total."""
    scale = rows / sum(cfg.data.vocabulary_sizes)
    sizes = [max(round(size * scale), min(size, 100)) + 1 for size in cfg.data.vocabulary_sizes]
    fields = tuple(CategoricalField(f"field_{i}", size) for i, size in enumerate(sizes))
    return Schema(fields, (), ("click", "conversion"), funnel=True)


def _draw(schema: Schema, rows: int, skew: float) -> Batch:
    """Draw rows whose frequent values are scattered over each table."""
    rng = np.random.default_rng(0)
    columns = []
    for field in schema.categorical:
        edges = np.cumsum(np.arange(1, field.vocabulary_size + 1) ** -skew)
        ranks = np.searchsorted(edges, rng.random(rows) * edges[-1])
        columns.append(rng.permutation(field.vocabulary_size)[ranks])
    labels = rng.random((rows, 2)) < (0.04, 0.01)
    labels[:, 1] &= labels[:, 0]
    return Batch(
        torch.from_numpy(np.stack(columns, axis=1).astype(np.int32)),
        torch.zeros(rows, 0),
        torch.from_numpy(labels.astype(np.float32)),
    )


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train in this process; return the measurements."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    cfg = _compose(arguments, *OPTIMIZERS[arguments.measure])
    schema = _schema(cfg, arguments.rows)
    L.seed_everything(cfg.seed, verbose=False)
    module = make_module(cfg, schema)
    size = cfg.data.batch_size
    batch = _draw(schema, size * (WARM_UP + arguments.steps + 1), arguments.skew)
    batches = [
        Batch(*parts)
        for parts in zip(
            *(x.split(size) for x in (batch.categorical, batch.numerical, batch.labels)),
            strict=True,
        )
    ]
    timer = _StepTimer()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    keys = lightning_keys(cfg.trainer)
    trainer = instantiate(keys, max_epochs=1, limit_val_batches=0, callbacks=[timer], **quiet)
    if arguments.measure != PLAIN:
        tune_process(trainer.strategy.root_device)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    present = [len(set(column.tolist())) for column in batches[-1].categorical.T]
    return {
        "seconds": timer.seconds_per_step(),
        "batch": size,
        "bytes": peak_memory_bytes(),
        "rows": sum(field.vocabulary_size for field in schema.categorical),
        "present": sum(present),
    }


def _measure_in_subprocess(arguments: argparse.Namespace, optimizer: str) -> dict[str, float]:
    """Measure one optimiser in a separate process."""
    keys = ("rows", "skew", "steps", "model")
    options = [f"--{key}={getattr(arguments, key)}" for key in keys]
    command = [sys.executable, __file__, *options, f"--measure={optimizer}"]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return found


def _row(optimizer: str, rounds: Sequence[dict[str, dict[str, float]]]) -> str:
    own = [found[optimizer] for found in rounds]
    ratios = [found[optimizer]["seconds"] / found["lazy_adam"]["seconds"] for found in rounds]
    seconds = median(one["seconds"] for one in own)
    cells = (
        f"`{optimizer}`",
        f"{seconds * 1000:,.0f} ms",
        f"{own[0]['batch'] / seconds:,.0f}",
        f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        f"{max(one['bytes'] for one in own) / 2**20:,.0f} MiB",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a Markdown table with one row per optimiser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=ALI_CCP_ROWS, help="rows of all embedding tables"
    )
    parser.add_argument("--skew", type=float, default=1.0)
    parser.add_argument(
        "--steps", type=int, default=40, help="measured steps of 2,048 samples each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="shared_bottom")
    parser.add_argument("--measure", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_measure(arguments)))
        return
    rounds = [
        {name: _measure_in_subprocess(arguments, name) for name in OPTIMIZERS}
        for _ in range(arguments.rounds)
    ]
    lazy = rounds[0]["lazy_adam"]
    print(
        f"{arguments.model}: {lazy['rows']:,} rows, of which a batch of {lazy['batch']:,} has "
        f"{lazy['present']:,}; median (and range) of {arguments.rounds} rounds\n"
    )
    print("| optimiser | step | samples per second | lazy_adam is faster by | peak memory |")
    print("|---|---|---|---|---|")
    for optimizer in OPTIMIZERS:
        print(_row(optimizer, rounds))


if __name__ == "__main__":
    main()
