"""Finished runs as tables: one row a run, a metric or an epoch.

An *arm* is all the runs that differ in nothing but their seed and what follows from it (the record
names those keys). The *baseline* of an arm is the arm with the same settings and no MTN; MTN arms
and their baseline share its hash. The columns ``data``, ``model``, ``variant`` and ``noise``
together tell every two arms apart.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from mtnrec.cell import FAILURE_FILE, RECORD_FILE, RUNNING_FILE, flatten, settings_of
from mtnrec.checks import InputError
from mtnrec.files import read_json

_MODEL_NAMES = {"SharedBottom": "Shared-bottom"}  # the paper's, where they are not the class's
_MTN_NUMBERS = ("lam", "refresh_every")
_MTN_TEXTS = (
    "target",
    "layers",
    "subsets",
    "alpha",
    "alpha_sharing",
    "layer_weighting",
    "coupling",
)
_KEYS = (
    *("cell", "seed", "config.data", "config.noise.proportion", "config.model._target_"),
    *("config.mtn.enabled", "data.name", "data.checksum", "data.parameters", "noise.checksum"),
    *("best_epoch", "metrics", "counts", "history", "calibration_curves", "expert_distances"),
    *("seconds", "samples_per_second", "peak_memory_bytes"),
)
_ARM = ("run", "arm", "baseline", "data", "checksum", "model", "variant", "mtn", "noise", "seed")
_TEXTS = (
    *("run", "cell", "arm", "baseline", "data", "checksum", "model", "variant", *_MTN_TEXTS),
    *("split", "task", "metric", "name"),
)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Where it lies.
        name: The folder, relative to the root that was read.
        record: Content of its ``result.json``.
    """

    folder: Path
    name: str
    record: dict[str, Any]


@dataclass(frozen=True)
class UnfinishedRun:
    """A folder whose run failed, or has not ended yet.

    Args:
        name: The folder, relative to the root that was read.
        reason: First line of the error; of a run without one, that it has not ended.
    """

    name: str
    reason: str


def read_runs(root: Path) -> list[Run]:
    """Read every finished run below a folder, sorted by name.

    Runs that differ in nothing but the folder count once.

    Raises:
        InputError: If there is no folder or no finished run, if a record cannot be read or lacks a
            key, or if two runs of the same settings and seed came to unlike metrics.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}: give the one that holds the runs")
    runs: dict[tuple[str, int], Run] = {}
    for path in sorted(root.rglob(RECORD_FILE), key=lambda path: _name(path, root)):
        run = Run(path.parent, _name(path, root), _read_record(path))
        other = runs.setdefault((_hash(_settings(run.record)), run.record["seed"]), run)
        if other.record["metrics"] != run.record["metrics"]:
            raise InputError(
                f"{other.name} and {run.name} in {root} have the same settings and seed "
                f"{run.record['seed']}, but unlike metrics: remove one of them"
            )
    if not runs:
        raise InputError(
            f"there is no finished run (result.json) below {root}: make some with `python -m "
            f"mtnrec.train -m mtn.enabled=false,true 'seed=range(0,10)' hydra.sweep.dir={root}`"
        )
    return list(runs.values())


def unfinished(root: Path) -> list[UnfinishedRun]:
    """Return the folders below ``root`` whose run was started and did not finish, by name."""
    started = {path.parent for name in (FAILURE_FILE, RUNNING_FILE) for path in root.rglob(name)}
    return [
        UnfinishedRun(_name(folder / RECORD_FILE, root), _reason(folder))
        for folder in sorted(started)
        if not (folder / RECORD_FILE).exists()
    ]


def settings_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row a run: its arm, what tells the arms apart, how it was made and what it cost.

    ``data``, ``model`` and ``variant`` are labels: a name and, where runs of one name are unlike,
    the settings that differ, as in ``MMoE (optimizer.lr=0.01)`` or ``+MTN (target=shared)``.
    ``variant`` is empty without MTN; so are then the settings of MTN.

    Raises:
        InputError: If runs of the same data and noise settings saw unlike noise.
    """
    arms = [_settings(run.record) for run in runs]
    baselines = [_hash(_without_mtn(arm)) for arm in arms]
    _check_masks(runs, baselines)
    data = _data_labels(runs)
    models = _model_labels(runs, arms)
    variants = _variant_labels(models, arms, baselines)
    rows = [
        {
            "run": run.name,
            "cell": run.record["cell"],
            "arm": _hash(arm),
            "baseline": baseline,
            "data": data_label,
            "checksum": run.record["data"]["checksum"],
            "model": model,
            "variant": variant,
            "mtn": arm["mtn.enabled"],
            "noise": float(arm["noise.proportion"]),
            "seed": run.record["seed"],
            **{key: float(arm.get(f"mtn.{key}", "nan")) for key in _MTN_NUMBERS},
            **{key: _text_or_none(arm, f"mtn.{key}") for key in _MTN_TEXTS},
            "best_epoch": run.record["best_epoch"],
            **{f"seconds_{key}": value for key, value in run.record["seconds"].items()},
            **{
                f"{key}_samples_per_second": value
                for key, value in run.record["samples_per_second"].items()
            },
            "peak_memory_bytes": run.record["peak_memory_bytes"],
        }
        for run, arm, baseline, data_label, model, variant in zip(
            runs, arms, baselines, data, models, variants, strict=True
        )
    ]
    return _typed(pd.DataFrame(rows))


