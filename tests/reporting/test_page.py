import base64
import json
import re
from html.parser import HTMLParser

import pytest

from mtnrec.reporting.figure.catalogue import WrittenFigure
from mtnrec.reporting.page import summarise, write_page
from mtnrec.reporting.runs import read_runs, unfinished
from mtnrec.reporting.table.appendix import cost_table, deviation_tables, settings_tables
from mtnrec.reporting.table.scores import comparisons, difference_table, score_table, split_by_table

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements of a page: that each is closed, its links, anchors, images and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.texts = [], set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def draw(out, kind):
    path = out / f"{kind}.svg"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return WrittenFigure(kind, f"{kind} of a < b", "what it is", f"lines of {kind}", (path,))


def make_page(root, out):
    runs = read_runs(root)
    parts = split_by_table(runs.results)
    cells = [comparisons(part) for part in parts.values()]
    tables = [
        lay_out(cell, title)
        for cell, title in zip(cells, parts, strict=True)
        for lay_out in (score_table, difference_table)
    ]
    out.mkdir()
    figures = [draw(out, kind) for kind in ("alphas", "noise_curves", "alphas")]
    path = out / "index.html"
    left_out = unfinished(root)
    write_page(path, runs, left_out=left_out, cells=cells, tables=tables, figures=figures)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def root(tmp_path, write_run):
    """A made-up table_2 of one model, and a run that failed."""
    for seed in range(5):
        for noise in (0.0, 0.1):
            for mtn in (False, True):
                auc = {"ctr": 0.61, "cvr": 0.66 + mtn * (0.01 + seed / 1000), "ctcvr": 0.65}
                name = f"{noise}-{mtn}-{seed}"
                settings = {"mtn": mtn, "seed": seed, "noise": noise, "data": "ali_ccp"}
                write_run(tmp_path / "runs", name, auc=auc, **settings)
    failed = tmp_path / "runs" / "unlucky"
    failed.mkdir()
    failure = {"error": "ValueError", "message": "no <luck> at all"}
    (failed / "failure.json").write_text(json.dumps(failure))
    return tmp_path / "runs"


def test_the_page_is_self_contained_and_has_every_figure(root, tmp_path):
    text = make_page(root, tmp_path / "report")

    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    alts = [image["alt"] for image in page.images]
    assert alts == ["lines of noise_curves", "lines of alphas", "lines of alphas"]  # by kind
    for image in page.images:
        form, content = image["src"].split(",")
        assert form == "data:image/svg+xml;base64"
        assert base64.b64decode(content) == (tmp_path / "report" / "alphas.svg").read_bytes()
    assert "alphas of a < b" in page.text
    assert not re.search(r"<(script|link|iframe)|@import|url\(", text)


def test_the_page_reports_missing_runs_and_the_outcome(root, tmp_path):
    page = Page(make_page(root, tmp_path / "report"))

    assert "1 started run without a result" in page.text
    assert "unlucky : ValueError: no <luck> at all" in page.text
    # CVR is better at both proportions; the other tasks are equal.
    assert "the baseline's in 2 of 6 comparisons (2 significant at p < 0.05, " in page.text
    assert "It is equal or worse in 4 (0 significant at p < 0.05, 0 after Holm's" in page.text
    assert "MTN on ali_ccp" in page.text
    for said in (
        "Our test AUCs compared with the paper's",
        "2.13.0",
        "data.batch_size",
        "Costs of the runs",
    ):
        assert said in page.text


def test_published_numbers_are_next_to_ours(tmp_path, write_run):
    auc = {"ctr": 0.61, "cvr": 0.67, "ctcvr": 0.65}
    write_run(tmp_path, "a", auc=auc, data="aliexpress_es")
    write_run(tmp_path, "b", auc=auc, data="aliexpress_es", mtn=True)
    write_run(tmp_path, "c", auc=auc, data="aliexpress_es", mtn={"lam": 0.1}, seed=1)
    cells = comparisons(read_runs(tmp_path).results)

    paper, mtreclib = deviation_tables(cells)

    rows = {(row.header, *(cell.text for cell in row.cells)) for row in paper.rows}
    # METHODS, section 8: MMoE .7281 / .8313 / .8901, with MTN .7303 / .8304 / .8912.
    assert ("MMoE", "aliexpress_es", "0", "CTR", "0.7281", "0.6100", "-0.1181", "1") in rows
    assert {row[4] for row in rows if "MTN" in row[0]} == {"0.7303", "0.8304", "0.8912"}
    assert len(rows) == 6  # not at another lambda
    rows = {(row.header, *(cell.text for cell in row.cells)) for row in mtreclib.rows}
    assert {row[:5] for row in rows} == {
        ("MMoE", "aliexpress_es", "0", "CTR", "0.7285"),
        ("MMoE", "aliexpress_es", "0", "CTCVR", "0.8898"),
    }


def test_runs_of_other_data_have_no_published_numbers(tmp_path, write_run):
    write_run(tmp_path, "a", data="synthetic")

    assert list(deviation_tables(comparisons(read_runs(tmp_path).results))) == []


def test_the_speed_of_mtn_is_compared_with_its_own_baseline(tmp_path, write_run):
    speeds = {("ESMM", False): 3e4, ("ESMM", True): 1.5e4, ("MMoE", False): 7e3}
    for (model, mtn), speed in speeds.items():
        folder = write_run(tmp_path, f"{model}-{mtn}", model=model, mtn=mtn)
        record = json.loads((folder / "result.json").read_text())
        record["samples_per_second"]["train"] = speed
        (folder / "result.json").write_text(json.dumps(record))

    table = cost_table(read_runs(tmp_path))

    place = table.groups[0].columns.index("to baseline")
    ratios = {row.header: row.cells[place].text for row in table.rows}
    assert ratios == {"ESMM": "—", "ESMM +MTN": "0.50", "MMoE": "—"}


def test_settings_are_split_into_varying_and_constant_ones(tmp_path, write_run):
    for seed, rate in ((0, 0.01), (1, 0.02)):
        write_run(tmp_path, f"{seed}", seed=seed, **{"optimizer.lr": rate})

    differing, shared = settings_tables(read_runs(tmp_path))

    found = {row.header: row.cells[0].text for row in differing.rows}
    assert found == {"data.seed": "0, 1", "optimizer.lr": "0.01, 0.02", "seed": "0, 1"}
    assert ("patience", "3") in {(row.header, row.cells[0].text) for row in shared.rows}


def test_without_pairs_the_summary_claims_nothing(tmp_path, write_run):
    write_run(tmp_path, "a", mtn=True)

    (sentence,) = summarise([comparisons(read_runs(tmp_path).results)])

    assert sentence.startswith("No run with MTN has a baseline run with the same seed")
