"""Measure the runs per hour of a sweep with one worker process and with two.

``python benchmarks/sweep.py``

The same runs of ``experiment=quickstart``, start included, each time into a new folder.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

RUNS = {
    "one process, `threads=1`": ["hydra/launcher=basic"],
    "one process, all cores": ["hydra/launcher=basic", "threads=null"],
    "two workers, `threads=1`": ["hydra/launcher=workers", "hydra.launcher.n_jobs=2"],
}


def main() -> None:
    """Print one row per launcher setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--keys", nargs="*", default=[], help="overrides of every run")
    arguments = parser.parse_args()
    print("| | runs | seconds | runs per hour |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, keys) in enumerate(RUNS.items()):
            runs = Path(folder) / str(number)
            command = [sys.executable, "-m", "mtnrec.train", "experiment=quickstart"]
            place = [f"hydra.sweep.dir={runs}", f"data_root={folder}/data"]
            seeds = f"seed=range(0,{arguments.seeds})"
            started = perf_counter()
            subprocess.run(
                [*command, *place, seeds, *keys, *arguments.keys],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            seconds = perf_counter() - started
            count = len(list(runs.rglob("result.json")))
            print(
                f"| {name} | {count} | {seconds:.0f} | {3600 * count / seconds:,.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
