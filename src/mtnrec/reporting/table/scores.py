"""Tables as in the paper: models in pairs, with and without MTN, by data set or by noise.

``comparisons`` does the statistics and returns one row per cell; ``score_table`` and
``difference_table`` lay them out; :mod:`mtnrec.reporting.table.render` writes them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from mtnrec.checks import InputError
from mtnrec.metric.catalogue import metric_info
from mtnrec.reporting.baseline import natural_order
from mtnrec.reporting.labels import LABEL_NOISE
from mtnrec.reporting.resampling import Resampled
from mtnrec.reporting.significance import (
    MARGIN,
    RowComparison,
    compare,
    compare_over_rows,
    holm,
    stars,
    verdict,
)
from mtnrec.reporting.table.published import (
    DATA_NAMES,
    MODELS,
    TASKS,
    has_paper_settings,
    mtn_part,
)
from mtnrec.reporting.table.render import Cell, Group, Row, Table

_FEW_PAIRS = 5
_LEVEL = 0.05
_MANY_SEEDS = 1000  # more are not listed exactly
_MTN_SETTINGS = ["lam", "target", "layers", "subsets", "alpha", "layer_weighting"]
_MTN_SETTINGS += ["coupling", "refresh_every", "norm", "frobenius"]
_PLACE = ["model", "variant", "data", "noise", "task"]
_ARM = ["arm", "baseline", "mtn", "treated", "label", "color"]
_ARM += [*_PLACE, *_MTN_SETTINGS, "split", "metric"]
_COMPARED = ["baseline_mean", "difference", "deviation", "low", "high", "p_value", "wilcoxon_p"]
_COMPARED += ["seeds_needed", "equivalence_p"]
_OVER_ROWS = ["rows_low", "rows_high", "rows_p", "both_low", "both_high", "both_p"]
_OVER_ROWS += ["both_equivalence_p"]
_EMPTY = "—"
_DEVIATION = ", ± the standard deviation over them"


def split_name(split: str) -> str:
    """Return the name of a split in titles.

    >>> split_name("val"), split_name("test"), split_name("test_random")
    ('validation', 'test', 'test_random')
    """
    return "validation" if split == "val" else split


def name_values(metric: str, split: str) -> str:
    """Return the name of a metric on a split: ``test AUC``, ``validation log loss``."""
    return f"{split_name(split)} {metric_info(metric).title}"


def split_by_table(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the results of each table, by title.

    Runs without noise make one table, runs with noise one per data set. Where a model was trained
    with several variants of MTN, these tables hold only the paper's, and all its variants have
    another table.

    Args:
        results: Rows of :attr:`Runs.results`.
    """
    place = ["model", "data", "noise"]
    parts_of_mtn = results.assign(variants=mtn_part(results["variant"]))
    variants = parts_of_mtn.groupby(place)["variants"].nunique()
    varied = results.join(variants, on=place)["variants"] > 1
    pairs = results[~results["mtn"] | ~varied | has_paper_settings(results)]
    is_noisy = (pairs["noise"] > 0) | pairs["data"].str.contains(f"{LABEL_NOISE}.", regex=False)
    parts = {"Models without noise": pairs[~is_noisy]}
    for data in _ordered(results["data"], DATA_NAMES):
        noisy = pairs[(pairs["data"] == data) & is_noisy]
        parts[f"Models under noise, {data_name(data)}"] = noisy
    for model in _ordered(results["model"], MODELS):
        parts[f"Variants of MTN, {model}"] = results[varied & (results["model"] == model)]
    return {title: part for title, part in parts.items() if len(part)}


