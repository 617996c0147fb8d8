"""Leaderboard: records of tuned sweeps without the rest, what they must share, and their page.

A leaderboard is a folder of such records. The runs of a data set that lie nearest to its root set
the terms: a record with another data checksum, protocol or version is refused.
"""

import itertools
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from mtnrec.checks import InputError
from mtnrec.reporting.labels import name_arm, name_model
from mtnrec.reporting.machines import describe_machines
from mtnrec.reporting.runs import Run, Runs
from mtnrec.reporting.significance import PairedComparison, compare, holm, mean_interval, stars
from mtnrec.reporting.table.appendix import OVERRIDES_FILE, command_of
from mtnrec.reporting.table.published import task_title
from mtnrec.reporting.table.ranks import rank_arms, rank_tables
from mtnrec.reporting.table.render import Cell, Group, Row, Table, to_markdown
from mtnrec.reporting.table.scores import interval_text
from mtnrec.run.identity import flatten
from mtnrec.run.record import RunRecord
from mtnrec.system.files import write_atomic
from mtnrec.tuning.record import TunedArm, Tuning

_METRIC = "mean_auc"  # ranks the rows
_KEY = f"test/{_METRIC}"
_EMPTY_CELL = Cell("—")
_PATHS = ("logger", "output_dir", "data_root")  # keys of a config that name places of a machine
_MOST_FAULTS = 10  # listed
_INTRODUCTION = """\
Models and regularisers, each tuned with the same number of trials on the validation rows alone;
fresh seeds of the best setting were then tested once. `experiment=leaderboard` is the protocol. The
sizes are reduced (embeddings of 16, layers of 64 and 32 units and less), so that these AUCs do not
compare with published ones. A row is a mean over the seeds with its 95 % t-interval, after ±; the
rows are in the order of the mean of the tasks' AUCs. Neighbours in this order often cannot be told
apart: the second table compares each arm with the first of the protocol and, if it has a
regulariser, with its model alone. Seconds per epoch include the validation, measured beside other
runs; they are not benchmarks.

`leaderboard/README.md` says how to add a row. This page is written by `python -m mtnrec.report
runs=leaderboard leaderboard=docs/leaderboard.md` from the records in `leaderboard/`."""


@dataclass(frozen=True)
class Entry:
    """A tuned arm on a data set, with its tested runs.

    Args:
        folder: Folder of its sweep.
        arm: Its search.
        runs: Its fresh runs, by seed.
    """

    folder: Path
    arm: TunedArm
    runs: Mapping[str, Run]

    @property
    def first(self) -> RunRecord:
        """Record of its first seed."""
        return next(iter(self.runs.values())).record

    @property
    def data(self) -> str:
        """Name of the data set."""
        return str(self.first.data["name"])

    def values(self, key: str) -> list[float]:
        """Return the metric of each seed that defines it."""
        return [value for value in self.paired(key) if not math.isnan(value)]

    def paired(self, key: str) -> list[float]:
        """Return the metric of each seed; NaN where it is undefined."""
        found = (run.record.metrics.get(key) for run in self.runs.values())
        return [math.nan if value is None else value for value in found]


def copy_records(runs: Runs, out: Path) -> int:
    """Copy the searches and the tested runs' records and overrides; return the number of runs.

    Left out of a record are the logged values of the epochs, the calibration curves, the distances
    of experts, and what names places of the machine.

    Args:
        runs: Runs of one tuned sweep.
        out: New folder: ``tuning.json``, and ``ARM/SEED/result.json`` of each run.

    Raises:
        InputError: If ``out`` exists, or the runs are not those of one tuned sweep.
    """
    if out.exists():
        raise InputError(f"records must be a new folder, got {out}. Choose another or delete it.")
    if len(runs.tuned.by_folder) != 1:
        raise InputError(
            f"records are those of one tuned sweep, got {len(runs.tuned.by_folder)} in the folder "
            "of the runs. Choose the folder of the sweep, runs=runs/leaderboard/hillstrom."
        )
    entries = _entries(runs)
    arms = []
    for entry in entries:
        places = {seed: f"{entry.arm.arm}/{seed}" for seed in entry.runs}
        for seed, run in entry.runs.items():
            folder = out / places[seed]
            (folder / OVERRIDES_FILE).parent.mkdir(parents=True)
            _without_details(run.record).write(folder)
            shutil.copyfile(run.folder / OVERRIDES_FILE, folder / OVERRIDES_FILE)
        arms.append(replace(entry.arm, fresh=places))
    Tuning(arms).write(out)
    return sum(len(entry.runs) for entry in entries)


