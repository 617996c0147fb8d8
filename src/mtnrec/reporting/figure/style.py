"""Shared style of the figures: lines with intervals, panels, legends, files.

Palette: Okabe and Ito, Color Universal Design (2008), distinguishable with every kind of colour
vision. Lines also differ in marker and dashes, so that no figure relies on colour alone.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from mtnrec.reporting.baseline import BASELINE
from mtnrec.reporting.significance import mean_interval
from mtnrec.reporting.table.published import TASKS
from mtnrec.system.files import write_atomic

P = ParamSpec("P")
R = TypeVar("R")
Style = Mapping[str, Any]  # keywords of Axes.plot
Draw = Callable[[Axes, pd.DataFrame, str, Style], None]

FORMATS = ("pdf", "svg", "png")
SEQUENTIAL = "cividis"  # perceptually uniform, also in grey and to the colour-blind
DIVERGING = "PuOr"  # orange below zero, purple above, for every kind of colour vision
_ONE_COLUMN, _TWO_COLUMNS = 3.3, 7.0  # inches, on a two-column page
_COLORS = ("#80868f", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FEW_POINTS = 3
_DASHES = ((0, (4, 2)), "-", (0, (6, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_SVG = "http://www.w3.org/2000/svg"
_HOVER = "hover:"
# The first comes with matplotlib; the others have the signs of most other scripts.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans", "Unifont")
_STYLE: dict[Any, Any] = {
    "font.family": [name for name in _FONTS if name in {font.name for font in fontManager.ttflist}],
    "text.parse_math": False,  # names may contain $
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "pdf.fonttype": 42,  # TrueType; publishers reject Type 3, the default
    "svg.hashsalt": "mtnrec",  # reproducible ids
    "svg.fonttype": "none",  # text, in the reader's fonts
    "savefig.dpi": 200,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Make a function draw in the shared style without changing matplotlib's settings."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def color_of(number: int) -> str:
    """Return the colour of an arm by its number; only 0, a baseline, is grey.

    >>> color_of(0) == color_of(7), color_of(1) == color_of(7)
    (False, True)
    """
    return _COLORS[1 + (number - 1) % (len(_COLORS) - 1) if number else 0]


def line_style(index: int) -> dict[str, Any]:
    """Return colour, marker and dashes of an arm by its number; 0, grey, is a baseline."""
    return {
        "color": color_of(index),
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "markerfacecolor": "white" if index == 0 else color_of(index),
    }


def along_funnel(tasks: pd.Series) -> pd.Series:
    """Return sort keys of tasks: funnel tasks first, in funnel order; others in their order."""
    return tasks.map(lambda task: (*TASKS, task).index(task))


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Sort results in drawing order: baselines first, by model, arm, noise and task."""
    by_task = table.sort_values("task", key=along_funnel, kind="stable")
    return by_task.sort_values(["data", "treated", "model", "color", "noise"], kind="stable")


def panels(
    rows: int, columns: int, *, height: float = 1.6, **subplots: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure one or two page columns wide, and its ``(rows, columns)`` axes.

    Args:
        rows: Number of rows.
        columns: Number of columns; a single one makes the figure one page column wide.
        height: Height of a row in inches.
        subplots: Keyword arguments of `Figure.subplots`.
    """
    width = _ONE_COLUMN if columns == 1 else _TWO_COLUMNS
    figure = Figure(figsize=(width, 0.45 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def facets(
    table: pd.DataFrame, draw: Draw, *, x: str, y: str, **subplots: Any
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Draw a panel per ``row`` and ``column`` of a table, with every ``line`` in it.

    Args:
        table: ``row``, ``column``, ``line`` (names, drawn in order of first occurrence),
            ``color`` (number of a line's style; by default, in order) and the columns that ``draw``
            needs.
        draw: Draws the rows of one line into a panel.
        x: Label of the horizontal axes.
        y: Label of the vertical axes.
        subplots: See `panels`.

    Returns:
        The figure, and its axes by row and column; a panel without data is left blank.
    """
    rows, columns, lines = (list(table[key].unique()) for key in ("row", "column", "line"))
    numbers = {line: number + (BASELINE not in lines) for number, line in enumerate(lines)}
    if "color" in table:
        numbers = dict(zip(table["line"], table["color"], strict=True))
    styles = {line: line_style(numbers[line]) for line in lines}
    figure, grid = panels(len(rows), len(columns), **subplots)
    found = {}
    for (row, column), axes in zip(itertools.product(rows, columns), grid.flat, strict=True):
        part = table[(table["row"] == row) & (table["column"] == column)]
        if part.empty:
            axes.set_axis_off()  # keeps the column title
            continue
        for line in (line for line in lines if (part["line"] == line).any()):
            draw(axes, part[part["line"] == line], line, styles[line])
        found[row, column] = axes
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        # Row names are long, so they are written above the panels and the column titles.
        row_title(axes, row, line=int(row == rows[0]))
        axes.set_ylabel(y)
    for axes in grid[-1]:
        axes.set_xlabel(x)
    return figure, found


def intervals(line: pd.DataFrame) -> pd.DataFrame:
    """Return ``mean``, ``low`` and ``high`` over the runs for each ``x``, ignoring NaN."""
    table = line.pivot(index="x", columns="run", values="value")
    return pd.DataFrame(mean_interval(table.T)._asdict(), index=table.index)


def points(axes: Axes, line: pd.DataFrame, name: str, style: Style) -> None:
    """Draw the mean at each x with its interval as an error bar.

    Lines are drawn a few points apart so that their bars do not overlap; the data do not change.
    """
    found = intervals(line)
    shift = 3 * len(axes.containers)
    bars = axes.errorbar(
        found.index,
        found["mean"],
        [found["mean"] - found["low"], found["high"] - found["mean"]],
        transform=axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans),
        label=name,
        elinewidth=0.8,
        **style,
    )
    _hover(bars.lines[0], name, found)
    # Matplotlib ignores shifted artists when it computes the limits.
    axes.update_datalim(np.column_stack([np.repeat(found.index, 3), found.to_numpy().ravel()]))
    axes.margins(x=0.05 + 0.03 * len(axes.containers))
    axes.autoscale_view()


