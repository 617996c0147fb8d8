"""One self-contained page: the verdict, a section per question, and how the runs were made."""

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mtnrec.reporting.figure.catalogue import (
    KINDS,
    MOST_ARMS,
    MOST_BLOCKS,
    RANKS,
    WORLDS,
    WrittenFigure,
    blocks,
)
from mtnrec.reporting.figure.style import color_of
from mtnrec.reporting.machines import warn_of_machines
from mtnrec.reporting.runs import Runs, UnfinishedRun
from mtnrec.reporting.summary import Forest, costs_of_arms, facts, lay_out_forest, summarise
from mtnrec.reporting.table.appendix import (
    cost_table,
    data_table,
    deviation_tables,
    runs_table,
    settings_tables,
    version_table,
)
from mtnrec.reporting.table.render import Table, to_csv, to_html, to_latex
from mtnrec.reporting.table.scores import comparisons, score_table
from mtnrec.reporting.table.tuning import trial_table
from mtnrec.system.files import slug, write_atomic

_PROTOCOL = (
    "A share of the training rows is held out for validation. The monitored validation metric "
    "selects the epoch and stops training early; the weights of that epoch are evaluated once on "
    "the test rows. AUCs are exact, over all rows of a split, with ties counted as one half. CTR "
    "and CTCVR are measured on all rows, CVR on the clicked rows. Runs are paired by seed, split "
    "and noise. All other settings are listed here."
)
_MECHANISM = (
    "MTN stacks the weights of parallel layers (a layer of each tower, or of each expert) into a "
    "tensor and lays it out as a matrix in three ways: by task or expert, by output and by input. "
    "It penalises the sum of each matrix's singular values, its trace norm, weighted by alpha: the "
    "smaller singular values shrink first, the effective rank falls, and the layers share "
    "directions. The grey line is the same model without MTN."
)


_WORLDS = (
    "The labels of these logs are drawn from known probabilities. Relatedness is how much of the "
    "conversion's logits comes from the hidden layer that the click's read: 1 for all, 0 for a "
    "hidden layer of its own; noise is the share of noisy training and validation rows. At each "
    "point MTN has the lambda, and weight decay the strength, with the best mean of the monitor on "
    "the validation rows over all seeds; the test rows choose nothing. planted_worlds.csv has the "
    "strengths, the AUCs and those of the true probabilities."
)


@dataclass(frozen=True)
class _Image:
    kind: str
    title: str
    caption: str
    svg: Markup
    links: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Section:
    """A section: what is shown at once, and what is folded, by the text that unfolds it."""

    title: str
    text: str = ""
    tables: Sequence[Markup] = ()
    images: Sequence[_Image] = ()
    folded: Sequence[tuple[str, Sequence[Markup]]] = ()
    more: Sequence[_Image] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class ReportTables:
    """Tables of a report, by section.

    Args:
        scores: Scores of the arms.
        differences: Differences from the baselines.
        over_rows: Intervals over test rows, if runs kept their scores.
        tuning: Results of tuned sweeps.
        ranks: Ranks over data sets.
        worlds: Maps of planted worlds.
    """

    scores: Sequence[Table]
    differences: Sequence[Table] = ()
    over_rows: Sequence[Table] = ()
    tuning: Sequence[Table] = ()
    ranks: Sequence[Table] = ()
    worlds: Sequence[Table] = ()

    def all(self) -> list[Table]:
        """Return the tables in the order of the page."""
        return [table for part in vars(self).values() for table in part]


