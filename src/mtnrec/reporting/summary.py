"""First screen of the page: the verdict, all differences at a glance, costs, what was run."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from mtnrec.reporting.baseline import natural_order
from mtnrec.reporting.machines import describe_machines, threads
from mtnrec.reporting.runs import Runs
from mtnrec.reporting.table.appendix import mean_costs
from mtnrec.reporting.table.published import task_title
from mtnrec.reporting.table.scores import name_values

_LEVEL = 0.05
_GIB = 2**30
_MOST_NAMES = 3  # of data sets or arms in a sentence
_VERDICTS = ("different", "equivalent", "undecided")


@dataclass(frozen=True)
class Difference:
    """A difference from the baseline, on the axis of a forest plot.

    Args:
        arm: Name of the arm.
        place: Data set and noise, where there are several.
        rows: Rows that share arm and place, from this one on; 0 if the row above has the same.
        task: Name of the task.
        color: Number of the arm's colour.
        at: Position of the mean, in percent of the axis.
        low: Position of the interval's lower end; None without an interval.
        high: Position of its upper end.
        text: Difference and interval.
        title: Text under the pointer.
        is_significant: Whether Holm's corrected p-value is below 0.05.
    """

    arm: str
    place: str
    rows: int
    task: str
    color: int
    at: float
    low: float | None
    high: float | None
    text: str
    title: str
    is_significant: bool


@dataclass(frozen=True)
class Forest:
    """A forest plot: differences on one axis.

    Args:
        name: Name of the values.
        differences: Rows, in the tables' order.
        ticks: Text and position, in percent, of the axis's ticks.
        zero: Position of 0.
        margin: Margin of equivalence.
        band: Positions of minus and plus the margin; None if nothing was tested.
    """

    name: str
    differences: list[Difference]
    ticks: list[tuple[str, float]]
    zero: float
    margin: float
    band: tuple[float, float] | None


def summarise(compared: pd.DataFrame) -> Iterator[str]:
    """Yield the verdict in a sentence, and how sure it is.

    Args:
        compared: Output of :func:`mtnrec.reporting.table.scores.comparisons` for all runs.
    """
    tested = compared[compared["pairs"] > 0]
    if tested.empty:
        yield "No run has a baseline run with the same seed to be compared with."
        return
    metric = _metric(compared)
    seeds = _range(tested["pairs"])
    significant = tested[tested["holm_p"] < _LEVEL]
    largest = _largest(tested if significant.empty else significant, compared)
    count, equal = len(tested), int((tested["verdict"] == "equivalent").sum())
    within = f"equivalent within {tested['margin'].iloc[0]:g}"
    if tested["p_value"].notna().sum() == 0:
        yield f"With {seeds} no difference in {metric} {_from(compared)} can be tested; {largest}"
    elif significant.empty and equal == count:
        arms = "the two arms are" if count == 1 else f"the arms of all {count} comparisons are"
        yield f"With {seeds} {arms} {within} in {metric} {_from(compared)}; {largest}"
    elif significant.empty:
        clause = f", and {equal} of {count} {'is' if equal == 1 else 'are'} {within}" * bool(equal)
        yield (
            f"With {seeds} no difference in {metric} {_from(compared)} is significant{clause}; "
            f"{largest}"
        )
    else:
        better = int(significant["improved"].sum())
        yield (
            f"With {seeds} {len(significant)} of {count} differences in {metric} "
            f"{_from(compared)} {'is' if len(significant) == 1 else 'are'} significant, {better} "
            f"better and {len(significant) - better} worse"
            f"{f', and {equal} of {count} {within}' * bool(equal)}; {largest}"
        )
    needed = tested["seeds_needed"].dropna()
    tests = int(tested["p_value"].notna().sum())
    if tests:
        yield (
            f"Paired t-tests at 5 %, corrected by Holm for {tests} comparison{'s' * (tests > 1)}. "
            f"To detect a difference of 0.001 takes {_seeds(needed)} seeds."
        )
    if tested["both_p"].notna().any():
        yield _over_both(tested)


def _over_both(tested: pd.DataFrame) -> str:
    """Return how many verdicts hold for new trainings on new users."""
    rows = tested[tested["both_p"].notna()]
    counts = {word: int((rows["both_verdict"] == word).sum()) for word in _VERDICTS}
    words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    total = f"{len(rows)} comparison{'s' * (len(rows) > 1)}"
    return f"For new trainings on new users (seeds and test rows together), of {total}: {words}."


def lay_out_forest(compared: pd.DataFrame) -> Forest:
    """Lay out all differences on one axis.

    Args:
        compared: Output of :func:`mtnrec.reporting.table.scores.comparisons` for all runs.
    """
    tested = compared[compared["pairs"] > 0]
    ends = pd.concat([tested["low"], tested["high"], tested["difference"], pd.Series([0.0])])
    low, high = float(ends.min()), float(ends.max())
    margin = 0.04 * (high - low) or 1e-6
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    rows = []
    cells = tested.to_dict("records")
    for name, same in groupby(cells, lambda cell: (str(cell["label"]), _place(cell, compared))):
        first, *others = same
        rows.append(_place_difference(name, first, at, 1 + len(others)))
        rows += [_place_difference(name, cell, at, 0) for cell in others]
    values = [float(v) for v in MaxNLocator(4).tick_values(low, high) if low < v < high]
    ticks = [(f"{value:+g}" if value else "0", at(value)) for value in values]
    margin = float(compared["margin"].iloc[0])
    band = max(0.0, at(-margin)), min(100.0, at(margin))
    is_tested = tested["equivalence_p"].notna().any()
    title = f"difference in {_metric(compared)}"
    return Forest(title, rows, ticks, at(0.0), margin, band if is_tested else None)


def _place_difference(
    name: tuple[str, str], cell: Mapping[Hashable, Any], at: Callable[[float], float], rows: int
) -> Difference:
    """Return a row of the forest plot; ``name`` has the arm and the place."""
    has_interval = pd.notna(cell["low"])
    text = _difference(cell)
    p_value = f", Holm p = {cell['holm_p']:.3f}" if pd.notna(cell["holm_p"]) else ""
    found = f", {cell['verdict']}" if cell["verdict"] else ""
    title = f"{' '.join(filter(None, name))}, {task_title(cell['task'])}: {text}{p_value}{found}"
    return Difference(
        arm=name[0],
        place=name[1],
        rows=rows,
        task=task_title(cell["task"]),
        color=int(cell["color"]),
        at=at(cell["difference"]),
        low=at(cell["low"]) if has_interval else None,
        high=at(cell["high"]) if has_interval else None,
        text=text,
        title=f"{title}; {cell['pairs']:.0f} pairs",
        is_significant=bool(cell["holm_p"] < _LEVEL),
    )


def costs_of_arms(runs: Runs) -> list[dict[str, str]]:
    """Return the mean training time and memory of each arm, over data sets and noise.

    An arm follows its baseline.
    """
    costs = mean_costs(runs)
    order = list(costs["baseline"].drop_duplicates())
    costs = costs.assign(block=costs["baseline"].map(order.index))
    costs = costs.sort_values(["block", "treated"], kind="stable")
    found = []
    for (label, color), arm in costs.groupby(["label", "color"], sort=False):
        ratio = arm["speed_ratio"].mean()
        found.append(
            {
                "arm": str(label),
                "color": str(color),
                "seconds": f"{arm['seconds_fit'].mean():,.1f} s",
                "ratio": f"{ratio:.2f}" if pd.notna(ratio) else "",
                "memory": f"{arm['peak_memory_bytes'].mean() / _GIB:.2f} GiB",
            }
        )
    return found


def facts(runs: Runs) -> Mapping[str, str]:
    """Return what was run: data, rows, arms, seeds, machine, software."""
    settings = runs.settings
    rows = {run.record.data["name"]: run.record.data["rows"] for run in runs}
    seconds = sum(sum(run.record.seconds.values()) for run in runs)
    noise = sorted(settings["noise"].unique())
    found = {
        "data": "; ".join(
            f"{name}: {counts['train']:,} training, {counts['val']:,} validation, "
            f"{', '.join(f'{counts[s]:,} {s}' for s in counts if s not in ('train', 'val'))} rows"
            for name, counts in rows.items()
        ),
        "runs": f"{len(runs)} of {settings['arm'].nunique()} arms, {_hours(seconds)} in all",
        "seeds": _compact(sorted(settings["seed"].unique())),
    }
    if len(noise) > 1 or noise[0]:
        found["noise"] = ", ".join(f"{value:g}" for value in noise)
    found["monitor"] = ", ".join(sorted({str(run.record.config["monitor"]) for run in runs}))
    if machines := describe_machines(runs):
        found["machine"] = machines
    versions = [
        f"{name} {', '.join(sorted(texts))}"
        for name in ("python", "torch", "mtnrec")
        if (texts := {run.record.versions[name] for run in runs if name in run.record.versions})
    ]
    counts = sorted({threads(run.record) for run in runs} - {""}, key=natural_order)
    found["software"] = ", ".join([*versions, *counts])
    return found


def _metric(compared: pd.DataFrame) -> str:
    return name_values(compared["metric"].iloc[0], compared["split"].iloc[0])


def _from(compared: pd.DataFrame) -> str:
    """Return which arms are compared."""
    if (compared["treated"] == compared["mtn"]).all():
        return "between MTN and its baseline"
    baselines = compared.loc[~compared["treated"], "label"].unique()
    return f"from {baselines[0]}" if len(baselines) == 1 else "from the baselines"


def _largest(tested: pd.DataFrame, compared: pd.DataFrame) -> str:
    by_size = tested.sort_values("difference", key=abs, ascending=False, kind="stable")
    cell = by_size.to_dict("records")[0]
    place = _place(cell, compared)
    where = ", ".join(filter(None, [str(cell["label"]), place]))
    return f"largest: {task_title(cell['task'])} {_difference(cell)}, {where}."


def _difference(cell: Mapping[Hashable, Any]) -> str:
    text = f"{cell['difference']:+.4f}"
    return text if pd.isna(cell["low"]) else f"{text} [{cell['low']:+.4f}, {cell['high']:+.4f}]"


def _place(cell: Mapping[Hashable, Any], compared: pd.DataFrame) -> str:
    parts = [str(cell["data"])] if compared["data"].nunique() > 1 else []
    parts += [f"noise {cell['noise']:g}"] if compared["noise"].nunique() > 1 else []
    return ", ".join(parts)


def _range(pairs: pd.Series) -> str:
    fewest, most = int(pairs.min()), int(pairs.max())
    return f"{most} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"


def _seeds(needed: pd.Series) -> str:
    if needed.empty:
        return "an unknown number of"
    fewest, most = int(needed.min()), int(needed.max())
    return f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"


def _compact(seeds: list[int]) -> str:
    """Format seeds, consecutive ones as a range.

    >>> _compact([0, 1, 2, 5]), _compact([0, 1])
    ('0 to 2, 5', '0, 1')
    """
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][-1] + 1:
            spans[-1].append(int(seed))
        else:
            spans.append([int(seed)])
    texts = [
        f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans
    ]
    return ", ".join(texts)


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
