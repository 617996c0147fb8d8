"""Fixture for run folders with realistic records."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FUNNEL = {"ctr": 0.73, "cvr": 0.79, "ctcvr": 0.86}
CLASSES = {
    "MMoE": "mtnrec.model.mmoe.MMoE",
    "ESMM": "mtnrec.model.esmm.ESMM",
    "Shared-bottom": "mtnrec.model.shared_bottom.SharedBottom",
}
MTN = {
    "_target_": "mtnrec.mtn.callback.MTN",
    "enabled": False,
    "lam": 1e-5,
    "target": "towers",
    "layers": "all",
    "alpha": "learned",
    "layer_weighting": "mean",
    "coupling": "gradient",
    "refresh_every": 16,
    "subsets": "distinct",
}


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Write and return the folder of a finished run.

    ``write_run(root, name, *, model="MMoE", mtn=False, seed=0, noise=0.0, data="synthetic",
    auc=None, metrics=None, epochs=3, spectra=False, **overrides)``: ``mtn`` is a flag or a dict of
    the keys that differ from the default; ``auc`` gives the test AUC of each task and thereby the
    tasks; ``metrics`` replaces entries of the record's metrics; ``overrides`` are dotted config
    keys, for example ``**{"optimizer.lr": 0.01}``.
    """
    return _write_run


