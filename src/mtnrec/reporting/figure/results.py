"""Figures of results: a metric against noise and lambda, differences, ranks, maps, calibration.

Functions that draw a figure return None if the rows hold no data for it.
"""

import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mtnrec.reporting.baseline import BASELINE
from mtnrec.reporting.figure.style import (
    DIVERGING,
    Style,
    along_funnel,
    facets,
    hover,
    legend,
    line_style,
    log_scale,
    ordered,
    panels,
    points,
    row_title,
    styled,
)
from mtnrec.reporting.significance import mean_interval
from mtnrec.reporting.table.published import task_title
from mtnrec.reporting.table.ranks import Ranking
from mtnrec.reporting.table.scores import in_order, name_values

CALIBRATION_BINS = 20
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
_NAME_WIDTH = 46  # characters of an arm's name in a line of a figure one column wide


@styled
def noise_curves(
    results: pd.DataFrame, *, metric: str = "auc", split: str = "test", y: str | None = None
) -> Figure | None:
    """Draw a metric against noise: a row per model, a column per task (paper, Figure 1).

    Args:
        results: Rows of :attr:`Runs.results` for one data set; variants with a single noise
            proportion are left out.
        metric: Metric to draw.
        split: Split to draw.
        y: Name of the values, if they were transformed.
    """
    table, y = _values(results, metric, split), y or name_values(metric, split)
    table = table.assign(row=table["model"], x=table["noise"])
    table = table[table.groupby(["row", "line"])["noise"].transform("nunique") > 1]
    if table.empty:
        return None
    figure, found = facets(table, points, x="noise proportion", y=y, sharex=True, sharey="col")
    for axes in found.values():
        axes.set_xticks(sorted(table["noise"].unique()))
    legend(figure)
    return figure


@styled
def lambda_curves(
    results: pd.DataFrame, *, metric: str = "auc", split: str = "test"
) -> Figure | None:
    """Draw a metric against lambda, and the baseline as a line with a band.

    Args:
        results: Rows of :attr:`Runs.results` for one data set, model and noise; those with lambda
            0 are left out.
        metric: Metric to draw.
        split: Split to draw, above the validation rows.
    """
    rows = [
        _values(results, metric, shown).assign(row=name_values(metric, shown))
        for shown in dict.fromkeys([split, "val"])
    ]
    table = pd.concat(rows)
    lam = r"\(lam=[^,)]+\)|\blam=[^,)]+, |, lam=[^,)]+"
    line = table["line"].str.replace(lam, "", regex=True).str.strip()
    table = table.assign(line=line, x=table["lam"])
    swept = table[table["lam"] > 0]
    swept = swept.assign(color=swept.groupby("line")["color"].transform("min"))
    swept = swept[swept.groupby("line")["lam"].transform("nunique") > 1]
    if swept.empty:
        return None
    figure, found = facets(swept, points, x="lambda", y="", sharex=True, sharey="col")
    baselines = table[~table["treated"] & table["baseline"].isin(swept["baseline"])]
    for (row, column), axes in found.items():
        log_scale(axes, "x", swept["x"].min() / 2, swept["x"].max() * 2)
        values = baselines[(baselines["row"] == row) & (baselines["column"] == column)]["value"]
        if len(values):
            _draw_level(axes, values)
    legend(figure)
    return figure


@styled
def paired_differences(
    results: pd.DataFrame, *, metric: str = "auc", split: str = "test"
) -> Figure | None:
    """Draw an arm's metric minus its baseline's: a dot per seed, a diamond for mean and interval.

    Args:
        results: Rows of :attr:`Runs.results` for one data set. Runs are paired by seed; a seed
            missing from either arm is left out.
        metric: Metric to draw.
        split: Split to draw.
    """
    pairs = differences(_values(results, metric, split))
    if pairs.empty:
        return None
    variants, tasks = pairs["line"].unique(), pairs["column"].unique()
    labels = {variant: _groups(of_variant) for variant, of_variant in pairs.groupby("line")}
    heights = [len(labels[variant]) + 1 for variant in variants]  # plus a line for the variant
    figure, grid = panels(
        len(variants),
        len(tasks),
        height=0.26 * sum(heights) / len(variants),
        sharex="col",
        height_ratios=heights,
    )
    for axes_of_row, variant in zip(grid, variants, strict=True):
        row_title(axes_of_row[0], variant)
        last = variant == variants[-1]
        for axes, task in zip(axes_of_row, tasks, strict=True):
            part = pairs[(pairs["line"] == variant) & (pairs["column"] == task)]
            _draw_differences(axes, part, labels[variant], named=axes is axes_of_row[0])
            axes.spines.bottom.set_visible(last)
            axes.tick_params(bottom=last)
    for axes, task in zip(grid[-1], tasks, strict=True):
        axes.set_xlabel(f"{task}: difference of {name_values(metric, split)}")
    legend(figure)
    return figure


