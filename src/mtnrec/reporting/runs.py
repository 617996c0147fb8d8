"""Finished runs as tables: one row per run, metric, epoch or bin.

The columns ``data``, ``model``, ``variant`` and ``noise`` together identify an arm.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import pandas as pd

from mtnrec.checks import InputError
from mtnrec.files import read_json
from mtnrec.metric.catalogue import MetricKey, parse_metric_key
from mtnrec.reporting.labels import label_runs, text_or_none
from mtnrec.run.folder import FAILURE_FILE, RUNNING_FILE
from mtnrec.run.record import RECORD_FILE, RunRecord

_MTN_NUMBERS = ("lam", "refresh_every")
_MTN_TEXTS = ("target", "layers", "subsets", "alpha", "layer_weighting", "coupling")
_ARM = ("run", "arm", "baseline", "data", "checksum", "model", "variant", "mtn", "noise", "seed")
_TEXTS = (
    *("run", "cell", "arm", "baseline", "data", "checksum", "model", "variant", *_MTN_TEXTS),
    *("split", "task", "metric", "name"),
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Folder of the run.
        name: The folder, relative to the root that was read.
        record: Content of its ``result.json``.
    """

    folder: Path
    name: str
    record: RunRecord


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that failed or has not finished.

    Args:
        name: The folder, relative to the root that was read.
        reason: First line of its error, or that it has not finished.
    """

    name: str
    reason: str


class Runs(Sequence[Run]):
    """Finished runs and their tables, each computed once.

    Args:
        runs: Runs, in order.
        unreadable: Runs whose record could not be read.

    Raises:
        InputError: If runs with the same data and noise settings saw different noise.
    """

    def __init__(self, runs: Iterable[Run], unreadable: Iterable["UnfinishedRun"] = ()) -> None:
        self._runs = tuple(runs)
        self.unreadable = tuple(unreadable)
        _check_masks(self._runs)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> "Runs": ...
    def __getitem__(self, index: int | slice) -> "Run | Runs":
        return Runs(self._runs[index]) if isinstance(index, slice) else self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        return f"<{len(self)} finished runs>"

    @cached_property
    def settings(self) -> pd.DataFrame:
        """One row per run: its arm, labels, settings and costs.

        ``data``, ``model`` and ``variant`` are the labels of
        :func:`~mtnrec.reporting.labels.label_runs`. MTN settings are empty without MTN.
        """
        labels = label_runs([run.record for run in self])
        rows = [
            {
                "run": run.name,
                "cell": run.record.cell,
                "arm": run.record.identity.arm,
                "baseline": run.record.identity.baseline,
                "data": label.data,
                "checksum": run.record.data["checksum"],
                "model": label.model,
                "variant": label.variant,
                "mtn": (arm := run.record.identity.arm_settings)["mtn.enabled"],
                "noise": float(arm["noise.proportion"]),
                "seed": run.record.seed,
                **{key: float(arm.get(f"mtn.{key}", "nan")) for key in _MTN_NUMBERS},
                **{key: text_or_none(arm, f"mtn.{key}") for key in _MTN_TEXTS},
                "best_epoch": run.record.best_epoch,
                **{f"seconds_{key}": value for key, value in run.record.seconds.items()},
                **{
                    f"{key}_samples_per_second": value
                    for key, value in run.record.samples_per_second.items()
                },
                "peak_memory_bytes": run.record.peak_memory_bytes,
            }
            for run, label in zip(self, labels, strict=True)
        ]
        return _typed(pd.DataFrame(rows))

    @cached_property
    def results(self) -> pd.DataFrame:
        """One row per run, split, task and metric; an undefined ``value`` is NaN.

        ``rows`` and ``positives`` count what the metric is computed on. Timings are left out, so
        that a sweep that was interrupted and resumed gives the same table.
        """
        columns = [*_ARM, *_MTN_NUMBERS, *_MTN_TEXTS, "best_epoch"]
        return self._spread(columns, [list(_metrics(run.record)) for run in self])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """One row per run: seconds, samples per second and peak memory."""
        costs = [name for name in self.settings.columns if name.startswith("seconds_")]
        costs += [name for name in self.settings.columns if name.endswith("_samples_per_second")]
        return self.settings[[*_ARM, *costs, "peak_memory_bytes"]]

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """One row per run, epoch and logged value: ``name``, ``value``."""
        details = [
            [
                {"epoch": entry["epoch"], "step": entry["step"], "name": name, "value": value}
                for entry in run.record.history
                for name, value in sorted(entry.items())
                if name not in ("epoch", "step")
            ]
            for run in self
        ]
        return self._spread(list(_ARM), details)

    @cached_property
    def bins(self) -> pd.DataFrame:
        """One row per run, task and bin of the calibration curve on the test set."""
        names = ["predicted", "observed", "rows"]
        rows = [
            (run.name, place.removeprefix("test/"), *values)
            for run in self
            for place, curve in run.record.calibration_curves.items()
            for values in zip(*(curve[name] for name in names), strict=True)
            if place.startswith("test/")
        ]
        return pd.DataFrame(rows, columns=["run", "task", *names])

    def write(self, out: Path) -> None:
        """Write ``results``, ``costs`` and ``epochs`` as csv and Parquet, with every digit.

        Each file is written atomically.
        """
        out.mkdir(parents=True, exist_ok=True)
        tables = {"results": self.results, "costs": self.costs, "epochs": self.epochs}
        with TemporaryDirectory(dir=out, prefix=".") as temporary:
            for name, table in tables.items():
                table.to_csv(Path(temporary, f"{name}.csv"), index=False)
                table.to_parquet(Path(temporary, f"{name}.parquet"), index=False)
            for path in sorted(Path(temporary).iterdir()):
                path.replace(out / path.name)

    def _spread(self, columns: list[str], details: Sequence[list[dict[str, Any]]]) -> pd.DataFrame:
        """Return one row per detail: the settings of its run, then the detail."""
        settings = self.settings[columns]
        repeated = settings.loc[settings.index.repeat([len(rows) for rows in details])]
        below = pd.DataFrame([row for rows in details for row in rows])
        return _typed(pd.concat([repeated.reset_index(drop=True), below], axis=1))


def read_runs(root: str | Path) -> Runs:
    """Read every finished run below a folder, sorted by name.

    Runs that differ only in their folder count once. A record that cannot be read or is not one is
    left out with a warning, and listed in ``unreadable``.

    Raises:
        InputError: If ``root`` is not a folder or has no readable record, or if two runs with the
            same settings and seed have different metrics.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder. Choose the one that holds the runs.")
    runs: dict[tuple[str, int], Run] = {}
    unreadable: list[UnfinishedRun] = []
    for path in sorted(root.rglob(RECORD_FILE), key=lambda path: _name(path, root)):
        try:
            run = Run(path.parent, _name(path, root), _read(path))
        except InputError as error:
            unreadable.append(UnfinishedRun(_name(path, root), str(error)))
            continue
        other = runs.setdefault((run.record.identity.arm, run.record.seed), run)
        if other.record.metrics != run.record.metrics:
            raise InputError(
                f"{other.name} and {run.name} in {root} have the same settings and seed "
                f"{run.record.seed}, but different metrics. Delete one of them."
            )
    if unreadable and not runs:
        raise InputError(unreadable[0].reason)
    for left_out in unreadable:
        _logger.warning("left out: %s", left_out.reason)
    if not runs:
        raise InputError(
            f"{root} has no finished run (result.json) below it. Train some with `python -m "
            f"mtnrec.train -m mtn.enabled=false,true 'seed=range(0,10)' hydra.sweep.dir={root}`."
        )
    return Runs(runs.values(), unreadable)


