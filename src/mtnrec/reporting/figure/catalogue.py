"""Figures of the report: the runs that each shows, its file, title, caption and alt text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mtnrec.files import slug
from mtnrec.reporting.figure import results as result_figures
from mtnrec.reporting.figure import training as training_figures
from mtnrec.reporting.figure.style import BASELINE, ordered, save
from mtnrec.reporting.runs import Run, Runs

MTN = "MTN"
_MOST_ROWS = 5  # rows of panels per figure
_MOST_VARIANTS = 8  # variants per figure of paired differences
_Drawn = tuple[str, tuple[str, ...], Figure | None]  # kind, parts of the name, figure
_DISTANCE_TITLES = {"shared": "MTN on experts", "": "no MTN", "towers": "MTN on towers"}
_INTERVAL = "the mean over seeds with its 95 % confidence interval (Student's t)"
_MEDIAN = "the median over seeds, with a band from the smallest to the largest value"
_WHILE_ALL_TRAIN = "A curve ends at the epoch in which the first of its seeds stopped."


@dataclass(frozen=True)
class Kind:
    """Texts shared by all figures of a kind.

    Args:
        title: Title without the name of the data set.
        caption: Contents of the figure, with definitions.
        alt: Description for readers who cannot see the figure.
    """

    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class WrittenFigure:
    """A figure on disk.

    Args:
        kind: Key of ``KINDS``.
        title: Title on a page.
        caption: Caption on a page or in a paper.
        alt: Alt text of the image.
        paths: The same figure in each format: pdf, svg, png.
    """

    kind: str
    title: str
    caption: str
    alt: str
    paths: tuple[Path, ...]


KINDS = {
    "noise_curves": Kind(
        "AUC against noise",
        f"Test AUC against the proportion of noisy rows: {_INTERVAL}. The intervals are per arm; "
        "those of the differences, paired by seed, are in another figure.",
        "Line charts of test AUC against noise, one row per model and one column per task.",
    ),
    "paired_differences": Kind(
        "Differences between paired runs",
        "Test AUC with MTN minus without, for each seed that both arms have (circles), and "
        f"{_INTERVAL}. Right of the line, the AUC is higher with MTN.",
        "Dot plots of the differences in test AUC, one row per model and noise, one column per "
        "task.",
    ),
    "lambda_curves": Kind(
        "AUC against lambda",
        f"Test and validation AUC against lambda: {_INTERVAL}. Dashed: the baseline without MTN, "
        "its interval in grey. Lambda is chosen by the validation AUC; the test AUC is shown for "
        "information only.",
        "Line charts of AUC against lambda on a log axis, with the baseline's level.",
    ),
    "training_curves": Kind(
        "Training curves",
        "Training loss (without the penalty) and validation AUCs over epochs, with and without "
        f"MTN: {_INTERVAL}. {_WHILE_ALL_TRAIN} Marks above the axis: best epoch of each seed.",
        "Line charts of training loss and validation AUCs over epochs.",
    ),
    "reliability": Kind(
        "Calibration",
        "Observed against predicted rates on the test set, in bins of equal mass pooled over all "
        "seeds, on log axes; the grey line is perfect calibration. Bins without positives cannot "
        "be shown on a log axis. Numbers: sum of predictions over sum of labels; 1 is calibrated.",
        "Reliability diagrams with and without MTN, one column per task.",
    ),
    "alphas": Kind(
        "Weights of the unfoldings",
        f"Alpha of each unfolding over epochs: {_INTERVAL}. {_WHILE_ALL_TRAIN}",
        "Line charts of the three alphas of each layer over epochs.",
    ),
    "effective_ranks": Kind(
        "Effective ranks",
        "Effective rank exp(H(s / sum s)) of each unfolding with singular values s over epochs: "
        f"{_INTERVAL}. {_WHILE_ALL_TRAIN}",
        "Line charts of the effective rank of each layer's unfoldings over epochs, on a log axis.",
    ),
    "spectra": Kind(
        "Spectra at the best epoch",
        f"Singular values of each unfolding at each run's best epoch: {_MEDIAN}. Values below "
        f"{training_figures.LEAST_SHOWN:g} times the largest are not shown.",
        "Line charts of singular values on a log axis, one row per layer and one column per "
        "unfolding.",
    ),
    "spectra_over_epochs": Kind(
        "Spectra over epochs",
        "Singular values of each unfolding after each run's first, middle and last epoch: "
        f"{_MEDIAN}. Values below {training_figures.LEAST_SHOWN:g} times the largest are not "
        "shown.",
        "Line charts of singular values at three epochs on a log axis.",
    ),
    "expert_distances": Kind(
        "Distances between experts",
        "Euclidean distance between two experts' outputs, averaged over test rows and seeds, on "
        "one colour scale. Experts are not matched across seeds: compare levels, not pairs.",
        "Heat maps of the distances between experts; brighter is farther apart.",
    ),
}


def write_figures(out: Path, runs: Runs) -> list[WrittenFigure]:
    """Write every figure that the runs have data for, as pdf, svg and png.

    The same runs give the same bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    written, pages = [], Counter[str]()
    for kind, parts, figure in drawn_figures(runs):
        if figure is None:
            continue
        texts, name = KINDS[kind], slug(kind, *parts)
        pages[name] += 1
        page = f"-{pages[name]}" if pages[name] > 1 else ""
        title = ", ".join((texts.title, *parts)) + page.replace("-", ", page ")
        paths = save(figure, out, name + page)
        alt = f"{texts.alt} {', '.join(parts)}."
        written.append(WrittenFigure(kind, title, texts.caption, alt, paths))
    return written