def write_page(
    path: Path,
    runs: Runs,
    *,
    left_out: Sequence[UnfinishedRun],
    compared: pd.DataFrame,
    tables: ReportTables,
    figures: Sequence[WrittenFigure],
) -> None:
    """Write a page with embedded style, script and figures, which any browser opens offline.

    Args:
        path: File of the page, in the folder of the report.
        runs: Finished runs.
        left_out: Runs without a result.
        compared: Output of :func:`mtnrec.reporting.table.scores.comparisons` for all runs.
        tables: Tables of the sections.
        figures: Written figures; their SVG is embedded.
    """
    environment = Environment(
        loader=PackageLoader("mtnrec.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ", ".join(sorted(runs.settings["data"].unique()))
    subject = "MTN" if runs.settings["mtn"].any() else f"{runs.settings['arm'].nunique()} arms"
    forest: Forest = lay_out_forest(compared)
    page = environment.get_template("page.html.jinja").render(
        title=f"{subject} on {names}",
        summary=list(summarise(compared)),
        forest=forest,
        costs=costs_of_arms(runs),
        warnings=warn_of_machines(runs),
        facts=facts(runs),
        left_out=left_out,
        sections=list(_sections(path, runs, compared, tables, figures)),
        runs=runs_table(runs, path.parent),
        color_of=color_of,
        version=metadata.version("mtnrec"),
    )
    write_atomic(path, page)


def _sections(
    path: Path,
    runs: Runs,
    compared: pd.DataFrame,
    tables: ReportTables,
    figures: Sequence[WrittenFigure],
) -> Iterator[_Section]:
    section = partial(_section, path.parent, figures)
    results = {
        "Each difference, with p-values": tables.differences,
        "Intervals over seeds, test users and both": tables.over_rows,
    }
    yield section("Results", most=0, tables=_rendered(tables.scores), folded=_folded(results))
    if tables.tuning:
        trials = _folded({"All trials": [trial_table(runs)]})
        yield _Section("Tuning", tables=_rendered(tables.tuning), folded=trials)
    if tables.ranks:
        yield section(RANKS, tables=_rendered(tables.ranks))
    if tables.worlds:
        maps = _folded({"Tables of the maps": tables.worlds})
        yield section(WORLDS, most=len(figures), text=_WORLDS, folded=maps)
    published = list(deviation_tables(compared))
    if published:
        yield _Section("Published numbers", tables=_rendered(published))
    has_mtn = runs.settings["mtn"].any()
    texts = {"Training": _left_out(runs), "What MTN does": _MECHANISM if has_mtn else ""}
    for name in dict.fromkeys(kind.section for kind in KINDS.values()):
        if name in ("Results", RANKS, WORLDS, "Calibration"):  # with tables
            continue
        found = section(name, most=2, text=texts.get(name, ""))
        if found.images:
            is_spectra = name == "What MTN does" and not has_mtn
            yield replace(found, title="Spectra") if is_spectra else found
    yield section("Calibration", tables=_calibration(runs))
    yield _Section("Costs", folded=_folded({"Costs of each arm": [cost_table(runs)]}))
    differing, shared = settings_tables(runs)
    yield _Section(
        "Settings",
        _PROTOCOL,
        tables=_rendered([differing]) if differing.rows else (),
        folded=_folded(
            {
                "Data sets": [data_table(runs)],
                "Settings shared by all runs": [shared],
                "Versions and machines": [version_table(runs)],
            }
        ),
    )


def _section(
    folder: Path,
    figures: Sequence[WrittenFigure],
    title: str,
    *,
    most: int = 1,
    **parts: object,
) -> _Section:
    """Show the first figure of the first kinds at once, and fold the others."""
    kinds = [name for name, kind in KINDS.items() if kind.section == title]
    found = [[f for f in figures if f.kind == kind] for kind in kinds]
    shown = [of_kind[0] for of_kind in found if of_kind][:most]
    rest = [
        figure for of_kind in found for figure in of_kind if all(figure is not s for s in shown)
    ]
    images, more = ([_image(f, folder) for f in part] for part in (shown, rest))
    return _Section(title, images=images, more=more, **parts)  # type: ignore[arg-type]


def _folded(tables: Mapping[str, Sequence[Table]]) -> list[tuple[str, list[Markup]]]:
    """Render tables by the text that unfolds them, without those that are empty."""
    return [(text, _rendered(part)) for text, part in tables.items() if part]


def _left_out(runs: Runs) -> str:
    """Return which runs have no figures of their training and layers."""
    arms = blocks(runs.settings).query("treated").groupby(["data", "block"])["line"].nunique()
    models = blocks(runs.settings)[["data", "block"]].drop_duplicates()
    parts = []
    if len(models) > MOST_BLOCKS:
        parts.append(f"the first {MOST_BLOCKS} of {len(models)} models")
    if len(arms) and arms.max() > MOST_ARMS:
        parts.append(f"the first {MOST_ARMS} arms of each model")
    if not parts:
        return ""
    return (
        f"Only {' and '.join(parts)} have figures of training, layers and calibration. The values "
        "of all runs are in epochs.csv; report a folder of fewer runs to see the others."
    )


def _calibration(runs: Runs) -> list[Markup]:
    results = runs.results
    if not ((results["metric"] == "calibration") & (results["split"] == "test")).any():
        return []
    cells = comparisons(results, metric="calibration")
    return _rendered([score_table(cells, "Sum of predictions over sum of labels; 1 is calibrated")])


def _rendered(tables: Sequence[Table]) -> list[Markup]:
    """Render tables with links to their LaTeX and csv, which the page holds."""
    return [Markup(to_html(table).replace("<figcaption>", _links(table), 1)) for table in tables]


def _links(table: Table) -> str:
    name = slug(table.title)
    links = [
        f'<a download="{name}.{suffix}" href="data:text/plain;charset=utf-8;base64,'
        f'{base64.b64encode(content.encode()).decode()}">{title}</a>'
        for suffix, title, content in (
            ("tex", "LaTeX", to_latex(table)),
            ("csv", "csv", to_csv(table)),
        )
    ]
    return f'<figcaption><p class="links">{" ".join(links)}</p>'


def _image(figure: WrittenFigure, folder: Path) -> _Image:
    (path,) = (path for path in figure.paths if path.suffix == ".svg")
    links = [
        (path.suffix.removeprefix("."), quote(Path(os.path.relpath(path, folder)).as_posix()))
        for path in figure.paths
    ]
    return _Image(figure.kind, figure.title, figure.caption, _inline(path, figure.alt), links)


def _inline(path: Path, alt: str) -> Markup:
    """Return an SVG as an element of the page, in the page's colours and at any width."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening, rest = text[: text.index(">")], text[text.index(">") :]
    opening = re.sub(r' (width|height|version)="[^"]*"', "", opening)
    rest = rest.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
    label = Markup(' role="img" aria-label="{}"').format(alt)
    return Markup(opening) + label + Markup(rest)
