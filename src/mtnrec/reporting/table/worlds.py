"""Maps of planted worlds: MTN with its best lambda, less weight decay with its best strength.

A *world* is a synthetic log with hidden layers; its point on a map is the relatedness of its tasks
and the noise. Strengths are chosen by the monitor on the validation rows, so that the test rows
choose nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtnrec.metric.catalogue import metric_info, parse_metric_key
from mtnrec.reporting.labels import label_runs
from mtnrec.reporting.runs import Run, Runs
from mtnrec.reporting.significance import compare, stars
from mtnrec.reporting.table.published import task_title
from mtnrec.reporting.table.render import Cell, Group, Row, Table
from mtnrec.reporting.table.scores import in_order
from mtnrec.system.files import write_atomic

MTN, DECAY, BASELINE = "MTN", "weight decay", "baseline"
RIVALS = (DECAY, BASELINE)  # what MTN is compared with
_DECAY_KEY = "optimizer.weight_decay"
# Settings that differ within a map, or stand for those.
_OF_POINT = ("checksum", "data.relatedness", _DECAY_KEY)
_OF_POINT_GROUPS = ("mtn.", "noise.")
_LEVEL = 0.05
_EMPTY = "—"


def map_worlds(runs: Runs) -> pd.DataFrame:
    """Return one row per map, point, task and rival; none without planted worlds.

    Of the arms with MTN, and of those with weight decay, the one with the best mean of the monitor
    over the seeds is taken, at each point for itself. Seeds that an arm of the point lacks are left
    out.

    Args:
        runs: Finished runs.

    Returns:
        ``map`` (model and what else distinguishes maps), ``relatedness``, ``noise``, ``task``,
        ``rival``, ``difference`` (test AUC of MTN minus that of the rival), its interval ``low``
        and ``high``, ``p_value``, ``seeds``, the mean AUCs ``mtn`` and ``of_rival``, ``bayes``
        (NaN if unknown), and the chosen ``lam`` and ``strength`` (of the rival).
    """
    worlds = [run for run in runs if run.record.data["parameters"].get("hidden_units")]
    kinds = {run.name: kind for run in worlds if (kind := _kind(run)) is not None}
    names = _map_names([run for run in worlds if kinds.get(run.name) == BASELINE])
    points: dict[tuple[str, float, float], list[Run]] = {}
    for run in worlds:
        if run.name in kinds and (name := names.get(_map_of(run))) is not None:
            relatedness = float(run.record.data["parameters"]["relatedness"])
            noise = float(run.record.config["noise"]["proportion"])
            points.setdefault((name, relatedness, noise), []).append(run)
    rows = [
        {"map": name, "relatedness": relatedness, "noise": noise, **row}
        for (name, relatedness, noise), members in sorted(points.items(), key=lambda item: item[0])
        for row in _compare_at(members, kinds, runs.tasks)
    ]
    return pd.DataFrame(rows)


def world_tables(worlds: pd.DataFrame) -> Iterator[Table]:
    """Yield a table per map and rival: a row per task and relatedness, a column per noise.

    Args:
        worlds: Output of :func:`map_worlds`.
    """
    for name in worlds["map"].unique() if len(worlds) else ():
        for rival in RIVALS:
            part = worlds[(worlds["map"] == name) & (worlds["rival"] == rival)]
            if len(part):
                yield _table(part, f"Planted worlds, {name}: MTN minus {rival}")


def write_worlds(out: Path, worlds: pd.DataFrame) -> None:
    """Write the maps as ``planted_worlds.csv``, with every digit; without any, remove the file."""
    path = out / "planted_worlds.csv"
    path.unlink(missing_ok=True)
    if len(worlds):
        write_atomic(path, worlds.to_csv(index=False))


def _kind(run: Run) -> str | None:
    """Return which of the compared arms a run belongs to; None for none of them."""
    treatments = run.record.identity.treatments
    has_decay = bool(run.record.identity.arm_settings.get(_DECAY_KEY))
    if treatments:
        return MTN if treatments == ["mtn"] and not has_decay else None
    return DECAY if has_decay else BASELINE


def _map_of(run: Run) -> tuple[tuple[str, str], ...]:
    """Return the settings that all runs of a map share."""
    settings = run.record.identity.arm_settings
    return tuple(
        (key, str(value))
        for key, value in sorted(settings.items())
        if key not in _OF_POINT
        and (not key.startswith(_OF_POINT_GROUPS) or key.startswith("noise.label_flip"))
    )


def _map_names(baselines: list[Run]) -> dict[tuple[tuple[str, str], ...], str]:
    """Return the name of each map: its model, and its data set if there are several."""
    labels = label_runs([run.record for run in baselines])
    data = pd.Series([label.data for label in labels], dtype="string")
    data = data.str.replace(r",? ?\brelatedness=[^,)]+", "", regex=True)
    data = data.str.replace("(, ", "(", regex=False).str.replace(" ()", "", regex=False)
    several = data.nunique() > 1
    return {
        _map_of(run): f"{label.model} on {name}" if several else label.model
        for run, label, name in zip(baselines, labels, data, strict=True)
    }


def _compare_at(
    members: list[Run], kinds: Mapping[str, str], tasks: list[str]
) -> Iterator[dict[str, Any]]:
    """Compare MTN with each rival at one point."""
    arms: dict[str, dict[str, dict[int, Run]]] = {}
    for run in members:
        of_kind = arms.setdefault(kinds[run.name], {})
        of_kind.setdefault(run.record.identity.arm, {})[run.record.seed] = run
    by_seed = [of_seeds for of_kind in arms.values() for of_seeds in of_kind.values()]
    seeds = sorted(set.intersection(*(set(of_seeds) for of_seeds in by_seed)))
    if MTN not in arms or not seeds:
        return
    best = {
        kind: min(
            ([of_seeds[seed] for seed in seeds] for of_seeds in of_kind.values()), key=_monitor_cost
        )
        for kind, of_kind in arms.items()
    }
    for task in in_order(tasks):
        values = {kind: _test(best[kind], f"{task}_auc") for kind in best}
        for rival in (rival for rival in RIVALS if rival in best):
            found = compare(values[rival], values[MTN])
            yield {
                "task": task,
                "rival": rival,
                "difference": found.difference,
                "low": np.nan if found.low is None else found.low,
                "high": np.nan if found.high is None else found.high,
                "p_value": np.nan if found.p_value is None else found.p_value,
                "seeds": found.pairs,
                "mtn": found.treated_mean,
                "of_rival": found.baseline_mean,
                "bayes": float(np.mean(_test(best[MTN], f"{task}_bayes_auc"))),
                "lam": float(best[MTN][0].record.identity.arm_settings["mtn.lam"]),
                "strength": float(best[rival][0].record.identity.arm_settings.get(_DECAY_KEY, 0)),
            }


def _test(runs: list[Run], metric: str) -> list[float]:
    values = (run.record.metrics.get(f"test/{metric}") for run in runs)
    return [np.nan if value is None else value for value in values]


def _monitor_cost(runs: list[Run]) -> float:
    """Return the mean of the monitor on the validation rows, smaller for better."""
    record = runs[0].record
    monitor = str(record.config["monitor"])
    key = parse_metric_key(monitor, {place.partition("/")[2] for place in record.counts})
    metric = "auc" if key is None else key.metric
    info = metric_info(metric, record.added_metrics.get(metric, "higher"))
    values = [run.record.metrics.get(monitor) for run in runs]
    mean = np.mean([np.nan if value is None else value for value in values])
    return float(np.nan_to_num(info.cost(mean), nan=np.inf))


def _table(part: pd.DataFrame, title: str) -> Table:
    noises = sorted(part["noise"].unique())
    places = ["task", "relatedness", "noise"]
    by_place = {tuple(row[key] for key in places): row for row in part.to_dict("records")}
    rows = [
        Row(
            f"{task_title(task)}, relatedness {relatedness:g}",
            tuple(_cell(by_place.get((task, relatedness, noise))) for noise in noises),
            starts=relatedness == part["relatedness"].min(),
        )
        for task in in_order(part["task"])
        for relatedness in sorted(part["relatedness"].unique())
    ]
    fewest, most = part["seeds"].min(), part["seeds"].max()
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return Table(
        title=title,
        stub="Task",
        groups=(Group("noise", tuple(f"{noise:g}" for noise in noises)),),
        rows=tuple(rows),
        notes=(
            f"Difference of test AUC, the mean over {seeds} seeds paired by seed, with its 95 % "
            "t-interval; * p < 0.05, ** p < 0.01, two-sided paired t-test, without a correction "
            "for the number of cells. Bold: better with p < 0.05.",
            "The strengths of MTN and of weight decay are those with the best mean of the monitor "
            "on the validation rows over the seeds, at each point; planted_worlds.csv has them.",
        ),
    )


def _cell(row: Mapping[Any, Any] | None) -> Cell:
    if row is None or np.isnan(row["difference"]):
        return Cell(_EMPTY)
    known = not np.isnan(row["p_value"])
    return Cell(
        f"{row['difference']:+.4f}",
        bold=known and row["difference"] > 0 and row["p_value"] < _LEVEL,
        stars=stars(row["p_value"] if known else None),
        note=f"[{row['low']:+.4f}, {row['high']:+.4f}]" if known else "",
    )