def _read(path: Path) -> RunRecord:
    record = RunRecord.read(path)
    for place in {f"{key.split}/{key.task}" for key in _metric_keys(record)}:
        if place not in record.counts:
            raise InputError(f"{path} lacks the key counts.{place}. Delete it and run again.")
    return record


def unfinished(root: Path) -> list[UnfinishedRun]:
    """Return the runs below ``root`` that were started and did not finish, by name."""
    started = {path.parent for name in (FAILURE_FILE, RUNNING_FILE) for path in root.rglob(name)}
    return [
        UnfinishedRun(_name(folder / RECORD_FILE, root), _reason(folder))
        for folder in sorted(started)
        if not (folder / RECORD_FILE).exists()
    ]


def _name(path: Path, root: Path) -> str:
    return path.parent.relative_to(root).as_posix()


def _reason(folder: Path) -> str:
    try:
        failure = read_json(folder / FAILURE_FILE)
        if failure is None:
            return "has not finished"
        return f"{failure['error']}: {failure['message']}".splitlines()[0]
    except (ValueError, KeyError, TypeError):
        return f"failed; its {FAILURE_FILE} cannot be read"


def _check_masks(runs: Sequence[Run]) -> None:
    first: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        is_drawn = "noise.seed" in run.record.keys_of_seed
        place = (run.record.identity.baseline, run.record.seed if is_drawn else None)
        other = first.setdefault(place, run)
        if other.record.noise["checksum"] != run.record.noise["checksum"]:
            raise InputError(
                f"{other.name} and {run.name} have the same noise settings, but saw different "
                "noise, since different versions of mtnrec made them. Run one of them again."
            )


def _metrics(record: RunRecord) -> Iterator[dict[str, Any]]:
    for key in _metric_keys(record):
        counts = record.counts[f"{key.split}/{key.task}"]
        yield {**key._asdict(), "value": record.metrics[str(key)], **counts}


def _metric_keys(record: RunRecord) -> list[MetricKey]:
    tasks = {place.partition("/")[2] for place in record.counts}
    keys = (parse_metric_key(name, tasks) for name in sorted(record.metrics))
    return [key for key in keys if key is not None]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    types: dict[str, Any] = {name: "string" for name in _TEXTS if name in table}
    if "value" in table:
        types["value"] = "float64"
    return table.astype(types)