def _without_details(record: RunRecord) -> RunRecord:
    return replace(
        record,
        config={key: value for key, value in record.config.items() if key not in _PATHS},
        history=[{"epoch": epoch["epoch"], "step": epoch["step"]} for epoch in record.history],
        calibration_curves={},
        expert_distances=None,
        machine={key: value for key, value in record.machine.items() if key != "host"},
        commits={key: value for key, value in record.commits.items() if key == "mtnrec"},
    )


def _entries(runs: Runs) -> list[Entry]:
    by_folder = {run.folder: run for run in runs}
    found = []
    for folder, arm in runs.tuned.arms:
        seeds = sorted(arm.fresh, key=int)
        own = {seed: by_folder.get(folder / arm.fresh[seed]) for seed in seeds}
        if missing := [seed for seed, run in own.items() if run is None]:
            raise InputError(
                f"{arm.title} in {folder} lacks the records of the seeds {', '.join(missing)}. "
                "Let the sweep end."
            )
        if not own:
            raise InputError(f"{arm.title} in {folder} has no fresh runs. Let the sweep end.")
        found.append(Entry(folder, arm, {seed: run for seed, run in own.items() if run}))
    return found


def check_records(runs: Runs) -> list[Entry]:
    """Return the entries of a leaderboard, those that set the terms of a data set first.

    Raises:
        InputError: If records do not match: each fault, with what is expected.
    """
    entries = sorted(_entries(runs), key=lambda entry: len(entry.folder.parts))
    own = {run.folder for entry in entries for run in entry.runs.values()}
    faults = [f"{run.name} belongs to no tuned arm" for run in runs if run.folder not in own]
    faults += [f"{run.name}: {run.reason}" for run in runs.unreadable]
    terms: dict[str, Entry] = {}
    by_name: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        first = terms.setdefault(entry.data, entry)
        faults += _faults_of_search(entry, first)
        name = entry.data, name_arm(entry.first), entry.arm.title
        if (other := by_name.setdefault(name, entry)) is not entry:
            faults.append(
                f"{entry.arm.title} in {entry.folder}: the name must be new, but that of an arm in "
                f"{other.folder} is the same"
            )
        for run in entry.runs.values():
            faults += [f"{run.name}: {fault}" for fault in _faults(run, entry, first, runs)]
    if faults:
        more = len(faults) - _MOST_FAULTS
        lines = [*faults[:_MOST_FAULTS], *([f"and {more} more"] if more > 0 else [])]
        raise InputError(
            "the records of a leaderboard must match:\n  " + "\n  ".join(lines) + "\nRun these "
            "arms again with the version and the protocol of the others, or leave them out."
        )
    return entries


def _faults_of_search(entry: Entry, first: Entry) -> Iterator[str]:
    arm, terms = entry.arm, first.arm
    name = f"{arm.title} in {entry.folder}"
    for what, found, expected in (
        ("budget", arm.budget, terms.budget),
        ("monitor", arm.monitor, terms.monitor),
        ("seeds", [*entry.runs], [*first.runs]),
        ("number of trials", len(arm.trials), arm.budget.trials),
    ):
        if found != expected:
            yield f"{name}: {what} must be {expected}, got {found}"


