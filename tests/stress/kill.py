"""Kill and resume a training repeatedly, and compare it with an uninterrupted one.

``python tests/stress/kill.py --kills 50 [--devices 2]``

Each attempt is a new process, killed at a random moment with all its children, mostly by SIGKILL,
the others by SIGINT. At the end the metrics of ``result.json`` and the weights of ``best.ckpt`` are
compared bit by bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from mtnrec.system.files import read_json

_RUN = [
    *("data.rows=20000", "data.click_rate=0.2", "data.conversion_rate=0.3", "data.batch_size=128"),
    *("model.embedding_dim=4", "model.tower_widths=[16,8]", "model.dropout=0.2"),
    *("optimizer.lr=0.003", "mtn.enabled=true", "trainer.max_epochs=6", "patience=6"),
    *("trainer.accelerator=cpu", "trainer.checkpoint_every_n_steps=10", "threads=1"),
]
_KEPT = ("cell", "metrics", "counts", "history", "best_epoch", "calibration_curves", "noise")


def main() -> None:
    """Print the stages that the kills hit; exit with an error if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interrupts", type=float, default=0.2, help="share of SIGINT")
    parser.add_argument("--devices", type=int, default=1, help="processes of a run")
    parser.add_argument(
        "--longest", type=float, default=1.0, help="seconds after the training starts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keys", nargs="*", default=[], help="overrides of every run")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        command = [sys.executable, "-m", "mtnrec.train", f"data_root={root / 'data'}", *_RUN]
        if arguments.devices > 1:
            command += ["trainer=ddp", f"trainer.devices={arguments.devices}"]
        command += arguments.keys
        _run([*command, f"hydra.run.dir={root / 'whole'}"])
        hits: Counter[str] = Counter()
        kills = finished = 0
        while kills < arguments.kills:
            folder = root / f"killed_{finished}"
            interrupt = rng.random() < arguments.interrupts
            sent = signal.SIGINT if interrupt else signal.SIGKILL
            # One kill in five falls anywhere after the start, the others after the training begins.
            early = rng.random() < 0.2
            moment = rng.uniform(0, 3 if early else arguments.longest)
            stage = _kill([*command, f"hydra.run.dir={folder}"], folder, sent, moment, early=early)
            if stage is None:  # finished before the kill: begin the next run
                compare(folder, root / "whole")
                finished += 1
                continue
            kills += 1
            hits[f"{sent.name}, {stage}"] += 1
            _check(folder)
        _run([*command, f"hydra.run.dir={folder}"])
        compare(folder, root / "whole")
    print("| signal, stage | kills |\n|---|---|")
    for stage, count in sorted(hits.items()):
        print(f"| {stage} | {count} |")
    print(f"\n{kills} kills, {finished + 1} runs: the bits of the uninterrupted run")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def _kill(
    command: list[str], folder: Path, sent: signal.Signals, moment: float, *, early: bool
) -> str | None:
    """Start a run and kill it; return its stage, or None if it had finished."""
    since = time.time()
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not early and process.poll() is None and not _trains(folder, since):
        time.sleep(0.005)
    time.sleep(moment)
    stage = _stage(folder, since)
    if process.poll() is not None:
        if process.returncode:
            sys.exit(f"a run failed without a kill: {folder / 'train.log'}")
        return None
    os.killpg(process.pid, sent)
    process.wait()
    return stage


def _trains(folder: Path, since: float) -> bool:
    csv = folder / "csv" / "hparams.yaml"
    return csv.exists() and csv.stat().st_mtime > since


def _stage(folder: Path, since: float) -> str:
    checkpoints = folder / "checkpoints"
    if list(checkpoints.glob(".*.tmp")):
        return "writing a checkpoint"
    if (folder / "result.json").exists():
        return "closing"
    if not _trains(folder, since):
        return "starting"
    return "training" if (checkpoints / "last.ckpt").exists() else "before the first checkpoint"


def _check(folder: Path) -> None:
    """Check that each checkpoint is complete."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        torch.load(path, weights_only=True)


def compare(folder: Path, whole: Path) -> None:
    """Exit with an error if the bits of two runs differ."""
    found, expected = (read_json(path / "result.json") or {} for path in (folder, whole))
    for key in _KEPT:
        if found[key] != expected[key]:
            sys.exit(f"{key} of {folder} differs: {found[key]} instead of {expected[key]}")
    files = [path / "checkpoints" / "best.ckpt" for path in (folder, whole)]
    weights, others = (torch.load(path, weights_only=True)["state_dict"] for path in files)
    for name, weight in others.items():
        if not torch.equal(weights[name], weight):
            sys.exit(f"{name} of {files[0]} differs")


if __name__ == "__main__":
    main()
