"""Figures of the report: the runs that each shows, its file, title, caption and alt text."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mtnrec.metric.catalogue import LayerKey, metric_info
from mtnrec.reporting.figure import results as figures
from mtnrec.reporting.figure import training as training_figures
from mtnrec.reporting.figure.style import FORMATS, ordered, save
from mtnrec.reporting.runs import Run, Runs
from mtnrec.reporting.table.published import task_title
from mtnrec.reporting.table.ranks import rank_arms
from mtnrec.reporting.table.scores import name_values
from mtnrec.reporting.table.worlds import map_worlds
from mtnrec.system.files import remove_files, slug

RANKS = "Ranks over data sets"  # section of the page
WORLDS = "Planted worlds"  # section of the page
MOST_BLOCKS = 4  # models with figures of their training; drawing one takes a second
_MOST_LINES = 6  # arms per figure next to their baseline; more have another figure
MOST_ARMS = 2 * _MOST_LINES  # of a model, with figures of their training
_INTERVAL = "the mean over seeds with its 95 % confidence interval (Student's t)"
_MEDIAN = "the median over seeds, with a band from the smallest to the largest value"
_WHILE_ALL_TRAIN = "A curve ends at the epoch in which the first of its seeds stopped."
_Drawn = tuple[str, tuple[str, ...], Figure | None]  # kind, parts of the name, figure

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Texts shared by all figures of a kind.

    ``{metric}`` stands for the metric of the report, ``{values}`` for it with its split.

    Args:
        section: Section of the page.
        title: Title without the name of the data set.
        caption: Contents of the figure, with definitions.
        alt: Description for readers who cannot see the figure.
    """

    section: str
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class WrittenFigure:
    """A figure on disk.

    Args:
        kind: Key of ``KINDS``.
        parts: What the figure shows: data set, model, noise.
        title: Title on a page.
        caption: Caption on a page or in a paper.
        alt: Alt text of the image.
        paths: The same figure in each format: pdf, svg, png.
    """

    kind: str
    parts: tuple[str, ...]
    title: str
    caption: str
    alt: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class PlannedFigure:
    """A figure to be drawn.

    Args:
        kind: Key of ``KINDS``.
        parts: What the figure shows: data set, model, noise.
        draw: Draws it; returns None if the runs hold no data for it.
    """

    kind: str
    parts: tuple[str, ...]
    draw: Callable[[], Figure | None]


KINDS = {
    "noise_curves": Kind(
        "Robustness",
        "{metric} against noise",
        f"The {{values}} against the proportion of noisy rows: {_INTERVAL}. The intervals are per "
        "arm; those of the differences, paired by seed, are in another figure.",
        "Line charts of {values} against noise, one row per model and one column per task.",
    ),
    "paired_differences": Kind(
        "Results",
        "Differences between paired runs",
        "The {values} of an arm minus that of its baseline, for each seed that both have "
        f"(circles), and {_INTERVAL}. Right of the line, it is higher than the baseline's.",
        "Dot plots of the differences in {values}, one row per model and noise, one column per "
        "task.",
    ),
    "ranks": Kind(
        RANKS,
        "Ranks",
        "Mean rank of each arm by {values} over data sets, best first (marker, and the number "
        "after the name). The bars are as long as the critical difference: two arms whose bars do "
        "not overlap differ significantly at 5 %, over all pairs of arms (Nemenyi). Grey band: the "
        "bar of the best arm.",
        "Dot plot of the mean rank of each arm, with bars as long as the critical difference.",
    ),
    "world_maps": Kind(
        WORLDS,
        "Map of planted worlds",
        "Test AUC of MTN with its best lambda, minus that of its rivals: weight decay with its "
        f"best strength, and the baseline without either: {_INTERVAL}. Purple: MTN is better, "
        "orange: the rival is. Hatched: the interval covers 0, or is unknown with one seed. "
        "Strengths are chosen by the monitor on the validation rows.",
        "Heat maps of the difference in test AUC by relatedness of the tasks and noise, one row "
        "per rival and one column per task.",
    ),
    "lambda_curves": Kind(
        "Lambda",
        "{metric} against lambda",
        f"The {{metric}} against lambda: {_INTERVAL}. Dashed: the baseline without MTN, its "
        "interval in grey. Lambda is chosen on the validation rows; the values of the test rows "
        "are shown for information only.",
        "Line charts of {metric} against lambda on a log axis, with the baseline's level.",
    ),
    "training_curves": Kind(
        "Training",
        "Training curves",
        f"Training loss (without the penalty) and validation AUCs over epochs: {_INTERVAL}. "
        f"{_WHILE_ALL_TRAIN} Marks above the axis: best epoch of each seed.",
        "Line charts of training loss and validation AUCs over epochs.",
    ),
    "reliability": Kind(
        "Calibration",
        "Calibration",
        "Observed against predicted rates on the test set, in bins of equal mass pooled over all "
        "seeds, on log axes; the grey line is perfect calibration. Bins without positives cannot "
        "be shown on a log axis.",
        "Reliability diagrams of all arms, one column per task.",
    ),
    "effective_ranks": Kind(
        "What MTN does",
        "Effective ranks",
        "Effective rank exp(H(s / sum s)) of each unfolding with singular values s over epochs, "
        f"with and without MTN: {_INTERVAL}. A penalty of the trace norm lowers it. "
        f"{_WHILE_ALL_TRAIN}",
        "Line charts of the effective rank of each layer's unfoldings over epochs.",
    ),
    "spectra": Kind(
        "What MTN does",
        "Spectra at the best epoch",
        "Singular values of each unfolding at each run's best epoch, with and without MTN: "
        f"{_MEDIAN}. Values below {training_figures.LEAST_SHOWN:g} times the largest are not "
        "shown. A trace norm is their sum.",
        "Line charts of singular values on a log axis, one row per layer and one column per "
        "unfolding.",
    ),
    "alphas": Kind(
        "What MTN does",
        "Weights of the unfoldings",
        f"Alpha of each unfolding over epochs, of arms with MTN: {_INTERVAL}. {_WHILE_ALL_TRAIN}",
        "Line charts of the three alphas of each layer over epochs.",
    ),
    "expert_distances": Kind(
        "What MTN does",
        "Distances between experts",
        "Euclidean distance between two experts' outputs, averaged over test rows and seeds, on "
        "one colour scale. Experts are not matched across seeds: compare the means, not pairs.",
        "Heat maps of the distances between experts; brighter is farther apart.",
    ),
}


