import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mtnrec.reporting.figure.catalogue import WrittenFigure
from mtnrec.reporting.page import ReportTables, write_page
from mtnrec.reporting.resampling import Resampled
from mtnrec.reporting.runs import read_runs, unfinished
from mtnrec.reporting.summary import costs_of_arms, lay_out_forest, summarise
from mtnrec.reporting.table.appendix import cost_table, deviation_tables, settings_tables
from mtnrec.reporting.table.ranks import rank_arms, rank_tables
from mtnrec.reporting.table.scores import (
    comparisons,
    difference_table,
    row_table,
    score_table,
    split_by_table,
)

VOID = {"meta", "img", "br", "input"}


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
    path.write_text("<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    return WrittenFigure(
        kind, ("a",), f"{kind} of a < b", "what it is", f"lines of {kind}", (path,)
    )


def make_page(root, out, baseline=None, **keys):
    runs = read_runs(root, baseline)
    tables = split_by_table(runs.results)
    parts = {title: comparisons(part, **keys) for title, part in tables.items()}
    over_rows = [row_table(cells, f"{title}: over users") for title, cells in parts.items()]
    out.mkdir()
    path = out / "index.html"
    write_page(
        path,
        runs,
        left_out=unfinished(root),
        compared=comparisons(runs.results, **keys),
        tables=ReportTables(
            scores=[score_table(cells, title) for title, cells in parts.items()],
            differences=[difference_table(cells, f"{title}: d") for title, cells in parts.items()],
            over_rows=[table for table in over_rows if table is not None],
            ranks=list(rank_tables(rank_arms(runs.results))),
        ),
        figures=[draw(out, kind) for kind in ("alphas", "noise_curves", "alphas")],
    )
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
    inner = [link for link in page.links if link.startswith("#")]
    assert {link[1:] for link in inner} <= page.ids
    assert page.images == []
    figures = re.findall(r'<svg[^>]*role="img" aria-label="(lines of \w+)"', text)
    assert figures == ["lines of noise_curves", "lines of alphas", "lines of alphas"]
    assert "alphas of a < b" in page.text
    assert not re.search(r"<(link|iframe)|src=|@import|url\(", text)


def test_tables_carry_their_latex_and_csv(root, tmp_path):
    links = Page(make_page(root, tmp_path / "report")).links

    assert sum(link.startswith("data:text/plain") for link in links) % 2 == 0
    assert "results.csv" in links


def test_the_page_reports_missing_runs_and_the_verdict(root, tmp_path):
    page = Page(make_page(root, tmp_path / "report"))

    assert "1 started run without a result" in page.text
    assert "unlucky : ValueError: no <luck> at all" in page.text
    # CVR is better at both proportions; the other tasks are equal.
    assert (
        "With 5 seeds 2 of 6 differences in test AUC between MTN and its baseline are significant, "
        "2 better and 0 worse; largest: CVR +0.0120 [+0.0100, +0.0140], MMoE +MTN, noise 0."
    ) in page.text
    assert "MTN on ali_ccp" in page.text
    for said in (
        "Our test AUCs compared with the paper's",
        "2.13.0",
        "data.batch_size",
        "Costs of each arm",
        "ali_ccp: 1,920 training, 480 validation, 600 test rows",
        "0 to 4",
    ):
        assert said in page.text


def test_the_page_lists_every_run_with_its_folder_and_command(root, tmp_path):
    folder = root / "0.1-True-3"
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- seed=3\n- 'mtn.layers=[0,1]'\n")

    page = Page(make_page(root, tmp_path / "report"))

    for run in root.glob("*/result.json"):
        assert f"../runs/{run.parent.name}/" in page.links
        assert f"../runs/{run.parent.name}/result.json" in page.links
    assert f"mtnrec.train hydra.mode=RUN hydra.run.dir={folder} seed=3 " in page.text


def test_without_a_significant_difference_the_verdict_says_so(tmp_path, write_run):
    for seed, change in enumerate((0.003, -0.001, 0.002, -0.002)):
        write_run(tmp_path, f"off-{seed}", seed=seed, auc={"buy": 0.7})
        write_run(tmp_path, f"on-{seed}", seed=seed, mtn=True, auc={"buy": 0.7 + change})

    verdict, sure = summarise(comparisons(read_runs(tmp_path).results))

    assert verdict == (
        "With 4 seeds no difference in test AUC between MTN and its baseline is significant; "
        "largest: buy +0.0005 [-0.0033, +0.0043], MMoE +MTN."
    )
    assert sure.startswith("Paired t-tests at 5 %, corrected by Holm for 1 comparison. To detect")


def equal_arms(tmp_path, write_run, tasks):
    """Arms whose differences are far below the margin on some tasks, and vary on the others."""
    for seed in range(6):
        for mtn in (False, True):
            changes = {True: 0.01 + 1e-3 * (seed % 3), False: 1e-5 * (seed % 3 - 1)}
            auc = {task: 0.7 + seed / 100 + mtn * changes[wide] for task, wide in tasks.items()}
            write_run(tmp_path, f"{mtn}-{seed}", mtn=mtn, seed=seed, auc=auc)
    return read_runs(tmp_path).results


