import numpy as np
import pytest
from omegaconf import OmegaConf

from mtnrec.tracking import make_logger, run_labels, tables_of


@pytest.fixture
def labels(compose_config):
    def make(*overrides, checksum="1"):
        config = compose_config("output_dir=out", *overrides)
        return run_labels(OmegaConf.to_container(config, resolve=True), checksum)

    return make


def test_seed_and_what_means_nothing_leave_the_arm_as_it_is(labels):
    group = labels()["group"]

    for override in ("seed=3", "mtn.lam=1", "noise.seed=4", "output_dir=other", "data.dir=there"):
        assert labels(override)["group"] == group


def test_what_determines_a_result_makes_another_arm(labels):
    overrides = ["mtn.enabled=true", "model=mmoe", "noise.proportion=0.1", "optimizer.lr=0.1"]
    groups = {labels(*override)["group"] for override in [[], *([o] for o in overrides)]}

    assert len(groups | {labels(checksum="2")["group"]}) == 6


def test_name_and_tags_say_model_data_mtn_and_noise(labels):
    found = labels("model=mmoe", "mtn.enabled=true", "noise.proportion=0.15", "seed=7")

    assert found["group"].startswith("synthetic mmoe mtn lam=1e-05 noise_0.15 ")
    assert found["name"] == f"{found['group']} seed=7"
    assert found["tags"] == ["synthetic", "mmoe", "mtn", "noise_0.15"]


def test_a_name_of_ones_own_is_kept_and_tags_are_added(compose_config, tmp_path):
    config = compose_config(
        "logger=wandb", f"output_dir={tmp_path}", "logger.name=mine", "logger.tags=[pilot]"
    )

    logger = make_logger(config.logger, OmegaConf.to_container(config, resolve=True), "1")

    assert logger.name == "mtnrec"  # Lightning's is the project's
    assert logger._wandb_init["name"] == "mine"
    assert logger._wandb_init["tags"] == ["pilot", "synthetic", "esmm", "baseline", "clean"]


def test_tables_lay_the_record_out(tmp_path):
    (tmp_path / "spectra").mkdir()
    np.savez(tmp_path / "spectra" / "epoch_001.npz", **{"layer_0/task": np.array([3.0, 1.0])})
    record = {
        "best_epoch": 1,
        "config": {"output_dir": str(tmp_path)},
        "counts": {
            "test/buy": {"rows": 9, "positives": 2},
            "test/buy_now": {"rows": 9, "positives": 1},
        },
        "metrics": {"test/buy_auc": 0.7, "test/buy_now_auc": 0.6},
        "history": [
            {"epoch": 0, "mtn/layer_0/alpha_task": 0.4, "mtn/layer_0/effective_rank_task": 1.5}
        ],
        "calibration_curves": {"test/buy": {"predicted": [0.1], "observed": [0.2], "rows": [9]}},
        "expert_distances": [[0.0, 2.0], [2.0, 0.0]],
    }

    rows = {name: rows for name, (_, rows) in tables_of(record).items()}

    nothing = [None] * 5
    assert rows["metrics"] == [
        ["test", "buy", 9, 2, 0.7, *nothing],
        ["test", "buy_now", 9, 1, 0.6, *nothing],
    ]
    assert rows["alphas"] == [[0, 0, "task", 0.4, 1.5]]
    assert rows["spectra"] == [["layer_0", "task", 0, 3.0], ["layer_0", "task", 1, 1.0]]
    assert rows["calibration"] == [["test", "buy", 0.1, 0.2, 9]]
    assert rows["expert_distances"] == [[0, 0.0, 2.0], [1, 2.0, 0.0]]


def test_a_record_without_history_and_curves_has_its_metrics_only(tmp_path):
    record = {
        "best_epoch": 0,
        "config": {"output_dir": str(tmp_path)},
        "counts": {"test/ctr": {"rows": 9, "positives": 2}},
        "metrics": {"test/ctr_auc": None},
    }

    assert list(tables_of(record)) == ["metrics"]
