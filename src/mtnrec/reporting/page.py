"""One self-contained page: tables, figures and how the runs were made."""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mtnrec.files import write_atomic
from mtnrec.reporting.figure.catalogue import KINDS, WrittenFigure
from mtnrec.reporting.runs import Runs, UnfinishedRun
from mtnrec.reporting.table.appendix import (
    cost_table,
    data_table,
    deviation_tables,
    settings_tables,
    version_table,
)
from mtnrec.reporting.table.render import Table, to_html

_PIXELS_PER_POINT = 96 / 72 * 1.3  # figure text is 8 points, sized for print
_PROTOCOL = (
    "A share of the training rows is held out for validation. The monitored validation metric "
    "selects the epoch and stops training early; the weights of that epoch are evaluated once on "
    "the test rows. AUCs are exact, over all rows of a split, with ties counted as one half. CTR "
    "and CTCVR are measured on all rows, CVR on the clicked rows. Runs are paired by seed, split "
    "and noise. All other settings are listed below."
)


@dataclass(frozen=True)
class _Image:
    title: str
    caption: str
    alt: str
    source: str
    width: int


@dataclass(frozen=True)
class _Section:
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Markup] = ()
    images: Sequence[_Image] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def write_page(
    path: Path,
    runs: Runs,
    *,
    left_out: Sequence[UnfinishedRun],
    cells: Sequence[pd.DataFrame],
    tables: Sequence[Table],
    figures: Sequence[WrittenFigure],
) -> None:
    """Write a page with embedded style and figures, which any browser opens offline.

    Args:
        path: File of the page.
        runs: Finished runs.
        left_out: Runs without a result.
        cells: Output of :func:`mtnrec.reporting.table.scores.comparisons`, by table.
        tables: Scores and differences.
        figures: Written figures; their SVG is embedded.
    """
    settings = runs.settings
    environment = Environment(
        loader=PackageLoader("mtnrec.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        title=f"MTN on {', '.join(sorted(settings['data'].unique()))}",
        summary=list(summarise(cells)),
        numbers={
            "runs": len(runs),
            "arms": settings["arm"].nunique(),
            "models": settings["model"].nunique(),
            "data sets": settings["data"].nunique(),
            "noise proportions": settings["noise"].nunique(),
            "seeds": settings["seed"].nunique(),
        },
        left_out=left_out,
        sections=list(_sections(runs, cells, tables, figures)),
        version=metadata.version("mtnrec"),
    )
    write_atomic(path, page)


def summarise(cells: Sequence[pd.DataFrame]) -> Iterator[str]:
    """Yield sentences that sum up the comparisons of all tables.

    Args:
        cells: Output of :func:`mtnrec.reporting.table.scores.comparisons`, by table.
    """
    compared = pd.concat([table[table["pairs"] > 0] for table in cells])
    if compared.empty:
        yield "No run with MTN has a baseline run with the same seed to be compared with."
        return
    better = compared["improved"]
    yield (
        f"The mean with MTN is better than the baseline's in {better.sum()} of {len(compared)} "
        f"comparisons ({_significant(compared[better])}). It is equal or worse in "
        f"{(~better).sum()} ({_significant(compared[~better])})."
    )


def _significant(cells: pd.DataFrame) -> str:
    plain, corrected = ((cells[key] < 0.05).sum() for key in ("p_value", "holm_p"))
    return f"{plain} significant at p < 0.05, {corrected} after Holm's correction"


def _sections(
    runs: Runs,
    cells: Sequence[pd.DataFrame],
    tables: Sequence[Table],
    figures: Sequence[WrittenFigure],
) -> Iterator[_Section]:
    yield _Section("Results", tables=_rendered(tables))
    published = [found for table in cells for found in deviation_tables(table)]
    if published:
        yield _Section("Published numbers", tables=_rendered(published))
    for name, kind in KINDS.items():
        images = [_image(figure) for figure in figures if figure.kind == name]
        if images:
            yield _Section(kind.title, images=images)
    yield _Section("Cost", tables=_rendered([cost_table(runs)]))
    how = [data_table(runs), *settings_tables(runs), version_table(runs)]
    yield _Section("Protocol", (_PROTOCOL,), _rendered(how))


def _rendered(tables: Sequence[Table]) -> list[Markup]:
    return [Markup(to_html(table)) for table in tables]


def _image(figure: WrittenFigure) -> _Image:
    (svg,) = (path for path in figure.paths if path.suffix == ".svg")
    content = svg.read_bytes()
    source = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    points = re.search(rb'width="([\d.]+)pt"', content)
    width = 0 if points is None else round(float(points[1]) * _PIXELS_PER_POINT)
    return _Image(figure.title, figure.caption, figure.alt, source, width)
