"""Reports of sweeps over ``regularizer``: arms, baselines and tables."""

import pytest
from omegaconf import OmegaConf

from mtnrec.reporting.runs import read_runs
from mtnrec.reporting.table.published import deviations, paper_results
from mtnrec.reporting.table.scores import comparisons, split_by_table

AUC = {"": 0.7, "L2": 0.72, "MTN": 0.73, "MTN+L2": 0.75}  # CTR, by treatments


def regularizer(norm="l2", **keys):
    target = "mtnrec.regularizer.callback.Regularizer"
    defaults = {"lam": 1e-5, "target": "towers", "layers": "all", "coupling": "gradient"}
    return {"_target_": target, "norm": norm, "enabled": True, **defaults, **keys}


@pytest.fixture
def four_arms(write_run, tmp_path):
    """The runs of ``regularizer=none,l2 mtn.enabled=false,true``, three seeds."""
    for seed in range(3):
        for number, (name, auc) in enumerate(AUC.items()):
            write_run(
                tmp_path,
                f"{number}_{seed}",
                seed=seed,
                mtn="MTN" in name,
                regularizer=regularizer() if "L2" in name else None,
                auc={"ctr": auc + seed * 1e-3, "cvr": 0.8, "ctcvr": 0.85},
            )
    return tmp_path


def test_arms_are_named_by_their_treatments_and_share_the_baseline_without_any(four_arms):
    table = read_runs(four_arms).settings.set_index("run")

    labels = ["", "+L2", "+MTN", "+MTN+L2"]
    assert [table.loc[f"{number}_0", "variant"] for number in range(4)] == labels
    assert [table.loc[f"{number}_0", "treated"] for number in range(4)] == [False, True, True, True]
    assert table["arm"].nunique() == 4
    assert table["baseline"].nunique() == 1
    assert set(table["line"]) == {"baseline", "+L2", "+MTN", "+MTN+L2"}


def test_one_table_compares_each_arm_with_the_baseline(four_arms):
    results = read_runs(four_arms).results

    parts = split_by_table(results)

    assert list(parts) == ["Models without noise"]
    cells = comparisons(parts["Models without noise"])
    found = cells[cells["task"] == "ctr"].set_index("variant")["difference"]
    assert found.dropna().to_dict() == {
        f"+{name}": pytest.approx(auc - AUC[""]) for name, auc in AUC.items() if name
    }


def test_without_mtn_a_regulariser_is_compared_with_the_run_that_has_none(write_run, tmp_path):
    write_run(tmp_path, "off")
    write_run(tmp_path, "on", regularizer=regularizer("soft_sharing"))

    table = read_runs(tmp_path).settings.set_index("run")

    assert table["variant"].to_dict() == {"off": "", "on": "+soft sharing"}
    assert table["treated"].to_dict() == {"off": False, "on": True}


def test_the_baseline_without_mtn_can_have_a_regulariser(four_arms):
    table = read_runs(four_arms, baseline="mtn.enabled=false").settings.set_index("run")

    assert [table.loc[f"{number}_0", "treated"] for number in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    blocks = [table.loc[f"{number}_0", "baseline"] for number in range(4)]
    assert blocks[0] == blocks[2] != blocks[1] == blocks[3]


def test_a_treatment_names_only_its_own_settings_that_differ(write_run, tmp_path):
    write_run(tmp_path, "off")
    write_run(tmp_path, "a", mtn={"alpha": "uniform"})
    write_run(tmp_path, "b", mtn=True)
    write_run(tmp_path, "c", regularizer=regularizer(lam=0.1))
    write_run(tmp_path, "d", mtn={"alpha": "uniform"}, regularizer=regularizer(lam=0.01))
    write_run(tmp_path, "e", regularizer=regularizer("frobenius"))

    table = read_runs(tmp_path).settings.set_index("run")

    assert table["variant"].to_dict() == {
        "off": "",
        "a": "+MTN (alpha=uniform)",
        "b": "+MTN",
        "c": "+L2 (lam=0.1)",
        "d": "+MTN (alpha=uniform)+L2 (lam=0.01)",
        "e": "+Frobenius",
    }


def test_a_regulariser_that_is_off_is_the_baseline(write_run, tmp_path):
    write_run(tmp_path, "a", seed=0)
    write_run(tmp_path, "b", seed=1, regularizer=regularizer(enabled=False))

    assert read_runs(tmp_path).settings["arm"].nunique() == 1


def test_other_norms_of_mtn_are_named_and_are_not_the_papers(write_run, tmp_path):
    data = {"data": "ali_ccp"}
    write_run(tmp_path, "off", **data)
    write_run(tmp_path, "paper", mtn={"norm": "trace", "cap": 0.5, "frobenius": True}, **data)
    write_run(tmp_path, "capped", mtn={"norm": "capped", "cap": 0.5, "frobenius": True}, **data)
    write_run(tmp_path, "both", mtn=True, regularizer=regularizer(), **data)

    runs = read_runs(tmp_path)
    variants = runs.settings.set_index("run")["variant"].to_dict()
    matched = deviations(comparisons(runs.results), paper_results())

    assert variants["paper"] == "+MTN"
    assert variants["capped"] == "+MTN (cap=0.5, norm=capped)"
    assert set(matched["variant"]) == {"", "+MTN"}


@pytest.mark.parametrize("choice", ["GTTN", "LAF", "TT", "Tucker", "Capped", "Nuclear"])
def test_other_trace_norms_have_their_names(choice, compose_config, write_run, tmp_path):
    config = compose_config(f"mtn={choice.lower()}", "mtn.enabled=true").mtn
    write_run(tmp_path, "off")
    write_run(tmp_path, "mtn", mtn=True)
    for lam in (1e-5, 1e-3):
        keys = OmegaConf.to_container(config) | {"lam": lam}
        write_run(tmp_path, f"own {lam}", mtn=keys)

    table = read_runs(tmp_path).settings.set_index("run")["variant"]

    assert table["mtn"] == "+MTN"
    assert table[["own 1e-05", "own 0.001"]].tolist() == [f"+{choice}", f"+{choice} (lam=0.001)"]


def test_a_changed_relative_is_mtn_with_its_settings(write_run, tmp_path):
    write_run(tmp_path, "off")
    write_run(tmp_path, "paper", mtn=True)
    write_run(tmp_path, "own", mtn={"alpha": [1, 0, 0], "frobenius": True})

    table = read_runs(tmp_path).settings.set_index("run")["variant"]

    assert table["own"] == "+MTN (alpha=[1, 0, 0])"


def test_weight_decay_is_named_where_only_runs_without_a_treatment_have_it(write_run, tmp_path):
    write_run(tmp_path, "off")
    write_run(tmp_path, "l2", regularizer=regularizer())
    decay = {"optimizer._target_": "torch.optim.AdamW", "optimizer.weight_decay": 0.1}
    write_run(tmp_path, "decay", **decay)

    table = read_runs(tmp_path).settings.set_index("run")["label"]

    assert table["off"] == "MMoE"
    assert table["l2"] == "MMoE +L2"
    assert table["decay"].startswith("MMoE (optimizer=AdamW")
    compared = read_runs(tmp_path, baseline="optimizer=adam").settings.set_index("run")
    assert compared["treated"].to_dict() == {"off": False, "l2": False, "decay": True}
