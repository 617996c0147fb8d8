"""Figures of training: curves over epochs, spectra, alphas, distances between experts.

Every function takes the rows of one data set and model, and returns None if they hold no data for
its figure.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtnrec.metric.catalogue import parse_layer_key, parse_metric_key
from mtnrec.reporting.figure.style import (
    SEQUENTIAL,
    Draw,
    Style,
    along_funnel,
    curve,
    facets,
    legend,
    log_scale,
    median,
    panels,
    styled,
)
from mtnrec.reporting.table.published import task_title

LEAST_SHOWN = 1e-6  # relative to the largest singular value; float32 rounding hides less
_MOST_COLUMNS = 3
_UNFOLDINGS = {"task": 0, "expert": 0, "output": 1, "input": 2}  # order of their lines


@styled
def training_curves(epochs: pd.DataFrame) -> Figure | None:
    """Draw training loss and validation AUCs, and mark each run's best epoch above the axis.

    Args:
        epochs: Rows of :attr:`Runs.epochs`, with ``row``, ``line`` and ``best_epoch`` of their run.
    """
    keys = {name: parse_metric_key(name) for name in epochs["name"].unique()}
    tasks = {name: key.task for name, key in keys.items() if key and key[::2] == ("val", "auc")}
    aucs = epochs.assign(task=epochs["name"].map(tasks)).dropna(subset="task")
    aucs = aucs.sort_values("task", key=along_funnel, kind="stable")
    aucs["column"] = aucs["task"].map(task_title) + " validation AUC"
    loss = epochs[epochs["name"] == "train/loss"].assign(column="training loss")
    return over_epochs(pd.concat([loss, aucs]), _curve_and_best, sharey="col")


@styled
def alphas(epochs: pd.DataFrame) -> Figure | None:
    """Draw the weight of each unfolding: a row per layer, a column per unfolding, a line per arm.

    Args:
        epochs: Rows of :attr:`Runs.epochs`.
    """
    return over_epochs(_of_unfoldings(epochs, "alpha"), curve, y="alpha", sharey=True)


@styled
def effective_ranks(epochs: pd.DataFrame) -> Figure | None:
    """Draw the effective rank of each unfolding: a row per layer, a column per unfolding.

    Args:
        epochs: Rows of :attr:`Runs.epochs`, of runs with and without MTN.
    """
    return over_epochs(_of_unfoldings(epochs, "effective_rank"), curve, y="effective rank")


@styled
def spectra(values: pd.DataFrame) -> Figure | None:
    """Draw the singular values of each unfolding: a row per layer, a column per unfolding.

    Args:
        values: ``row`` (layer), ``column`` (unfolding), ``line``, ``x`` (1 is the largest) and
            ``value`` of each run.
    """
    # A matrix with one row or column has one value: nothing to compare.
    values = values[values.groupby(["row", "column"])["x"].transform("max") > 1]
    if values.empty:
        return None
    figure, found = facets(values, median, x="index", y="singular value")
    for (row, column), axes in found.items():
        part = values[(values["row"] == row) & (values["column"] == column)]
        largest, count = part["value"].max(), part["x"].max()
        least = part["value"][part["value"] > LEAST_SHOWN * largest].min()
        log_scale(axes, "y", least / 1.5, largest * 1.5)
        axes.set_xlim(1 - max(0.3, 0.03 * count), count + max(0.3, 0.03 * count))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    legend(figure)
    return figure


@styled
def expert_distances(matrices: Mapping[str, Sequence[np.ndarray]]) -> Figure | None:
    """Draw the mean distance between two experts on one colour scale (paper, Figure 3).

    Args:
        matrices: ``(E, E)`` distances of each seed, by panel name.
    """
    if not matrices:
        return None
    means = {name: np.mean(of_seeds, axis=0) for name, of_seeds in matrices.items()}
    scale = mpl.colors.Normalize(0, max(mean.max() for mean in means.values()))
    columns = min(_MOST_COLUMNS, len(means))
    figure, axes = panels(-(-len(means) // columns), columns, height=2.4)
    drawn = list(axes.flat)[: len(means)]
    images = []
    for panel, (name, mean) in zip(drawn, means.items(), strict=True):
        images.append(panel.imshow(mean, cmap=SEQUENTIAL, norm=scale))
        count = len(matrices[name])
        level = mean.sum() / (mean.size - len(mean))  # the diagonal is 0
        seeds = f"{count} seed{'s' * (count > 1)}"
        panel.set_title(f"{textwrap.fill(name, 30)}\nmean {level:.3g}, {seeds}")
        panel.set(xticks=range(len(mean)), yticks=range(len(mean)))
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    for panel in axes.flat[len(means) :]:
        panel.remove()
    for panel in axes[:, 0]:
        panel.set_ylabel("expert")
    for panel in drawn[-columns:]:
        panel.set_xlabel("expert")
    figure.colorbar(images[0], ax=drawn, label="distance of outputs", aspect=20, shrink=0.8)
    return figure


@styled
def over_epochs(
    curves: pd.DataFrame,
    draw: Draw = curve,
    *,
    y: str = "",
    **subplots: Any,
) -> Figure | None:
    """Draw logged values over the epochs that all seeds of an arm trained.

    Args:
        curves: Rows of :attr:`Runs.epochs`, with the ``row``, ``column`` and ``line`` of `facets`.
        draw: Draws one line.
        y: Label of the vertical axes.
        subplots: See `panels`.
    """
    if curves.empty:
        return None
    curves = curves.dropna(subset="value")
    last = curves.groupby(["arm", "run"])["epoch"].max().groupby("arm").min()
    curves = curves[curves["epoch"] <= curves["arm"].map(last)]
    curves = curves.assign(x=curves["epoch"])
    figure, found = facets(curves, draw, x="epoch", y=y, sharex=True, **subplots)
    for axes in found.values():
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(figure)
    return figure


def _of_unfoldings(epochs: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return one quantity's rows, with the layer as ``row`` and the unfolding as ``column``."""
    keys = {name: parse_layer_key(name) for name in epochs["name"].unique()}
    chosen = {name: key for name, key in keys.items() if key and key.quantity == quantity}
    curves = epochs[epochs["name"].isin(chosen)]
    found = [chosen[name] for name in curves["name"]]
    curves = curves.assign(
        row=[f"layer {key.layer}" for key in found],
        column=[f"{key.unfolding} unfolding" for key in found],
        place=[10 * key.layer + _UNFOLDINGS[key.unfolding] for key in found],
    )
    return curves.sort_values(["place", "color"], kind="stable")


def _curve_and_best(axes: Axes, line: pd.DataFrame, name: str, style: Style) -> None:
    height = 0.04 + 0.03 * len(axes.lines)
    axes.margins(y=0.15)  # room for the marks
    curve(axes, line, name, style)
    best = line.groupby("run")["best_epoch"].first()
    marks = {**style, "linestyle": "none", "markersize": 2.5}
    axes.plot(best, np.full(len(best), height), transform=axes.get_xaxis_transform(), **marks)