def comparisons(
    results: pd.DataFrame,
    *,
    metric: str = "auc",
    split: str = "test",
    margin: float = MARGIN,
    resampled: Resampled | None = None,
) -> pd.DataFrame:
    """Return one row per arm and task of a table, in the table's order.

    Runs are paired by seed: a baseline and all arms that are compared with it are averaged over the
    ``seeds`` for which each of them has a defined metric, out of the ``all_seeds`` that any has.
    Without a common seed, each is averaged over its own seeds and not compared. Holm's correction
    covers the returned rows.

    Args:
        results: Rows of :attr:`Runs.results`.
        metric: Metric to compare.
        split: Split to compare.
        margin: Differences below it count as none, in the units of the metric.
        resampled: AUCs on resampled rows of this split; None, or another metric than ``auc``,
            leaves out what depends on them.

    Returns:
        The settings of the arm, ``mean``, ``spread`` (standard deviation over the seeds),
        ``seeds``, ``all_seeds``, and, for arms with a baseline, the fields of
        :class:`~mtnrec.reporting.significance.PairedComparison` and
        :class:`~mtnrec.reporting.significance.RowComparison`, the p-values corrected by Holm
        (``holm_p``, ``holm_equivalence_p``), ``seeds_needed``, ``improved``, and the ``verdict`` of
        the corrected p-values, over seeds and over ``both`` (``both_verdict``); undefined values
        are NaN. ``groups`` is the number of users that were resampled, 0 for none.

    Raises:
        InputError: If no run has the metric.
    """
    chosen = choose_results(results, metric=metric, split=split)
    blocks = chosen.groupby(["baseline", "task"], sort=False)
    rows = resampled if metric == "auc" else None
    cells = pd.DataFrame([row for _, block in blocks for row in _block_rows(block, margin, rows)])
    info = metric_info(metric, chosen["better"].iloc[0])
    cells["improved"] = info.improves(cells["mean"], cells["baseline_mean"])
    cells["margin"] = margin
    for prefix, p_value in (("", "p_value"), ("both_", "both_p")):
        cells[f"{prefix}holm_p"] = holm(cells[p_value])
        cells[f"{prefix}holm_equivalence_p"] = holm(cells[f"{prefix}equivalence_p"])
        pairs = cells[[f"{prefix}holm_p", f"{prefix}holm_equivalence_p"]]
        cells[f"{prefix}verdict"] = [verdict(*pair) for pair in pairs.itertuples(index=False)]
    return _sorted(cells, chosen)


def choose_results(results: pd.DataFrame, *, metric: str, split: str) -> pd.DataFrame:
    """Return the rows of a metric on a split.

    Raises:
        InputError: If no run has the metric.
    """
    chosen = results[(results["metric"] == metric) & (results["split"] == split)]
    if chosen.empty:
        found = sorted(
            {f"{s}/{m}" for s, m in zip(results["split"], results["metric"], strict=True)}
        )
        choices = ", ".join(found)
        raise InputError(f"no run has the metric {split}/{metric}. Choose one of {choices}.")
    return chosen


def score_table(cells: pd.DataFrame, title: str) -> Table:
    """Lay out comparisons as in the paper: models in pairs, tasks under data sets or noise.

    Args:
        cells: Output of :func:`comparisons`.
        title: Title of the table.
    """
    groups = _groups(cells)
    by_place = {tuple(cell[key] for key in _PLACE): cell for cell in cells.to_dict("records")}
    rows = []
    previous = None
    for model, variant in cells[["model", "variant"]].drop_duplicates().itertuples(index=False):
        places = [
            (model, variant, data, noise, task)
            for data, noise, _, tasks in groups
            for task in tasks
        ]
        found = tuple(
            _score(by_place[place]) if place in by_place else Cell(_EMPTY) for place in places
        )
        starts = model != previous
        rows.append(Row(f"{model} {variant}".strip(), found, starts))
        previous = model
    return Table(
        title=title,
        stub="Model",
        groups=tuple(
            Group(header, tuple(_task_name(task, tasks) for task in tasks))
            for _, _, header, tasks in groups
        ),
        rows=tuple(rows),
        notes=_notes(cells),
        warnings=_warnings(cells),
    )


