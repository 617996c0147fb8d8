import numpy as np
import pytest

from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.published import deviations, mtreclib_results, paper_results
from mtnrec.reporting.table.scores import comparisons


@pytest.fixture
def cells(tmp_path):
    return lambda **choice: comparisons(read_runs(tmp_path).results, **choice)


def published(data, model, task, *, mtn, noise=0.0):
    table = paper_results().set_index(["data", "model", "task", "mtn", "noise"])
    return table.loc[(data, model, task, mtn, noise), "auc"]


def test_the_papers_numbers_are_in_their_places():
    assert len(paper_results()) == 4 * 6 * 3 + 3 * 6 * 3
    assert published("aliexpress_nl", "MMoE", "ctr", mtn=False) == 0.7258
    assert published("aliexpress_es", "ESMM", "cvr", mtn=True) == 0.8323
    assert published("ali_ccp", "Shared-bottom", "ctcvr", mtn=True) == 0.6289
    assert published("ali_ccp", "MMoE", "ctr", mtn=False, noise=0.05) == 0.6171
    assert published("ali_ccp", "ESMM", "cvr", mtn=True, noise=0.1) == 0.6626
    assert published("ali_ccp", "Shared-bottom", "ctcvr", mtn=True, noise=0.15) == 0.6365


def test_all_ali_ccp_metrics_of_the_paper_improve_with_noise_by_at_most_0_0141():
    found = paper_results().pivot_table(
        index=["data", "noise", "model", "task"], columns="mtn", values="auc"
    )
    gains = (found[True] - found[False]).loc["ali_ccp"]

    assert (gains > 0).all()
    assert gains[gains.index.get_level_values("noise") > 0].max() == pytest.approx(0.0141)


def test_mtreclibs_numbers_are_in_their_places():
    table = mtreclib_results().set_index(["data", "model", "task"])["auc"]

    assert len(table) == 3 * 4 * 2
    assert table["aliexpress_nl", "Shared-bottom", "ctr"] == 0.7228
    assert table["aliexpress_fr", "MMoE", "ctcvr"] == 0.8811
    assert table["aliexpress_us", "PLE", "ctcvr"] == 0.8675


def test_deviations_are_ours_minus_the_papers(tmp_path, write_run, cells):
    ours = {"ctr": [0.72, 0.74], "cvr": [0.8, 0.81], "ctcvr": [0.86, 0.87]}
    for seed in (0, 1):
        auc = {task: values[seed] for task, values in ours.items()}
        for mtn in (False, True):
            write_run(tmp_path, f"{mtn}{seed}", seed=seed, mtn=mtn, auc=auc, data="aliexpress_nl")

    found = deviations(cells(), paper_results())

    assert len(found) == 6
    for row in found.itertuples():
        mtn = row.variant == "+MTN"
        assert row.published == published("aliexpress_nl", "MMoE", row.task, mtn=mtn)
        assert row.ours == pytest.approx(np.mean(ours[row.task]))
        assert row.deviation == pytest.approx(row.ours - row.published)
        assert row.seeds == 2


def test_noise_is_matched_with_the_second_table(tmp_path, write_run, cells):
    for noise in (0.1, 0.2):
        write_run(tmp_path, f"{noise}", noise=noise, data="ali_ccp", model="ESMM")

    found = deviations(cells(), paper_results())

    assert set(found["noise"]) == {0.1}
    assert found["published"].tolist() == [0.6162, 0.6547, 0.6421]


def test_synthetic_data_has_no_deviations(tmp_path, write_run, cells):
    for mtn in (False, True):
        write_run(tmp_path, f"{mtn}", mtn=mtn)

    found = deviations(cells(), paper_results())

    assert found.empty
    assert "deviation" in found


def test_other_metrics_and_other_variants_are_not_the_papers(tmp_path, write_run, cells):
    write_run(tmp_path, "a", data="ali_ccp", mtn={"target": "shared"})
    write_run(tmp_path, "b", data="ali_ccp", mtn={"lam": 1e-3})
    write_run(tmp_path, "c", data="ali_ccp", mtn={"layers": [0]})

    assert deviations(cells(), paper_results()).empty
    assert deviations(cells(metric="log_loss"), paper_results()).empty


def test_labels_that_distinguish_runs_are_matched_by_name(tmp_path, write_run, cells):
    write_run(tmp_path, "a", data="ali_ccp", **{"data.rows": 1})
    write_run(tmp_path, "b", data="ali_ccp", **{"optimizer.lr": 0.1})
    write_run(tmp_path, "c", data="ali_ccp")

    found = deviations(cells(), paper_results())

    assert set(found["model"]) == {"MMoE (optimizer.lr=0.1)", "MMoE (optimizer.lr=0.001)"}
    assert set(found["data"]) == {"ali_ccp (rows=1)", "ali_ccp (rows=3000)"}
