"""A training that diverges ends with one message, and without a checkpoint from it."""

import math
import re

import numpy as np
import pytest
import torch

from mtnrec.data.samplers import TrainSampler
from mtnrec.training.divergence import Divergence, largest
from mtnrec.training.module import MultiTaskModule

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
RUN = [*LOG, "data.batch_size=128", "trainer.max_epochs=3"]
STEPS = 15  # of an epoch


@pytest.fixture
def spoil(monkeypatch):
    """Let the loss, or the gradient alone, of one batch be what it should not be."""

    def arrange(epoch, batch, *, loss=math.nan, gradient=None):
        original = MultiTaskModule.training_step

        def step(self, of, batch_idx):
            value = original(self, of, batch_idx)
            if (self.current_epoch, batch_idx) != (epoch, batch):
                return value
            if gradient is None:
                return value * loss
            next(self.parameters()).register_hook(lambda g: torch.full_like(g, gradient))
            return value

        monkeypatch.setattr(MultiTaskModule, "training_step", step)

    return arrange


@pytest.mark.parametrize("mtn", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_loss_that_is_not_finite_is_named_with_its_rows(mtn, train, spoil, tmp_path):
    spoil(1, 4)

    with pytest.raises(SystemExit) as stop:
        train(*RUN, f"mtn.enabled={mtn}", folder=tmp_path)

    step = STEPS + 4
    assert re.match(
        rf"mtnrec: the loss must be finite, got nan at step {step} \(epoch 1, batch 4: 128 rows, "
        r"\d+, \d+, \d+, \d+, \d+, … of the training file\)\. Its features reach only .*, so the "
        r"learning rate is the likely cause\. Set optimizer.lr below 0.001, or set "
        r"trainer.gradient_clip_val\. The last checkpoint stays\.$",
        stop.value.code,
    )
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == STEPS
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())


def test_the_rows_of_a_batch_can_be_recomputed():
    sampler = TrainSampler(1000, 64, seed=3, rank=1, world_size=2)
    sampler.set_epoch(5)

    for number, rows in enumerate(sampler):
        assert np.array_equal(sampler.batch_rows(5, number, rank=1), rows)


def test_a_gradient_that_is_not_finite_changes_no_weight(train, spoil, tmp_path):
    spoil(0, STEPS - 1, gradient=math.inf)

    with pytest.raises(SystemExit) as stop:
        train(*RUN, folder=tmp_path)

    assert "the gradient must be finite, got inf at step 14 (epoch 0, batch 14" in stop.value.code
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_no_checkpoint_is_written_from_weights_that_are_not_finite(train, spoil, tmp_path):
    spoil(0, 7, gradient=math.nan)

    with pytest.raises(SystemExit) as stop:
        train(*RUN, "trainer.checkpoint_every_n_steps=8", folder=tmp_path)

    message = "a checkpoint must have finite weights, got NaN or infinity after step 8. Set a low"
    assert message in stop.value.code
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
def test_a_high_learning_rate_is_reported(train, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(*RUN, "optimizer.lr=1e30", folder=tmp_path)

    assert "learning rate is the likely cause. Set optimizer.lr below 1e+30" in stop.value.code


@pytest.mark.slow
def test_huge_features_are_reported(train, spoil, tmp_path, monkeypatch):
    spoil(0, 3)
    monkeypatch.setattr("mtnrec.training.divergence.HUGE", 0.5)

    with pytest.raises(SystemExit) as stop:
        train(*RUN, folder=tmp_path)

    assert re.search(
        r"\. Its numerical features reach \d.*\. Scale them, or leave", stop.value.code
    )


@pytest.mark.slow
def test_an_fp16_run_reports_the_range(train, spoil, tmp_path):
    spoil(0, 2)

    with pytest.raises(SystemExit) as stop:
        train(*RUN, "trainer.precision=16-true", folder=tmp_path)

    assert "fp16 ends at 65504. Choose trainer.precision=bf16-mixed or 32-true" in stop.value.code


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -3.0], 3),
        ([math.nan, 5.0], math.nan),
        ([-math.inf, 2.0], math.inf),
        ([], 0),
        ([3e38], 3e38),
    ],
)
def test_the_largest_absolute_value_neither_overflows_nor_hides_a_nan(values, expected):
    tensors = iter([torch.tensor(values), torch.zeros(2)])

    assert largest(tensors) == pytest.approx(expected, nan_ok=True)


def test_a_loss_scaler_may_skip_steps(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), math.inf)
    module = torch.nn.ParameterList([parameter])

    class Trainer:
        global_step, is_last_batch, train_dataloader = 0, False, None

        class precision_plugin:  # noqa: N801
            scaler = torch.amp.GradScaler("cpu")

    Divergence().on_before_optimizer_step(Trainer, module, None)
    monkeypatch.setattr(Trainer.precision_plugin, "scaler", None)
    Trainer.fit_loop = type("Loop", (), {"batch_idx": 0})
    Trainer.current_epoch = 0
    with pytest.raises(AttributeError):  # the rows are looked for
        Divergence().on_before_optimizer_step(Trainer, module, None)
