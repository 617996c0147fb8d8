"""Finished runs as tables: one row per run, metric, epoch or bin.

The columns ``data``, ``model``, ``variant`` and ``noise`` together identify an arm: ``noise`` is
the share of rows with noisy features, and ``data`` names the label noise. ``label`` is the arm's
name; ``baseline`` is a hash that it shares with the arm that it is compared with, its baseline,
which is not ``treated``.
"""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import pandas as pd

from mtnrec.checks import InputError
from mtnrec.metric.catalogue import ALL_TASKS, MEAN_AUC, MetricKey, metric_info, parse_metric_key
from mtnrec.reporting.baseline import Place, natural_order, place_arms
from mtnrec.reporting.labels import (
    LABEL_NOISE,
    Labels,
    as_text,
    label_runs,
    label_tuned,
    text_or_none,
)
from mtnrec.reporting.table.published import TASKS
from mtnrec.reporting.tuned import TunedSweeps, baseline_arm, place_tuned, read_tuned
from mtnrec.run.folder import FAILURE_FILE, RUNNING_FILE
from mtnrec.run.record import RECORD_FILE, RunRecord
from mtnrec.system.files import read_json

_MTN_NUMBERS = ("lam", "refresh_every")
_MTN_TEXTS: tuple[str, ...] = ("target", "layers", "subsets", "alpha", "layer_weighting")
_MTN_TEXTS += ("coupling", "norm", "frobenius")
_PARAMETERS = ("network", "embeddings")
_ARM: tuple[str, ...] = (
    "run",
    "arm",
    "baseline",
    "data",
    "checksum",
    "model",
    "variant",
    "mtn",
    "noise",
    "seed",
)
_ARM += ("label", "line", "treated", "color")
_TEXTS = (
    *("run", "cell", "arm", "baseline", "data", "checksum", "model", "variant", *_MTN_TEXTS),
    *("label", "line", "split", "task", "metric", "name"),
)
# Settings with a column of their own name.
_OWN_COLUMNS = {"checksum", "noise.proportion", "mtn.enabled", "data.name"}
_OWN_COLUMNS |= {f"mtn.{key}" for key in (*_MTN_NUMBERS, *_MTN_TEXTS)}
_OWN_COLUMNS |= {f"{group}._target_" for group in ("data", "model", "mtn", "regularizer", "noise")}

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
        baseline: Setting of the baseline, as in :func:`~mtnrec.reporting.baseline.place_arms`.
        trials: Runs without a test, which no table of results has.
        tuned: Tuned sweeps that some runs belong to.

    Raises:
        InputError: If runs with the same data and noise settings saw different noise, or no run has
            the setting of the baseline.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        unreadable: Iterable["UnfinishedRun"] = (),
        baseline: str | None = None,
        trials: Iterable[Run] = (),
        tuned: TunedSweeps | None = None,
    ) -> None:
        self._runs = tuple(runs)
        self.unreadable = tuple(unreadable)
        self._baseline = baseline
        self.trials = tuple(trials)
        self.tuned = TunedSweeps({}) if tuned is None else tuned
        _check_masks(self._runs)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> "Runs": ...
    def __getitem__(self, index: int | slice) -> "Run | Runs":
        if isinstance(index, slice):
            return Runs(self._runs[index], baseline=self._baseline, tuned=self.tuned)
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        return f"<{len(self)} finished runs>"

    @cached_property
    def settings(self) -> pd.DataFrame:
        """One row per run: its arm, labels, settings and costs.

        ``data``, ``model`` and ``variant`` are the labels of
        :func:`~mtnrec.reporting.labels.label_runs`. MTN settings are empty without MTN. ``line``
        names the arm in figures, where ``color`` numbers its colour (0 is a baseline's). Every
        other setting that differs between runs has a column, named by its dotted key.
        """
        labels, places = self._label_and_place()
        lines = sorted({place.line for place in places if place.treated}, key=natural_order)
        rows = [
            {
                "run": run.name,
                "cell": run.record.cell,
                "arm": run.record.identity.arm,
                "baseline": place.block,
                "data": label.data,
                "checksum": (arm := run.record.identity.arm_settings)["checksum"],
                "model": label.model,
                "variant": label.variant,
                "mtn": arm["mtn.enabled"],
                "noise": float(arm["noise.proportion"]),
                "seed": run.record.seed,
                "label": label.arm,
                "line": place.line,
                "treated": place.treated,
                "color": 1 + lines.index(place.line) if place.treated else 0,
                **{key: float(arm.get(f"mtn.{key}", "nan")) for key in _MTN_NUMBERS},
                **{key: text_or_none(arm, f"mtn.{key}") for key in _MTN_TEXTS},
                "best_epoch": run.record.best_epoch,
                **{f"seconds_{key}": value for key, value in run.record.seconds.items()},
                **{
                    f"{key}_samples_per_second": value
                    for key, value in run.record.samples_per_second.items()
                },
                "peak_memory_bytes": run.record.peak_memory_bytes,
                **{f"{key}_parameters": run.record.parameters.get(key) for key in _PARAMETERS},
            }
            for run, label, place in zip(self, labels, places, strict=True)
        ]
        swept = pd.DataFrame(self.swept, index=range(len(self)))
        return _typed(pd.concat([pd.DataFrame(rows), swept], axis=1))

    def _label_and_place(self) -> tuple[list[Labels], list[Place]]:
        """Return labels and places of the runs; fresh runs of tuned arms are compared by arm."""
        tuned = self.tuned
        own = [number for number, run in enumerate(self) if run.folder in tuned.fresh]
        others = [number for number in range(len(self)) if number not in {*own}]
        of_tuned, of_others = ([self[n].record for n in part] for part in (own, others))
        arms = [tuned.fresh[self[number].folder] for number in own]
        found: dict[int, tuple[Labels, Place]] = {}
        if own:
            labels = label_tuned(of_tuned, arms, tuned.sets)
            places = place_tuned(arms, self._baseline)
            found |= dict(zip(own, zip(labels, places, strict=True), strict=True))
        if others:
            baseline = self._baseline if not own or baseline_arm(self._baseline) is None else None
            labels = label_runs(of_others)
            places = place_arms(of_others, labels, baseline)
            found |= dict(zip(others, zip(labels, places, strict=True), strict=True))
        pairs = [found[number] for number in range(len(self))]
        return [label for label, _ in pairs], [place for _, place in pairs]

    @cached_property
    def swept(self) -> dict[str, list[Any]]:
        """Value of each run, by the dotted key of a setting that differs; None if it is not set.

        Settings that have a column of their own name, and label noise, are left out.
        """
        arms = [run.record.identity.arm_settings for run in self]
        found: dict[str, set[str]] = {}
        for arm in arms:
            for key, value in arm.items():
                found.setdefault(key, set()).add(as_text(value))
        keys = sorted(
            key
            for key, texts in found.items()
            if len(texts) > 1
            and key not in _OWN_COLUMNS
            and not key.startswith(f"noise.{LABEL_NOISE}.")
        )
        return {key: _column([arm.get(key) for arm in arms]) for key in keys}

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the order of the labels; CTR, CVR and CTCVR first, others by name."""
        known = [name for run in self for name in _task_order(run.record)]
        found = {place.partition("/")[2] for run in self for place in run.record.counts}
        order = list(dict.fromkeys([*TASKS, *known, *sorted(found)]))
        return [task for task in order if task in found]

    @cached_property
    def results(self) -> pd.DataFrame:
        """One row per run, split, task and metric; an undefined ``value`` is NaN.

        ``better`` is the better direction, ``higher``, ``lower`` or ``one``; ``rows`` and
        ``positives`` count what the metric is computed on, and are missing for the mean of the
        tasks, ``mean_auc``, whose ``task`` is ``all``. Timings are left out, so that a sweep that
        was interrupted and resumed gives the same table.
        """
        columns = [*_ARM, *_MTN_NUMBERS, *_MTN_TEXTS, *self.swept, "best_epoch"]
        return self._spread(columns, [list(_metrics(run.record, self.tasks)) for run in self])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """One row per run: seconds, samples per second, peak memory and numbers of parameters.

        The numbers are ``network_parameters`` and ``embeddings_parameters``; runs recorded before
        they were counted have none.
        """
        costs = [name for name in self.settings.columns if name.startswith("seconds_")]
        costs += [name for name in self.settings.columns if name.endswith("_samples_per_second")]
        costs += ["peak_memory_bytes", *(f"{key}_parameters" for key in _PARAMETERS)]
        return self.settings[[*_ARM, *costs]]

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """One row per run, epoch and logged value: ``name``, ``value``."""
        ranks = {f"val/{task}_": rank for rank, task in enumerate(self.tasks)}

        def by_task(item: tuple[str, Any]) -> tuple[int, str]:
            return ranks.get(item[0][: item[0].rfind("_") + 1], -1), item[0]

        details = [
            [
                {"epoch": entry["epoch"], "step": entry["step"], "name": name, "value": value}
                for entry in run.record.history
                for name, value in sorted(entry.items(), key=by_task)
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
            for place in (f"test/{task}" for task in self.tasks)
            if (curve := run.record.calibration_curves.get(place)) is not None
            for values in zip(*(curve[name] for name in names), strict=True)
        ]
        return pd.DataFrame(rows, columns=["run", "task", *names])

    @cached_property
    def searched(self) -> pd.DataFrame:
        """One row per trial of a tuned sweep and searched key: ``key``, ``setting``.

        ``arm`` and ``place`` (a hash) name the search, ``trial`` counts from 0, ``run`` is the
        folder below that of its sweep; ``value`` is the monitor, NaN if the trial failed.
        """
        rows = [
            {
                **{"arm": arm.arm, "place": arm.place, "trial": number, "run": trial.folder},
                **{"monitor": arm.monitor, "value": trial.value, "is_best": trial == arm.best},
                **{"key": key, "setting": as_text(setting)},
            }
            for _, arm in self.tuned.arms
            for number, trial in enumerate(arm.trials)
            for key, setting in trial.setting.items()
        ]
        columns = ["arm", "place", "trial", "run", "monitor", "value", "is_best", "key", "setting"]
        return pd.DataFrame(rows, columns=columns).astype({"value": "float64"})

    def write(self, out: Path) -> None:
        """Write ``results``, ``costs`` and ``epochs`` as csv and Parquet, with every digit.

        Of tuned sweeps also ``searched``.

        Each file is written atomically.
        """
        out.mkdir(parents=True, exist_ok=True)
        tables = {"results": self.results, "costs": self.costs, "epochs": self.epochs}
        if self.tuned.arms:
            tables["searched"] = self.searched
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


def read_runs(root: str | Path, baseline: str | None = None) -> Runs:
    """Read every finished run below a folder, sorted by name.

    Runs that differ only in their folder count once, as the one that kept its scores, if one did.
    Runs without a test are ``trials``; runs of a tuned arm's earlier setting are left out with a
    warning. A record that cannot be read or is not one is left out with a warning, and listed in
    ``unreadable``.

    Args:
        root: Folder of the runs, at any depth.
        baseline: Setting of the baseline, as in :func:`~mtnrec.reporting.baseline.place_arms`.

    Raises:
        InputError: If ``root`` is not a folder or has no readable record of a tested run, or if two
            runs with the same settings and seed have different metrics.
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
        key = run.record.identity.arm, run.record.seed
        other = runs.setdefault(key, run)
        if other.record.metrics != run.record.metrics:
            raise InputError(
                f"{other.name} and {run.name} in {root} have the same settings and seed "
                f"{run.record.seed}, but different metrics. Delete one of them."
            )
        runs[key] = max(other, run, key=lambda found: len(found.record.scores))
    if unreadable and not runs:
        raise InputError(unreadable[0].reason)
    for left_out in unreadable:
        _logger.warning("left out: %s", left_out.reason)
    if not runs:
        raise InputError(
            f"{root} has no finished run (result.json) below it. Train some with `python -m "
            f"mtnrec.train -m mtn.enabled=false,true 'seed=range(0,10)' hydra.sweep.dir={root}`."
        )
    tuned = read_tuned(root)
    tested, trials = _split_trials(root, [*runs.values()], tuned.superseded)
    return Runs(tested, unreadable, baseline, trials, tuned)


