"""Compare two processes with one over the same global batches: weights, alphas and metrics.

``python tests/stress/ddp.py`` trains each model with and without MTN, under each option, with the
command (gloo, float64), and prints the differences. It takes about ten minutes.
"""

import logging
import subprocess
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from hydra.utils import instantiate
from rich import box, get_console
from rich.table import Table
from torch import Tensor

from mtnrec.run.override import quote_value
from mtnrec.system.files import read_json
from mtnrec.training.module import MultiTaskModule
from mtnrec.training.recorder import split_counts

GLOBAL_BATCH = 240
MODELS = {
    "shared_bottom": ["model=shared_bottom", "model.bottom_widths=[16]", "model.tower_widths=[8]"],
    "esmm": ["model=esmm", "model.tower_widths=[16,8]"],
    "mmoe": [
        *("model=mmoe", "model.experts=3", "model.expert_widths=[16]", "model.tower_widths=[8]"),
    ],
}
OPTIONS = {
    "none": [],
    "accumulation": ["trainer.accumulate_grad_batches=3"],
    "clipping": ["trainer.gradient_clip_val=0.1"],
    "noise": ["noise.proportion=0.5", "noise.label_flip={click:0.2}"],
    "lazy_adam": ["optimizer=lazy_adam"],
    "uncertainty": ["balance=uncertainty"],
}
OPTIONS["all"] = [override for option in OPTIONS.values() for override in option]
LOSSES = {"reweighted": ["loss=reweighted"]}
_RUN = [
    *("data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"),  # 1920 rows train
    *("trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.precision=64-true", "threads=1"),
    *("model.embedding_dim=4", "mtn.lam=0.1"),
]


def settings(*, mtn: bool, option: str, devices: int) -> list[str]:
    """Return the overrides of a run, except its model and folder."""
    ddp = [] if devices == 1 else ["trainer=ddp", f"trainer.devices={devices}"]
    batch = f"data.batch_size={GLOBAL_BATCH // devices}"
    return [*ddp, *_RUN, f"mtn.enabled={str(mtn).lower()}", *(OPTIONS | LOSSES)[option], batch]


def train(folder: Path, *arguments: str) -> None:
    """Run the training command; its output is shown if it fails."""
    place = f"hydra.run.dir={quote_value(str(folder))}"
    command = [sys.executable, "-m", "mtnrec.train", place, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, timeout=300, text=True)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"


class Comparison(NamedTuple):
    """Differences between two runs.

    Args:
        weights: Largest difference of a weight, relative to the largest weight of its tensor.
        alphas: Largest difference of an alpha; 0 without MTN.
        metrics_equal: Whether the second run's metrics and counts are bit-identical to those that
            one process finds with its weights.
    """

    weights: float
    alphas: float
    metrics_equal: bool


def compare(one: Path, several: Path) -> Comparison:
    """Compare a run of one process with a run of several."""
    (first, expected), (second, found) = (_read(folder) for folder in (one, several))
    alphas = [
        abs(epoch[name] - other[name])
        for epoch, other in zip(expected["history"], found["history"], strict=True)
        for name in epoch
        if "/alpha_" in name
    ]
    metrics, counts = _measure(several)
    return Comparison(
        weights=max(_difference(first[name], second[name]) for name in first),
        alphas=max(alphas, default=0.0),
        metrics_equal=metrics.items() <= found["metrics"].items() and counts == found["counts"],
    )


def _read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the weights of the best epoch and the record of a run."""
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    record = read_json(folder / "result.json")
    assert record is not None
    return checkpoint["state_dict"], record


def _difference(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / first.abs().max()).item()


def _measure(folder: Path) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """Return the metrics and counts of a run's best epoch, measured in this process."""
    weights, record = _read(folder)
    config = record["config"]
    datamodule = instantiate(config["data"], _convert_="all")
    datamodule.noise = instantiate(config["noise"], _convert_="all")
    datamodule.prepare_data()
    datamodule.setup()
    network = instantiate(config["model"], _partial_=True, _convert_="all")(
        schema=datamodule.schema
    )
    optimizer = instantiate(config["optimizer"])
    balance = instantiate(config["balance"], _convert_="all")
    module = MultiTaskModule(
        network, schema=datamodule.schema, optimizer=optimizer, balance=balance
    )
    module.to(torch.float64).load_state_dict(weights)
    trainer = L.Trainer(
        accelerator="cpu",
        precision=config["trainer"]["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, datamodule=datamodule, verbose=False)
    trainer.test(module, datamodule=datamodule, verbose=False)
    return split_counts(module.results["val"] | module.test_results)


def main() -> None:
    """Train all pairs of runs and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")  # Lightning warns about evaluating in this process
    torch.set_num_threads(1)
    table = Table(box=box.MARKDOWN)
    for header in ("model", "MTN", "option", "weights", "alphas", "metrics equal"):
        table.add_column(header)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for model, mtn, option in product(MODELS, (False, True), OPTIONS):
            folders = {devices: root / f"{model}-{mtn}-{option}-{devices}" for devices in (1, 2)}
            for devices, folder in folders.items():
                own = settings(mtn=mtn, option=option, devices=devices)
                train(folder, f"data_root={root / 'data'}", *MODELS[model], *own)
            found = compare(folders[1], folders[2])
            differences = f"{found.weights:.0e}", f"{found.alphas:.0e}" if mtn else ""
            equal = "yes" if found.metrics_equal else "no"
            table.add_row(model, "with" if mtn else "without", option, *differences, equal)
    get_console().print(table)


if __name__ == "__main__":
    main()