def difference_table(cells: pd.DataFrame, title: str) -> Table:
    """Lay out the statistics of each comparison, one row per comparison.

    Args:
        cells: Output of :func:`comparisons`.
        title: Title of the table.
    """
    columns = (
        *("data", "task", "pairs", "baseline", "arm", "difference", "95 % interval", "p", "Holm p"),
        *(["Wilcoxon p"] if cells["wilcoxon_p"].notna().any() else []),
        *(["equivalence p", "verdict"] if cells["equivalence_p"].notna().any() else []),
        "seeds for 0.001",
    )

    def texts(cell: dict[Hashable, Any]) -> list[str]:
        return [
            f"{cell['pairs']:.0f}",
            f"{cell['baseline_mean']:.4f}",
            f"{cell['mean']:.4f}",
            f"{cell['difference']:+.4f}",
            interval_text(cell["low"], cell["high"]),
            *(p_text(cell[key]) for key in ("p_value", "holm_p")),
            *([p_text(cell["wilcoxon_p"])] if "Wilcoxon p" in columns else []),
            *(_equivalence_texts(cell, "") if "verdict" in columns else []),
            _seeds_text(cell["seeds_needed"]),
        ]

    return Table(
        title=title,
        stub="Model",
        groups=(Group("", columns),),
        rows=_comparison_rows(cells, cells[cells["pairs"] > 0], texts),
        notes=(
            "Difference: arm minus baseline, the mean over pairs of runs with the same seed, with "
            "its t-interval; p: two-sided paired t-test; Holm p: corrected for all comparisons in "
            "the table; Wilcoxon p, for six pairs or more: two-sided signed-rank test.",
            *(_equivalence_notes(cells, "p") if "verdict" in columns else []),
            "Seeds for 0.001: pairs needed to detect a 0.001 difference (power 0.8, level 0.05).",
        ),
        warnings=_warnings(cells),
    )


def row_table(cells: pd.DataFrame, title: str) -> Table | None:
    """Lay out the intervals over test rows; None if no comparison has them.

    Args:
        cells: Output of :func:`comparisons`.
        title: Title of the table.
    """
    shown = cells[cells["rows_p"].notna()]
    if shown.empty:
        return None
    has_both = shown["both_p"].notna().any()
    columns = (
        *("data", "task", "seeds", "users", "difference"),
        *(["over both", "both p", "equivalence p", "verdict"] if has_both else []),
        *("over seeds", "over users", "users p"),
    )

    def texts(cell: dict[Hashable, Any]) -> list[str]:
        of_both = []
        if has_both:
            of_both = [interval_text(cell["both_low"], cell["both_high"]), p_text(cell["both_p"])]
            of_both += _equivalence_texts(cell, "both_")
        return [
            f"{cell['pairs']:.0f}",
            f"{cell['groups']:,.0f}",
            f"{cell['difference']:+.4f}",
            *of_both,
            interval_text(cell["low"], cell["high"]),
            interval_text(cell["rows_low"], cell["rows_high"]),
            p_text(cell["rows_p"]),
        ]

    missing = int((cells["pairs"] > 0).sum()) - len(shown)
    warnings = (
        f"{missing} comparisons are left out: a run kept no scores (keep_scores=true), other rows "
        "than its baseline's, or too few positives.",
    )
    return Table(
        title=title,
        stub="Model",
        groups=(Group("", columns),),
        rows=_comparison_rows(cells, shown, texts),
        notes=(
            "95 % intervals of the difference, arm minus baseline. Over seeds: new trainings, on "
            "these test rows (t-interval). Over users: new test users, with these trained models "
            "(percentile bootstrap of whole users or searches, or of rows where the data has "
            "neither), and the p-value that inverts it. Over both: new trainings on new users "
            "(Obuchowski & Rockette, 1995; Hillis, 2007).",
            *(_equivalence_notes(cells, "both p") if has_both else []),
        ),
        warnings=warnings if missing else (),
    )


def _comparison_rows(
    cells: pd.DataFrame, shown: pd.DataFrame, texts: Callable[[dict[Hashable, Any]], list[str]]
) -> tuple[Row, ...]:
    """Return a row per shown comparison: data and task, then its texts, under the arm's name."""
    headers = {(data, noise): (header, tasks) for data, noise, header, tasks in _groups(cells)}
    rows, previous = [], None
    for cell in shown.to_dict("records"):
        group, tasks = headers[cell["data"], cell["noise"]]
        line = [group, _task_name(cell["task"], tasks), *texts(cell)]
        rows.append(Row(cell["label"], tuple(map(Cell, line)), starts=cell["label"] != previous))
        previous = cell["label"]
    return tuple(rows)


