import itertools
import json
import warnings
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mtnrec.reporting.figure.catalogue import KINDS, blocks, drawn_figures, write_figures
from mtnrec.reporting.figure.results import (
    lambda_curves,
    noise_curves,
    paired_differences,
    pooled,
    reliability,
)
from mtnrec.reporting.figure.style import facets, line_style, panels, save
from mtnrec.reporting.figure.training import (
    alphas,
    effective_ranks,
    expert_distances,
    over_epochs,
    spectra,
    training_curves,
)
from mtnrec.reporting.runs import Runs, read_runs

TASKS = ("ctr", "cvr", "ctcvr")


@pytest.fixture
def make_runs(tmp_path, write_run):
    """Write a run for each dict of `write_run`'s keywords; read them."""

    def make(*settings):
        for number, keys in enumerate(settings):
            write_run(tmp_path / "runs", f"run_{number}", **keys)
        return read_runs(tmp_path / "runs")

    return make


def aucs(ctr):
    return {"auc": {"ctr": ctr, "cvr": ctr + 0.05, "ctcvr": ctr + 0.1}}


def drawn(axes, label):
    """The y values of the line, or of the mean of the error bars, with this label."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handle = handles[label]
    return np.asarray(getattr(handle, "lines", [handle])[0].get_ydata(), dtype=float)


def epochs_of(runs):
    settings = runs.settings
    epochs = runs.epochs.merge(settings[["run", "best_epoch"]], on="run")
    return epochs.assign(row=epochs["noise"].astype(str)).sort_values("color", kind="stable")


def test_a_noise_curve_is_the_mean_with_its_t_interval(make_runs):
    values = {noise: [0.7 - noise + 0.01 * seed**2 for seed in range(3)] for noise in (0, 0.05)}
    runs = make_runs(
        *(
            {"mtn": mtn, "seed": seed, "noise": noise, **aucs(value + 0.02 * mtn)}
            for noise, of_noise in values.items()
            for seed, value in enumerate(of_noise)
            for mtn in (False, True)
        )
    )

    figure = noise_curves(runs.results)

    ctr = figure.axes[0]
    means = [np.mean(of_noise) for of_noise in values.values()]
    assert [axes.get_title() for axes in figure.axes] == ["CTR", "CVR", "CTCVR"]
    assert drawn(ctr, "baseline") == pytest.approx(means)
    assert drawn(ctr, "+MTN") == pytest.approx(np.add(means, 0.02))
    bars = ctr.containers[0].lines[2][0].get_segments()
    for bar, mean, of_noise in zip(bars, means, values.values(), strict=True):
        assert bar[:, 1] == pytest.approx(stats.t.interval(0.95, 2, mean, stats.sem(of_noise)))
    assert list(ctr.get_xticks()) == [0, 0.05]


def test_the_limits_of_a_noise_panel_hold_every_interval(make_runs):
    runs = make_runs(
        *({"seed": s, "noise": n, **aucs(0.6 + 0.1 * s)} for s in range(2) for n in (0, 0.1))
    )

    axes = noise_curves(runs.results).axes[0]

    low, high = axes.get_ylim()
    assert all(low < y < high for bar in axes.collections[0].get_segments() for y in bar[:, 1])


def test_a_noise_curve_labels_its_values(make_runs):
    results = make_runs({"noise": 0.0}, {"noise": 0.1}).results

    assert noise_curves(results).axes[0].get_ylabel() == "test AUC"
    assert noise_curves(results, y="change").axes[0].get_ylabel() == "change"


def test_one_noise_proportion_gives_no_curve(make_runs):
    assert noise_curves(make_runs({"seed": 0}, {"seed": 1}).results) is None


def test_lambda_curves_show_the_baseline_level(make_runs):
    lams, couplings = (1e-5, 1e-3, 0.0), ("gradient", "decoupled")
    swept = [
        {"mtn": {"lam": lam, "coupling": coupling}, **aucs(0.7 + lam + 0.01 * number)}
        for lam in lams
        for number, coupling in enumerate(couplings)
    ]
    runs = make_runs({"seed": 0, **aucs(0.6)}, {"seed": 1, **aucs(0.62)}, *swept)

    figure = lambda_curves(runs.results)

    test_ctr = figure.axes[0]
    assert len(figure.axes) == 2 * len(TASKS)
    assert test_ctr.get_xscale() == "log"
    assert not any("$" in label.get_text() for label in test_ctr.get_xticklabels())
    assert drawn(test_ctr, "+MTN") == pytest.approx([0.70001, 0.701])
    assert drawn(test_ctr, "+MTN (coupling=decoupled)") == pytest.approx([0.71001, 0.711])
    assert drawn(test_ctr, "baseline") == pytest.approx([0.61, 0.61])
    band = test_ctr.patches[0].get_extents().transformed(test_ctr.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx(stats.t.interval(0.95, 1, 0.61, 0.01))


def test_a_seed_that_one_arm_lacks_is_not_in_the_paired_figure(make_runs):
    runs = make_runs(
        *({"seed": seed, **aucs(0.6 + 0.01 * seed)} for seed in (0, 1, 2, 7)),
        *({"seed": seed, "mtn": True, **aucs(0.7 + 0.02 * seed)} for seed in (0, 1, 2, 9)),
    )

    axes = paired_differences(runs.results).axes[0]

    dots, means = axes.lines[0], axes.containers[0].lines
    assert sorted(dots.get_xdata()) == pytest.approx([0.1, 0.11, 0.12])
    assert means[0].get_xdata() == pytest.approx([0.11])
    interval = stats.t.interval(0.95, 2, 0.11, stats.sem([0.1, 0.11, 0.12]))
    assert means[2][0].get_segments()[0][:, 0] == pytest.approx(interval)


def test_heat_maps_share_one_colour_scale():
    rng = np.random.default_rng(0)
    sizes = {"MTN on experts": 1, "no MTN": 5, "MTN on towers": 3}
    matrices = {name: rng.random((3, 4, 4)) * size for name, size in sizes.items()}

    figure = expert_distances(matrices)

    images = [image for axes in figure.axes[:3] for image in axes.get_images()]
    means = [np.mean(of_seeds, axis=0) for of_seeds in matrices.values()]
    assert {image.get_clim() for image in images} == {(0, np.max(means))}
    for image, mean in zip(images, means, strict=True):
        np.testing.assert_allclose(image.get_array(), mean)
    level = means[0].sum() / 12
    assert figure.axes[0].get_title() == f"MTN on experts\nmean {level:.3g}, 3 seeds"


def test_spectra_show_the_median_over_the_seeds_down_to_float32_precision():
    seeds = np.array([[4, 2, 1e-9], [5, 3, 1e-9], [9, 1, 1e-9]])
    values = pd.DataFrame(
        [
            {"row": "layer 0", "column": "input", "line": "+MTN", "run": r, "x": i + 1, "value": v}
            for r, of_run in enumerate(seeds)
            for i, v in enumerate(of_run)
        ]
    )

    axes = spectra(values).axes[0]

    assert drawn(axes, "+MTN") == pytest.approx(np.median(seeds, axis=0))
    assert axes.get_yscale() == "log"
    assert 1e-6 < axes.get_ylim()[0] < 1


def test_training_curves_end_where_the_first_seed_stopped(make_runs):
    runs = make_runs(
        *({"seed": seed, "epochs": epochs} for seed, epochs in ((0, 3), (1, 5))),
        *({"seed": seed, "mtn": True, "epochs": 6} for seed in (0, 1)),
    )

    figure = training_curves(epochs_of(runs))

    ctr = next(axes for axes in figure.axes if axes.get_title() == "CTR validation AUC")
    histories = [[e["val/ctr_auc"] for e in run.record.history[:3]] for run in runs[:2]]
    assert drawn(ctr, "baseline") == pytest.approx(np.mean(histories, axis=0))
    assert len(drawn(ctr, "+MTN")) == 6
    assert sorted(ctr.lines[1].get_xdata()) == [2, 4]  # the best epochs of the baseline's seeds
    band = ctr.collections[0].get_paths()[0].vertices[:, 1]
    intervals = stats.t.interval(0.95, 1, np.mean(histories, axis=0), stats.sem(histories))
    assert (band.min(), band.max()) == pytest.approx((np.min(intervals), np.max(intervals)))


def test_any_logged_value_is_drawn_over_the_epochs_that_all_seeds_trained(make_runs):
    runs = make_runs(*({"mtn": True, "seed": seed, "epochs": 2 + seed} for seed in range(3)))
    epochs = runs.epochs
    gaps = epochs[epochs["name"] == "mtn/layer_1/gap"]

    figure = over_epochs(gaps.assign(row="MMoE", column="layer 1", line="+MTN"), y="gap")

    (axes,) = figure.axes
    histories = [[e["mtn/layer_1/gap"] for e in run.record.history[:2]] for run in runs]
    assert drawn(axes, "+MTN") == pytest.approx(np.mean(histories, axis=0))
    assert (axes.get_title(), axes.get_ylabel()) == ("layer 1", "gap")


def test_alphas_and_ranks_have_a_panel_per_layer_and_unfolding(make_runs):
    epochs = epochs_of(make_runs({"mtn": True}, {"seed": 0}))

    for figure, name in ((alphas(epochs), "alpha"), (effective_ranks(epochs), "effective_rank")):
        unfoldings = ("task", "output", "input")
        assert [axes.get_title() for axes in figure.axes[:3]] == [
            f"{u} unfolding" for u in unfoldings
        ]
        panels_of = itertools.product((0, 1), unfoldings)
        for axes, (depth, unfolding) in zip(figure.axes, panels_of, strict=True):
            of_name = epochs[epochs["name"] == f"mtn/layer_{depth}/{name}_{unfolding}"]
            assert drawn(axes, "+MTN") == pytest.approx(of_name["value"].to_numpy())


def test_effective_ranks_and_spectra_show_the_baseline(make_runs):
    runs = make_runs({"mtn": True, "spectra": True}, {"spectra": True})

    figures = {kind: figure for kind, _, figure in drawn_figures(runs)}

    for kind in ("effective_ranks", "spectra"):
        labels = figures[kind].axes[0].get_legend_handles_labels()[1]
        assert labels == ["baseline", "+MTN"]
    with np.load(runs[1].folder / "spectra" / "epoch_002.npz") as arrays:
        spectrum = arrays["layer_0/output"]
    shares = spectrum / spectrum.sum()
    rank = np.exp(-(shares * np.log(shares)).sum())
    assert drawn(figures["effective_ranks"].axes[1], "baseline")[-1] == pytest.approx(rank)
    assert drawn(figures["spectra"].axes[1], "baseline") == pytest.approx(spectrum)


def test_runs_without_mtn_have_no_alphas_ranks_and_differences(make_runs):
    runs = make_runs({"seed": 0}, {"seed": 1})

    assert alphas(epochs_of(runs)) is None
    assert effective_ranks(epochs_of(runs)) is None
    assert paired_differences(runs.results) is None
    assert training_curves(epochs_of(runs)) is not None


def test_pooled_bins_keep_the_mass_and_the_rates():
    predicted, observed = [0.4, 0.1, 0.2, 0.3], [0.5, 0, 0.1, 0.2]
    bins = pd.DataFrame({"predicted": predicted, "observed": observed, "rows": [10, 10, 20, 20]})

    found = pooled(bins, count=2)

    assert found["predicted"].tolist() == pytest.approx([5 / 30, 10 / 30])
    assert found["observed"].tolist() == pytest.approx([2 / 30, 9 / 30])


def test_a_reliability_diagram_draws_rates_on_log_axes():
    bins = pd.DataFrame(
        {
            "row": "+MTN",
            "line": ["baseline", "baseline", "MTN", "MTN"],
            "task": "ctr",
            "run": ["a", "a", "b", "b"],
            "predicted": [0.01, 0.04, 0.01, 0.03],
            "observed": [0.0, 0.02, 0.01, 0.03],
            "rows": 50,
        }
    )

    axes = reliability(bins).axes[0]

    assert drawn(axes, "baseline") == pytest.approx([0.02])  # no place for a rate of zero
    assert drawn(axes, "MTN") == pytest.approx([0.01, 0.03])
    assert (axes.get_xscale(), axes.get_xlim()) == ("log", axes.get_ylim())


def test_a_task_without_positives_has_no_reliability_diagram():
    bins = {"row": "r", "line": "MTN", "task": "cvr", "run": "a", "predicted": [0.1], "rows": 9}

    assert reliability(pd.DataFrame(bins | {"observed": 0.0})) is None


def test_the_arms_of_a_block_are_drawn_together_baseline_first(make_runs):
    noisy = [{"mtn": mtn, "noise": 0.1} for mtn in ({"lam": 1}, True, False)]
    runs = make_runs(*noisy, {"noise": 0.0, "model": "ESMM"})

    found = blocks(runs.settings)

    assert list(zip(found["block"], found["line"], strict=True)) == [
        ("ESMM", "baseline"),
        ("MMoE", "baseline"),
        ("MMoE", "+MTN"),
        ("MMoE", "+MTN (lam=1)"),
    ]


@pytest.mark.slow
def test_one_seed_of_independent_tasks_is_drawn_without_a_band(make_runs):
    auc = {"auc": {"visit": 0.6, "buy_now": 0.7}}
    runs = make_runs(*({"mtn": mtn, "noise": n, **auc} for mtn in (False, True) for n in (0, 0.1)))

    figure = noise_curves(runs.results)
    curves = training_curves(epochs_of(runs))

    assert [axes.get_title() for axes in figure.axes] == ["buy_now", "visit"]
    assert drawn(figure.axes[0], "+MTN") == pytest.approx([0.7, 0.7])
    assert not [axes for axes in curves.axes if axes.collections]


@pytest.mark.slow
def test_every_kind_is_drawn_if_the_runs_have_it(make_runs):
    keys = {"spectra": True, "auc": {"ctr": 0.7}, "epochs": 2}
    arms = [{"mtn": False}, {"mtn": True}, {"mtn": {"lam": 0.1}}, {"noise": 0.1}]
    more = [{"model": "ESMM", **keys}]
    more += [{"data": "other", "auc": keys["auc"], **arm} for arm in arms[:3]]
    runs = make_runs(*(arm | keys for arm in arms), *more)

    found = [(kind, parts) for kind, parts, figure in drawn_figures(runs) if figure is not None]

    assert {kind for kind, _ in found} == set(KINDS)
    assert [parts for kind, parts in found if kind == "noise_curves"] == [("synthetic",)]
    assert [parts for kind, parts in found if kind == "ranks"] == [("CTR",)]
    assert ("spectra", ("synthetic", "MMoE")) in found
    assert ("expert_distances", ("synthetic", "MMoE", "noise 0.1")) in found
    of_esmm = {kind for kind, parts in found if "ESMM" in parts}
    assert of_esmm == {"training_curves", "reliability", "effective_ranks", "spectra"}


@pytest.mark.slow
def test_the_same_runs_give_the_same_files(make_runs, tmp_path):
    runs = make_runs({"model": "ESMM", "auc": {"click": 0.7}})

    written = write_figures(tmp_path / "a", runs)
    write_figures(tmp_path / "b", runs)

    names = {path.name for path in (tmp_path / "a").iterdir()}
    stems = {"training_curves-synthetic-esmm", "reliability-synthetic-esmm"}
    assert names == {f"{stem}.{end}" for stem in stems for end in ("pdf", "svg", "png")}
    assert {path.name for figure in written for path in figure.paths} == names
    assert all(figure.title and figure.caption and figure.alt for figure in written)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_a_run_without_saved_arrays_has_no_figures_of_them(make_runs):
    run, *_ = make_runs({"mtn": True, "epochs": 2})
    record = replace(run.record, expert_distances=None, calibration_curves={})
    bare = Runs([replace(run, record=record)])

    kinds = {kind for kind, _, figure in drawn_figures(bare) if figure is not None}

    assert kinds == {"training_curves", "alphas", "effective_ranks"}


@pytest.mark.slow
def test_heat_maps_begin_with_the_baseline(make_runs):
    runs = make_runs({"mtn": True}, {"mtn": False}, {"mtn": {"target": "shared"}})

    figures = {kind: figure for kind, _, figure in drawn_figures(runs)}

    titles = [axes.get_title().split("\n")[0] for axes in figures["expert_distances"].axes[:3]]
    assert titles == ["baseline", "+MTN", "+MTN (target=shared)"]


def test_values_are_shown_under_the_pointer(make_runs, tmp_path):
    runs = make_runs(*({"seed": s, "noise": n, **aucs(0.6)} for s in range(2) for n in (0, 0.1)))

    _, path, _ = save(noise_curves(runs.results), tmp_path, "curves")

    assert ">MMoE, 0.1: 0.6 [0.6, 0.6]</title>" in path.read_text()


@pytest.mark.slow
def test_names_with_dollars_and_of_any_length_are_drawn_and_kept(make_runs, tmp_path):
    name = "a$b$" + "点击" * 100
    runs = make_runs(*({"data": name, "noise": n, "auc": {"c$d$e": 0.7}} for n in (0, 0.1)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no letter without a font is reported raw
        written = write_figures(tmp_path / "figures", runs)

    path = next(
        p for f in written if f.kind == "noise_curves" for p in f.paths if p.suffix == ".svg"
    )
    assert len(path.name.encode()) < 150
    assert f"AUC against noise, {name}" in path.read_text()
    assert ">c$d$e</text>" in path.read_text()


def test_figures_of_an_earlier_report_are_removed(make_runs, tmp_path):
    (tmp_path / "old.svg").write_text("")
    (tmp_path / "note.txt").write_text("")

    write_figures(tmp_path, make_runs({"auc": {"ctr": 0.7}, "epochs": 1}), lambda planned: [])

    assert [path.name for path in tmp_path.glob("*.*")] == ["note.txt"]


@pytest.mark.slow
def test_a_baseline_is_grey_and_an_arm_has_one_colour_in_every_figure(make_runs):
    arms = [{"mtn": m} for m in (False, True, {"target": "shared"})]
    runs = make_runs(*(arm | {"noise": n, "spectra": True} for arm in arms for n in (0, 0.1)))

    colors = {}
    for _, _, figure in drawn_figures(runs):
        for axes in figure.axes if figure else ():
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                line = getattr(handle, "lines", [handle])[0]
                colors.setdefault(label, set()).add(line.get_color())

    assert colors["baseline"] == {line_style(0)["color"]}
    assert colors["+MTN"] == {line_style(1)["color"]}
    assert colors["+MTN (target=shared)"] == {line_style(2)["color"]}


def test_pdf_fonts_are_embedded_as_truetype(tmp_path):
    figure, _ = panels(1, 1)

    path, *_ = save(figure, tmp_path, "empty")

    assert b"/Subtype /Type3" not in path.read_bytes()
    assert b"/FontFile2" in path.read_bytes()


def test_drawing_does_not_change_the_settings_of_matplotlib(make_runs):
    before = json.dumps(dict(mpl.rcParams), default=str)

    expert_distances({"no MTN": [np.eye(2)]})

    assert json.dumps(dict(mpl.rcParams), default=str) == before


def test_lines_of_a_figure_differ_even_without_colour():
    styles = [line_style(index) for index in range(7)]

    assert len({style["marker"] for style in styles}) == 7
    assert len({style["color"] for style in styles}) == 7


def test_a_panel_without_data_is_blank_under_the_name_of_its_column():
    table = pd.DataFrame({"row": ["a", "b"], "column": ["c", "d"], "line": "baseline"})

    def draw(axes, line, name, style):
        axes.plot([0, 1], label=name)

    figure, found = facets(table, draw, x="x", y="y")

    assert set(found) == {("a", "c"), ("b", "d")}
    assert [axes.axison for axes in figure.axes] == [True, False, False, True]
    assert figure.axes[1].get_title() == "d"


@pytest.mark.slow
def test_names_with_dollar_signs_are_drawn_as_they_are(make_runs, tmp_path):
    names = {"auc": {"$buy$": 0.7, "a_$x^$": 0.8}, "data": "$\\frac{$"}
    runs = make_runs(
        *({**names, "seed": seed, "mtn": mtn} for seed in (0, 1) for mtn in (False, True))
    )

    assert write_figures(tmp_path / "figures", runs)
