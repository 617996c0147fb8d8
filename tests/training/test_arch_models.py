"""HEAC, STEM, the cross network and the personal gates in whole runs."""

import json

import pytest
import torch
from shared_fixtures import Killed

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3", "trainer.max_epochs=1"]
PERSONAL = ("mmoe", ["model.personal_fields=[categorical_1]"])


def read_record(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("model", "overrides", "target", "depths"),
    [
        ("heac", [], "shared", 1),
        pytest.param("stem", [], "shared", 1, marks=pytest.mark.slow),
        pytest.param("stem", [], "towers", 2, marks=pytest.mark.slow),
        pytest.param("mmoe_cross", [], "towers", 2, marks=pytest.mark.slow),
        pytest.param(*PERSONAL, "towers", 2, marks=pytest.mark.slow),
    ],
)
def test_mtn_acts_on_the_layers_of_its_target(model, overrides, target, depths, train):
    run = train(*LOG, *overrides, "mtn.enabled=true", f"mtn.target={target}", model=model)

    (epoch,) = read_record(run)["history"]

    assert len({k.split("/")[1] for k in epoch if k.startswith("mtn/layer_")}) == depths


def test_mtn_on_the_towers_of_heac_is_refused_with_the_remedy(train, tmp_path):
    with pytest.raises(
        SystemExit, match=r"^mtnrec: HEAC must have layers per task .* Choose mtn\.target=shared"
    ):
        train(*LOG, "mtn.enabled=true", model="heac", folder=tmp_path)

    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_an_unknown_personal_field_is_refused_before_training(train, tmp_path):
    with pytest.raises(
        SystemExit, match=r"^mtnrec: model\.personal_fields must name fields .*, got 'user_id'$"
    ):
        train(*LOG, "model.personal_fields=[user_id]", model="mmoe", folder=tmp_path)

    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("heac", []),
        ("stem", ["optimizer=lazy_adam"]),
        ("mmoe_cross", []),
        PERSONAL,
    ],
)
@pytest.mark.slow
def test_every_model_resumes_to_the_same_bits(model, overrides, train, kill, tmp_path):
    run = [*LOG, *overrides, "model.dropout=0.3", "trainer.max_epochs=2"]
    expected = train(*run, model=model)
    kill("on_train_epoch_start", 2)
    with pytest.raises(Killed):
        train(*run, model=model, folder=tmp_path)

    train(*run, model=model, folder=tmp_path)

    assert "last.ckpt, after epoch 0" in (tmp_path / "train.log").read_text()
    assert read_record(tmp_path)["metrics"] == read_record(expected)["metrics"]
    found, weights = (
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path, expected)
    )
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_gates_of_the_towers_pass_the_comparison_that_export_makes(form, train, export, tmp_path):
    model, overrides = PERSONAL
    out = tmp_path / ("model.onnx" if form == "onnx" else "model.pt2")
    run = train(*LOG, *overrides, model=model)

    export(f"checkpoint={run}", f"format={form}", f"out={out}")

    assert out.stat().st_size > 0
