"""What the module keeps of a test."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from mtnrec.model.mmoe import MMoE
from mtnrec.training.module import MultiTaskModule


@pytest.fixture
def tested(tmp_path, funnel_schema, make_batch):
    """A module after a test, and the batches of the test."""
    torch.manual_seed(0)
    network = MMoE(
        funnel_schema,
        embedding_dim=8,
        bag_mode="mean",
        experts=3,
        expert_widths=[32],
        tower_widths=[32],
        dropout=0.0,
        batch_norm=False,
    )
    module = MultiTaskModule(network, schema=funnel_schema, optimizer=torch.optim.Adam)
    batches = [make_batch(funnel_schema, 100, seed) for seed in range(4)]
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",  # no two rows are alike
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.test(module, loader, verbose=False)
    return module, batches


def test_the_curves_of_a_test_are_ready_for_the_record(tested):
    module, batches = tested

    curves = json.loads(json.dumps(module.calibration_curves))

    assert list(curves) == ["test/ctr", "test/cvr", "test/ctcvr"]
    with torch.no_grad():
        p = torch.cat([module(batch).positive.double().exp() for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    for column, task in ((0, "test/ctr"), (1, "test/ctcvr")):
        curve = curves[task]
        observed, predicted = calibration_curve(
            labels[:, column], p[:, column], n_bins=20, strategy="quantile"
        )
        np.testing.assert_allclose(curve["predicted"], predicted, rtol=1e-12)
        np.testing.assert_allclose(curve["observed"], observed, rtol=1e-12)
        assert curve["rows"] == [20] * 20
    assert sum(curves["test/cvr"]["rows"]) == labels[:, 0].sum()


def test_the_curves_agree_with_the_calibration_error(tested):
    module, _ = tested

    for task, curve in module.calibration_curves.items():
        distances = np.abs(np.subtract(curve["predicted"], curve["observed"]))
        error = np.average(distances, weights=curve["rows"])
        assert module.results["test"][f"{task}_ece"] == pytest.approx(error, abs=1e-13)
