"""Parameters and speed of every model, beside MMoE.

``python benchmarks/models.py``

Rows shaped like AliExpress, batches of 2,048. In each round every model takes a few steps, in turn;
*beside MMoE* is the time of its steps over that of MMoE's in the same round, and so the cost of a
fit of as many epochs. *Epoch*: the training rows of 200,000.
"""

import argparse
import tempfile
from itertools import islice
from statistics import median
from time import perf_counter

import torch
from _setup import compose_train, make_data, make_module, take_step

from mtnrec.batch import Batch
from mtnrec.command.config import CONF_DIR
from mtnrec.model.network import count_parameters
from mtnrec.system.performance import tune_process
from mtnrec.training.module import MultiTaskModule

MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
BESIDE = "mmoe"


def seconds_per_step(
    module: MultiTaskModule, optimizer: torch.optim.Optimizer, batches: list[Batch]
) -> float:
    """Return the time of a step: forward pass, losses, backward pass, optimiser."""
    started = perf_counter()
    for batch in batches:
        take_step(module, optimizer, batch)
    return (perf_counter() - started) / len(batches)


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    names = list(dict.fromkeys([BESIDE, *arguments.models]))
    tune_process(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as data_root:
        datamodule = make_data(compose_train(f"data_root={data_root}"))
        datamodule.setup()
        rows = datamodule.split_rows["train"]
        batches = list(islice(datamodule.train_dataloader(), arguments.steps))
        modules = {
            name: make_module(compose_train(f"model={name}"), datamodule.schema) for name in names
        }
        optimizers = {name: module.configure_optimizers() for name, module in modules.items()}
        for name in names:  # the optimisers create their states
            seconds_per_step(modules[name], optimizers[name], batches)
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                times[name].append(seconds_per_step(modules[name], optimizers[name], batches))
    columns = "parameters | of embeddings | step | rows/s | epoch | beside MMoE"
    print(f"| model | {columns} |\n|{'---|' * 7}")
    for name in arguments.models:
        counts = count_parameters(modules[name].network)
        step = median(times[name])
        shares = sorted(own / mmoe for own, mmoe in zip(times[name], times[BESIDE], strict=True))
        speed = datamodule.batch_size / step
        cells = [
            f"`{name}`",
            *(f"{counts[part]:,}" for part in ("network", "embeddings")),
            f"{step * 1e3:.0f} ms",
            f"{speed:,.0f}",
            f"{rows / speed:.0f} s",
            f"**{median(shares):.2f}** ({shares[0]:.2f} to {shares[-1]:.2f})",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
