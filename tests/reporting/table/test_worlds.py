"""Maps of planted worlds, against scipy and made-up records whose best strengths are known."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mtnrec.reporting.figure.results import world_maps
from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.render import to_csv
from mtnrec.reporting.table.worlds import map_worlds, world_tables, write_worlds

SEEDS = range(4)
LAMBDAS, DECAYS = (1e-4, 1e-2), (1e-3, 1e-1)


@pytest.fixture
def write_world(write_run):
    """Write a run of a planted world, whose seed draws the world."""

    def write(root, name, *, seed, relatedness=0.5, noise=0.0, mtn=False, val, test, **settings):
        metrics = {"val/cvr_auc": val, "test/cvr_auc": test, "test/cvr_bayes_auc": 0.9}
        of_world = {"data.relatedness": relatedness, "data.generator_seed": seed}
        settings = {"optimizer.weight_decay": 0.0, "model.tower_init": "independent"} | settings
        folder = write_run(
            root, name, seed=seed, noise=noise, mtn=mtn, metrics=metrics, **of_world, **settings
        )
        record = json.loads((folder / "result.json").read_text())
        record["data"]["parameters"] |= {"relatedness": relatedness, "hidden_units": 8}
        record["data"]["checksum"] = f"{seed}{relatedness}" * 10
        record["keys_of_seed"] = ["data.generator_seed", "data.seed", "seed"]
        (folder / "result.json").write_text(json.dumps(record))
        return folder

    return write


def write_point(write_world, root, *, gain=0.02, prefix="", skip=(), **settings):
    """Five arms; the best strengths on validation are the first, on test the second."""
    rng = np.random.default_rng([*prefix.encode()])
    expected = {}
    for seed in SEEDS:
        base = 0.7 + rng.normal(0, 0.01)
        found = {"baseline": base, "decay": base + 0.01 + rng.normal(0, 0.002)}
        found["mtn"] = base + gain + rng.normal(0, 0.002)
        expected[seed] = found
        arms = {
            "baseline": ({}, 0.6, base),
            "mtn0": ({"mtn": {"lam": LAMBDAS[0]}}, 0.66, found["mtn"]),
            "mtn1": ({"mtn": {"lam": LAMBDAS[1]}}, 0.65, 0.99),
            "decay0": ({"optimizer.weight_decay": DECAYS[0]}, 0.64, found["decay"]),
            "decay1": ({"optimizer.weight_decay": DECAYS[1]}, 0.63, 0.98),
        }
        for name, (own, val, test) in arms.items():
            if (name, seed) not in skip:
                folder = f"{prefix}{name}-{seed}"
                # One seed alone would choose otherwise: the mean over seeds decides.
                val += 0.005 * (seed == 0) * (name[-1] == "1") * 3
                write_world(root, folder, seed=seed, val=val, test=test, **own, **settings)
    return pd.DataFrame(expected).T


def cvr(worlds, rival="weight decay", **place):
    rows = worlds[(worlds["task"] == "cvr") & (worlds["rival"] == rival)]
    for key, value in place.items():
        rows = rows[rows[key] == value]
    return rows.iloc[0]


def test_strengths_are_chosen_on_validation_and_compared_on_test_by_seed(tmp_path, write_world):
    expected = write_point(write_world, tmp_path)

    worlds = map_worlds(read_runs(tmp_path))

    assert len(worlds) == 3 * 2  # tasks, rivals
    for rival, column in (("weight decay", "decay"), ("baseline", "baseline")):
        row = cvr(worlds, rival)
        test = stats.ttest_rel(expected["mtn"], expected[column])
        interval = test.confidence_interval()
        assert row["difference"] == pytest.approx((expected["mtn"] - expected[column]).mean())
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
        assert row["p_value"] == pytest.approx(test.pvalue)
        assert row["seeds"] == len(SEEDS)
        assert row["mtn"] == pytest.approx(expected["mtn"].mean())
        assert row["of_rival"] == pytest.approx(expected[column].mean())
        assert row["lam"] == LAMBDAS[0]
        assert row["strength"] == (DECAYS[0] if rival == "weight decay" else 0)
        assert row["bayes"] == pytest.approx(0.9)
    assert set(worlds["map"]) == {"MMoE"}


def test_a_loss_as_monitor_chooses_the_smallest(tmp_path, write_world):
    for seed in SEEDS:
        for lam, loss, test in ((1e-4, 0.3, 0.8), (1e-2, 0.2, 0.7)):
            folder = write_world(
                tmp_path,
                f"{lam}-{seed}",
                seed=seed,
                mtn={"lam": lam},
                val=0.5,
                test=test,
                monitor="val/cvr_log_loss",
            )
            record = json.loads((folder / "result.json").read_text())
            record["metrics"]["val/cvr_log_loss"] = loss
            (folder / "result.json").write_text(json.dumps(record))
        plain = {"monitor": "val/cvr_log_loss", "val": 0.5, "test": 0.6}
        write_world(tmp_path, f"off-{seed}", seed=seed, **plain)

    row = cvr(map_worlds(read_runs(tmp_path)), "baseline")

    assert row["lam"] == 1e-2
    assert row["difference"] == pytest.approx(0.1)
    assert np.isnan(row["low"])  # differences that do not vary have no interval


def test_points_and_maps_are_kept_apart(tmp_path, write_world):
    places = [(0.0, 0.0, "independent"), (1.0, 0.2, "independent"), (1.0, 0.2, "equal")]
    for number, (relatedness, noise, start) in enumerate(places):
        settings = {"relatedness": relatedness, "noise": noise, "model.tower_init": start}
        gain = 0.01 * (1 + number)
        write_point(write_world, tmp_path, gain=gain, prefix=f"{number}-", **settings)

    worlds = map_worlds(read_runs(tmp_path))

    assert worlds.groupby(["map", "relatedness", "noise"]).ngroups == 3
    for number, (relatedness, noise, start) in enumerate(places):
        place = {"map": f"MMoE (tower_init={start})", "relatedness": relatedness, "noise": noise}
        assert cvr(worlds, "baseline", **place)["difference"] == pytest.approx(
            0.01 * (1 + number), abs=0.004
        )


def test_seeds_that_an_arm_lacks_are_left_out(tmp_path, write_world):
    expected = write_point(write_world, tmp_path, skip=[("mtn1", 2)])

    row = cvr(map_worlds(read_runs(tmp_path)))

    difference = (expected["mtn"] - expected["decay"]).drop(2)
    assert row["seeds"] == 3
    assert row["difference"] == pytest.approx(difference.mean())


def test_tables_and_file_have_a_cell_for_each_point(tmp_path, write_world):
    for noise in (0.0, 0.2):
        write_point(write_world, tmp_path / "runs", prefix=f"{noise}-", noise=noise)
    worlds = map_worlds(read_runs(tmp_path / "runs"))

    tables = list(world_tables(worlds))
    write_worlds(tmp_path, worlds)

    assert [table.title for table in tables] == [
        "Planted worlds, MMoE: MTN minus weight decay",
        "Planted worlds, MMoE: MTN minus baseline",
    ]
    lines = to_csv(tables[1]).splitlines()
    assert lines[0] == "Task,noise 0,noise 0.2"
    values = [cvr(worlds, "baseline", noise=noise)["difference"] for noise in (0.0, 0.2)]
    assert lines[2] == f"CVR, relatedness 0.5,{values[0]:+.4f},{values[1]:+.4f}".replace(
        "CVR, relatedness 0.5", '"CVR, relatedness 0.5"'
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "planted_worlds.csv"), worlds)

    write_worlds(tmp_path, worlds.iloc[:0])
    assert not (tmp_path / "planted_worlds.csv").exists()


def test_runs_on_other_data_have_no_map(tmp_path, write_run):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", mtn=True)

    worlds = map_worlds(read_runs(tmp_path))

    assert worlds.empty
    assert list(world_tables(worlds)) == []


def test_the_figure_writes_each_value_and_hatches_what_may_be_nothing():
    rows = [("cvr", 0.0, 0.02, 0.01, 0.03), ("cvr", 1.0, -0.01, -0.03, 0.01)]
    worlds = pd.DataFrame(rows, columns=["task", "relatedness", "difference", "low", "high"])
    worlds = worlds.assign(noise=0.1, rival="weight decay", seeds=5, map="ESMM")

    figure = world_maps(worlds)

    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts if "[" in text.get_text()] == [
        "+0.020\n[+0.010,\n+0.030]",
        "-0.010\n[-0.030,\n+0.010]",
    ]
    hatched = [patch.get_y() for patch in axes.patches if patch.get_hatch()]
    assert hatched == [0.5]  # the second relatedness
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    blue, orange = (patch.get_facecolor() for patch in axes.patches if not patch.get_hatch())
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    assert world_maps(worlds.assign(difference=np.nan)) is None


def test_the_values_of_a_whole_map_stay_in_their_cells():
    keys = ("rival", "task", "relatedness", "noise")
    choices = (["baseline", "decay"], ["ctr", "cvr", "ctcvr"], [0.0, 0.5, 1.0], [0.0, 0.15, 0.3])
    worlds = pd.DataFrame(itertools.product(*choices), columns=keys)
    worlds = worlds.assign(difference=-0.0123, low=-0.0456, high=0.0345, seeds=10, map="ESMM")

    figure = world_maps(worlds)

    figure.canvas.draw()
    for axes in figure.axes[:6]:
        cells = [patch.get_window_extent() for patch in axes.patches if not patch.get_hatch()]
        texts = [text for text in axes.texts if "[" in text.get_text()]
        for cell, text in zip(cells, texts, strict=True):
            box = text.get_window_extent()
            assert cell.x0 < box.x0 < box.x1 < cell.x1
            assert cell.y0 < box.y0 < box.y1 < cell.y1


@pytest.mark.slow
def test_the_report_has_a_section_with_the_map(tmp_path, write_world, report):
    for seed in (0, 1):
        write_world(tmp_path / "runs", f"off-{seed}", seed=seed, val=0.6, test=0.7)
        for lam in LAMBDAS:
            place = {"seed": seed, "mtn": {"lam": lam}, "val": 0.6 + lam, "test": 0.71 + seed / 100}
            write_world(tmp_path / "runs", f"{lam}-{seed}", **place)

    report(f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'report'}")

    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('<section id="planted-worlds">') == 1
    assert page.count('aria-label="Heat maps of the difference in test AUC') == 1
    assert "Planted worlds, MMoE: MTN minus baseline" in page
    names = {path.name for path in (tmp_path / "report").rglob("*")}
    assert {"planted_worlds.csv", "world_maps-mmoe.svg"} <= names