def write_figures(
    out: Path,
    runs: Runs,
    track: Callable[[Sequence[PlannedFigure]], Iterable[PlannedFigure]] = iter,
    *,
    metric: str = "auc",
    split: str = "test",
) -> list[WrittenFigure]:
    """Write every figure that the runs have data for, as pdf, svg and png.

    The same runs give the same bytes. Figures of an earlier report in the folder are removed.

    Args:
        out: Folder of the files.
        runs: Finished runs.
        track: Iterates over the planned figures, for example behind a progress bar.
        metric: Metric of the figures of results.
        split: Split of the figures of results.
    """
    names = {"metric": metric_info(metric).title, "values": name_values(metric, split)}
    out.mkdir(parents=True, exist_ok=True)
    remove_files(out, FORMATS)
    written, pages = [], Counter[str]()
    with warnings.catch_warnings(record=True) as caught:
        for planned in track(plan_figures(runs, metric, split)):
            if (figure := planned.draw()) is None:
                continue
            texts, name = KINDS[planned.kind], slug(planned.kind, *planned.parts)
            pages[name] += 1
            page = f"-{pages[name]}" if pages[name] > 1 else ""
            kind_title, caption, alt = (
                text.format(**names) for text in (texts.title, texts.caption, texts.alt)
            )
            title = ", ".join((kind_title, *planned.parts)) + page.replace("-", ", part ")
            paths = save(figure, out, name + page, title)
            alt = f"{alt} {', '.join(planned.parts)}."
            found = WrittenFigure(planned.kind, planned.parts, title, caption, alt, paths)
            written.append(found)
    _report_glyphs(caught)
    return written


def _report_glyphs(caught: Sequence[warnings.WarningMessage]) -> None:
    """Log once that letters have no font, and repeat the other warnings."""
    glyphs = [found for found in caught if str(found.message).startswith("Glyph ")]
    for found in caught:
        if found not in glyphs:
            warnings.warn_explicit(found.message, found.category, found.filename, found.lineno)
    if glyphs:
        _logger.warning(
            "The pdf and png figures show boxes for letters that no font of this machine has. "
            "Install one, for example Noto Sans CJK. The page shows them in the reader's fonts."
        )


def drawn_figures(runs: Runs) -> Iterator[_Drawn]:
    """Yield every kind of figure for every data set, model and noise; None without data."""
    for planned in plan_figures(runs):
        yield planned.kind, planned.parts, planned.draw()