def differences(values: pd.DataFrame) -> pd.DataFrame:
    """Return arm minus baseline, ``difference``, for each seed that both have.

    Args:
        values: One metric on one split, one row per run and task.
    """
    pair = ["baseline", "seed", "task"]
    without = values[~values["treated"]][[*pair, "value"]]
    pairs = values[values["treated"]].merge(without, on=pair, suffixes=("", "_without"))
    pairs["difference"] = pairs["value"] - pairs["value_without"]
    return pairs.dropna(subset="difference")


@styled
def critical_differences(ranking: Ranking) -> Figure:
    """Draw the mean rank of each arm with a bar as long as the critical difference, best first.

    Two arms whose bars do not overlap differ significantly. The band is the best arm's bar.
    """
    ranks, half = ranking.test.mean_ranks, ranking.test.critical_difference / 2
    order = np.argsort(ranks, kind="stable")
    texts = [textwrap.fill(f"{ranking.arms[n]}, {ranks[n]:.2f}", _NAME_WIDTH) for n in order]
    heights = np.cumsum([1 + 0.5 * text.count("\n") for text in texts])
    figure, ((axes,),) = panels(1, 1, height=0.3 * heights[-1])
    for height, index, text in zip(heights, order, texts, strict=True):
        style = line_style(ranking.colors[index])
        axes.plot(ranks[index] + np.array([-half, half]), [height] * 2, color=style["color"])
        (dot,) = axes.plot(ranks[index], height, **style)
        hover(dot, [f"{ranking.arms[index]}: {ranks[index]:.2f} ± {half:.2f}"])
        # Above the bar, not next to the axis, where a long name would leave no room for it.
        name = axes.annotate(
            text,
            (0, height),
            (0, 5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
        name.set_in_layout(False)
    axes.axvspan(ranks.min() - half, ranks.min() + half, color="0.55", alpha=0.15, linewidth=0)
    axes.set(xlim=(0.5, len(ranks) + 0.5), ylim=(heights[-1] + 0.5, 0.1), yticks=[])
    axes.set_xlabel(f"mean rank, {task_title(ranking.task)}: {ranking.values}")
    axes.spines.left.set_visible(False)
    return figure


@styled
def world_maps(worlds: pd.DataFrame) -> Figure | None:
    """Draw differences of test AUC by relatedness and noise: a row per rival, a column per task.

    A cell is hatched if its interval covers 0, or if a single seed gives none.

    Args:
        worlds: Rows of :func:`~mtnrec.reporting.table.worlds.map_worlds` for one map.
    """
    worlds = worlds.dropna(subset="difference")
    if worlds.empty:
        return None
    rivals, tasks = worlds["rival"].unique(), in_order(worlds["task"])
    noises, levels = (sorted(worlds[key].unique()) for key in ("noise", "relatedness"))
    most = max(worlds["difference"].abs().max(), 1e-9)
    scale = mpl.colors.Normalize(-most, most)
    figure, grid = panels(len(rivals), len(tasks), height=0.5 * len(levels) + 0.5)
    for axes_of_row, rival in zip(grid, rivals, strict=True):
        row_title(axes_of_row[0], f"MTN minus {rival}", line=int(rival == rivals[0]))
        for axes, task in zip(axes_of_row, tasks, strict=True):
            part = worlds[(worlds["rival"] == rival) & (worlds["task"] == task)]
            place = part["relatedness"].map(levels.index), part["noise"].map(noises.index)
            _draw_map(axes, part.assign(row=place[0], column=place[1]), scale)
            axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
            named = axes is axes_of_row[0]
            axes.set_yticks(range(len(levels)), [f"{level:g}" for level in levels] if named else [])
            axes.set(xlim=(-0.5, len(noises) - 0.5), ylim=(-0.5, len(levels) - 0.5))
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        axes_of_row[0].set_ylabel("relatedness")
    for axes, task in zip(grid[0], tasks, strict=True):
        axes.set_title(task_title(task))
    for axes in grid[-1]:
        axes.set_xlabel("noise proportion")
    colors = mpl.cm.ScalarMappable(scale, DIVERGING)
    figure.colorbar(colors, ax=grid, label="difference of test AUC", aspect=25, shrink=0.8)
    return figure


def _draw_map(axes: Axes, cells: pd.DataFrame, scale: mpl.colors.Normalize) -> None:
    colormap = mpl.colormaps[DIVERGING]
    for cell in cells.to_dict("records"):
        corner = cell["column"] - 0.5, cell["row"] - 0.5
        color = colormap(scale(cell["difference"]))
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=color, linewidth=0))
        if not (cell["low"] > 0 or cell["high"] < 0):
            axes.add_patch(
                Rectangle(corner, 1, 1, fill=False, hatch="/////", edgecolor="0.62", linewidth=0)
            )
        interval = f"\n[{cell['low']:+.3f},\n{cell['high']:+.3f}]" if cell["seeds"] > 1 else ""
        # Neither black nor white: the page replaces these by its own colours.
        ink = "0.08" if np.dot(color[:3], _LUMINANCE) > 0.45 else "0.97"
        text = axes.text(
            cell["column"],
            cell["row"],
            f"{cell['difference']:+.3f}{interval}",
            ha="center",
            va="center",
            color=ink,
            fontsize=5.5,
        )
        text.set_bbox({"facecolor": color, "edgecolor": "none", "pad": 0.8})


