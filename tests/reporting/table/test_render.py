import csv
import io
import re
from xml.etree import ElementTree

import pytest

from mtnrec.reporting.table.render import (
    Cell,
    Group,
    Row,
    Table,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
)

HOSTILE = "a_b & <script> | 5% #{x} $~^\\ *[z]`"


@pytest.fixture
def table():
    marked = Cell("0.7951", bold=True, stars="**", holm_stars="*", note="8 of 10 seeds")
    return Table(
        title="Title",
        stub="Model",
        groups=(Group("NL", ("CTR", "CVR")), Group("ES", ("CTR",))),
        rows=(
            Row("MMoE", (Cell("0.7"), Cell("0.8"), Cell("—")), starts=True),
            Row("+MTN", (marked, Cell("0.81", stars="*"), Cell("-0.1"))),
            Row("ESMM", (Cell("0.7"), Cell("0.8"), Cell("0.9")), starts=True),
        ),
        notes=("A note.",),
        warnings=("A warning.",),
    )


@pytest.fixture
def hostile():
    return Table(
        title=HOSTILE,
        stub=HOSTILE,
        groups=(Group(HOSTILE, (HOSTILE,)),),
        rows=(Row(HOSTILE, (Cell(HOSTILE, bold=True, note=HOSTILE),), starts=True),),
        notes=(HOSTILE,),
        warnings=(HOSTILE,),
    )


def test_markdown_distinguishes_stars_and_holms_daggers(table):
    lines = to_markdown(table).splitlines()

    assert lines[:5] == [
        "**Title**",
        "",
        "| Model | NL CTR | NL CVR | ES CTR |",
        "| --- | ---: | ---: | ---: |",
        "| MMoE | 0.7 | 0.8 | — |",
    ]
    assert lines[5] == (
        r"| +MTN | **0.7951**<sup>\*\*</sup><sup>†</sup> <sub>8 of 10 seeds</sub> "
        r"| 0.81<sup>\*</sup> | -0.1 |"
    )
    assert lines[-3:] == ["A note.", "", "**Warning:** A warning."]


def test_markdown_escapes_labels(hostile):
    text = to_markdown(hostile)

    assert "<script" not in text.replace("\\<", "")
    assert "a\\_b &amp; \\<script\\> \\| 5%" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| a") and "**" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # the cells' own bars are escaped


def test_latex_rows_have_as_many_cells_as_the_tabular_has_columns(table):
    text = to_latex(table)

    (columns,) = re.findall(r"\\begin\{tabular\}\{(l\w+)\}", text)
    body = re.findall(r"^(.*) \\\\$", text, flags=re.MULTILINE)
    assert columns == "lrrr"
    assert body[0] == r" & \multicolumn{2}{c}{NL} & \multicolumn{1}{c}{ES}"
    assert [len(line.split(" & ")) for line in body[1:]] == [4, 4, 4, 4]
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}" in text
    assert text.count(r"\midrule") == 2
    assert (
        r"\textbf{0.7951}$^{**}$$^{\dag{}}$ {\tiny (8 of 10 seeds)} & 0.81$^{*}$ & $-$0.1" in text
    )
    assert re.findall(r"\\begin\{(\w+)\}", text) == re.findall(r"\\end\{(\w+)\}", text)[::-1]


def test_latex_escapes_labels(hostile):
    text = to_latex(hostile)

    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"[_#%~<>|]", bare)
    assert text.isascii()
    rows = re.findall(r"^(.*) \\\\$", text, flags=re.MULTILINE)
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [1, 1, 1]


def test_html_is_a_table_with_headers_of_rows_and_columns(table):
    figure = ElementTree.fromstring(to_html(table))

    assert figure.attrib == {"class": "table"}
    assert figure.find("table/caption/span").text == "Title"
    groups, columns = figure.findall("table/thead/tr")
    assert [(th.text, th.get("colspan")) for th in groups.findall("th")] == [
        ("NL", "2"),
        ("ES", "1"),
    ]
    assert [th.text for th in columns.findall("th[@scope='col']")] == ["Model", "CTR", "CVR", "CTR"]
    bodies = figure.findall("table/tbody")
    assert [[row.find("th[@scope='row']").text for row in body] for body in bodies] == [
        ["MMoE", "+MTN"],
        ["ESMM"],
    ]
    assert {len(row.findall("td")) for body in bodies for row in body} == {3}
    cell = bodies[0][1].find("td")
    assert cell.find("strong").text == "0.7951"
    assert [sup.text for sup in cell.findall("sup")] == ["**", "†"]
    assert cell.find("small[@class='note']").text == "8 of 10 seeds"
    assert [(p.get("class"), p.text) for p in figure.findall("figcaption//p")] == [
        ("warning", "A warning."),
        ("note", "A note."),
    ]


def test_csv_html_latex_and_markdown_have_the_same_numbers_in_the_same_order():
    cells = [[Cell("0.7", spread="0.01"), Cell("-3")], [Cell("0.9", spread="0.02"), Cell("4")]]
    rows = tuple(Row(name, tuple(row)) for name, row in zip("ab", cells, strict=True))
    table = Table("Title", "Arm", (Group("NL", ("CTR", "seeds")),), rows)
    expected = [["0.7", "0.01", "-3"], ["0.9", "0.02", "4"]]

    header, *lines = csv.reader(io.StringIO(to_csv(table)))
    found = ElementTree.fromstring(to_html(table)).findall("table/tbody/tr")
    latex = to_latex(table).replace("$-$", "-").splitlines()

    assert header == ["Arm", "NL CTR", "NL CTR ±", "NL seeds"]
    assert [line[1:] for line in lines] == expected
    texts = [" ".join(row.itertext()) for row in found]
    texts += [line for line in latex if line.startswith(("a &", "b &"))]
    texts += [line for line in to_markdown(table).splitlines() if re.match(r"\| [ab] ", line)]
    numbers = [re.findall(r"-?\d+\.?\d*", text) for text in texts]
    assert numbers == expected * 3


def test_html_preserves_labels(hostile):
    figure = ElementTree.fromstring(to_html(hostile))

    texts = [element.text for element in figure.iter() if element.text and element.text.strip()]
    assert set(texts) == {HOSTILE, "How to read this table"}


def test_a_table_without_group_headers_has_one_line_of_headers(table):
    plain = Table("Title", "Model", (Group("", ("a", "b", "c")),), table.rows)

    assert len(ElementTree.fromstring(to_html(plain)).findall("table/thead/tr")) == 1
    assert "multicolumn" not in to_latex(plain)
    assert "| Model | a | b | c |" in to_markdown(plain)
