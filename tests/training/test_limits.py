"""Keys of Lightning's trainer that change what a run means."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
from torch import nn

from mtnrec.checks import InputError
from mtnrec.training.limits import (
    check_batch_norm,
    check_clipping,
    check_first_validation,
    check_trainer_keys,
    total_steps,
)

EPOCHS = {"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 1}
WHOLE = {"limit_train_batches": 1.0, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("callbacks", [], "Set callbacks="),
        ("logger", False, "Choose logger=csv"),
        ("default_root_dir", "x", "Set hydra.run.dir"),
        ("fast_dev_run", True, "Set debug=fast"),
        ("fast_dev_run", 3, "Set debug=fast"),
        ("use_distributed_sampler", True, "Leave it out"),
        ("limit_val_batches", 0, "Set a number of batches"),
        ("limit_test_batches", 0.0, "Set a number of batches"),
        ("limit_train_batches", 0, "Set a number of batches"),
    ],
)
def test_a_key_that_leaves_no_result_or_is_ignored_is_refused(key, value, remedy):
    with pytest.raises(InputError, match=rf"^trainer\.{key} must .*got .*{re.escape(remedy)}"):
        check_trainer_keys({key: value})


def test_no_gradient_clips_below_zero():
    with pytest.raises(InputError, match=r"trainer\.gradient_clip_val must be .*-1"):
        check_clipping({"gradient_clip_val": -1}, {})


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", 16, "bf16"])
def test_a_fused_optimiser_cannot_clip_in_mixed_precision(precision):
    trainer = {"gradient_clip_val": 1.0, "precision": precision}

    with pytest.raises(InputError, match=r"^optimizer\.fused must be false .*Set optimizer\.fused"):
        check_clipping(trainer, {"fused": True})

    check_clipping(trainer, {"fused": False})
    check_clipping(trainer | {"gradient_clip_val": None}, {"fused": True})
    check_clipping(trainer | {"precision": "32-true"}, {"fused": True})


def test_the_keys_of_the_config_are_accepted(compose_config):
    check_trainer_keys(compose_config().trainer)
    check_trainer_keys({"fast_dev_run": False, "limit_val_batches": 1, "min_epochs": 3})


def trainer(**keys):
    return SimpleNamespace(**(EPOCHS | WHOLE | keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"max_steps": 3},
        {"max_steps": 0},
        {"max_steps": 4},
        {"check_val_every_n_epoch": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 11},
        {"check_val_every_n_epoch": 2, "max_steps": 9},
        {"accumulate_grad_batches": 2, "max_steps": 2},
    ],
)
def test_a_training_that_ends_before_its_first_validation_is_refused(keys):
    with pytest.raises(InputError, match="would end before its first validation, after"):
        check_first_validation(trainer(**keys), batches=5)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"max_steps": 5},
        {"max_steps": 7},
        {"max_steps": 3, "val_check_interval": 0.5},
        {"max_steps": 2, "val_check_interval": 2},
        {"max_steps": 2, "limit_train_batches": 2},
        {"max_steps": 2, "limit_train_batches": 0.4},
        {"check_val_every_n_epoch": 2, "max_steps": 10},
        {"check_val_every_n_epoch": None, "val_check_interval": 10},
        {"accumulate_grad_batches": 2, "max_steps": 3},
        {"max_epochs": -1, "check_val_every_n_epoch": 9},
        {"val_check_interval": "00:00:10:00", "max_steps": 1},
    ],
)
def test_a_training_that_validates_is_accepted(keys):
    check_first_validation(trainer(**keys), batches=5)


def test_an_interval_longer_than_an_epoch_is_refused():
    with pytest.raises(InputError, match=r"val_check_interval must be at most 5, .* got 9"):
        check_first_validation(trainer(val_check_interval=9), batches=5)


def test_a_share_that_leaves_no_training_batch_is_refused():
    with pytest.raises(InputError, match=r"limit_train_batches must leave a batch, got 0\.1"):
        check_first_validation(trainer(limit_train_batches=0.1), batches=5)


NORMALISED = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("rows", "batch_size", "world_size", "sizes"),
    [
        (1280, 1279, 1, "1278 or 1280"),
        (1280, 639, 2, "638 or 640"),  # 1278 rows, then one for each process
        (1281, 128, 1, "127 or 129"),
        (7, 1, 1, "4"),  # 2, 3 and 6 leave one as well
    ],
)
def test_a_batch_of_one_row_is_refused_before_batch_norm(rows, batch_size, world_size, sizes):
    keys = {"rows": rows, "world_size": world_size, "limited": False}
    with pytest.raises(InputError, match=rf"got {batch_size} with {rows} training rows") as error:
        check_batch_norm(NORMALISED, batch_size=batch_size, **keys)

    assert f"Set data.batch_size={sizes}, or model.batch_norm=false." in str(error.value)


def test_other_batches_and_networks_are_accepted():
    check_batch_norm(NORMALISED, rows=1280, batch_size=1278, world_size=1, limited=False)
    check_batch_norm(NORMALISED, rows=1280, batch_size=2048, world_size=1, limited=False)
    check_batch_norm(NORMALISED, rows=1280, batch_size=1279, world_size=1, limited=True)
    check_batch_norm(NORMALISED, rows=1281, batch_size=640, world_size=2, limited=False)
    check_batch_norm(nn.Linear(1, 1), rows=1280, batch_size=1279, world_size=1, limited=False)


@pytest.mark.parametrize(
    "keys",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 4},
        {"max_epochs": 3, "max_steps": 7},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": -1},
        {"max_epochs": 2, "limit_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 0.5},
        {"max_epochs": 2, "overfit_batches": 2},
    ],
)
def test_the_steps_of_a_training_are_those_that_lightning_counts(keys, make_datamodule, tmp_path):
    class CountedError(Exception):
        """Ends the training as soon as both numbers are known."""

    class Module(L.LightningModule):
        def training_step(self, batch):
            return None

        def validation_step(self, batch):
            return None

        def configure_optimizers(self):
            raise CountedError(total_steps(self.trainer), self.trainer.estimated_stepping_batches)

    data = make_datamodule("synthetic", "rows=700", "batch_size=32")
    keys = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **keys}
    trainer = L.Trainer(
        accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **keys
    )

    with pytest.raises(CountedError) as found:
        trainer.fit(Module(), datamodule=data)

    ours, lightnings = found.value.args
    assert ours == lightnings