def _equivalence_texts(cell: dict[Hashable, Any], prefix: str) -> list[str]:
    return [p_text(cell[f"{prefix}equivalence_p"]), cell[f"{prefix}verdict"] or _EMPTY]


def _equivalence_notes(cells: pd.DataFrame, p_value: str) -> list[str]:
    margin = cells["margin"].iloc[0]
    return [
        f"Equivalence p: two one-sided t-tests that the true difference is within ±{margin:g}. "
        f"Verdict, of both p-values after Holm's correction for the table: equivalent if that is "
        f"below 0.05, else different if {p_value} is, else undecided."
    ]


def interval_text(low: float, high: float) -> str:
    """Format an interval; NaN is one that is undefined."""
    return _EMPTY if np.isnan(low) else f"[{low:+.4f}, {high:+.4f}]"


def _block_rows(
    block: pd.DataFrame, margin: float, resampled: Resampled | None
) -> Iterator[dict[str, Any]]:
    """Compare the arms of one block on one task with their baseline."""
    # numpy: pandas takes ten times as long, with hundreds of blocks of a few runs.
    seeds, rows = np.unique(block["seed"].to_numpy(), return_inverse=True)
    columns, names = pd.factorize(block["arm"])
    values = np.full((len(seeds), len(names)), np.nan)
    values[rows, columns] = block["value"]
    runs = np.full(values.shape, None, object)
    runs[rows, columns] = block["run"]
    task = str(block["task"].iloc[0])
    is_common = ~np.isnan(values).any(axis=1)
    arms = block.drop_duplicates("arm")[_ARM].to_dict("records")
    baseline = next((number for number, arm in enumerate(arms) if not arm["treated"]), None)
    for number, arm in enumerate(arms):
        own = values[is_common if is_common.any() else ~np.isnan(values[:, number]), number]
        paired = arm["treated"] and baseline is not None and is_common.any()
        before = values[is_common, baseline] if paired else own[:0]
        found = compare(before, own[: len(before)], margin=margin)
        over_rows, groups = RowComparison(), 0
        if paired and resampled is not None:
            pairs = [runs[is_common, column] for column in (number, baseline)]
            groups = resampled.shared_groups(np.concatenate(pairs), task)
            if groups:
                one, other = (resampled.of_runs(of_arm, task) for of_arm in pairs)
                over_rows = compare_over_rows(own - before, one - other, margin=margin)
        yield {
            **{str(key): value for key, value in arm.items()},
            "mean": float(own.mean()) if len(own) else np.nan,
            "spread": float(own.std(ddof=1)) if len(own) > 1 else np.nan,
            "seeds": len(own),
            "all_seeds": len(seeds),
            "pairs": found.pairs,
            "groups": groups,
            **_values(found, _COMPARED),
            **_values(over_rows, _OVER_ROWS),
        }


def _values(found: object, keys: Iterable[str]) -> dict[str, float]:
    """Return attributes, NaN for None."""
    return {key: np.nan if (v := getattr(found, key)) is None else v for key in keys}


