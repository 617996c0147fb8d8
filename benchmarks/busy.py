"""Train beside a process that keeps a core busy, as other work on a laptop or a shared node does.

``python benchmarks/busy.py``

Every command limits how long OpenMP's waiting threads spin (``GOMP_SPINCOUNT``); GNU's default is
the alternative. Each model is trained four ways, in turn: idle and beside the busy process, with
our limit and with GNU's. Rows per second are those of training, without the validation. The last
column says whether all runs have the same AUCs, to the bit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from train import MODELS, measure_mtnrec, prepare_log

GNU = "300000"  # spins of a waiting thread, with no more threads than cores
LIMITS = {"ours": {}, "GNU's": {"GOMP_SPINCOUNT": GNU}}
_BUSY = "while True: pass"


@contextmanager
def busy_process(*, exists: bool) -> Iterator[None]:
    """Keep a core busy during the block, if there is to be such a process."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY]) if exists else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    print(
        "| model | idle, rows/s: ours, GNU's | beside a busy process: ours, GNU's | ours, busy / "
        "idle | idle, ours / GNU's | same AUCs |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = prepare_log(arguments.rows, scratch / "log")
        for model in arguments.models:
            found: dict[tuple[bool, str], list[dict[str, Any]]] = {}
            for _ in range(arguments.pairs):
                for is_busy in (False, True):
                    for name, limit in LIMITS.items():
                        with mock.patch.dict(os.environ, limit), busy_process(exists=is_busy):
                            result = measure_mtnrec(data, model, 1, scratch)
                        found.setdefault((is_busy, name), []).append(result)
            print(_row(model, found), flush=True)


def _row(model: str, found: dict[tuple[bool, str], list[dict[str, Any]]]) -> str:
    speed = {
        way: median(result["samples_per_second"]["train"] for result in results)
        for way, results in found.items()
    }
    aucs = {tuple(result["aucs"]) for results in found.values() for result in results}
    idle, busy = (", ".join(f"{speed[b, name]:,.0f}" for name in LIMITS) for b in (False, True))
    cost = speed[False, "ours"] / speed[False, "GNU's"]
    share = speed[True, "ours"] / speed[False, "ours"]
    return (
        f"| `{model}` | {idle} | {busy} | **{share:.2f}** | {cost:.2f} | "
        f"{'yes' if len(aucs) == 1 else 'no'} |"
    )


if __name__ == "__main__":
    main()
