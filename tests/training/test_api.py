"""Training from Python: the same runs as those of the command."""

from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mtnrec
from mtnrec.checks import InputError
from mtnrec.system.files import read_json

LOG = {"rows": 3000, "click_rate": 0.2, "conversion_rate": 0.3, "batch_size": 512}
WIDTHS = {"embedding_dim": 4, "tower_widths": [16, 8]}
SHORT = {"max_epochs": 2, "accelerator": "cpu"}
KEPT = ("cell", "metrics", "counts", "history", "best_epoch", "calibration_curves", "noise")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return mtnrec.Synthetic(dir=tmp_path_factory.mktemp("data"), **LOG)


def command_record(train, *overrides):
    keys = [f"data.{key}={value}" for key, value in LOG.items()]
    return read_json(train(*keys, *overrides) / "result.json")


@pytest.mark.parametrize(
    "mtn",
    [
        pytest.param(mtnrec.MTN(lam=1e-3), id="an object"),
        pytest.param({"lam": 1e-3}, id="keys of the group", marks=pytest.mark.slow),
    ],
)
def test_a_run_from_python_equals_that_of_the_command(mtn, data, train):
    overrides = ["seed=1", "mtn.enabled=true", "mtn.lam=1e-3", "noise.proportion=0.1"]
    expected = command_record(train, *overrides)

    run = mtnrec.fit(data, WIDTHS, mtn=mtn, noise={"proportion": 0.1}, seed=1, trainer=SHORT)

    record = read_json(run.folder / "result.json")
    assert {key: record[key] for key in KEPT} == {key: expected[key] for key in KEPT}


@pytest.mark.slow
def test_a_run_from_python_without_mtn_equals_the_baseline_of_the_command(data, train):
    expected = command_record(train, "seed=2")

    run = mtnrec.fit(data, partial(mtnrec.ESMM, **WIDTHS), seed=2, trainer=SHORT)

    assert run.record.cell == expected["cell"]
    assert run.metrics == expected["metrics"]


def test_a_finished_run_is_read_and_not_trained_again(data, monkeypatch):
    settings = {"seed": 3, "trainer": SHORT}
    first = mtnrec.fit(data, WIDTHS, **settings)
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))

    again = mtnrec.fit(data, WIDTHS, **settings)

    assert again.folder == first.folder
    assert again.record.cell == first.record.cell
    assert again.metrics == first.metrics


@pytest.mark.slow
def test_runs_from_python_are_read_like_those_of_a_sweep(data, tmp_path):
    for mtn in (None, mtnrec.MTN()):
        mtnrec.fit(data, WIDTHS, mtn=mtn, trainer=SHORT)

    settings = mtnrec.read_runs(tmp_path / "runs").settings

    assert settings["variant"].tolist() == ["", "+MTN"] or set(settings["variant"]) == {"", "+MTN"}
    assert settings["baseline"].nunique() == 1


@pytest.mark.slow
def test_history_has_a_row_for_each_epoch(data):
    run = mtnrec.fit(data, WIDTHS, trainer=SHORT)

    assert run.history["epoch"].tolist() == [0, 1]
    assert run.history["val/cvr_auc"].notna().all()


@pytest.mark.slow
def test_runs_of_different_seeds_and_noise_share_one_data_set(data):
    quiet = mtnrec.fit(data, WIDTHS, trainer=SHORT, seed=4)
    noisy = mtnrec.fit(data, WIDTHS, trainer=SHORT, seed=4, noise=mtnrec.Noise(proportion=0.3))
    again = mtnrec.fit(data, WIDTHS, trainer=SHORT, seed=4, resume=False)

    assert quiet.metrics == again.metrics != noisy.metrics


def test_a_built_network_is_refused(data):
    data.prepare_data()
    data.setup()

    with pytest.raises(InputError, match=r"got a built ESMM, whose weights do not follow from"):
        mtnrec.fit(data, mtnrec.ESMM(data.schema, **WIDTHS))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"model": "esm"}, InputError, "model must be one of .*mmoe.*; got 'esm'"),
        ({"trainer": {"epochs": 3}}, InputError, "trainer must have keys of its choice default"),
        ({"optimizer": partial(torch.optim.Adam, lr=nn.ReLU())}, InputError, r"optimizer\.lr must"),
        ({"patience": 0}, InputError, "patience must be an integer >= 1"),
        ({"stop": "never"}, InputError, "stop must be one of"),
        ({"mtn": {"lambda": 1}}, InputError, "mtn must have keys of its choice mtn, got lambda"),
    ],
)
def test_invalid_arguments_are_refused_with_a_remedy(keys, error, message, data):
    with pytest.raises(error, match=message):
        mtnrec.fit(data, **{"trainer": SHORT, **keys})


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    clicks = rng.integers(0, 2, 2000)
    columns = {"shop": rng.choice(list("abcd"), 2000), "age": rng.normal(size=2000)}
    labels = {"visit": clicks, "conversion": clicks & rng.integers(0, 2, 2000)}
    return pd.DataFrame(columns | labels)


@pytest.mark.slow
def test_a_frame_is_prepared_once_trained_on_and_scored(frame, capsys):
    table = mtnrec.Table(train=frame, labels=["visit", "conversion"], funnel=True, batch_size=256)
    settings = {"model": WIDTHS, "mtn": mtnrec.MTN(lam=1e-5), "trainer": SHORT}

    run = mtnrec.fit(table, **settings)
    again = mtnrec.fit(table, **settings)
    changed = mtnrec.Table(train=frame[::-1], labels=["visit", "conversion"], funnel=True)
    other = mtnrec.fit(changed, **settings)

    assert capsys.readouterr().out.count("rows to write") == 2
    assert again.record == run.record
    assert other.record.cell != run.record.cell
    assert run.record.config["data"]["train"] == "<DataFrame>"
    scores = run.score(frame.head(3))
    assert list(scores.columns) == ["ctr", "cvr", "ctcvr"]
    assert scores["ctcvr"].to_numpy() == pytest.approx(scores["ctr"] * scores["cvr"], rel=1e-5)


def test_a_lightning_trainer_trains_the_parts(data, tmp_path):
    data.prepare_data()
    data.setup()
    network = mtnrec.MMoE(data.schema, embedding_dim=4, experts=2, expert_widths=[8])
    module = mtnrec.MultiTaskModule(network, schema=data.schema)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[mtnrec.MTN(lam=1e-5)],
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )

    trainer.fit(module, datamodule=data)

    assert trainer.callback_metrics["mtn/norm"] > 0
    assert 0 < trainer.callback_metrics["val/cvr_auc"] < 1


def test_every_public_name_exists():
    for name in mtnrec.__all__:
        assert getattr(mtnrec, name).__doc__
    assert set(mtnrec.__all__) <= set(dir(mtnrec))
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = mtnrec.Trainer
