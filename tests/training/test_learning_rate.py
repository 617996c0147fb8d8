"""Schedules of the learning rate: closed forms, resuming, refusals."""

import math
from functools import partial

import lightning as L
import pytest
import torch
from shared_fixtures import Killed
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from mtnrec.checks import InputError
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.system.files import read_json
from mtnrec.training.module import MultiTaskModule

RUN = ["data.rows=1100", "data.batch_size=64", "stop=patience", "patience=9", "optimizer.lr=0.01"]
RUN += ["data.click_rate=0.3", "data.conversion_rate=0.4"]
ADAM = partial(torch.optim.Adam, lr=0.1)
SCHEDULERS = ("cosine", "one_cycle", "plateau")
PLATEAU = ["scheduler.patience=0", "scheduler.threshold=0.5"]  # lowers it after each validation


def history(folder):
    return read_json(folder / "result.json")["history"]


def overrides_of(scheduler):
    return [*RUN, f"scheduler={scheduler}", *(PLATEAU if scheduler == "plateau" else [])]


class Rates(L.Callback):
    """Collects the learning rate and the first beta of each step."""

    def __init__(self):
        self.rates, self.betas = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.betas.append(optimizer.param_groups[0].get("betas", [0])[0])


@pytest.fixture
def fit(funnel_schema, make_batch, tmp_path):
    def run(scheduler, *, optimizer=ADAM, monitor=None, **keys):
        torch.manual_seed(0)
        module = MultiTaskModule(
            SharedBottom(funnel_schema, embedding_dim=4, bottom_widths=[6], tower_widths=[4]),
            schema=funnel_schema,
            optimizer=optimizer,
            scheduler=scheduler,
            **({} if monitor is None else {"monitor": monitor}),
        )
        rates = Rates()
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=[rates],
            default_root_dir=tmp_path,
            **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
            **{"enable_model_summary": False, "max_epochs": 3, **keys},
        )
        batches = [make_batch(funnel_schema, 32, seed) for seed in range(5)]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, loader)
        return rates, trainer

    return run


def test_cosine_falls_over_the_steps_of_the_whole_training(fit):
    rates, trainer = fit(partial(CosineAnnealingLR, T_max=None, eta_min=0.01))

    wave = [0.01 + 0.045 * (1 + math.cos(math.pi * step / 15)) for step in range(15)]
    assert rates.rates == pytest.approx(wave)
    assert trainer.callback_metrics["train/learning_rate"].item() == pytest.approx(wave[-1])


