"""Tables of tuned sweeps: what each arm might choose, what it chose, and what came of it."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mtnrec.reporting.runs import Runs
from mtnrec.reporting.table.render import Cell, Group, Row, Table
from mtnrec.reporting.tuned import selection_optimism

_EMPTY = "—"


def tuned_frame(runs: Runs) -> pd.DataFrame:
    """Return one row per tuned arm and place, in the sweep's order.

    ``arm`` (name), ``model``, ``data``, ``trials`` and ``failed`` (counts), ``best`` (value of the
    best trial), ``fresh`` (values on validation), ``tested`` (on the test rows) and ``optimism``,
    :func:`~mtnrec.reporting.tuned.selection_optimism`. An arm without a fresh run has no model and
    data.
    """
    names = {run.folder: number for number, run in enumerate(runs)}
    settings = runs.settings
    rows = []
    for folder, arm in runs.tuned.arms:
        numbers = [names[folder / n] for n in arm.fresh.values() if folder / n in names]
        metric = arm.monitor.partition("/")[2]
        val, test = (_values(runs, numbers, f"{split}/{metric}") for split in ("val", "test"))
        first = settings.iloc[numbers[0]] if numbers else {"model": "", "data": ""}
        rows.append(
            {
                **{"arm": arm.title, "model": first["model"], "data": first["data"]},
                "trials": len(arm.trials),
                "failed": sum(trial.value is None for trial in arm.trials),
                "best": arm.best.value if arm.best else None,
                **{"fresh": val, "tested": test, "optimism": selection_optimism(arm, val)},
            }
        )
    return pd.DataFrame(rows)


def _values(runs: Runs, numbers: Sequence[int], key: str) -> list[float]:
    found = (runs[number].record.metrics.get(key) for number in numbers)
    return [value for value in found if value is not None]


def tuning_tables(runs: Runs) -> Iterator[Table]:
    """Yield the tables of the searches; none without a tuned sweep."""
    if not runs.tuned.arms:
        return
    frame = tuned_frame(runs)
    yield _chosen_table(runs, frame)
    yield _range_table(runs, frame)


def _chosen_table(runs: Runs, frame: pd.DataFrame) -> Table:
    rows = []
    for (_, arm), row in zip(runs.tuned.arms, frame.to_dict("records"), strict=True):
        budget = arm.budget
        trials = f"{row['trials']} of {budget.trials}"
        trials += f", {row['failed']} failed" if row["failed"] else ""
        rows.append(
            Row(
                _header(row),
                (
                    Cell(trials),
                    Cell(f"{len(arm.space)}"),
                    Cell(_number(row["best"])),
                    _mean(row["fresh"], len(arm.fresh)),
                    Cell(_number(row["optimism"], "+.4f")),
                    _mean(row["tested"], len(arm.fresh)),
                ),
            )
        )
    monitors = ", ".join(sorted({arm.monitor for _, arm in runs.tuned.arms}))
    budgets = {arm.budget for _, arm in runs.tuned.arms}
    notes = (
        f"Chosen by {monitors}, on the validation rows alone; trials are not tested. Fresh runs "
        "have seeds that no trial had; all comparisons are between them. Optimism: how "
        "much better the best trial is than the mean of its fresh runs; the more trials and the "
        "more noise, the larger.",
        "Arms differ in their number of keys; their number of trials and their sampler's seed are "
        "the same.",
    )
    warnings = (
        ("Arms have different budgets, and are compared within one budget alone.",)
        if len(budgets) > 1
        else ()
    )
    return Table(
        "Tuned arms",
        "Arm",
        (
            Group("", ("trials", "searched keys")),
            Group("validation", ("best trial", "fresh runs", "optimism")),
            Group("test", ("fresh runs",)),
        ),
        tuple(rows),
        notes,
        warnings,
    )


def _range_table(runs: Runs, frame: pd.DataFrame) -> Table:
    rows = []
    for (_, arm), row in zip(runs.tuned.arms, frame.to_dict("records"), strict=True):
        for number, (key, space) in enumerate(arm.space.items()):
            value = None if arm.best is None else _setting(arm.best.setting, key)
            share = arm.importance.get(key)
            texts = (key, space, _text(value), _EMPTY if share is None else f"{share:.2f}")
            rows.append(Row(_header(row), tuple(map(Cell, texts)), starts=number == 0))
    notes = (
        "Importance: each key's share of what sets the best tenth of an arm's trials apart "
        "(PED-ANOVA), from few trials a rough guide.",
    )
    columns = ("key", "searched", "chosen", "importance")
    return Table(
        "Search spaces and chosen values",
        "Arm",
        (Group("", columns),),
        tuple(rows),
        notes,
        is_text=True,
    )


def trial_table(runs: Runs) -> Table:
    """Return all trials: number, settings, value and folder."""
    rows = []
    for _, arm in runs.tuned.arms:
        for number, trial in enumerate(arm.trials):
            setting = ", ".join(f"{key}={_text(value)}" for key, value in trial.setting.items())
            value = "failed" if trial.value is None else f"{trial.value:.4f}"
            cells = tuple(map(Cell, (str(number), setting, value, trial.folder)))
            rows.append(Row(arm.title, cells, starts=number == 0))
    columns = ("trial", "setting", "validation", "folder")
    return Table("Trials", "Arm", (Group("", columns),), tuple(rows), is_text=True)


def _setting(setting: Mapping[str, Any], key: str) -> Any:
    return next((v for name, v in setting.items() if name.lstrip("+") == key), None)


def _header(row: Mapping[Hashable, Any]) -> str:
    return " ".join(filter(None, (row["model"], row["arm"], row["data"] and f"on {row['data']}")))


def _text(value: Any) -> str:
    if value is None:
        return _EMPTY
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any, form: str = ".4f") -> str:
    return _EMPTY if value is None or pd.isna(value) else f"{value:{form}}"


def _mean(values: Sequence[float], planned: int) -> Cell:
    if not values:
        return Cell(_EMPTY)
    spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    note = f"{len(values)} of {planned} seeds" if len(values) < planned else ""
    return Cell(f"{np.mean(values):.4f}", spread=spread, note=note)
