"""Tables of a run for W&B."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtnrec.metric.catalogue import METRICS, parse_layer_key
from mtnrec.run.record import RunRecord

Table = tuple[list[Any], list[Any]]  # columns, rows


def record_tables(record: RunRecord) -> dict[str, Table]:
    """Return the non-empty tables: ``metrics``, ``alphas``, ``spectra``, ``calibration``, ….

    Spectra are those of the best epoch, from the run folder.
    """
    best = f"epoch_{record.best_epoch:03d}.npz"
    tables = {
        "metrics": _metrics_table(record),
        "alphas": _alphas_table(record.history),
        "spectra": _spectra_table(Path(record.config["output_dir"]) / "spectra" / best),
        "calibration": _calibration_table(record.calibration_curves),
        "expert_distances": _distances_table(record.expert_distances or []),
    }
    return {name: (columns, rows) for name, (columns, rows) in tables.items() if rows}


def _metrics_table(record: RunRecord) -> Table:
    metrics, names = record.metrics, [*METRICS, *record.added_metrics]
    rows = [
        [*where.split("/", 1), count["rows"], count["positives"]]
        + [metrics.get(f"{where}_{metric}") for metric in names]
        for where, count in record.counts.items()
    ]
    return ["split", "task", "rows", "positives", *names], rows


def _alphas_table(history: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for entry in history:
        for name, alpha in entry.items():
            key = parse_layer_key(name)
            if key is not None and key.quantity == "alpha":
                rank = entry[str(key._replace(quantity="effective_rank"))]
                rows.append([entry["epoch"], key.layer, key.unfolding, alpha, rank])
    return ["epoch", "layer", "unfolding", "alpha", "effective_rank"], rows


def _spectra_table(path: Path) -> Table:
    rows: list[list[Any]] = []
    if path.exists():
        with np.load(path) as spectra:
            for name in spectra.files:
                values = enumerate(spectra[name].tolist())
                rows += [[*name.split("/"), index, value] for index, value in values]
    return ["layer", "unfolding", "index", "singular_value"], rows


def _calibration_table(curves: Mapping[str, Mapping[str, Sequence[Any]]]) -> Table:
    columns = ["predicted", "observed", "rows"]
    rows = [
        [*where.split("/", 1), *values]
        for where, curve in curves.items()
        for values in zip(*(curve[column] for column in columns), strict=True)
    ]
    return ["split", "task", *columns], rows


def _distances_table(distances: Sequence[Sequence[float]]) -> Table:
    rows = [[expert, *row] for expert, row in enumerate(distances)]
    return ["expert", *(f"to_{expert}" for expert in range(len(distances)))], rows