@styled
def reliability(bins: pd.DataFrame) -> Figure | None:
    """Draw observed against predicted rates on the test set, on log axes: a column per task.

    Args:
        bins: ``row``, ``line``, ``task``, ``run``, and ``predicted``, ``observed``, ``rows`` of
            each bin of a run. The bins of all seeds are pooled by predicted rate.
    """
    positives = bins.groupby(["row", "line", "task"])["observed"].transform("max") > 0
    if not positives.any():
        return None
    table = bins[positives].sort_values("task", key=along_funnel, kind="stable")
    table["column"] = table["task"].map(task_title)
    figure, found = facets(
        table, _draw_reliability, x="predicted rate (%)", y="observed rate (%)", height=1.8
    )
    for axes in found.values():
        rates = np.concatenate([np.ravel(line.get_xydata()) for line in axes.lines])
        limits = rates.min() / 1.5, rates.max() * 1.5
        axes.plot(limits, limits, color="0.55", linewidth=0.8, zorder=0)
        axes.set_aspect("equal")
        log_scale(axes, "x", *limits, unit=0.01)
        log_scale(axes, "y", *limits, unit=0.01)
    legend(figure)
    return figure


def pooled(bins: pd.DataFrame, count: int = CALIBRATION_BINS) -> pd.DataFrame:
    """Pool bins, sorted by predicted rate, into ``count`` bins of nearly equal mass."""
    bins = bins.sort_values("predicted", kind="stable")
    middle = bins["rows"].cumsum() - bins["rows"] / 2
    group = (middle * count / bins["rows"].sum()).astype(int)
    sums = bins[["predicted", "observed"]].mul(bins["rows"], axis=0).groupby(group).sum()
    return sums.div(bins["rows"].groupby(group).sum(), axis=0)


def _values(results: pd.DataFrame, metric: str, split: str) -> pd.DataFrame:
    chosen = results[(results["split"] == split) & (results["metric"] == metric)]
    return ordered(chosen.assign(column=chosen["task"].map(task_title)))


def _draw_level(axes: Axes, values: pd.Series) -> None:
    mean, low, high = mean_interval(values.dropna().to_numpy())
    style = line_style(0)
    axes.axhline(mean, label=BASELINE, color=style["color"], linestyle=style["linestyle"])
    if np.isfinite(low):
        axes.axhspan(low, high, color=style["color"], alpha=0.12, linewidth=0)


def _groups(pairs: pd.DataFrame) -> list[tuple[str, float]]:
    return list(dict.fromkeys(zip(pairs["model"], pairs["noise"], strict=True)))


def _draw_differences(
    axes: Axes, pairs: pd.DataFrame, groups: list[tuple[str, float]], *, named: bool
) -> None:
    dots, mean_style = line_style(0), line_style(int(pairs["color"].max()))
    for height, (model, noise) in enumerate(groups):
        found = pairs[(pairs["model"] == model) & (pairs["noise"] == noise)]["difference"]
        mean, low, high = mean_interval(found.to_numpy())
        axes.plot(
            found,
            np.full(len(found), height - 0.17),
            label="one seed",
            **dots | {"linestyle": "none", "markersize": 3},
        )
        axes.errorbar(
            [mean],
            [height + 0.17],
            xerr=[[mean - low], [high - mean]],
            label="mean, 95 % interval",
            **mean_style | {"marker": "D", "linestyle": "none"},
        )
    axes.axvline(0, color="0.55", linewidth=0.8, zorder=0)
    axes.locator_params("x", nbins=3)  # the numbers are long
    for height in range(1, len(groups)):
        if groups[height][0] != groups[height - 1][0]:
            axes.axhline(height - 0.5, color="0.85", linewidth=0.6, zorder=0)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    names = [f"{model}, noise {noise:g}" for model, noise in groups]
    axes.set_yticks(range(len(groups)), names if named else [])
    axes.tick_params("y", length=0)


def _draw_reliability(axes: Axes, bins: pd.DataFrame, name: str, style: Style) -> None:
    seen = pooled(bins)
    seen = seen[seen["observed"] > 0]
    (drawn,) = axes.plot(
        seen["predicted"], seen["observed"], label=name, **{**style, "markersize": 3}
    )
    rates = seen[["predicted", "observed"]].itertuples(index=False)
    hover(drawn, [f"{name}: predicted {p:.3%}, observed {o:.3%}" for p, o in rates])
