"""The callback against the same penalty written inside the loss."""

import dataclasses
from functools import partial

import lightning as L
import pytest
import torch
from shared_fixtures import Killed

from mtnrec.checks import InputError
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.mtn.callback import MTN
from mtnrec.regularizer.callback import Regularizer
from mtnrec.system.files import read_json
from mtnrec.training.module import MultiTaskModule

SGD = partial(torch.optim.SGD, lr=0.1)
LAM = 0.05
FORMULAS = {
    "l2": lambda w: w.square().sum() / 2,
    "frobenius": lambda w: w.norm(),
    "soft_sharing": lambda w: (w[0] - w[1]).square().sum() / 2,
    "group_lasso": lambda w: w.square().sum((0, 1)).sqrt().sum(),
}


def make_network(schema, **keys):
    torch.manual_seed(0)
    sizes = {"embedding_dim": 4, "bottom_widths": [6], "tower_widths": [5, 4]}
    return SharedBottom(schema, **sizes | keys).double()


class PenaltyInTheLoss(MultiTaskModule):
    """Adds ``LAM`` times the mean over the depths of a formula of the stacked weights."""

    formula = None

    def training_step(self, batch):
        loss = cross_entropies(self(batch), batch.labels).sum()
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        stacks = [torch.stack([x.weight for x in d]) for d in self.network.task_layers()]
        return loss + LAM * sum(map(self.formula, stacks)) / len(stacks)


@pytest.fixture
def fit(funnel_schema, make_batch, tmp_path):
    def run(module, *callbacks, **keys):
        batches = [
            dataclasses.replace(b, numerical=b.numerical.double(), labels=b.labels.double())
            for b in (make_batch(funnel_schema, 32, seed) for seed in range(4))
        ]
        settings = {"accelerator": "cpu", "precision": "64-true", "max_epochs": 2}
        trainer = L.Trainer(
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
            **{"enable_model_summary": False, **settings, **keys},
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, loader)
        return trainer

    return run


def make_module(schema, kind=MultiTaskModule, optimizer=SGD, **keys):
    return kind(make_network(schema, **keys), schema=schema, optimizer=optimizer)


@pytest.mark.parametrize("norm", FORMULAS)
@pytest.mark.parametrize("trainer_keys", [{}, {"gradient_clip_val": 0.05}], ids=["", "clipped"])
def test_equals_the_same_penalty_inside_the_loss(norm, trainer_keys, fit, funnel_schema):
    ours = make_module(funnel_schema)
    fit(ours, Regularizer(norm=norm, lam=LAM), **trainer_keys)
    inside = make_module(funnel_schema, PenaltyInTheLoss)
    inside.formula = FORMULAS[norm]
    fit(inside, **trainer_keys)

    for a, b in zip(ours.parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_decoupled_l2_is_weight_decay_of_adamw_on_the_towers(fit, funnel_schema):
    """The mean over three depths divides the strength by three."""

    def adamw(parameters):
        parameters = list(parameters)
        towers = {id(x.weight) for d in network.task_layers() for x in d}
        decayed = [p for p in parameters if id(p) in towers]
        others = [p for p in parameters if id(p) not in towers]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0}]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=LAM / 3)

    adam = partial(torch.optim.Adam, lr=1e-2)
    ours = make_module(funnel_schema, optimizer=adam)
    fit(ours, Regularizer(norm="l2", lam=LAM, coupling="decoupled"))
    network = make_network(funnel_schema)
    theirs = MultiTaskModule(network, schema=funnel_schema, optimizer=adamw)
    fit(theirs)

    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("keys", [{"lam": 0}, {"enabled": False}])
def test_lambda_zero_and_disabled_change_no_bit(keys, fit, funnel_schema):
    ours, plain = make_module(funnel_schema), make_module(funnel_schema)
    fit(ours, Regularizer(**keys))
    fit(plain)

    assert all(map(torch.equal, ours.parameters(), plain.parameters()))