def contrasts(settings: pd.DataFrame) -> pd.DataFrame:
    """Return ``run``, ``row`` and ``line``: each row of panels has an MTN arm and its baseline.

    A baseline is in the row of each of its arms; one without arms has its own row.

    Args:
        settings: Rows of :attr:`Runs.settings` for one data set and model.
    """
    parts = []
    settings = settings.sort_values(["lam", "variant", "seed"], kind="stable")
    for noise, group in settings.groupby("noise"):
        without = group[~group["mtn"]].assign(line=BASELINE)
        for variant, arm in group[group["mtn"]].groupby("variant", sort=False):
            pair = pd.concat([without, arm.assign(line=MTN)])
            parts.append(pair.assign(row=f"{variant}, noise {noise:g}"))
        if not group["mtn"].any():
            parts.append(without.assign(row=f"noise {noise:g}"))
    return pd.concat(parts)[["run", "row", "line"]]


def drawn_figures(runs: Runs) -> Iterator[_Drawn]:
    """Yield every kind of figure for every data set, model and noise; None without data."""
    results = ordered(runs.results)
    by = ["data", "model", "noise", "mtn", "lam", "variant", "seed"]
    settings = runs.settings.sort_values(by, kind="stable")
    for (data,), of_data in _groups(results, "data"):
        yield "noise_curves", (data,), result_figures.noise_curves(of_data)
        variants = of_data["variant"].unique()
        for page in _pages([name for name in variants if name], _MOST_VARIANTS):
            rows = of_data[of_data["variant"].isin([*page, ""])]
            yield "paired_differences", (data,), result_figures.paired_differences(rows)
        for (model, noise), rows in _groups(of_data, "model", "noise"):
            yield "lambda_curves", _parts(data, model, noise), result_figures.lambda_curves(rows)
    epochs = runs.epochs.merge(settings[["run", "best_epoch"]], on="run")
    for (data, model), of_model in _groups(settings, "data", "model"):
        arms = contrasts(of_model)
        for page in _pages(list(arms["row"].unique()), _MOST_ROWS):
            shown = arms[arms["row"].isin(page)]
            curves = shown.merge(epochs, on="run")
            yield "training_curves", (data, model), training_figures.training_curves(curves)
            yield "alphas", (data, model), training_figures.alphas(curves)
            yield "effective_ranks", (data, model), training_figures.effective_ranks(curves)
            rates = shown.merge(runs.bins, on="run")
            yield "reliability", (data, model), result_figures.reliability(rates)
    yield from _figures_of_arrays(runs, settings)


