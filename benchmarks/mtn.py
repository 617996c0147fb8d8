"""Cost of MTN in a training step, and its accuracy.

``python benchmarks/mtn.py``

Rows shaped like AliExpress, batches of 2,048. *Step*: a training step without MTN's part. *Share*:
the time of MTN's part over that of the rest, in blocks of 256 steps after the first 512, on a log
of two million rows. *Start*: the extra time of MTN in the first 512 steps. *Epoch*: the time to
measure at the end of an epoch, with kept vectors and, every ``mtn.spectra_every`` epochs, exactly.
*Exact*: MTN's part of a step with ``refresh_every=1``, in
float64, over the same by autograd through SVDs, in float32 and in float64. The other columns are
those of ``mtn_accuracy.py`` at full size, ``lam=1e-5``: the deviation of the default's norms, loss
share, alphas, effective ranks and spectra from the exact method's in float64, at the worst of
``--epochs`` epochs on the default log.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from _setup import compose_train, make_data, make_network, optimizer_of
from hydra.utils import instantiate
from mtn_accuracy import FIGURES, compose_training, load, train, worst

from mtnrec.batch import Batch
from mtnrec.model.loss import cross_entropies
from mtnrec.system.performance import tune_process

ROWS = 2_000_000
START, BLOCK, BLOCKS = 512, 256, 4
MODELS = ("shared_bottom", "esmm", "mmoe")


class Training:
    """Model, optimiser and MTN callback of one training."""

    def __init__(self, model: str, data_root: str, *overrides: str) -> None:
        keys = [f"model={model}", f"data_root={data_root}", f"data.rows={ROWS}"]
        keys += ["mtn.enabled=true", *overrides]
        cfg = compose_train(*keys)
        datamodule = make_data(cfg)
        datamodule.setup()
        torch.manual_seed(0)
        self.network: Any = make_network(cfg, datamodule.schema)
        self.optimizer = optimizer_of(cfg)(self.network.parameters())
        self.mtn = instantiate(cfg.mtn, _convert_="all")
        loader = datamodule.train_dataloader()
        self.batches: Iterator[Batch] = chain.from_iterable(repeat(loader))
        self.trainer: Any = SimpleNamespace(precision_plugin=None, global_step=0)
        module: Any = SimpleNamespace(network=self.network, device=torch.device("cpu"))
        self.mtn.setup(self.trainer, module, "fit")
        self.mtn.on_train_start(self.trainer, module)

    def steps(self, count: int) -> tuple[float, float]:
        """Run ``count`` steps; return the seconds of the penalty and of everything else."""
        started, of_penalty = perf_counter(), 0.0
        for batch in islice(self.batches, count):
            loss = cross_entropies(self.network(batch), batch.labels).sum()
            self.optimizer.zero_grad()
            loss.backward()
            of_penalty += self.penalty()
            self.optimizer.step()
        return of_penalty, perf_counter() - started - of_penalty

    def penalty_by_autograd(self, dtype: torch.dtype) -> float:
        """Return the seconds for the penalty's value and gradient through SVDs."""
        started = perf_counter()
        terms = []
        for layers in self.network.task_layers():
            stack = torch.stack([layer.weight for layer in layers]).to(dtype)
            for mode in range(3):
                matrix = stack.movedim(mode, 0).flatten(1)
                terms.append(torch.linalg.svd(matrix, full_matrices=False).S.sum() / 3)
            terms.append(torch.linalg.vector_norm(stack))
        torch.stack(terms).sum().backward()
        return perf_counter() - started

    def penalty(self) -> float:
        """Return the seconds of the callback in one step."""
        started = perf_counter()
        self.mtn.on_before_optimizer_step(self.trainer, None, self.optimizer)
        self.trainer.global_step += 1
        return perf_counter() - started


def measure(model: str, data_root: str) -> list[str]:
    """Return the timing columns of a model's row."""
    training = Training(model, data_root)
    first, _ = training.steps(START)
    blocks = [training.steps(BLOCK) for _ in range(BLOCKS)]
    shares = sorted(of_mtn / others for of_mtn, others in blocks)
    of_mtn, others = (median(column) for column in zip(*blocks, strict=True))
    kept, exactly = (
        median(_seconds(partial(method, training.trainer.global_step)) for _ in range(5))
        for method in (training.mtn._penalty.refresh, training.mtn._penalty.measure)
    )

    exact = Training(model, data_root, "mtn.refresh_every=1")
    exact.steps(2)
    ratios = [
        median(exact.penalty_by_autograd(dtype) / exact.penalty() for _ in range(5))
        for dtype in (torch.float32, torch.float64)
    ]
    return [
        f"{others / BLOCK * 1e3:.1f} ms",
        f"**{median(shares):.1%}** ({shares[0]:.1%} to {shares[-1]:.1%})",
        f"{first - of_mtn / BLOCK * START:.1f} s",
        f"{kept * 1e3:.0f} and {exactly * 1e3:.0f} ms",
        *(f"**1/{ratio:.1f}**" for ratio in ratios),
    ]


def _seconds(function: Callable[[], object]) -> float:
    started = perf_counter()
    function()
    return perf_counter() - started


def deviations(model: str, data_root: str, epochs: int) -> list[str]:
    """Return the deviations of the default from the exact method, one per figure."""
    keys = ["mtn.enabled=true", "mtn.lam=1e-5"]
    default = compose_training(model, "full", 0, data_root, *keys)
    exact = compose_training(model, "full", 0, data_root, *keys, "mtn.refresh_every=1")
    schema, batches = load(default, epochs)
    found = list(train(default, schema, batches, torch.float32))
    return worst(found, list(train(exact, schema, batches, torch.float64)))


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    tune_process(torch.device("cpu"))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    columns = ["model", "step", "share", "start", "epoch", "exact", "in float64", *FIGURES]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as data_root:
        for model in arguments.models:
            cells = measure(model, data_root)
            cells += deviations(model, data_root, arguments.epochs)
            print(f"| `{model}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