@pytest.mark.parametrize("penalty", ["regularizer", "mtn"])
def test_norm_share_and_push_are_logged(penalty, fit, funnel_schema):
    """With a learning rate of 0 both gradients are those of the first weights."""
    module = make_module(funnel_schema, optimizer=partial(torch.optim.SGD, lr=0.0))
    keys = {"lam": LAM, "layers": [0]}
    callback = (
        Regularizer(norm="soft_sharing", **keys)
        if penalty == "regularizer"
        else MTN(alpha="uniform", refresh_every=1, **keys)
    )
    trainer = fit(module, callback, max_epochs=1, limit_train_batches=1)

    layers = module.network.task_layers()[0]
    stack = torch.stack([layer.weight for layer in layers]).detach().requires_grad_()
    if penalty == "regularizer":
        norm = FORMULAS["soft_sharing"](stack)
    else:
        spectra = [torch.linalg.svdvals(stack.movedim(m, 0).flatten(1)) for m in range(3)]
        norm = sum(s.sum() for s in spectra) / 3 + stack.norm()
    (own,) = torch.autograd.grad(norm, stack)
    (batch,) = list(trainer.train_dataloader)[:1]
    loss = cross_entropies(module(batch), batch.labels).sum()
    data = torch.autograd.grad(loss, [layer.weight for layer in layers])
    push = LAM * own.norm() / torch.stack(data).norm()
    logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert logged[f"{penalty}/norm"] == pytest.approx(norm.item(), rel=1e-5)
    share = (LAM * norm / (loss + LAM * norm)).item()
    assert logged[f"{penalty}/loss_share"] == pytest.approx(share, rel=1e-5)
    assert logged[f"{penalty}/push"] == pytest.approx(push.item(), rel=1e-5)


def test_l2_of_the_chosen_layers_alone_reaches_them(fit, funnel_schema):
    torch.manual_seed(0)
    network = MMoE(funnel_schema, embedding_dim=4, experts=3, expert_widths=[6, 5])
    callback = Regularizer(norm="l2", target="shared", layers="last_hidden")
    module = MultiTaskModule(network.double(), schema=funnel_schema, optimizer=SGD)
    callback.setup(None, module, "fit")

    reached = {id(parameter) for parameter, *_ in callback._gradients()}
    assert reached == {id(layer.weight) for layer in network.shared_layers()[1]}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_record_of_an_uninterrupted_one(train, kill, tmp_path):
    run = ["regularizer=soft_sharing", "regularizer.lam=0.01", "data.rows=2000", "mtn.enabled=true"]
    run += ["trainer.checkpoint_every_n_steps=2", "data.batch_size=128"]
    expected = train(*run)
    kill("on_train_batch_end", 6)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path)
    train(*run, folder=tmp_path)

    records = [read_json(folder / "result.json") for folder in (expected, tmp_path)]
    assert records[0]["history"] == records[1]["history"]
    assert {"regularizer/push", "mtn/push"} <= records[0]["history"][0].keys()


@pytest.mark.slow
def test_the_first_epoch_of_a_run_records_the_push(train):
    folder = train("regularizer=l2", "data.rows=2000", "trainer.max_epochs=1")

    (epoch,) = read_json(folder / "result.json")["history"]
    assert epoch["regularizer/push"] > 0
    assert 0 < epoch["regularizer/loss_share"] < 1
    assert epoch["regularizer/norm"] > 0


def test_soft_sharing_needs_two_towers(fit, funnel_schema):
    class OneTower(torch.nn.Module):
        def task_layers(self):
            return [[torch.nn.Linear(3, 2)]]

    module = torch.nn.Module()
    module.network = OneTower()
    Regularizer(norm="l2").setup(None, module, "fit")
    with pytest.raises(InputError, match=r"layer 0 of regularizer.target=towers must have"):
        Regularizer(norm="soft_sharing").setup(None, module, "fit")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm": "l1"}, "regularizer.norm must be one of l2, frobenius, soft_sharing, group_l"),
        ({"lam": -1}, r"regularizer.lam must be a number in \[0, inf\), got -1"),
        ({"target": "gates"}, "regularizer.target must be one of towers, shared"),
        ({"layers": [0, 0]}, "regularizer.layers must be `all`, `last_hidden` or a list"),
        ({"coupling": "loose"}, "regularizer.coupling must be one of gradient, decoupled"),
        ({"enabled": 1}, "regularizer.enabled must be true or false"),
    ],
)
def test_values_out_of_range_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        Regularizer(**keys)