def plan_figures(runs: Runs, metric: str = "auc", split: str = "test") -> list[PlannedFigure]:
    """Return every kind of figure for every data set, model and noise, to be drawn.

    Of many models, and of many arms of a model, only the first have figures of their training.
    """
    of_results = (*_of_results(runs, metric, split), *_of_ranks(runs, metric, split))
    return [*of_results, *_of_worlds(runs), *_of_training(runs), *_of_arrays(runs)]


def _of_results(runs: Runs, metric: str, split: str) -> Iterator[PlannedFigure]:
    results = ordered(runs.results)
    shown = {"metric": metric, "split": split}
    for (data,), of_data in _groups(results, "data"):
        draw: Callable[[], Figure | None] = partial(figures.noise_curves, of_data, **shown)
        yield PlannedFigure("noise_curves", (data,), draw)
        for rows in _pages(of_data):
            draw = partial(figures.paired_differences, rows, **shown)
            yield PlannedFigure("paired_differences", (data,), draw)
        for (model, noise), rows in _groups(of_data, "model", "noise"):
            if rows["lam"].nunique() < 2:
                continue
            parts = _parts(data, model, noise)
            draw = partial(figures.lambda_curves, rows, **shown)
            yield PlannedFigure("lambda_curves", parts, draw)


def _of_ranks(runs: Runs, metric: str, split: str) -> Iterator[PlannedFigure]:
    for ranking in rank_arms(runs.results, metric=metric, split=split):
        parts = tuple(filter(None, (task_title(ranking.task), ranking.noise)))
        yield PlannedFigure("ranks", parts, partial(figures.critical_differences, ranking))


def _of_worlds(runs: Runs) -> Iterator[PlannedFigure]:
    worlds = map_worlds(runs)
    for (name,), rows in _groups(worlds, "map") if len(worlds) else ():
        yield PlannedFigure("world_maps", (name,), partial(figures.world_maps, rows))


def _of_training(runs: Runs) -> Iterator[PlannedFigure]:
    settings = blocks(runs.settings)
    epochs = runs.epochs.drop(columns=["line", "color"])
    by_run = {name: rows for (name,), rows in _groups(epochs, "run")}
    bins = {name: rows for (name,), rows in _groups(runs.bins, "run")}
    for (data, block), of_block in islice(_groups(settings, "data", "block"), MOST_BLOCKS):
        several = of_block["noise"].nunique() > 1
        rows = of_block["noise"].map(lambda noise: f"noise {noise:g}") if several else ""
        arms = of_block.assign(row=rows)[["run", "row", "line", "color", "best_epoch", "treated"]]
        for page in _pages(arms, MOST_ARMS):
            for kind, draw, tables in (
                ("training_curves", training_figures.training_curves, by_run),
                ("reliability", figures.reliability, bins),
            ):
                found = _joined(page, tables)
                if not found.empty:
                    yield PlannedFigure(kind, (data, block), partial(draw, found))