def _faults(run: Run, entry: Entry, first: Entry, runs: Runs) -> Iterator[str]:
    """Yield what a record of an entry has otherwise than its search or the terms of the data."""
    record, terms = run.record, first.first
    pairs: list[tuple[str, Any, Any]] = [
        ("checksum of the data", record.data["checksum"], terms.data["checksum"]),
        ("version of mtnrec", record.versions.get("mtnrec"), terms.versions.get("mtnrec")),
        ("counts", _test_counts(record), _test_counts(terms)),
    ]
    own, expected = (_protocol(found, runs) for found in (record, terms))
    pairs += [(key, own.get(key), expected.get(key)) for key in sorted({*own, *expected})]
    if entry.arm.best is not None:
        settings = dict(flatten(record.config))
        chosen = {key.lstrip("+"): value for key, value in entry.arm.best.setting.items()}
        pairs += [(key, settings.get(key), value) for key, value in chosen.items()]
    yield from (f"{key} must be {want}, got {got}" for key, got, want in pairs if got != want)
    if record.commits.get("mtnrec", {}).get("dirty"):
        yield "it was trained with changes that are not committed"


def _protocol(record: RunRecord, runs: Runs) -> dict[str, Any]:
    """Return the settings of a run that no arm or search sets."""
    settings = record.identity.arm_settings.items()
    return {k: v for k, v in settings if k != "checksum" and not runs.tuned.sets(k)}


def _test_counts(record: RunRecord) -> dict[str, Any]:
    return {place: count for place, count in record.counts.items() if not place.startswith("val/")}


def write_leaderboard(runs: Runs, path: Path) -> int:
    """Check the records and write the page, in Markdown; return the number of rows.

    Raises:
        InputError: As :func:`check_records`.
    """
    entries = check_records(runs)
    boards = {
        data: _by_name([entry for entry in entries if entry.data == data])
        for data in dict.fromkeys(entry.data for entry in entries)
    }
    parts = ["# Leaderboard", _INTRODUCTION]
    labelled = _labelled(runs, itertools.chain.from_iterable(boards.values()))
    if rankings := rank_arms(labelled, metric=_METRIC):
        parts += ["## Ranks", *map(to_markdown, rank_tables(rankings))]
    for data, rows in boards.items():
        tables = (_score_table(runs, rows), _difference_table(rows))
        facts = _facts(runs, [entry for _, entry in rows])
        parts += [f"## {data}", facts, *map(to_markdown, tables), _commands(rows)]
    write_atomic(path, "\n\n".join(part.strip() for part in parts) + "\n")
    return len(entries)


def _by_name(entries: Sequence[Entry]) -> list[tuple[str, Entry]]:
    """Return the entries of a data set with the names of their rows.

    A name is the model and its treatments, with the arm's where these repeat.
    """
    short = [name_arm(entry.first) for entry in entries]
    return [
        (f"{name} ({entry.arm.title})" if short.count(name) > 1 else name, entry)
        for name, entry in zip(short, entries, strict=True)
    ]


def _labelled(runs: Runs, rows: Iterable[tuple[str, Entry]]) -> pd.DataFrame:
    """Return the results with the names of the rows as labels."""
    names = {run.name: name for name, entry in rows for run in entry.runs.values()}
    return runs.results.assign(label=runs.results["run"].map(names).astype("string"))


def _ordered(rows: Sequence[tuple[str, Entry]]) -> list[tuple[str, Entry]]:
    """Return the rows, the best mean AUC first, undefined ones last."""
    return sorted(rows, key=lambda row: -fmean(row[1].values(_KEY) or [-math.inf]))


def _score_table(runs: Runs, rows: Sequence[tuple[str, Entry]]) -> Table:
    tasks = [task for task in runs.tasks if f"test/{task}" in rows[0][1].first.counts]
    keys = [*(f"test/{task}_auc" for task in tasks), _KEY]
    found = []
    for rank, (name, entry) in enumerate(_ordered(rows), 1):
        costs = (f"{sum(entry.first.parameters.values()):,}", _pace(entry))
        aucs = [_cell(entry.values(key)) for key in keys]
        found.append(Row(name, (Cell(str(rank)), *aucs, *map(Cell, costs))))
    aucs_of = tuple(f"{task_title(task)} AUC" for task in tasks)
    columns = ("rank", *aucs_of, "mean AUC", "parameters", "s per epoch")
    return Table("Test AUC", "Arm", (Group("", columns),), tuple(found))


