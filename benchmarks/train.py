"""Compare end-to-end training by mtnrec with the literal layout, in pairs.

``python benchmarks/train.py``

Both run as separate commands on the same prepared rows (shaped like AliExpress), in turn, including
loader, metrics, logging, progress bar on a terminal and checkpoints. ``fit`` divides the training
rows of all epochs by the time from the first batch on, with validation and checkpoints; ``train``
excludes the validation; ``evaluate`` is validation and test.
"""

import argparse
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

MEASURES = ("fit", "train", "evaluate")
TESTS = Path(__file__).parents[1] / "tests"
MODELS = ("shared_bottom", "esmm", "mmoe", "ple", "aitm", "stem")


def run_on_a_terminal(command: Sequence[str], cwd: Path | None = None) -> str:
    """Run a command whose output goes to a terminal; return the output."""
    ours, theirs = pty.openpty()
    output: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # the terminal is closed
                return
            output.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(command, stdout=theirs, stderr=theirs, check=False, cwd=cwd)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    text = b"".join(output).decode(errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return text


def prepare_log(rows: int, folder: Path) -> list[str]:
    """Prepare a synthetic log; return the overrides that name it."""
    data = ["data=synthetic", f"data.rows={rows}", f"data.dir={folder}"]
    prepare = [sys.executable, "-m", "mtnrec.prepare", *data]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    return data


def measure_literal(
    folder: Path, model: str, epochs: int, scratch: Path, *options: str
) -> dict[str, Any]:
    """Run the literal program; return rows per second by measure, and the test AUCs."""
    checkpoint = scratch / "literal.pt"
    command = [sys.executable, "-m", "reference.literal", str(folder), f"--model={model}"]
    options = (*options, f"--epochs={epochs}", f"--checkpoint={checkpoint}")
    text = run_on_a_terminal([*command, *options], cwd=TESTS)
    return json.loads(text.strip().splitlines()[-1])


def measure_mtnrec(
    data: Sequence[str], model: str, epochs: int, scratch: Path, *overrides: str
) -> dict[str, Any]:
    """Run ``mtnrec.train``; return the same figures from the run's record."""
    run = scratch / "run"
    keys = [*data, f"model={model}", f"trainer.max_epochs={epochs}", f"patience={epochs}"]
    place = [f"hydra.run.dir={run}", "resume=false"]
    run_on_a_terminal([sys.executable, "-m", "mtnrec.train", *keys, *place, *overrides])
    record = json.loads((run / "result.json").read_text())
    rows = record["data"]["rows"]["train"] * len(record["history"])
    speeds = record["samples_per_second"] | {"fit": rows / record["seconds"]["fit"]}
    aucs = [record["metrics"][f"test/{task}_auc"] for task in ("ctr", "cvr", "ctcvr")]
    return {"samples_per_second": speeds, "aucs": aucs}


def main() -> None:
    """Print one row per model: rows per second of both, and the ratio of each measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--workers", type=int, default=2, help="loader processes of the literal program"
    )
    parser.add_argument(
        "--keys", nargs="*", default=[], help="overrides, for example trainer.precision=bf16-mixed"
    )
    arguments = parser.parse_args()
    options = [f"--device={arguments.device}", f"--workers={arguments.workers}"]
    keys = [f"trainer.accelerator={arguments.device}", *arguments.keys]
    print("| model | literal, rows/s: fit, train, evaluate | mtnrec | ratios (pairs) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepared = scratch / "log"
        data = prepare_log(arguments.rows, prepared)
        for model in arguments.models:
            pairs = [
                (
                    measure_literal(prepared, model, arguments.epochs, scratch, *options),
                    measure_mtnrec(data, model, arguments.epochs, scratch, *keys),
                )
                for _ in range(arguments.pairs)
            ]
            print(_row(model, pairs), flush=True)


def _row(model: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    literal, own = (
        ", ".join(
            f"{median(pair[side]['samples_per_second'][what] for pair in pairs):,.0f}"
            for what in MEASURES
        )
        for side in (0, 1)
    )
    ratios = []
    for what in MEASURES:
        found = sorted(
            own["samples_per_second"][what] / literal["samples_per_second"][what]
            for literal, own in pairs
        )
        ratios.append(f"{what} **{median(found):.1f}** ({found[0]:.1f} to {found[-1]:.1f})")
    return f"| `{model}` | {literal} | {own} | {', '.join(ratios)} |"


if __name__ == "__main__":
    main()