def _write_run(
    root: Path,
    name: str,
    *,
    model: str = "MMoE",
    mtn: bool | dict[str, Any] = False,
    seed: int = 0,
    noise: float = 0.0,
    data: str = "synthetic",
    auc: dict[str, float | None] | None = None,
    metrics: dict[str, float | None] | None = None,
    epochs: int = 3,
    spectra: bool = False,
    **overrides: Any,
) -> Path:
    rng = np.random.default_rng([seed, *name.encode()])
    drawn = {task: value + rng.normal(0, 0.002) for task, value in FUNNEL.items()}
    auc = drawn if auc is None else auc
    folder = root / name
    folder.mkdir(parents=True)
    config = _config(folder, model, mtn, seed, noise, data)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    enabled = config["mtn"]["enabled"]
    parameters = {key: config["data"][key] for key in ("rows", "generator_seed")}
    checksum = _hash([data, parameters])
    depths = 2 if enabled else 0
    record = {
        "status": "finished",
        "cell": _hash([config, checksum])[:16],
        "seed": seed,
        "config": config,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "data": {
            "name": data,
            "checksum": checksum,
            "parameters": parameters,
            "rows": {"train": 1920, "val": 480, "test": 600},
            "suspected_leaks": [],
            "leaks_not_judged": [],
        },
        "noise": config["noise"]
        | {
            "noisy_rows": {"train": round(1920 * noise), "val": round(480 * noise)},
            "replaced_features": {"train": round(3840 * noise), "val": round(960 * noise)},
            "checksum": _hash(config["noise"]) if noise else None,
        },
        "mtn": config["mtn"],
        "best_epoch": epochs - 1,
        "metrics": _metrics(auc, rng) | (metrics or {}),
        "counts": _counts(auc),
        "history": [_epoch(epoch, auc, depths, rng) for epoch in range(epochs)],
        "calibration_curves": {f"test/{task}": _curve(rng) for task in auc},
        "expert_distances": _distances(rng) if model == "MMoE" else None,
        "threads": 1,
        "seconds": {"setup": 1.5, "fit": 20 + rng.random(), "test": 0.5},
        "samples_per_second": {"train": 6e4 + rng.random(), "evaluate": 2e5},
        "peak_memory_bytes": 500_000_000 + int(rng.integers(1000)),
    }
    (folder / "result.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    if spectra:
        _write_spectra(folder / "spectra", epochs, rng)
    return folder


def _config(
    folder: Path, model: str, mtn: bool | dict[str, Any], seed: int, noise: float, data: str
) -> dict[str, Any]:
    settings = {"enabled": mtn} if isinstance(mtn, bool) else {"enabled": True} | mtn
    return {
        "data": {
            "_target_": "mtnrec.data.synthetic.Synthetic",
            "name": data,
            "dir": f"data/{data}",
            "rows": 3000,
            "generator_seed": 0,
            "batch_size": 512,
            "split_seed": 0,
            "seed": seed,
            "verify": True,
        },
        "noise": {
            "_target_": "mtnrec.data.noise.Noise",
            "proportion": noise,
            "feature_probability": 0.2,
            "sampling": "uniform",
            "splits": ["train", "val"],
            "seed": 0,
        },
        "model": {"_target_": CLASSES.get(model, f"models.{model}"), "embedding_dim": 4},
        "mtn": MTN | settings,
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.001},
        "trainer": {"_target_": "lightning.Trainer", "max_epochs": 3, "log_every_n_steps": 1},
        "logger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)},
        "seed": seed,
        "monitor": "val/cvr_auc",
        "patience": 3,
        "data_root": "data",
        "output_dir": str(folder),
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metrics(auc: dict[str, float | None], rng: np.random.Generator) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for task, value in auc.items():
        for split in ("val", "test"):
            found |= {
                f"{split}/{task}_auc": value,
                f"{split}/{task}_log_loss": 0.3 + 0.01 * rng.random(),
                f"{split}/{task}_calibration": 1 + 0.05 * rng.standard_normal(),
                f"{split}/{task}_ece": 0.01 + 0.005 * rng.random(),
                f"{split}/{task}_grouped_auc": None if value is None else value - 0.02,
                f"{split}/{task}_bayes_auc": 0.9,
            }
    return found


def _counts(auc: dict[str, float | None]) -> dict[str, dict[str, int]]:
    return {
        f"{split}/{task}": {"rows": rows // (1 + number), "positives": rows // (10 + number)}
        for split, rows in (("val", 480), ("test", 600))
        for number, task in enumerate(auc)
    }


def _epoch(
    epoch: int, auc: dict[str, float | None], depths: int, rng: np.random.Generator
) -> dict[str, Any]:
    entry: dict[str, Any] = {"epoch": epoch, "step": 4 * (epoch + 1), "train/loss": 1 / (1 + epoch)}
    for task, value in auc.items():
        entry[f"val/{task}_auc"] = None if value is None else value - 0.05 / (1 + epoch)
    if depths:
        entry |= {f"mtn/{key}": float(rng.random()) for key in ("norm", "penalty", "loss_share")}
        entry["mtn/zero_gradient_share"] = 0.1
    for depth in range(depths):
        alphas = rng.dirichlet([1, 1, 1])
        for mode, alpha in zip(("task", "output", "input"), alphas, strict=True):
            entry[f"mtn/layer_{depth}/alpha_{mode}"] = float(alpha)
            entry[f"mtn/layer_{depth}/effective_rank_{mode}"] = 2 + float(rng.random())
        for key in ("norm", "weight", "distance", "gap"):
            entry[f"mtn/layer_{depth}/{key}"] = float(rng.random())
    return entry


def _curve(rng: np.random.Generator) -> dict[str, list[Any]]:
    predicted = np.sort(rng.random(10))
    observed = np.clip(predicted + rng.normal(0, 0.02, 10), 0, 1)
    return {"predicted": predicted.tolist(), "observed": observed.tolist(), "rows": [60] * 10}


def _distances(rng: np.random.Generator) -> list[list[float]]:
    distances = rng.random((3, 3)) + 0.5
    distances = distances + distances.T
    np.fill_diagonal(distances, 0)
    return distances.tolist()


def _write_spectra(folder: Path, epochs: int, rng: np.random.Generator) -> None:
    folder.mkdir()
    for epoch in range(epochs):
        values = {
            f"layer_{depth}/{mode}": np.sort(rng.random(size))[::-1].astype(np.float32)
            for depth in range(2)
            for mode, size in (("task", 2), ("output", 8), ("input", 16))
        }
        np.savez(folder / f"epoch_{epoch:03}.npz", **values)