def _difference_table(rows: Sequence[tuple[str, Entry]]) -> Table:
    first_name, first = rows[0]
    plain = {name_model(e.first): e for _, e in reversed(rows) if not _is_treated(e)}
    names, entries = zip(*_ordered(rows), strict=True)
    columns = {
        f"minus {first_name}": [None if e is first else first for e in entries],
        "minus the model alone": [
            plain.get(name_model(e.first)) if _is_treated(e) else None for e in entries
        ],
    }
    cells = [_differences(entries, others) for others in columns.values()]
    return Table(
        "Differences of the mean test AUC",
        "Arm",
        (Group("", tuple(columns)),),
        tuple(map(Row, names, zip(*cells, strict=True))),
        (
            "Paired by seed, with 95 % t-intervals. * p < 0.05, ** p < 0.01 (two-sided paired "
            "t-test); † and ‡: the same after Holm's correction for the column.",
        ),
    )


def _is_treated(entry: Entry) -> bool:
    return bool(entry.first.identity.treatments)


def _differences(entries: Sequence[Entry], others: Sequence[Entry | None]) -> list[Cell]:
    """Return the difference of each entry from another one, paired by seed."""
    pairs = [
        None if other is None else compare(other.paired(_KEY), entry.paired(_KEY))
        for entry, other in zip(entries, others, strict=True)
    ]
    corrected = holm([math.nan if p is None or p.p_value is None else p.p_value for p in pairs])
    return [
        _EMPTY_CELL if pair is None else _difference(pair, holm_p)
        for pair, holm_p in zip(pairs, corrected.tolist(), strict=True)
    ]


def _difference(pair: PairedComparison, holm_p: float) -> Cell:
    text = f"{pair.difference:+.4f}"
    if pair.low is not None and pair.high is not None:
        text += f" {interval_text(pair.low, pair.high)}"
    return Cell(text, stars=stars(pair.p_value), holm_stars=stars(holm_p))


def _cell(values: Sequence[float]) -> Cell:
    if not values:
        return _EMPTY_CELL
    mean, low, _ = mean_interval(values)
    return Cell(f"{mean:.4f}", spread=f"{mean - low:.4f}" if len(values) > 1 else "")


def _pace(entry: Entry) -> str:
    records = [run.record for run in entry.runs.values()]
    return f"{fmean(r.seconds['fit'] / max(len(r.history), 1) for r in records):.2f}"


def _facts(runs: Runs, entries: Sequence[Entry]) -> str:
    record, arm = entries[0].first, entries[0].arm
    rows = ", ".join(
        f"{record.data['rows'][split]:,} {name}"
        for split, name in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    positives = ", ".join(
        f"{task_title(task)} {count['positives']:,} of {count['rows']:,}"
        for task in runs.tasks
        if (count := record.counts.get(f"test/{task}")) is not None
    )
    own = Runs([run for entry in entries for run in entry.runs.values()])
    commit = record.commits.get("mtnrec", {}).get("commit")
    version = (
        f"mtnrec {record.versions.get('mtnrec')}{f', commit `{commit[:8]}`' if commit else ''}"
    )
    lines = [
        f"rows: {rows}",
        f"positives in the test rows: {positives}",
        f"checksum (SHA-256): `{record.data['checksum']}`",
        f"{arm.budget.trials} trials an arm by `{arm.monitor}`; seeds {', '.join(entries[0].runs)}",
        f"{version}; {describe_machines(own)}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _commands(rows: Sequence[tuple[str, Entry]]) -> str:
    lines = []
    for name, entry in rows:
        run = next(iter(entry.runs.values()))
        place = run.folder.parent
        lines += [f"# {name}: {place.as_posix()}", command_of(run, Path("runs", place.name)), ""]
    text = "\n".join(lines).strip()
    return (
        "<details>\n<summary>Commands and records</summary>\n\nThe command and the folder of each "
        "row; seeds differ in `seed` alone. A record has the whole configuration.\n\n"
        f"```\n{text}\n```\n\n</details>"
    )