def curve(axes: Axes, line: pd.DataFrame, name: str, style: Style) -> None:
    """Draw the mean at each x as a line with its interval as a band."""
    found = intervals(line)
    marked = _marked(found, style)
    (drawn,) = axes.plot(found.index, found["mean"], label=name, **marked)
    _hover(drawn, name, found[:: marked["markevery"]])
    if found["low"].notna().any():
        axes.fill_between(
            found.index, found["low"], found["high"], color=style["color"], alpha=0.18, linewidth=0
        )


def median(axes: Axes, line: pd.DataFrame, name: str, style: Style) -> None:
    """Draw the median at each x as a line, with a band from the smallest to the largest value."""
    values = line.groupby("x")["value"].agg(["median", "min", "max"])
    marked = _marked(values, style)
    is_few = len(values) <= _FEW_POINTS
    if is_few:
        marked["linestyle"] = "none"  # a line between two values would suggest others
    (drawn,) = axes.plot(values.index, values["median"], label=name, **marked)
    _hover(drawn, name, values[:: marked["markevery"]])
    band = values["min"], values["max"]
    if is_few:
        axes.vlines(values.index, *band, color=style["color"], alpha=0.5)
    else:
        axes.fill_between(values.index, *band, color=style["color"], alpha=0.18, linewidth=0)


def log_scale(axes: Axes, axis: str, low: float, high: float, unit: float = 1) -> None:
    """Make the ``x`` or ``y`` axis logarithmic, with plain numbers in multiples of ``unit``."""
    decades = np.log10(high / low)
    subs = (1, 2, 5) if decades < 1 else (1, 3) if decades < 2 else (1,)
    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
    ticks = getattr(axes, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=subs, numticks=6))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    ticks.set_minor_locator(NullLocator())


def row_title(axes: Axes, name: str, line: int = 0) -> None:
    """Write the name of a row above its first panel, beyond whose width it may extend."""
    if not name:
        return
    axes.set_title(" \n" * line + " ", loc="left")  # only space: a long one would widen the panel
    title = axes.annotate(
        name,
        (0, 1),
        (0, 6 + 11 * line),
        xycoords="axes fraction",
        textcoords="offset points",
        annotation_clip=False,
    )
    title.set_in_layout(False)


def legend(figure: Figure) -> None:
    """Put one legend above the panels, with each label once, in drawing order."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    widest = 0.5 + 0.06 * max(map(len, handles))  # inches
    columns = max(1, min(len(handles), int(figure.get_figwidth() / widest)))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(handles) // columns))


def _marked(values: pd.DataFrame, style: Style) -> dict[str, Any]:
    return {**style, "markersize": 3, "markevery": max(1, len(values) // 8)}


def hover(artist: Artist, texts: Sequence[str]) -> None:
    """Show a text at each marker of a line in the SVG, when the pointer is on it."""
    artist.set_gid(_HOVER + json.dumps(list(texts)))


def _hover(artist: Artist, name: str, points: pd.DataFrame) -> None:
    """Show the values at each point: the first column, and the others as a range."""
    hover(
        artist,
        [
            f"{name}, {x:g}: {middle:.4g} [{low:.4g}, {high:.4g}]"
            for x, middle, low, high in points.itertuples()
        ],
    )


@styled
def save(figure: Figure, folder: Path, name: str, title: str = "") -> tuple[Path, ...]:
    """Write a figure in each format; the same figure gives the same bytes.

    Args:
        figure: Figure.
        folder: Folder of the files.
        name: Name of the files, without suffix.
        title: Title in the files' metadata.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # layout is done; all formats share it
    paths = []
    for suffix, date in zip(FORMATS, ("CreationDate", "Date", None), strict=True):
        path = folder / f"{name}.{suffix}"
        figure.savefig(path, metadata={"Title": title} | ({date: None} if date else {}))
        paths.append(path)
        if suffix == "svg":
            write_atomic(path, _with_titles(path.read_text(encoding="utf-8")))
    return tuple(paths)


def _with_titles(svg: str) -> str:
    """Move the texts of :func:`hover` from the ids of lines to titles of their markers."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for group in root.iter(f"{{{_SVG}}}g"):
        if not group.get("id", "").startswith(_HOVER):
            continue
        texts = json.loads(group.attrib.pop("id").removeprefix(_HOVER))
        markers = list(group.iter(f"{{{_SVG}}}use"))
        if len(markers) == len(texts):  # otherwise some lie outside the axes
            for marker, text in zip(markers, texts, strict=True):
                ElementTree.SubElement(marker, f"{{{_SVG}}}title").text = text
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