def _joined(arms: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of the runs in ``arms``, with their columns."""
    found = [tables[name] for name in arms["run"] if name in tables and len(tables[name])]
    if not found:
        return pd.DataFrame()
    of_runs = pd.concat(found)
    other = [name for name in of_runs.columns if name in arms.columns and name != "run"]
    return arms.merge(of_runs.drop(columns=other), on="run")


def _of_arrays(runs: Runs) -> Iterator[PlannedFigure]:
    settings, by_name = blocks(runs.settings), {run.name: run for run in runs}
    history = runs.epochs[runs.epochs["name"].str.startswith("mtn/")]
    logged = {name: rows for (name,), rows in _groups(history, "run")}
    groups = _groups(settings, "data", "block", "noise")
    for (data, block, noise), group in islice(groups, MOST_BLOCKS):
        parts = _parts(data, block, noise)
        experts = (group["target"] == "shared").fillna(value=False).astype(bool)
        for place, arms in (("layer", group[~experts]), ("shared", group[experts | ~group["mtn"]])):
            if place == "shared" and not experts.any():
                continue
            suffix = ("experts",) if place == "shared" else ()
            shown_arms = arms[["run", "arm", "line", "color", "treated", "mtn"]]
            for page in _pages(shown_arms, MOST_ARMS):
                of_page = [by_name[name] for name in page["run"]]
                shown = (*parts, *suffix)
                curves = partial(_mechanism_curves, page, of_page, logged, place)
                for kind, draw in (
                    ("effective_ranks", training_figures.effective_ranks),
                    ("alphas", training_figures.alphas),
                ):
                    yield PlannedFigure(kind, shown, partial(_draw, draw, curves))
                yield PlannedFigure(
                    "spectra",
                    shown,
                    partial(
                        _draw,
                        training_figures.spectra,
                        partial(_best_spectra, page, of_page, place),
                    ),
                )
        for page in _pages(group, MOST_ARMS):
            yield PlannedFigure("expert_distances", parts, partial(_distances, page, by_name))


def _draw(
    draw: Callable[[pd.DataFrame], Figure | None], make: Callable[[], pd.DataFrame]
) -> Figure | None:
    table = make()
    return None if table.empty else draw(table)


def blocks(settings: pd.DataFrame) -> pd.DataFrame:
    """Return the settings in drawing order, with ``block``: the label of an arm's baseline."""
    baselines = settings[~settings["treated"]].drop_duplicates("baseline").set_index("baseline")
    names = settings["baseline"].map(baselines["model"]).fillna(settings["model"])
    by = ["data", "block", "noise", "treated", "color", "seed"]
    return settings.assign(block=names).sort_values(by, kind="stable")


def _mechanism_curves(
    arms: pd.DataFrame, runs: Sequence[Run], logged: Mapping[str, pd.DataFrame], place: str
) -> pd.DataFrame:
    """Return what runs with MTN logged, and the effective ranks of the others' spectra."""
    tables = {
        run.name: logged[run.name]
        if run.name in logged
        else pd.DataFrame(_ranks(run, place), columns=["run", "epoch", "name", "value"])
        for run in runs
    }
    return _joined(arms, tables)


def _ranks(run: Run, place: str) -> Iterator[tuple[str, int, str, float]]:
    for epoch, path in _spectrum_files(run).items():
        with np.load(path) as arrays:
            for layer, unfolding in (name.split("/") for name in arrays):
                where, _, depth = layer.rpartition("_")
                if where == place:
                    shares = arrays[f"{layer}/{unfolding}"]
                    shares = shares[shares > 0] / shares.sum()
                    rank = float(np.exp(-(shares * np.log(shares)).sum()))
                    yield (
                        run.name,
                        epoch,
                        str(LayerKey(int(depth), "effective_rank", unfolding)),
                        rank,
                    )


def _spectrum_files(run: Run) -> dict[int, Path]:
    """Return a run's spectrum files by epoch, in order, of the epochs in its record."""
    trained = {entry["epoch"] for entry in run.record.history}
    files = {int(path.stem[6:]): path for path in run.folder.glob("spectra/epoch_*.npz")}
    return {epoch: files[epoch] for epoch in sorted(files) if epoch in trained}


def _best_spectra(arms: pd.DataFrame, runs: Sequence[Run], place: str) -> pd.DataFrame:
    tables = {}
    for run in runs:
        path = _spectrum_files(run).get(run.record.best_epoch)
        if path is not None:
            tables[run.name] = _spectrum(run, path, place)
    return _joined(arms, tables)


def _spectrum(run: Run, path: Path, place: str) -> pd.DataFrame:
    # MTN on experts calls its layers `layer`, as MTN on towers does.
    wanted = "layer" if run.record.identity.treatments else place
    columns = ["run", "row", "column", "x", "value"]
    with np.load(path) as arrays:
        rows = [
            (run.name, f"layer {layer.rpartition('_')[2]}", f"{unfolding} unfolding", index, value)
            for layer, unfolding in (name.split("/") for name in arrays)
            if layer.rpartition("_")[0] == wanted
            for index, value in enumerate(arrays[f"{layer}/{unfolding}"], start=1)
        ]
    return pd.DataFrame(rows, columns=columns)


def _distances(group: pd.DataFrame, by_name: Mapping[str, Run]) -> Figure | None:
    matrices = {
        str(line): [np.asarray(by_name[name].record.expert_distances) for name in arm["run"]]
        for (line,), arm in _groups(group, "line")
        if all(by_name[name].record.expert_distances for name in arm["run"])
    }
    return training_figures.expert_distances(matrices)


def _groups(table: pd.DataFrame, *keys: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield the groups in order of first occurrence."""
    yield from table.groupby(list(keys), sort=False)


def _parts(data: str, model: str, noise: float) -> tuple[str, ...]:
    return (data, model, f"noise {noise:g}") if noise else (data, model)


def _pages(table: pd.DataFrame, most: int | None = None) -> Iterator[pd.DataFrame]:
    """Yield the rows of a few of the first ``most`` arms at a time, with those of the baselines."""
    lines = list(table.loc[table["treated"], "line"].unique())[:most]
    for start in range(0, max(len(lines), 1), _MOST_LINES):
        shown = table["line"].isin(lines[start : start + _MOST_LINES])
        yield table[~table["treated"] | shown]
