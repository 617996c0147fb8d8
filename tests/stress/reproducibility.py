"""Repeat the same run with one thread and with two, and compare the bits.

``python tests/stress/reproducibility.py [--runs 10] [--models shared_bottom esmm mmoe]``

Each run is a separate process, with dropout, noise and MTN; during every other one all cores are
kept busy. Three tables are printed: how many runs have the same bits; the differences between two
threads and one; and the operations that cause them, from a run that repeats each operation with one
thread and with two. The exit status is 1 if identical runs differ.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mtnrec import train
from mtnrec.batch import Batch
from mtnrec.mtn.callback import MTN
from mtnrec.system.files import read_json, write_json
from mtnrec.training.module import MultiTaskModule
from mtnrec.training.resume import ResumePoint

_RUN = [
    *("data.rows=20000", "data.click_rate=0.2", "data.conversion_rate=0.3", "data.batch_size=1024"),
    *("model.embedding_dim=32", "model.dropout=0.2", "noise.proportion=0.15", "mtn.enabled=true"),
    *("trainer.max_epochs=3", "trainer.accelerator=cpu"),
]
_REPEATED = ["--repeat", "trainer.max_epochs=1"]
_THREADS = (1, 2)
_MEASURED = ("counts", "history", "best_epoch", "calibration_curves")
_BUSY = "while True: sum(range(10**6))"


class Repeated(TorchDispatchMode):
    """Repeats each operation with one thread and with two on the same numbers.

    ``calls`` counts the calls of each operation, ``differing`` those with different results, and
    ``largest`` holds their largest difference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.differing: Counter[str] = Counter()
        self.largest: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = (args, kwargs or {})
        name = func.overloadpacket.__name__
        # A repeat would advance an explicit generator, and uninitialised memory is arbitrary.
        if inputs[1].get("generator") is not None or "empty" in name:
            return func(*args, **inputs[1])
        random_state = torch.get_rng_state()
        results = []
        for threads in _THREADS:
            torch.set_num_threads(threads)
            torch.set_rng_state(random_state)
            own = inputs
            if func._schema.is_mutable:
                own = tree_map_only(Tensor, torch.clone, inputs)
            results.append((func(*own[0], **own[1]), own))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(results)):
            return results[0][0]  # a meta tensor has no numbers
        self.calls[name] += 1
        if difference := largest_difference(*results):
            self.differing[name] += 1
            self.largest[name] = max(difference, self.largest.get(name, 0.0))
        torch.set_rng_state(random_state)
        return func(*args, **inputs[1])


def largest_difference(one: Any, other: Any) -> float:
    """Return the largest difference of a value, relative to its tensor's largest value."""
    largest = 0.0
    for x, y in pairs_of_numbers(one, other):
        if bits(x) != bits(y):
            largest = max(largest, ((x - y).abs().max() / x.abs().max()).item())
    return largest


def distance(one: Any, other: Any) -> float:
    """Return the norm of the difference of all numbers, relative to the norm of the first."""
    numbers = [
        torch.cat([part.flatten() for part in parts])
        for parts in zip(*pairs_of_numbers(one, other), strict=True)
    ]
    return ((numbers[0] - numbers[1]).norm() / numbers[0].norm()).item()