def _split_trials(
    root: Path, runs: Sequence[Run], superseded: Collection[Path]
) -> tuple[list[Run], list[Run]]:
    """Return the tested runs, without those whose setting was replaced, and the untested ones."""
    trials = [run for run in runs if not run.record.is_tested]
    tested = [run for run in runs if run.record.is_tested]
    if not tested:
        raise InputError(
            f"{root} has only runs without a test, {len(trials)} of them. Let the tuned sweep end, "
            "or train with test=true."
        )
    current = [run for run in tested if run.folder not in superseded]
    if len(current) < len(tested):
        _logger.warning(
            "%d runs of settings that a later search replaced are left out",
            len(tested) - len(current),
        )
    return current, trials


def _read(path: Path) -> RunRecord:
    record = RunRecord.read(path)
    keys = _metric_keys(record)
    for place in {f"{key.split}/{key.task}" for key in keys if key.metric != MEAN_AUC}:
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
        is_drawn = run.record.identity.draws_data or "noise.seed" in run.record.keys_of_seed
        place = (run.record.identity.baseline, run.record.seed if is_drawn else None)
        other = first.setdefault(place, run)
        if other.record.noise["checksum"] != run.record.noise["checksum"]:
            raise InputError(
                f"{other.name} and {run.name} have the same noise settings, but saw different "
                "noise, since different versions of mtnrec made them. Run one of them again."
            )