def _sorted(cells: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    by_setting = results.sort_values(_MTN_SETTINGS, na_position="first")
    orders = {
        "model": _ordered(cells["model"], MODELS),
        "variant": sorted(by_setting["variant"].unique(), key=bool),
        "data": _ordered(cells["data"], DATA_NAMES),
        "noise": sorted(cells["noise"].unique()),
        "task": in_order(results["task"]),
    }
    ranks = {
        name: {value: rank for rank, value in enumerate(order)} for name, order in orders.items()
    }
    return cells.sort_values(
        list(orders), key=lambda column: column.map(ranks[str(column.name)]), ignore_index=True
    )


def in_order(tasks: Iterable[str]) -> list[str]:
    """Return CTR, CVR and CTCVR, then the other tasks in order of first occurrence."""
    found = dict.fromkeys(tasks)
    return list(dict.fromkeys([*(task for task in TASKS if task in found), *found]))


def _ordered(labels: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return labels in the order of known names, then the others."""
    names = list(known)

    def place(label: str) -> tuple[int, list[Any]]:
        name = label.partition(" (")[0]
        return (names.index(name) if name in names else len(names), natural_order(label))

    return sorted(set(labels), key=place)


def _groups(cells: pd.DataFrame) -> list[tuple[str, float, str, list[str]]]:
    """Return data, noise, header and tasks of each column group."""
    places = cells[["data", "noise"]].drop_duplicates()
    ordered = sorted(
        places.itertuples(index=False, name=None),
        key=lambda place: (_ordered(places["data"], DATA_NAMES).index(place[0]), place[1]),
    )
    several_data, several_noise = places["data"].nunique() > 1, places["noise"].nunique() > 1
    groups = []
    for data, noise in ordered:
        tasks = cells.loc[(cells["data"] == data) & (cells["noise"] == noise), "task"]
        parts = [data_name(data)] if several_data or not several_noise else []
        parts += [f"noise {noise:g}"] if several_noise or noise else []
        groups.append((data, noise, ", ".join(parts), in_order(tasks)))
    return groups


def _score(cell: dict[Hashable, Any]) -> Cell:
    if np.isnan(cell["mean"]):
        return Cell(_EMPTY, note="undefined")
    short = cell["seeds"] < cell["all_seeds"]
    text = f"{cell['mean']:.4f}"
    return Cell(
        text=text,
        bold=bool(cell["improved"]) and cell["p_value"] < _LEVEL,
        spread="" if np.isnan(cell["spread"]) else f"{cell['spread']:.4f}",
        stars=stars(cell["p_value"]),
        holm_stars=stars(cell["holm_p"]),
        note=f"{cell['seeds']} of {cell['all_seeds']} seeds" if short else "",
    )


def _notes(cells: pd.DataFrame) -> tuple[str, ...]:
    metric, split = cells["metric"].iloc[0], cells["split"].iloc[0]
    fewest, most = cells["seeds"].min(), cells["seeds"].max()
    runs = f"{most}" if fewest == most else f"{fewest} to {most}"
    title, rows = metric_info(metric).title, split_name(split)
    notes = [f"Mean {title} on the {rows} rows over {runs} seeds{_DEVIATION}."]
    if set(cells["task"]) == set(TASKS):
        notes.append("CTR and CTCVR: all rows; CVR: the clicked rows.")
    tests = int(cells["p_value"].notna().sum())
    if cells["treated"].any():
        notes.append(
            "* p < 0.05, ** p < 0.01: two-sided paired t-test against the baseline over the same "
            "seeds. Bold: better than the baseline, with p < 0.05. "
            f"† and ‡: the same two levels after Holm's correction for the {tests} tests in the "
            "table."
        )
    if (cells["seeds"] < cells["all_seeds"]).any():
        notes.append(
            "Where seeds are missing, the arms that are compared are averaged over the seeds they "
            "all have."
        )
    return tuple(notes)


def _warnings(cells: pd.DataFrame) -> tuple[str, ...]:
    found = []
    compared = cells[cells["pairs"] > 0]
    few = compared[compared["pairs"] < _FEW_PAIRS]
    if len(few):
        found.append(
            f"Fewer than five pairs of runs in {len(few)} of {len(compared)} comparisons (minimum "
            f"{few['pairs'].min():.0f}): the tests have little power."
        )
    alone = cells[cells["treated"] & (cells["pairs"] == 0) & cells["mean"].notna()]
    if len(alone):
        found.append(
            f"{len(alone)} numbers are not compared with a baseline: no run of it has a value for "
            "the same seed."
        )
    return tuple(found)


def data_name(label: str) -> str:
    """Return the paper's name of a data set, with the settings in its label."""
    name, bracket, rest = label.partition(" (")
    return DATA_NAMES.get(name, name) + bracket + rest


def _task_name(task: str, tasks: Iterable[str]) -> str:
    return task.upper() if set(tasks) == set(TASKS) else task


def p_text(p_value: float) -> str:
    """Format a p-value; NaN is one that is undefined."""
    if np.isnan(p_value):
        return _EMPTY
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _seeds_text(seeds: float) -> str:
    if np.isnan(seeds):
        return _EMPTY
    return f"{seeds:.0f}" if seeds < _MANY_SEEDS else f">{_MANY_SEEDS - 1}"