def results_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row for each run, split, task and metric; an undefined ``value`` is NaN.

    ``rows`` and ``positives`` are those that the metric is of. There are no timings in it: a sweep
    that was interrupted and resumed gives the same table.
    """
    columns = [*_ARM, *_MTN_NUMBERS, *_MTN_TEXTS, "best_epoch"]
    return _spread(settings_table(runs)[columns], [list(_metrics(run.record)) for run in runs])


def costs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row a run: seconds, samples a second and peak memory."""
    settings = settings_table(runs)
    costs = [name for name in settings.columns if name.startswith("seconds_")]
    costs += [name for name in settings.columns if name.endswith("_samples_per_second")]
    costs.append("peak_memory_bytes")
    return settings[[*_ARM, *costs]]


def epochs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row for each run, epoch and value that was logged: ``name``, ``value``."""
    return _spread(
        settings_table(runs)[list(_ARM)],
        [
            [
                {"epoch": entry["epoch"], "step": entry["step"], "name": name, "value": value}
                for entry in run.record["history"]
                for name, value in sorted(entry.items())
                if name not in ("epoch", "step")
            ]
            for run in runs
        ],
    )


def write_results(out: Path, runs: Sequence[Run]) -> None:
    """Write ``results``, ``costs`` and ``epochs`` as csv and Parquet, with every digit.

    Each file is written whole or not at all.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = {
        "results": results_table(runs),
        "costs": costs_table(runs),
        "epochs": epochs_table(runs),
    }
    with TemporaryDirectory(dir=out, prefix=".") as temporary:
        for name, table in tables.items():
            table.to_csv(Path(temporary, f"{name}.csv"), index=False)
            table.to_parquet(Path(temporary, f"{name}.parquet"), index=False)
        for path in sorted(Path(temporary).iterdir()):
            path.replace(out / path.name)


def _name(path: Path, root: Path) -> str:
    return path.parent.relative_to(root).as_posix()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text or of its encoding
        raise InputError(
            f"{path} is not valid JSON ({error}): remove it and run the cell again"
        ) from None
    for key in _KEYS:
        if not _has(record, key.split(".")):
            raise _lacks(path, key)
    for entry in record["history"]:
        for key in ("epoch", "step"):
            if key not in entry:
                raise _lacks(path, f"history.{key}")
    return record


