"""Tables of the runs, their costs, settings, data and versions, and of published numbers."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml  # type: ignore[import-untyped]

from mtnrec.reporting.baseline import natural_order
from mtnrec.reporting.labels import as_text
from mtnrec.reporting.machines import hardware, warn_of_machines
from mtnrec.reporting.runs import Run, Runs
from mtnrec.reporting.table.published import (
    MTRECLIB_PROTOCOL,
    PAPER_PROTOCOL,
    TABLE_2_REMARK,
    deviations,
    mtreclib_results,
    paper_results,
    task_title,
)
from mtnrec.reporting.table.render import Cell, Group, Row, Table
from mtnrec.run.folder import BEST_CHECKPOINT
from mtnrec.run.identity import flatten
from mtnrec.run.override import quote_value
from mtnrec.run.record import RECORD_FILE

_EMPTY = "—"
_MOST_VALUES = 12  # values of a setting shown in a cell
_GIB = 2**30


OVERRIDES_FILE = Path(".hydra", "overrides.yaml")  # written by Hydra
_FILES = {"record": RECORD_FILE, "log": "train.log", "checkpoint": BEST_CHECKPOINT}


@dataclass(frozen=True)
class RunRow:
    """A run in the list of runs.

    Args:
        name: Folder, relative to that of all runs.
        link: Address of the folder, relative to the page.
        files: Name and address of files in it.
        command: Command that makes the run again; empty if its overrides are not known.
        color: Number of the arm's colour.
        cells: Values, one per column.
    """

    name: str
    link: str
    files: Sequence[tuple[str, str]]
    command: str
    color: int
    cells: Sequence[str]


@dataclass(frozen=True)
class RunList:
    """All runs, one per row."""

    columns: Sequence[str]
    rows: Sequence[RunRow]


def runs_table(runs: Runs, folder: Path) -> RunList:
    """Return the list of runs: arm, swept settings, test AUCs, best epoch, time, files, command.

    Args:
        runs: Finished runs.
        folder: Folder of the page, from which links lead to the runs.
    """
    settings = runs.settings
    places = [key for key in ("data", "noise") if settings[key].nunique() > 1]
    texts = settings[["label", *places, "seed", *runs.swept]].astype("string").fillna(_EMPTY)
    rows: list[RunRow] = []
    for run, cells in zip(runs, texts.itertuples(index=False), strict=True):
        link = quote(Path(os.path.relpath(run.folder, folder)).as_posix())
        row = settings.iloc[len(rows)]
        metrics = [run.record.metrics.get(f"test/{task}_auc") for task in runs.tasks]
        shown = [_EMPTY if value is None else f"{value:.4f}" for value in metrics]
        times = (str(run.record.best_epoch), f"{run.record.seconds['fit']:.1f}")
        files = [(n, f"{link}/{f}") for n, f in _FILES.items() if (run.folder / f).is_file()]
        rows.append(
            RunRow(
                run.name, link, files, command_of(run), int(row["color"]), [*cells, *shown, *times]
            )
        )
    aucs = [f"{task_title(task)} AUC" for task in runs.tasks]
    keys = [key.rpartition(".")[2] for key in runs.swept]
    columns = ["arm", *places, "seed", *keys, *aucs, "best epoch", "fit, s"]
    return RunList(columns, rows)


def command_of(run: Run, folder: Path | None = None) -> str:
    """Return the command that makes a run again; empty if it is not known.

    Args:
        run: Run.
        folder: Folder of the new run; None: its own, where the new run replaces it.
    """
    try:
        overrides = yaml.safe_load((run.folder / OVERRIDES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    if not isinstance(overrides, list):
        return ""
    place = ["hydra.mode=RUN", f"hydra.run.dir={quote_value(str(folder or run.folder))}"]
    return shlex.join(["python", "-m", "mtnrec.train", *place, *map(str, overrides)])


def deviation_tables(cells: pd.DataFrame) -> Iterator[Table]:
    """Yield tables that compare ours with the paper's and MTReclib's numbers, if any match.

    Args:
        cells: Output of :func:`mtnrec.reporting.table.scores.comparisons`.
    """
    sources = (
        ("the paper's", paper_results(), (PAPER_PROTOCOL, TABLE_2_REMARK)),
        ("MTReclib's", mtreclib_results(), (MTRECLIB_PROTOCOL,)),
    )
    columns = ("data", "noise", "task", "theirs", "ours", "deviation", "our seeds")
    for whose, published, notes in sources:
        rows = tuple(
            _row(
                f"{row['model']} {row['variant']}".strip(),
                *(row["data"], f"{row['noise']:g}", row["task"].upper()),
                *(f"{row['published']:.4f}", f"{row['ours']:.4f}", f"{row['deviation']:+.4f}"),
                f"{row['seeds']}",
            )
            for row in deviations(cells, published).to_dict("records")
        )
        if rows:
            title = f"Our test AUCs compared with {whose}"
            yield Table(title, "Model", (Group("", columns),), rows, notes)


def mean_costs(runs: Runs) -> pd.DataFrame:
    """Return the mean costs of each arm, by data set, name and noise.

    ``runs`` counts its runs; ``speed_ratio`` is its speed in training, divided by that of its
    baseline, NaN for a baseline.
    """
    arm = ["data", "label", "color", "noise", "treated", "arm", "baseline"]
    groups = runs.costs.groupby(arm, as_index=False)
    means = groups.mean(numeric_only=True).assign(runs=groups.size()["size"])
    speeds = means[~means["treated"]].set_index("baseline")["train_samples_per_second"]
    without = means["baseline"].map(speeds[~speeds.index.duplicated()])
    ratio = (means["train_samples_per_second"] / without).where(means["treated"])
    names = sorted(means["label"].unique(), key=natural_order)
    means = means.assign(speed_ratio=ratio, rank=means["label"].map(names.index))
    return means.sort_values(["data", "rank", "noise"], kind="stable", ignore_index=True)


def cost_table(runs: Runs) -> Table:
    """Return the mean costs of each arm, and the speed of MTN relative to its baseline."""
    rows = []
    for cost in mean_costs(runs).to_dict("records"):
        ratio = _EMPTY if pd.isna(cost["speed_ratio"]) else f"{cost['speed_ratio']:.2f}"
        rows.append(
            _row(
                cost["label"],
                *(cost["data"], f"{cost['noise']:g}", f"{cost['runs']}"),
                *(f"{cost[f'seconds_{stage}']:,.1f}" for stage in ("setup", "fit", "test")),
                f"{cost['train_samples_per_second']:,.0f}",
                *(ratio, f"{cost['evaluate_samples_per_second']:,.0f}"),
                f"{cost['peak_memory_bytes'] / _GIB:.2f}",
                *(_count(cost[f"{part}_parameters"]) for part in ("network", "embeddings")),
            )
        )
    columns = (
        *("data", "noise", "runs", "setup, s", "fit, s", "test, s", "trained rows/s"),
        *("speed to baseline", "evaluated rows/s", "memory, GiB", "parameters"),
        "in embeddings",
    )
    notes = (
        "Means over the runs, including loading, as measured: runs that shared a machine slowed "
        "each other down. Speed to baseline: rows trained per second, divided by those of the "
        "baseline. Memory: peak of the process so far, which may stem from an earlier run in it. "
        "Parameters: without those in embeddings, which have a column of their own.",
    )
    return Table(
        "Costs of each arm",
        "Arm",
        (Group("", columns),),
        tuple(rows),
        notes,
        tuple(warn_of_machines(runs)),
    )


def _count(number: float) -> str:
    return _EMPTY if pd.isna(number) else f"{number:,.0f}"


def data_table(runs: Runs) -> Table:
    """Return the data sets' rows, positives, checksums and suspected leaks."""
    records = {run.record.data["checksum"]: run.record for run in runs}
    rows = []
    for checksum, record in records.items():
        data = record.data
        positives = (
            f"{task_title(task)} {count['positives']:,} of {count['rows']:,}"
            for task in runs.tasks
            if (count := record.counts.get(f"test/{task}")) is not None
        )
        leaks = [f"{leak['feature']} ({leak['task']})" for leak in data["suspected_leaks"]]
        rows.append(
            _row(
                data["name"],
                *(f"{data['rows'][split]:,}" for split in ("train", "val", "test")),
                *("; ".join(positives), ", ".join(leaks) or "none", checksum),
            )
        )
    columns = (
        *("training rows", "validation rows", "test rows", "positives in the test rows"),
        *("suspected leaks", "checksum (SHA-256)"),
    )
    return Table("Data sets", "Name", (Group("", columns),), tuple(rows), is_text=True)