def _metrics(record: RunRecord, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    found = _metric_keys(record)
    order = [*tasks, ALL_TASKS]
    for key in sorted(found, key=lambda key: (key.split, order.index(key.task))):
        counts = record.counts.get(f"{key.split}/{key.task}", {})
        better = metric_info(key.metric, record.added_metrics.get(key.metric, "higher")).better
        yield {**key._asdict(), "better": better, "value": record.metrics[str(key)], **counts}


def _metric_keys(record: RunRecord) -> list[MetricKey]:
    tasks = {place.partition("/")[2] for place in record.counts}
    keys = (parse_metric_key(name, tasks) for name in sorted(record.metrics))
    return [key for key in keys if key is not None]


def _task_order(record: RunRecord) -> Sequence[str]:
    """Return the tasks of a run in order, or its labels where the record has no tasks."""
    if isinstance(tasks := record.data.get("tasks"), list):
        return [task for task in tasks if isinstance(task, str)]
    for settings in (record.data["parameters"], record.config["data"]):
        if isinstance(labels := settings.get("labels"), list):
            return [label for label in labels if isinstance(label, str)]
    return []


def _column(values: Sequence[Any]) -> list[Any]:
    """Return numbers as they are, and other values as text."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return [math.nan if value is None else float(value) for value in values]
    return [None if value is None else as_text(value) for value in values]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    types: dict[str, Any] = {name: "string" for name in _TEXTS if name in table}
    counts = (f"{key}_parameters" for key in _PARAMETERS)
    types |= {name: "Int64" for name in (*counts, "rows", "positives") if name in table}
    if "value" in table:
        types["value"] = "float64"
    return table.astype(types)