def test_accumulated_batches_are_one_step_of_the_schedule(fit):
    rates, _ = fit(partial(CosineAnnealingLR, T_max=None), accumulate_grad_batches=2)

    wave = [0.05 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
    assert rates.rates == pytest.approx(wave)


def test_the_largest_number_of_steps_ends_the_schedule(fit):
    rates, _ = fit(partial(CosineAnnealingLR, T_max=None), max_steps=4)

    wave = [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates.rates == pytest.approx(wave)


def test_one_cycle_peaks_at_the_optimisers_rate(fit):
    keys = {"max_lr": None, "total_steps": None, "pct_start": 0.5}
    rates, _ = fit(partial(OneCycleLR, **keys), max_epochs=2)

    assert rates.rates[0] == pytest.approx(0.1 / 25)
    assert max(rates.rates) == pytest.approx(0.1)
    assert rates.rates[4] == max(rates.rates)
    assert rates.rates[-1] == pytest.approx(0.1 / 25 / 1e4)
    assert rates.betas[4] == pytest.approx(0.85)  # torch's base_momentum, at the peak


def test_each_group_keeps_its_own_peak(funnel_schema, fit):
    def optimizer(parameters):
        first, *others = parameters
        groups = [{"params": [first], "lr": 0.5}, {"params": others}]
        return torch.optim.Adam(groups, lr=0.1)

    _, trainer = fit(
        partial(OneCycleLR, max_lr=None, total_steps=None), optimizer=optimizer, max_epochs=1
    )

    peaks = [group["max_lr"] for group in trainer.optimizers[0].param_groups]
    assert peaks == [0.5, 0.1]


@pytest.mark.slow
def test_a_schedule_without_keywords_to_fill_needs_no_end(fit):
    rates, _ = fit(
        partial(StepLR, step_size=2, gamma=0.5),
        max_epochs=-1,
        max_steps=-1,
        max_time={"seconds": 1},
    )

    assert rates.rates[:5] == [0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize(
    "scheduler",
    [partial(CosineAnnealingLR, T_max=None), partial(OneCycleLR, max_lr=1, total_steps=None)],
)
def test_a_training_without_an_end_is_refused(scheduler, fit):
    with pytest.raises(InputError, match=r"must know the number of steps.*Set trainer.max_epochs"):
        fit(scheduler, max_epochs=-1)


def test_what_torch_refuses_is_an_input_error(fit):
    with pytest.raises(InputError, match=r"scheduler: .*pct_start"):
        fit(partial(OneCycleLR, max_lr=1, total_steps=None, pct_start=2.0))
    with pytest.raises(InputError, match=r"scheduler: .*momentum"):
        fit(
            partial(OneCycleLR, max_lr=1, total_steps=None),
            optimizer=partial(torch.optim.Adagrad, lr=0.1),
        )


@pytest.mark.parametrize(
    ("monitor", "better"), [("val/ctcvr_auc", "max"), ("val/ctcvr_log_loss", "min")]
)
def test_plateau_follows_the_better_direction_of_the_monitor(monitor, better, fit):
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode=None)
    _, trainer = fit(scheduler, monitor=monitor, max_epochs=1)

    assert trainer.lr_scheduler_configs[0].scheduler.mode == better


def test_an_unknown_monitor_of_a_plateau_is_refused(fit):
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode=None)
    with pytest.raises(InputError, match=r"monitor must be one of val/ctr_auc"):
        fit(scheduler, monitor="val/loss")


@pytest.mark.slow
def test_plateau_lowers_the_rate_once_after_each_validation_that_is_not_better(train):
    folder = train(*overrides_of("plateau"), "trainer.max_epochs=3")

    rates = [epoch["train/learning_rate"] for epoch in history(folder)]
    assert rates == pytest.approx([0.01, 0.01, 0.001])  # the first validation is the best so far


@pytest.mark.slow
def test_a_constant_schedule_changes_no_bit(train):
    plain, constant = (train(*RUN, *more) for more in ([], ["scheduler=constant"]))

    assert read_json(plain / "result.json")["cell"] == read_json(constant / "result.json")["cell"]
    records = [read_json(folder / "result.json") for folder in (plain, constant)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert [epoch["train/learning_rate"] for epoch in history(constant)] == pytest.approx(
        [0.01] * 2
    )


@pytest.mark.parametrize(
    ("scheduler", "within"),
    [
        pytest.param(
            scheduler,
            within,
            marks=[]
            if (scheduler, within) in {("one_cycle", True), ("plateau", False)}
            else pytest.mark.slow,
        )
        for scheduler in SCHEDULERS
        for within in (True, False)
    ],
)
@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    scheduler, within, train, kill, tmp_path
):
    run = [*overrides_of(scheduler), "trainer.max_epochs=4"]
    run += ["trainer.checkpoint_every_n_steps=3"] if within else []
    expected = train(*run)
    # 11 steps an epoch: in the second epoch, or between the second and the third.
    kill(*(("on_train_batch_end", 18) if within else ("on_train_epoch_start", 3)))
    with pytest.raises(Killed):
        train(*run, folder=tmp_path)

    train(*run, folder=tmp_path)

    assert "resumes from" in (tmp_path / "train.log").read_text()
    assert history(tmp_path) == history(expected)
    weights = [
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path, expected)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