def settings_tables(runs: Runs) -> tuple[Table, Table]:
    """Return the settings that differ between runs, and those of all runs that have them."""
    configs = [dict(flatten(run.record.identity.settings)) for run in runs]
    values = {key: _values(configs, key) for key in sorted({k for c in configs for k in c})}
    set_ones = {key: [text for text in found if text != _EMPTY] for key, found in values.items()}
    differing = {key: values[key] for key, found in set_ones.items() if len(found) > 1}
    shared = {key: found for key, found in set_ones.items() if len(found) == 1}
    return (
        _two_columns("Settings that differ", "Key", "Values", differing),
        _two_columns("Settings shared by all runs", "Key", "Value", shared),
    )


def version_table(runs: Runs) -> Table:
    """Return the versions that the runs were made with, their threads and machines."""
    versions = [run.record.versions for run in runs]
    names = sorted({name for version in versions for name in version})
    found = {name: _values(versions, name) for name in names}
    threads = [{"threads": run.record.threads} for run in runs]
    found["threads per process"] = _values(threads, "threads")
    machines = [{"hardware": hardware(run.record), **run.record.machine} for run in runs]
    for key, title in (("hardware", "hardware"), ("os", "operating system"), ("host", "host")):
        if values := [text for text in _values(machines, key) if text not in ("", _EMPTY)]:
            found[title] = values
    return _two_columns("Versions and machines", "Name", "Version", found)


def _values(mappings: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    texts = {as_text(mapping[key]) if key in mapping else _EMPTY for mapping in mappings}
    return sorted(texts, key=lambda text: (len(text), text))


def _two_columns(title: str, stub: str, header: str, found: Mapping[str, Sequence[str]]) -> Table:
    rows = tuple(_row(key, ", ".join(_shortened(values))) for key, values in found.items())
    return Table(title, stub, (Group("", (header,)),), rows, is_text=True)


def _shortened(values: Sequence[str]) -> Iterator[str]:
    yield from values[:_MOST_VALUES]
    if len(values) > _MOST_VALUES:
        yield f"… ({len(values)} in all)"


def _row(header: str, *texts: str) -> Row:
    return Row(header, tuple(Cell(text) for text in texts))