def _figures_of_arrays(runs: Runs, settings: pd.DataFrame) -> Iterator[_Drawn]:
    by_name = {run.name: run for run in runs}
    for (data, model, noise), group in _groups(settings, "data", "model", "noise"):
        parts = _parts(data, model, noise)
        arms = {
            variant: [by_name[name] for name in arm["run"]]
            for (variant,), arm in _groups(group, "variant")
        }
        for matrices in _distances(arms):
            yield "expert_distances", parts, training_figures.expert_distances(matrices)
        measured = {
            name: kept
            for name, arm in arms.items()
            if (kept := [run for run in arm if run.record.best_epoch in _spectrum_files(run)])
        }
        for target, suffix in (("towers", ()), ("shared", ("experts",))):
            of_target = [name for name in measured if _target(arms[name]) == target]
            for page in _pages(of_target, _MOST_ROWS):
                best = pd.concat(_best_spectra(name, measured[name]) for name in page)
                yield "spectra", (*parts, *suffix), training_figures.spectra(best)
        for variant, arm in measured.items():
            three = pd.concat(map(_three_spectra, arm))
            yield "spectra_over_epochs", (*parts, variant), training_figures.spectra(three)


def _distances(arms: Mapping[str, Sequence[Run]]) -> Iterator[dict[str, list[np.ndarray]]]:
    """Yield the panels of each page in order: MTN on experts, no MTN, MTN on towers."""
    found = {
        variant: [np.asarray(run.record.expert_distances) for run in arm]
        for variant, arm in arms.items()
        if all(run.record.expert_distances for run in arm)
    }
    places = {name: _target(arms[name]) if name else "" for name in found}
    titles = {
        name: _DISTANCE_TITLES[place] if list(places.values()).count(place) == 1 else name
        for name, place in places.items()
    }
    order = sorted(found, key=lambda name: list(_DISTANCE_TITLES).index(places[name]))
    for page in _pages([name for name in order if name], _MOST_ROWS) if any(order) else [order]:
        # Every page shows the baseline.
        yield {titles[name]: found[name] for name in order if name in page or not name}


def _target(arm: Sequence[Run]) -> str:
    return arm[0].record.config["mtn"]["target"]


def _spectrum_files(run: Run) -> dict[int, Path]:
    """Return a run's spectrum files by epoch, in order."""
    files = {int(path.stem[6:]): path for path in run.folder.glob("spectra/epoch_*.npz")}
    return dict(sorted(files.items()))


def _best_spectra(line: str, arm: Sequence[Run]) -> pd.DataFrame:
    files = [(run, _spectrum_files(run)[run.record.best_epoch]) for run in arm]
    return pd.concat(_spectrum(run, path, line) for run, path in files)


def _three_spectra(run: Run) -> pd.DataFrame:
    files = list(_spectrum_files(run).values())
    chosen = {"first epoch": files[0], "middle": files[(len(files) - 1) // 2], "last": files[-1]}
    return pd.concat(_spectrum(run, path, line) for line, path in chosen.items())


def _spectrum(run: Run, path: Path, line: str) -> pd.DataFrame:
    with np.load(path) as arrays:
        tables = [
            pd.DataFrame({"x": np.arange(1, len(values) + 1), "value": values}).assign(
                row=layer.replace("_", " "), column=unfolding
            )
            for (layer, unfolding), values in ((n.split("/"), arrays[n]) for n in arrays)
        ]
    return pd.concat(tables).assign(run=run.name, line=line)


def _groups(table: pd.DataFrame, *keys: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield the groups in order of first occurrence."""
    yield from table.groupby(list(keys), sort=False)


def _parts(data: str, model: str, noise: float) -> tuple[str, ...]:
    return (data, model, f"noise {noise:g}") if noise else (data, model)


def _pages(names: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), most):
        yield names[start : start + most]