def _has(record: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(record, Mapping) or key not in record:
            return False
        record = record[key]
    return True


def _lacks(path: Path, key: str) -> InputError:
    return InputError(
        f"{path} lacks the key {key}: it was not written by this version of mtnrec; run it again"
    )


def _reason(folder: Path) -> str:
    try:
        failure = read_json(folder / FAILURE_FILE)
        if failure is None:
            return "has not ended"
        return f"{failure['error']}: {failure['message']}".splitlines()[0]
    except (ValueError, KeyError, TypeError):
        return f"failed; its {FAILURE_FILE} cannot be read"


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines the result but the seed, by dotted key."""
    settings = flatten(settings_of(record["config"]))
    of_seed = _keys_of_seed(record)
    flat = {key: _plain(value) for key, value in settings if key not in of_seed}
    return flat | {"checksum": record["data"]["checksum"]}


def _keys_of_seed(record: Mapping[str, Any]) -> Sequence[str]:
    return record.get("keys_of_seed", ("seed", "data.seed"))  # older records do not name them


def _plain(value: Any) -> Any:
    """Write whole numbers as integers: the command line gives 0 where a file gives 0.0."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_mtn(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if not key.startswith("mtn.")}


def _hash(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_masks(runs: Sequence[Run], baselines: Sequence[str]) -> None:
    first: dict[tuple[str, int | None], Run] = {}
    for run, baseline in zip(runs, baselines, strict=True):
        is_drawn = "noise.seed" in _keys_of_seed(run.record)
        other = first.setdefault((baseline, run.record["seed"] if is_drawn else None), run)
        if other.record["noise"]["checksum"] != run.record["noise"]["checksum"]:
            raise InputError(
                f"{other.name} and {run.name} have the same noise settings, but saw unlike noise: "
                "they were made by unlike versions of mtnrec; run one of them again"
            )


def _data_labels(runs: Sequence[Run]) -> list[str]:
    records = [run.record["data"] for run in runs]
    names = [record["name"] for record in records]
    parameters = [dict(flatten(record["parameters"])) for record in records]
    labels = _labels(names, names, parameters)
    checksums = [{"checksum": record["checksum"][:8]} for record in records]
    told = {(label, part["checksum"]) for label, part in zip(labels, checksums, strict=True)}
    if len(told) == len(set(labels)):
        return labels
    return _labels(names, names, checksums)


def _model_labels(runs: Sequence[Run], arms: Sequence[Mapping[str, Any]]) -> list[str]:
    classes = [arm["model._target_"].rpartition(".")[2] for arm in arms]
    names = [_MODEL_NAMES.get(name, name) for name in classes]
    # Settings that go with the data set or the proportion of noise have columns of their own.
    groups = [
        (name, arm["checksum"], arm["noise.proportion"])
        for name, arm in zip(names, arms, strict=True)
    ]
    settings = [
        {key.removeprefix("model."): value for key, value in _without_mtn(arm).items()}
        for arm in arms
    ]
    return _labels(names, groups, settings)


def _variant_labels(
    models: Sequence[str], arms: Sequence[Mapping[str, Any]], baselines: Sequence[str]
) -> list[str]:
    settings = [
        {
            key.removeprefix("mtn."): value
            for key, value in arm.items()
            if key.startswith("mtn.") and key != "mtn.enabled"
        }
        for arm in arms
    ]
    # The baseline has no settings of MTN, so it would make every one of them tell.
    groups = [(baseline, arm["mtn.enabled"]) for baseline, arm in zip(baselines, arms, strict=True)]
    labels = _labels(models, groups, settings)
    return [
        f"+MTN{label.removeprefix(model)}" if arm["mtn.enabled"] else ""
        for model, label, arm in zip(models, labels, arms, strict=True)
    ]


def _labels(
    names: Sequence[str], groups: Sequence[Any], settings: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return each name, with the settings that differ within any group of that name."""
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault((names[index], group), []).append(index)
    telling: dict[str, set[str]] = {name: set() for name in names}
    for (name, _), indices in members.items():
        telling[name] |= _differing([settings[index] for index in indices])
    return [
        _label(name, {key: setting[key] for key in sorted(telling[name] & setting.keys())})
        for name, setting in zip(names, settings, strict=True)
    ]


def _differing(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    keys = {key for setting in settings for key in setting}
    return {key for key in keys if len({_text_or_none(setting, key) for setting in settings}) > 1}


def _label(name: str, settings: Mapping[str, Any]) -> str:
    parts = [f"{key}={as_text(value)}" for key, value in settings.items()]
    return f"{name} ({', '.join(parts)})" if parts else name


def as_text(value: Any) -> str:
    """Write a setting as the command line does."""
    return value if isinstance(value, str) else json.dumps(value)


def _text_or_none(settings: Mapping[str, Any], key: str) -> str | None:
    return as_text(settings[key]) if key in settings else None


def _metrics(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    counts = record["counts"]
    for name, value in sorted(record["metrics"].items()):
        # Names of tasks and of metrics may contain underscores.
        place = max((key for key in counts if name.startswith(f"{key}_")), key=len)
        split, task = place.split("/", 1)
        metric = name.removeprefix(f"{place}_")
        yield {"split": split, "task": task, "metric": metric, "value": value, **counts[place]}


def _spread(settings: pd.DataFrame, details: Sequence[list[dict[str, Any]]]) -> pd.DataFrame:
    """Repeat the settings of each run before each of its details."""
    repeated = settings.loc[settings.index.repeat([len(rows) for rows in details])]
    below = pd.DataFrame([row for rows in details for row in rows])
    return _typed(pd.concat([repeated.reset_index(drop=True), below], axis=1))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    types: dict[str, Any] = {name: "string" for name in _TEXTS if name in table}
    if "value" in table:
        types["value"] = "float64"
    return table.astype(types)
