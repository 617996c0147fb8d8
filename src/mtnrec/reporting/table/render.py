"""Tables rendered as Markdown, LaTeX, HTML and csv."""

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtnrec.system.files import remove_files, slug, write_atomic

_DAGGERS = {"": "", "*": "†", "**": "‡"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "—": "---",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
    **{character: rf"\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: Text of the cell.
        bold: Whether it is significantly better than its baseline.
        spread: Spread of a mean, shown after ±.
        stars: ``*`` or ``**`` for the p-value.
        holm_stars: The same for the corrected p-value; shown as daggers.
        note: Caveat for the reader, e.g. ``8 of 10 seeds``.
    """

    text: str
    bold: bool = False
    stars: str = ""
    holm_stars: str = ""
    note: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Group:
    """Neighbouring columns under one header; an empty header is not shown."""

    header: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row; ``starts`` if a rule separates it from the row above."""

    header: str
    cells: tuple[Cell, ...]
    starts: bool = False


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Args:
        title: One-line title.
        stub: Header of the first column.
        groups: Columns.
        rows: Rows with one cell per column.
        notes: Sentences that explain the marks.
        warnings: Sentences on the limits of the numbers.
        is_text: Whether the cells are words, not numbers, and so are aligned left.
    """

    title: str
    stub: str
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_text: bool = False


def to_markdown(table: Table) -> str:
    """Render a table as GitHub's Markdown."""
    grouped = [
        f"{group.header} {column}".strip() for group in table.groups for column in group.columns
    ]
    lines = [f"**{_markdown(table.title)}**", ""]
    lines.append(_pipes([_markdown(text) for text in (table.stub, *grouped)]))
    lines.append(_pipes(["---", *["---" if table.is_text else "---:"] * len(grouped)]))
    for row in table.rows:
        cells = [
            _render(cell, _markdown, "**{}**", " <sub>±{}</sub>", "<sup>{}</sup>", " <sub>{}</sub>")
            for cell in row.cells
        ]
        lines.append(_pipes([_markdown(row.header), *cells]))
    lines += [f"\n{_markdown(note)}" for note in table.notes]
    lines += [f"\n**Warning:** {_markdown(warning)}" for warning in table.warnings]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """Render a table as a LaTeX float, which needs the package booktabs."""
    columns = [column for group in table.groups for column in group.columns]
    caption = [f"{table.title}.", *table.notes, *(f"Warning: {text}" for text in table.warnings)]
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(' '.join(caption))}}}"]
    lines += [
        rf"\begin{{tabular}}{{l{('l' if table.is_text else 'r') * len(columns)}}}",
        r"\toprule",
    ]
    if any(group.header for group in table.groups):
        headers, rules, first = [""], [], 2
        for group in table.groups:
            width = len(group.columns)
            headers.append(rf"\multicolumn{{{width}}}{{c}}{{{_latex(group.header)}}}")
            rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
            first += width
        lines += [_ampersands(headers), "".join(rules)]
    lines.append(_ampersands([_latex(text) for text in (table.stub, *columns)]))
    for number, row in enumerate(table.rows):
        if row.starts or number == 0:
            lines.append(r"\midrule")
        cells = [
            _render(
                cell,
                _latex,
                r"\textbf{{{}}}",
                r" {{\tiny $\pm$ {}}}",
                "$^{{{}}}$",
                r" {{\tiny ({})}}",
            )
            for cell in row.cells
        ]
        lines.append(_ampersands([_latex(row.header), *cells]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def to_html(table: Table) -> str:
    """Render a table as an HTML figure with classes for a style sheet and no inline style."""
    stub = _tag("th", html.escape(table.stub), scope="col")
    columns = [column for group in table.groups for column in group.columns]
    headers = [_tag("th", html.escape(text), scope="col") for text in columns]
    head = [_tag("tr", stub + "".join(headers))]
    if any(group.header for group in table.groups):
        grouped = [
            _tag("th", html.escape(group.header), scope="colgroup", colspan=len(group.columns))
            for group in table.groups
        ]
        head.insert(0, _tag("tr", "<td></td>" + "".join(grouped)))
    bodies: list[list[str]] = [[]]
    for row in table.rows:
        if row.starts and bodies[-1]:
            bodies.append([])
        cells = [
            _render(
                cell,
                html.escape,
                "<strong>{}</strong>",
                ' <small class="spread">±{}</small>',
                "<sup>{}</sup>",
                ' <small class="note">{}</small>',
            )
            for cell in row.cells
        ]
        header = _tag("th", html.escape(row.header), scope="row")
        bodies[-1].append(_tag("tr", header + "".join(_tag("td", cell) for cell in cells)))
    parts = [
        _tag("caption", _tag("span", html.escape(table.title))),
        _tag("thead", "\n".join(head)),
        *(_tag("tbody", "\n".join(body)) for body in bodies),
    ]
    below = [_tag("p", html.escape(text), class_="warning") for text in table.warnings]
    notes = "\n".join(_tag("p", html.escape(text), class_="note") for text in table.notes)
    if notes:
        below.append(_tag("details", _tag("summary", "How to read this table") + notes))
    content = _tag("table", "\n".join(parts)) + "\n" + _tag("figcaption", "\n".join(below))
    kind = "table text" if table.is_text else "table"
    return _tag("figure", content, class_=kind) + "\n"


def to_csv(table: Table) -> str:
    """Render the cells of a table as csv, without marks and notes.

    A column of means is followed by one of their spreads, named after it with ±.
    """
    columns = [
        f"{group.header} {column}".strip() for group in table.groups for column in group.columns
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    lines = [[table.stub], *([row.header] for row in table.rows)]
    for number, column in enumerate(columns):
        cells = [row.cells[number] for row in table.rows]
        found = [(column, *(cell.text for cell in cells))]
        if any(cell.spread for cell in cells):
            found.append((f"{column} ±", *(cell.spread for cell in cells)))
        for texts in found:
            for line, text in zip(lines, texts, strict=True):
                line.append(text)
    writer.writerows(lines)
    return file.getvalue()


FORMATS = {"md": to_markdown, "tex": to_latex, "html": to_html, "csv": to_csv}


def write_tables(out: Path, tables: Sequence[Table]) -> None:
    """Write each table in every format, in files named after its title; remove earlier ones."""
    out.mkdir(parents=True, exist_ok=True)
    remove_files(out, FORMATS)
    for table in tables:
        for suffix, render in FORMATS.items():
            write_atomic(out / f"{slug(table.title)}.{suffix}", render(table))


def _render(
    cell: Cell, escape: Callable[[str], str], bold: str, spread: str, mark: str, note: str
) -> str:
    """Render a cell with a format's escape and its patterns for bold, spread, marks and notes."""
    text = escape(cell.text)
    text = bold.format(text) if cell.bold else text
    text += spread.format(escape(cell.spread)) if cell.spread else ""
    for marks in (cell.stars, _DAGGERS[cell.holm_stars]):
        text += mark.format(escape(marks)) if marks else ""
    return text + (note.format(escape(cell.note)) if cell.note else "")


def _pipes(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _ampersands(texts: Sequence[str]) -> str:
    return rf"{' & '.join(texts)} \\"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text.replace("&", "&amp;"))


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escaped)  # a minus, not a hyphen


def _tag(name: str, content: str, **attributes: Any) -> str:
    """Return an HTML element; content and attributes must already be escaped."""
    written = "".join(f' {key.rstrip("_")}="{value}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"