def pairs_of_numbers(one: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of the tensors and numbers in both, as float64."""
    for pair in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(pair[0], Tensor | float):
            a, b = (torch.as_tensor(value).double() for value in pair)
            yield a, b


def bits(tree: Any) -> bytes:
    """Return the bytes of all tensors and numbers in ``tree``."""
    return b"".join(
        leaf.detach().contiguous().numpy().tobytes()
        if isinstance(leaf, Tensor)
        else repr(leaf).encode()
        for leaf in tree_leaves(tree)
    )


def train_here(folder: Path, *, repeat: bool) -> None:
    """Train in this process; keep the last state, and record the batches in order."""
    seen = hashlib.sha256()
    initial: list[str] = []
    step = MultiTaskModule.training_step

    def noting_step(module: MultiTaskModule, batch: Batch, batch_idx: int) -> Tensor:
        if not initial:
            initial.append(hashlib.sha256(bits(module.state_dict())).hexdigest())
        seen.update(bits([batch.categorical, batch.numerical, batch.labels]))
        return step(module, batch, batch_idx)

    MultiTaskModule.training_step = noting_step  # type: ignore[method-assign]
    ResumePoint.discard = lambda self: None  # type: ignore[method-assign]
    operations = Repeated() if repeat else None
    with operations or nullcontext():
        train.main()
    noted: dict[str, Any] = {"batches": seen.hexdigest(), "initial": initial}
    if operations is not None:
        noted["operations"] = {
            name: [count, operations.differing[name], operations.largest.get(name, 0.0)]
            for name, count in operations.calls.items()
        }
    write_json(folder / "noted.json", noted)


def run(root: Path, model: str, threads: int, name: str, *arguments: str) -> Path:
    """Train in a separate process; return the run folder."""
    folder = root / f"{model}_{threads}_{name}"
    command = [sys.executable, __file__, "--here", str(folder), *_RUN, f"model={model}"]
    command += [f"threads={threads}", f"data_root={root}", f"hydra.run.dir={folder}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return folder


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with other processes."""
    processes = [
        subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def quantities(folder: Path) -> dict[str, Any]:
    """Return the compared quantities of a run by their names in the tables."""
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    record, noted = (read_json(folder / name) or {} for name in ("result.json", "noted.json"))
    callbacks = last["callbacks"]
    return {
        "batches, noise": noted["batches"],
        "initial weights": noted["initial"],
        "dropout's stream": callbacks[ResumePoint.__qualname__]["cpu"],
        "weights": last["state_dict"],
        "optimiser": last["optimizer_states"],
        "MTN": callbacks[MTN.__qualname__],
        "metrics": record["metrics"],
        "history, curves": [record[key] for key in _MEASURED],
    }


def compare_runs(root: Path, model: str, threads: int, runs: int) -> dict[str, Any]:
    """Train ``runs`` times and print a row; return the quantities of the first run."""
    found: list[dict[str, Any]] = []
    for number in range(runs):
        with busy_cores() if number % 2 else nullcontext():
            found.append(quantities(run(root, model, threads, str(number))))
    same = [
        sum(bits(other[name]) == bits(value) for other in found) for name, value in found[0].items()
    ]
    print(f"| {model} | {threads} | {' | '.join(f'{count} of {runs}' for count in same)} |")
    if min(same) < runs:
        sys.exit("identical runs differ")
    return found[0]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--models", nargs="+", default=["shared_bottom", "esmm", "mmoe"])
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", action="store_true", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.here is not None:
        sys.argv[1:] = overrides
        train_here(arguments.here, repeat=arguments.repeat)
        return
    with tempfile.TemporaryDirectory() as place:
        print_tables(Path(place), arguments.models, arguments.runs)


def print_tables(root: Path, models: list[str], runs: int) -> None:
    """Train, and print the tables of equal and different quantities."""
    names = ["batches, noise", "initial weights", "dropout's stream", "weights", "optimiser"]
    names += ["MTN", "metrics", "history, curves"]
    head = " | ".join(names)
    rule = f"\n|{'---|' * (len(names) + 2)}"
    print(f"Runs with the bits of the first one:\n\n| model | threads | {head} |{rule}")
    firsts = {m: [compare_runs(root, m, threads, runs) for threads in _THREADS] for m in models}
    print(f"\nTwo threads against one, relative norm of the difference:\n\n| model | {head} |")
    print(f"|{'---|' * (len(names) + 1)}")
    for model, (one, two) in firsts.items():
        cells = [
            "same bits" if bits(value) == bits(two[name]) else f"{distance(value, two[name]):.0e}"
            for name, value in one.items()
        ]
        print(f"| {model} | {' | '.join(cells)} |")
    print("\nOperations that differ between one thread and two, given the same numbers:\n")
    print(f"| model | operation | calls | differ | largest relative difference |\n|{'---|' * 5}")
    for model in models:
        noted = read_json(run(root, model, 1, "repeated", *_REPEATED) / "noted.json") or {}
        for name, (calls, differing, largest) in noted["operations"].items():
            if differing:
                print(f"| {model} | `{name}` | {calls} | {differing} | {largest:.0e} |")


if __name__ == "__main__":
    main()
