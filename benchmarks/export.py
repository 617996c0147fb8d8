"""Cost of an exported model with and without MTN: size, nodes, latency in onnxruntime.

``python benchmarks/export.py``

Each model is trained for one epoch on a small click log, with and without MTN, and exported by the
commands. *Latency* is the median of single calls in turn, with random rows, on one thread; *ratio*
is with MTN over without, the median and quartiles of the pairs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import numpy as np
import onnx
import onnxruntime

ROWS = (1, 256, 2048)
MODELS = ("shared_bottom", "esmm", "mmoe")


def exported(model: str, enabled: bool, folder: Path) -> Path:
    """Train and export a model; return the exported file."""
    run = folder / f"{model}-{enabled}"
    train = [f"model={model}", f"mtn.enabled={enabled}", "data.rows=20000", "trainer.max_epochs=1"]
    train += [f"data_root={folder}", f"hydra.run.dir={run}"]
    for arguments in (
        ["mtnrec.train", *train],
        ["mtnrec.export", f"checkpoint={run}/checkpoints/best.ckpt", f"out={run}/model.onnx"],
    ):
        command = [sys.executable, "-m", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run / "model.onnx"


def session(path: Path) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(
    sessions: Sequence[onnxruntime.InferenceSession], rows: int, calls: int
) -> list[list[float]]:
    """Return the seconds of paired calls; the order within a pair alternates."""
    rng = np.random.default_rng(0)
    found = []
    for call in range(calls + 3):
        inputs = {
            i.name: rng.random((rows, i.shape[1]), np.float32)
            if i.type == "tensor(float)"
            else rng.integers(0, 2, (rows, i.shape[1]), np.int32)
            for i in sessions[0].get_inputs()
        }
        pair = [0.0, 0.0]
        for turn in (call % 2, 1 - call % 2):
            started = perf_counter()
            sessions[turn].run(None, inputs)
            pair[turn] = perf_counter() - started
        found.append(pair)
    return found[3:]


def main() -> None:
    """Print one row per model and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--calls", type=int, default=300)
    arguments = parser.parse_args()
    print("| model | rows | bytes, nodes: without | with MTN | latency: without | with | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            paths = [exported(model, enabled, Path(folder)) for enabled in (False, True)]
            sizes = [
                f"{path.stat().st_size:,}, {len(onnx.load(path).graph.node)}" for path in paths
            ]
            sessions = [session(path) for path in paths]
            for rows in ROWS:
                pairs = seconds(sessions, rows, arguments.calls)
                without, with_mtn = (np.median(column) * 1e3 for column in zip(*pairs, strict=True))
                low, middle, high = quantiles([b / a for a, b in pairs], n=4)
                print(
                    f"| `{model}` | {rows:,} | {sizes[0]} | {sizes[1]} | {without:.3f} ms "
                    f"| {with_mtn:.3f} ms | **{middle:.2f}** ({low:.2f} to {high:.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