@pytest.mark.parametrize(
    ("tasks", "verdict"),
    [
        ({"buy": False}, "With 6 seeds the two arms are equivalent within 0.0005 in test AUC "),
        (
            {"buy": False, "like": False},
            "With 6 seeds the arms of all 2 comparisons are equivalent within 0.0005 in test AUC ",
        ),
        (
            {"buy": False, "like": True},
            "With 6 seeds 1 of 2 differences in test AUC between MTN and its baseline is "
            "significant, 1 better and 0 worse, and 1 of 2 equivalent within 0.0005; largest: like",
        ),
    ],
)
def test_the_verdict_claims_equivalence_where_it_is_shown(tasks, verdict, tmp_path, write_run):
    results = equal_arms(tmp_path, write_run, tasks)

    first, *_ = summarise(comparisons(results))

    assert first.startswith(verdict)


def test_the_margin_decides_what_is_equivalent(tmp_path, write_run):
    results = equal_arms(tmp_path, write_run, {"buy": False})

    narrow, wide = (comparisons(results, margin=margin) for margin in (1e-6, 0.01))

    assert set(narrow["verdict"]) <= {"", "different", "undecided"}
    assert "equivalent within 0.01" in next(summarise(wide))


def test_the_forest_plot_shows_the_margin_on_its_axis(tmp_path, write_run):
    results = equal_arms(tmp_path, write_run, {"buy": True})

    forest = lay_out_forest(comparisons(results, margin=0.002))

    low, high = forest.band
    (row,) = forest.differences
    scale = (row.at - forest.zero) / 0.011  # the mean difference
    assert high - forest.zero == pytest.approx(0.002 * scale, abs=0.05)
    assert low == 0  # it reaches beyond the axis
    assert lay_out_forest(comparisons(results[results["seed"] == 0])).band is None


def test_the_page_folds_the_intervals_over_users_only_where_runs_kept_scores(root, tmp_path):
    resampled = Resampled(
        {
            (path.parent.name, task): np.random.default_rng(number).normal(0.7, 0.001, 200)
            for number, path in enumerate(sorted(root.glob("*/result.json")))
            for task in ("ctr", "cvr", "ctcvr")
        },
        {path.parent.name: "rows" for path in root.glob("*/result.json")},
        {"rows": 1234},
    )

    without = Page(make_page(root, tmp_path / "without")).text
    text = Page(make_page(root, tmp_path / "with", resampled=resampled)).text

    assert "Intervals over seeds, test users and both" in text
    assert "1,234" in text
    assert (
        "For new trainings on new users (seeds and test rows together), of 6 comparisons:" in text
    )
    for said in ("Intervals over seeds", "new users", "over both"):
        assert said not in without


def test_a_forest_plot_has_every_difference_and_holds_every_interval(root):
    compared = comparisons(read_runs(root).results)

    forest = lay_out_forest(compared)

    assert [row.task for row in forest.differences] == ["CTR", "CVR", "CTCVR"] * 2
    ends = [end for row in forest.differences for end in (row.low, row.high) if end is not None]
    assert all(0 < end < 100 for end in [*ends, forest.zero])
    better = [row.at > forest.zero for row in forest.differences]
    assert better == [False, True, False] * 2
    assert {row.color for row in forest.differences} == {1}


def test_arms_without_mtn_are_compared_with_the_baseline_that_is_named(tmp_path, write_run):
    for seed in range(3):
        for rate, auc in ((0.001, 0.7), (0.01, 0.72), (0.1, 0.71)):
            auc = {"buy": auc + seed / 1000}
            write_run(
                tmp_path / "runs", f"{rate}-{seed}", seed=seed, auc=auc, **{"optimizer.lr": rate}
            )

    page = Page(make_page(tmp_path / "runs", tmp_path / "report", "optimizer.lr=1e-2"))

    assert "from MMoE (optimizer.lr=0.01) can be tested; largest: buy -0.0200" in page.text
    assert "3 arms on synthetic" in page.text


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

    place = table.groups[0].columns.index("speed to baseline")
    ratios = {row.header: row.cells[place].text for row in table.rows}
    assert ratios == {"ESMM": "—", "ESMM +MTN": "0.50", "MMoE": "—"}


def test_the_costs_give_the_parameters_and_those_in_embeddings_apart(tmp_path, write_run):
    write_run(tmp_path, "old", model="ESMM")
    folder = write_run(tmp_path, "recent", model="MMoE")
    record = json.loads((folder / "result.json").read_text())
    record["parameters"] = {"embeddings": 508, "network": 10_084_882}
    (folder / "result.json").write_text(json.dumps(record))

    table = cost_table(read_runs(tmp_path))

    place = table.groups[0].columns.index("parameters")
    cells = {row.header: [cell.text for cell in row.cells[place : place + 2]] for row in table.rows}
    assert cells == {"ESMM": ["—", "—"], "MMoE": ["10,084,882", "508"]}


def record_machines(root, machines):
    """Write hardware into the records of a folder, by the name of the run."""
    for name, (machine, threads) in machines.items():
        path = root / name / "result.json"
        record = json.loads(path.read_text()) | {"machine": machine, "threads": threads}
        path.write_text(json.dumps(record))


