"""Tables of the runs' costs, settings, data and versions, and of published numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from mtnrec.reporting.labels import as_text
from mtnrec.reporting.runs import Runs
from mtnrec.reporting.table.published import (
    MTRECLIB_PROTOCOL,
    PAPER_PROTOCOL,
    TABLE_2_REMARK,
    deviations,
    mtreclib_results,
    paper_results,
)
from mtnrec.reporting.table.render import Cell, Group, Row, Table
from mtnrec.run.identity import flatten

_EMPTY = "—"
_MOST_VALUES = 12  # values of a setting shown in a cell
_GIB = 2**30


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


def cost_table(runs: Runs) -> Table:
    """Return the mean costs of each arm, and the speed of MTN relative to its baseline."""
    costs = runs.costs
    arm = ["data", "model", "noise", "variant", "arm", "baseline"]
    means = costs.groupby(arm, sort=True, as_index=False).mean(numeric_only=True)
    counts = costs.groupby("arm")["run"].count()
    speeds = means[means["variant"] == ""].set_index("baseline")["train_samples_per_second"]
    rows = []
    for cost in means.to_dict("records"):
        speed = cost["train_samples_per_second"]
        without = speeds.get(cost["baseline"])
        ratio = _EMPTY if not cost["variant"] or without is None else f"{speed / without:.2f}"
        rows.append(
            _row(
                f"{cost['model']} {cost['variant']}".strip(),
                *(cost["data"], f"{cost['noise']:g}", f"{counts[cost['arm']]}"),
                *(f"{cost[f'seconds_{stage}']:,.1f}" for stage in ("setup", "fit", "test")),
                *(f"{speed:,.0f}", ratio, f"{cost['evaluate_samples_per_second']:,.0f}"),
                f"{cost['peak_memory_bytes'] / _GIB:.2f}",
            )
        )
    columns = (
        *("data", "noise", "runs", "setup, s", "fit, s", "test, s", "trained rows/s"),
        *("to baseline", "evaluated rows/s", "memory, GiB"),
    )
    notes = (
        "Means over the runs, including loading, as measured: runs that shared a machine slowed "
        "each other down. To baseline: rows trained per second with MTN divided by those without. "
        "Memory: peak of the process so far, which may stem from an earlier run in it.",
    )
    return Table("Costs of the runs", "Model", (Group("", columns),), tuple(rows), notes)


def data_table(runs: Runs) -> Table:
    """Return the data sets' rows, positives, checksums and suspected leaks."""
    records = {run.record.data["checksum"]: run.record for run in runs}
    rows = []
    for checksum, record in records.items():
        data = record.data
        positives = (
            f"{place.removeprefix('test/')} {count['positives']:,} of {count['rows']:,}"
            for place, count in sorted(record.counts.items())
            if place.startswith("test/")
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
    """Return the settings that differ between runs, and those that all share."""
    configs = [dict(flatten(run.record.identity.settings)) for run in runs]
    values = {key: _values(configs, key) for key in sorted({k for c in configs for k in c})}
    differing = {key: found for key, found in values.items() if len(found) > 1}
    shared = {key: found for key, found in values.items() if len(found) == 1}
    return (
        _two_columns("Settings that differ", "Key", "Values", differing),
        _two_columns("Settings shared by all runs", "Key", "Value", shared),
    )


def version_table(runs: Runs) -> Table:
    """Return the versions that the runs were made with, and their threads."""
    versions = [run.record.versions for run in runs]
    names = sorted({name for version in versions for name in version})
    found = {name: _values(versions, name) for name in names}
    threads = [{"threads": run.record.threads} for run in runs]
    found["threads per process"] = _values(threads, "threads")
    return _two_columns("Versions", "Package", "Version", found)


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
