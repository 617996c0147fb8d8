"""AITM, ESCM2, DCMT and the controls: trained with MTN by the command, logged and resumed."""

import json

import pytest
import torch
from shared_fixtures import Killed

LOG = ["data=synthetic", "data.rows=1500", "data.click_rate=0.2", "data.conversion_rate=0.3"]
RUN = [*LOG, "data.batch_size=128", "mtn.enabled=true", "model.dropout=0.2"]
WEIGHTS = {"clipped_share", "largest_weight", "effective_share", "mean_weight", "mean_cvr"}
LOGGED = {
    "aitm": {"loss_calibrator", "violating_share"},
    "escm2": {"loss_weighted_cvr", "mean_clicked_cvr", *WEIGHTS},
    "dcmt": {"loss_weighted_cvr", "loss_agreement", *WEIGHTS},
    "naive_cvr": {"loss_clicked_cvr"},
    "esmm": {"loss_clicked_cvr", "loss_clicked_ctcvr"},
}
KEYS = {
    "escm2": ["model.estimator=dr"],
    "esmm": ["model.clicked_weight=1", "model.unclicked_weight=0.5", "model.click_gate=true"],
}
CASES = [
    pytest.param(model, marks=[] if model == "escm2" else [pytest.mark.slow]) for model in LOGGED
]


@pytest.mark.parametrize("model", CASES)
@pytest.mark.slow
def test_a_killed_run_with_mtn_ends_with_the_bits_of_an_uninterrupted_one(
    model, train, kill, tmp_path
):
    run = [*RUN, *KEYS.get(model, []), "trainer.checkpoint_every_n_steps=4"]
    expected = train(*run, model=model)
    kill("on_train_batch_end", 13)
    with pytest.raises(Killed):
        train(*run, model=model, folder=tmp_path)

    train(*run, model=model, folder=tmp_path)

    paths = (folder / "checkpoints" / "best.ckpt" for folder in (tmp_path, expected))
    found, whole = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    history, other = (
        json.loads((folder / "result.json").read_text())["history"]
        for folder in (tmp_path, expected)
    )
    assert history == other
    assert {f"train/{name}" for name in LOGGED[model]} <= history[0].keys()
    assert any(name.startswith("mtn/") for name in history[0])


@pytest.mark.slow
def test_mtn_acts_on_the_experts_of_escm2(train):
    run = train(*LOG, "mtn.enabled=true", "mtn.target=shared", model="escm2")

    history = json.loads((run / "result.json").read_text())["history"]
    assert any(name.startswith("mtn/") for name in history[0])