SMALL = {"processor": "Xeon", "cores": 2, "memory_bytes": 24 * 2**30, "gpus": [], "os": "Linux 6"}
LARGE = {**SMALL, "cores": 64, "gpus": ["H200", "H200"], "host": "node7"}


def test_the_page_names_the_machine_and_its_threads(tmp_path, write_run):
    for name, mtn in (("off", False), ("on", True)):
        write_run(tmp_path / "runs", name, mtn=mtn)
    record_machines(tmp_path / "runs", {"off": (LARGE, 1), "on": (LARGE, 1)})

    text = Page(make_page(tmp_path / "runs", tmp_path / "report")).text

    assert "Xeon, 64 cores, 24 GiB, 2x H200, Linux 6" in text
    assert "python 3.11.7, torch 2.13.0, 1 thread per run" in text
    assert "node7" in text
    assert "not comparable" not in text


@pytest.mark.parametrize(
    ("of_arm", "is_warned"),
    [((LARGE, 1), True), ((SMALL, 2), True), ((SMALL, 1), False), (({}, 1), False)],
)
def test_costs_across_hardware_or_threads_are_warned_of(of_arm, is_warned, tmp_path, write_run):
    for name, mtn in (("off", False), ("on", True)):
        write_run(tmp_path / "runs", name, mtn=mtn)
    record_machines(tmp_path / "runs", {"off": (SMALL, 1), "on": of_arm})

    warnings = cost_table(read_runs(tmp_path / "runs")).warnings

    assert ["Costs are not comparable in 1 of 1 comparisons" in w for w in warnings] == (
        [True] if is_warned else []
    )


def test_the_costs_of_the_first_screen_are_those_of_the_table(root):
    runs = read_runs(root)
    table = cost_table(runs)
    columns = table.groups[0].columns
    seconds, memory = columns.index("fit, s"), columns.index("memory, GiB")

    arms = {cost["arm"]: cost for cost in costs_of_arms(runs)}

    assert set(arms) == {row.header for row in table.rows}
    for arm, cost in arms.items():
        rows = [row.cells for row in table.rows if row.header == arm]
        mean = sum(float(row[seconds].text) for row in rows) / len(rows)
        assert float(cost["seconds"].removesuffix(" s")) == pytest.approx(mean, abs=0.1)
        assert {row[memory].text for row in rows} == {cost["memory"].removesuffix(" GiB")}


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (None, ["ESMM", "ESMM +MTN", "MMoE", "MMoE +MTN"]),
        ("model=mmoe,mtn.enabled=true", ["MMoE +MTN", "ESMM", "ESMM +MTN", "MMoE"]),
    ],
)
def test_the_costs_of_the_first_screen_list_an_arm_after_its_baseline(
    baseline, expected, tmp_path, write_run
):
    for model in ("MMoE", "ESMM"):
        for mtn in (True, False):
            write_run(tmp_path, f"{model}-{mtn}", model=model, mtn=mtn)

    assert [cost["arm"] for cost in costs_of_arms(read_runs(tmp_path, baseline))] == expected


def test_arms_on_several_data_sets_have_a_section_of_ranks(tmp_path, write_run):
    for data in ("a", "b"):
        for model in ("ESMM", "MMoE", "PLE"):
            write_run(tmp_path / "runs", f"{data}-{model}", model=model, data=data)

    page = Page(make_page(tmp_path / "runs", tmp_path / "report"))

    assert "ranks-over-data-sets" in page.ids
    assert "#ranks-over-data-sets" in page.links
    assert "critical difference" in page.text


def test_every_sortable_header_is_a_button_above_a_value_of_each_row(root, tmp_path):
    text = make_page(root, tmp_path / "report")
    body = text[text.index('<section id="runs"') :]

    head, *rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)

    headers = re.findall(r"<th[^>]*>(.*?)</th>", head)
    buttons = [header.startswith("<button>") for header in headers]
    assert buttons == [True] * (len(headers) - 2) + [False] * 2  # files and command
    assert {len(re.findall(r"<t[hd]\b", row)) for row in rows} == {len(headers)}
    assert 'type="search"' in body


def test_settings_are_split_into_varying_and_constant_ones(tmp_path, write_run):
    for seed, rate in ((0, 0.01), (1, 0.02)):
        write_run(tmp_path, f"{seed}", seed=seed, **{"optimizer.lr": rate})

    differing, shared = settings_tables(read_runs(tmp_path))

    found = {row.header: row.cells[0].text for row in differing.rows}
    assert found == {"data.seed": "0, 1", "optimizer.lr": "0.01, 0.02", "seed": "0, 1"}
    assert ("patience", "3") in {(row.header, row.cells[0].text) for row in shared.rows}


def test_without_pairs_the_summary_claims_nothing(tmp_path, write_run):
    write_run(tmp_path, "a", mtn=True)

    (sentence,) = summarise(comparisons(read_runs(tmp_path).results))

    assert sentence.startswith("No run has a baseline run with the same seed")
