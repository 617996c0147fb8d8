"""Measure the start of a training: seconds from the command to the end of the first step.

``python benchmarks/startup.py [--times 7]``

runs ``python -m mtnrec.train`` on a tiny log several times, after one run that generates the log
and the compiled modules, and prints the medians next to those of a process that only imports
Lightning.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any

import torch

_NOTE = Path("first_step")
_TRAINING = [
    *("data.rows=3000", "data.batch_size=512", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
    *("model=esmm", "model.embedding_dim=4", "model.tower_widths=[16,8]"),
    *("optimizer=adam", "optimizer._target_=startup.NotingAdam"),
    *("resume=false", "hydra.run.dir=run"),
]


class NotingAdam(torch.optim.Adam):
    """Adam that writes the end time of its first step to the working folder."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if not _NOTE.exists():
            _NOTE.write_text(str(monotonic()))
        return loss


def _train(folder: str) -> tuple[float, float]:
    """Return the seconds to the end of the first step and to the end of the command."""
    note = folder / _NOTE
    note.unlink(missing_ok=True)
    started = monotonic()
    _run(folder, "-m", "mtnrec.train", *_TRAINING)
    return float(note.read_text()) - started, monotonic() - started


def _import(folder: str) -> float:
    """Return the seconds of a process that only imports Lightning."""
    started = monotonic()
    _run(folder, "-c", "import lightning")
    return monotonic() - started


def _run(folder: str, *arguments: str) -> None:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MTNREC_DATA": "data",
    }
    subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    """Print the median seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _train(folder)
        # In turn, so that other load on the machine affects both alike.
        runs = [(*_train(folder), _import(folder)) for _ in range(arguments.times)]
    first_step, end, imported = map(statistics.median, zip(*runs, strict=True))
    print("| to the first step | to the end, test included | `import lightning` alone |")
    print("|---|---|---|")
    print(f"| {first_step:.1f} s | {end:.1f} s | {imported:.1f} s |")


if __name__ == "__main__":
    main()
