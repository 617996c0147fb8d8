"""Balances in training: gradients per loss, learned weights, their state, and what is refused."""

from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mtnrec.checks import InputError
from mtnrec.model.esmm import ESMM
from mtnrec.model.mmoe import MMoE
from mtnrec.mtn.callback import MTN
from mtnrec.objective import gradient_balance
from mtnrec.objective.balance import FAMO, Uncertainty, Weights
from mtnrec.objective.gradient_balance import GradientBalance, MetaBalance
from mtnrec.objective.gramian import METHODS, find_weights
from mtnrec.optimizer.lazy_adam import LazyAdam
from mtnrec.training.module import MultiTaskModule

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
ALL = [
    *(partial(GradientBalance, method) for method in METHODS),
    MetaBalance,
    Uncertainty,
    FAMO,
]
IDS = [*METHODS, "metabalance", "uncertainty", "famo"]


def build(schema, network=MMoE, **keys):
    torch.manual_seed(0)
    sizes = {"experts": 2, "expert_widths": [6]} if network is MMoE else {}
    return network(schema, embedding_dim=4, tower_widths=[8], **sizes, **keys)


def train(module, batches, callbacks=(), **keys):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=keys.pop("max_epochs", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **keys,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def assert_close(found, expected, tolerance):
    found, expected = found.network.state_dict(), expected.network.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=tolerance, rtol=tolerance)


@pytest.fixture
def batches(funnel_schema, make_batch):
    return [make_batch(funnel_schema, 40 + seed, seed) for seed in range(8)]


@pytest.fixture
def all_ones(monkeypatch):
    """Make every method choose the weights of the sum."""
    monkeypatch.setattr(gradient_balance, "find_weights", lambda m, g, c: np.ones(len(g)))


@pytest.mark.usefixtures("all_ones")
@pytest.mark.parametrize("task_loss", ["sum", "mean"])
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_with_weights_of_one_training_is_that_of_autograd(
    task_loss, accumulated, clip, funnel_schema, batches
):
    modules = [
        MultiTaskModule(
            build(funnel_schema).double(),
            schema=funnel_schema,
            balance=balance,
            task_loss=task_loss,
        )
        for balance in (GradientBalance("mgda"), None)
    ]

    for module in modules:
        keys = {"accumulate_grad_batches": accumulated, "gradient_clip_val": clip}
        train(module, batches, precision="64-true", **keys)

    assert_close(*modules, 1e-9)


def test_without_conflict_pcgrad_trains_like_the_weights_of_one_to_the_bit(
    funnel_schema, batches, monkeypatch
):
    def train_with(rule):
        monkeypatch.setattr(gradient_balance, "find_weights", rule)
        balance = GradientBalance("pcgrad")
        module = MultiTaskModule(build(funnel_schema), schema=funnel_schema, balance=balance)
        train(module, batches)
        return module.network.state_dict()

    found = train_with(lambda method, gramian, c: find_weights(method, np.abs(gramian), c=c))

    expected = train_with(lambda method, gramian, c: np.ones(2))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def gradients_of(network, batch, scale=1.0):
    """Return each loss's gradients by parameter, from a backward pass of its own."""
    output = network(batch)
    losses = -torch.where(batch.labels == 1, *output).mean(dim=0)
    found = []
    for loss in losses:
        network.zero_grad()
        (scale * loss).backward(retain_graph=True)
        found.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in network.named_parameters()
            }
        )
    network.zero_grad()
    return found


def balance_once(network, schema, balance, batch):
    module = MultiTaskModule(network, schema=schema, balance=balance)
    objective = module.objective(network, batch)[0]
    module.objective.backward(network, objective)
    return module.objective


@pytest.mark.parametrize("network", [MMoE, ESMM])
def test_shared_parameters_get_the_weighted_sum_and_the_others_their_own_gradient(
    network, funnel_schema, batches
):
    network = build(funnel_schema, network).double()
    batch = batches[0]
    batch = replace(batch, numerical=batch.numerical.double(), labels=batch.labels.double())
    first, second = gradients_of(network, batch)
    shared = [n for n in first if first[n].abs().sum() and second[n].abs().sum()]
    own = [n for n in first if n not in shared]
    flat = [torch.cat([g[n].flatten() for n in shared]) for g in (first, second)]
    lengths = [f.norm() for f in flat]
    # IMTL-G's bisector of the two gradients, in the scale of the sum.
    weights = [2 * lengths[1 - i] / sum(lengths) for i in range(2)]

    objective = balance_once(network, funnel_schema, GradientBalance("imtl_g"), batch)

    assert any(n.startswith("towers") for n in own)
    for name, parameter in network.named_parameters():
        if name in shared:
            expected = weights[0] * first[name] + weights[1] * second[name]
        else:
            expected = first[name] + second[name]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12)
    measured = objective.balance.measured
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert measured["cos_click_conversion"].item() == pytest.approx(cosine.item(), rel=1e-5)
    ratio = (lengths[0] / lengths[1]).item()
    assert measured["norm_ratio_click_conversion"].item() == pytest.approx(ratio, rel=1e-5)
    assert measured["conflict"].item() == float(cosine < 0)


def test_metabalance_with_r_1_and_without_average_gives_equal_norms_per_tensor(
    funnel_schema, batches
):
    network = build(funnel_schema)
    click, conversion = gradients_of(network, batches[0])

    balance_once(network, funnel_schema, MetaBalance(r=1, beta=0), batches[0])

    for name, parameter in network.named_parameters():
        norms = click[name].norm(), conversion[name].norm()
        added = parameter.grad - conversion[name]
        expected = norms[1] if all(norms) else norms[0]  # unchanged where one has no gradient
        torch.testing.assert_close(added.norm(), expected, rtol=1e-4, atol=1e-7)


def test_metabalance_of_named_main_loss_scales_the_other_by_the_averages(funnel_schema, batches):
    network = build(funnel_schema)
    balance = MetaBalance(main="click", r=0.7, beta=0.9)
    objective = MultiTaskModule(network, schema=funnel_schema, balance=balance).objective
    means = {}
    for batch in batches[:3]:
        first, second = gradients_of(network, batch)
        objective.backward(network, 5 * objective(network, batch)[0])  # as a loss scaler does
        for name, parameter in network.named_parameters():
            old = means.get(name, (0.0, 0.0))
            norms = first[name].norm().item(), second[name].norm().item()
            new = means[name] = tuple(0.9 * m + 0.1 * n for m, n in zip(old, norms, strict=True))
            factor = 0.7 * new[0] / new[1] + 0.3 if all(new) else 1
            expected = first[name] + factor * second[name]
            torch.testing.assert_close(parameter.grad, 5 * expected, rtol=1e-4, atol=1e-7)


def test_metabalance_with_r_0_is_the_sum(funnel_schema, batches):
    modules = [
        MultiTaskModule(build(funnel_schema).double(), schema=funnel_schema, balance=balance)
        for balance in (MetaBalance(r=0), None)
    ]
    for module in modules:
        train(module, batches, precision="64-true")

    assert_close(*modules, 1e-9)


def test_the_log_variances_start_at_the_sum_and_tend_to_the_logarithms_of_the_losses():
    balance = Uncertainty()
    balance.prepare(["click", "conversion"], {})
    losses = torch.tensor([0.16, 0.002])
    torch.testing.assert_close(balance(losses), losses, rtol=0, atol=0)
    optimizer = torch.optim.Adam(balance.parameters(), lr=balance.lr)

    for _ in range(800):
        optimizer.zero_grad()
        balance(losses).sum().backward()
        optimizer.step()

    torch.testing.assert_close(balance.log_variances.detach(), losses.log(), rtol=0, atol=0.02)
    losses.requires_grad_()
    balance(losses).sum().backward()
    torch.testing.assert_close(losses.grad, 1 / losses.detach(), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.Adam, lr=1e-3, fused=True),
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5),
        partial(LazyAdam, lr=1e-3),
    ],
)
def test_log_variances_have_their_own_rate_and_no_weight_decay(make, funnel_schema, batches):
    module = MultiTaskModule(
        build(funnel_schema), schema=funnel_schema, optimizer=make, balance=Uncertainty()
    )
    train(module, batches[:1])
    # Adam's first step is the rate itself.
    steps = module.objective.balance.log_variances.abs().tolist()
    assert steps == pytest.approx([2.5e-2, 2.5e-2], rel=1e-4)


def test_the_network_is_clipped_without_the_gradients_of_the_log_variances(funnel_schema, batches):
    seen = {}

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            for name, part in (("network", module.network), ("balance", module.objective.balance)):
                own = [p.grad for p in part.parameters() if p.grad is not None]
                if own:
                    seen[name] = torch.nn.utils.get_total_norm(own).item()

    module = MultiTaskModule(build(funnel_schema), schema=funnel_schema, balance=Uncertainty())
    train(module, batches, [Norms()], gradient_clip_val=1e-3)

    assert seen["network"] == pytest.approx(1e-3, rel=1e-3)
    assert seen["balance"] > 1e-3


def test_famo_weights_the_gradients_and_moves_its_logits_as_the_paper_says():
    balance = FAMO()
    balance.prepare(["click", "conversion"], {})
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.025, weight_decay=1e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        before, after = torch.rand(2, 2, generator=rng, dtype=torch.float64) + 0.1
        losses = before.float().requires_grad_()
        (found,) = torch.autograd.grad(balance(losses).sum(), losses)
        literal = before.clone().requires_grad_()
        shares = logits.detach().softmax(dim=0)
        (1 / (shares / before).sum() * (shares * literal.log()).sum()).backward()
        torch.testing.assert_close(found, literal.grad.float(), rtol=1e-4, atol=0)

        balance.after_step(after.float())

        adam.zero_grad()
        jacobian = torch.autograd.functional.jacobian(lambda x: x.softmax(dim=0), logits)
        logits.grad = jacobian.T @ (before.log() - after.log())
        adam.step()
        torch.testing.assert_close(balance.logits, logits.detach().float(), rtol=1e-3, atol=1e-6)


def test_famo_sees_the_losses_of_the_batch_after_each_step_and_leaves_the_buffers(
    funnel_schema, batches
):
    network = build(funnel_schema, batch_norm=True)
    module = MultiTaskModule(network, schema=funnel_schema, balance=FAMO())
    after = []
    module.objective.balance.after_step = after.append

    train(module, batches, accumulate_grad_batches=4)

    assert len(after) == 2  # of 8 batches
    with torch.no_grad():
        torch.testing.assert_close(after[-1], module.objective.losses(network, batches[-1])[0])
    counts = [b.item() for n, b in network.named_buffers() if n.endswith("num_batches_tracked")]
    # The call above counts; the one after each step does not.
    assert set(counts) == {len(batches) + 1}


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_each_balance_trains_and_logs_its_weights_or_cosines(make, funnel_schema, batches):
    module = MultiTaskModule(build(funnel_schema), schema=funnel_schema, balance=make())

    logged = train(module, [*batches] * 3)  # more than the values that are summed at a time

    assert all(np.isfinite(list(logged.values())))
    balanced = "train/weight_click" in logged or "train/cos_embeddings_click_conversion" in logged
    assert balanced
    if "train/cos_click_conversion" in logged:
        assert -1 <= logged["train/cos_click_conversion"] <= 1
        assert 0 <= logged["train/conflict"] <= 1


@pytest.mark.parametrize("make", [partial(GradientBalance, "imtl_g"), MetaBalance])
def test_mtn_adds_the_same_gradient_to_the_towers_under_a_gradient_balance(
    make, funnel_schema, batches
):
    """With SGD one step moves the towers by the sum's gradient and MTN's, whatever the balance."""
    modules = [
        MultiTaskModule(
            build(funnel_schema).double(),
            schema=funnel_schema,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            balance=balance,
        )
        for balance in (make(), None)
    ]
    for module in modules:
        train(module, batches[:1], [MTN(lam=0.1)], precision="64-true")

    towers, rest = [], []
    balanced, plain = (module.network.state_dict() for module in modules)
    for name, weight in plain.items():
        (towers if name.startswith("towers") else rest).append((weight, balanced[name]))
    for weight, found in towers:
        torch.testing.assert_close(found, weight, rtol=1e-12, atol=1e-12)
    assert any(not torch.allclose(*pair, rtol=1e-6) for pair in rest)


@pytest.mark.parametrize("make", [MetaBalance, Uncertainty, FAMO])
def test_the_state_of_a_balance_is_part_of_the_checkpoint(make, funnel_schema, batches):
    """The second half of a run, from the weights of the first, has the bits of the whole."""
    sgd = partial(torch.optim.SGD, lr=0.1)

    def module():
        network = build(funnel_schema)
        return MultiTaskModule(network, schema=funnel_schema, optimizer=sgd, balance=make())

    whole, first, second = module(), module(), module()
    train(whole, batches)
    train(first, batches[:4])

    second.load_state_dict(first.state_dict())
    train(second, batches[4:])

    expected = whole.state_dict()
    assert all(torch.equal(found, expected[name]) for name, found in second.state_dict().items())


def test_a_gradient_that_is_not_finite_reaches_the_parameters(funnel_schema, batches):
    """The loss scaler or the check of divergence must see it."""
    network = build(funnel_schema)
    with torch.no_grad():
        next(iter(network.parameters())).fill_(torch.inf)

    balance_once(network, funnel_schema, GradientBalance("aligned_mtl"), batches[0])

    assert any(not p.grad.isfinite().all() for p in network.parameters())


def test_misuse_is_refused(funnel_schema, batches):
    network = build(funnel_schema)
    for balance in (GradientBalance("mgda"), MetaBalance(), Uncertainty(), FAMO()):
        with pytest.raises(InputError, match=r"needs at least two losses, got one \(click\). Choo"):
            balance.prepare(["click"], {})
    with pytest.raises(InputError, match=r"balance.main must be a loss of the model \(click, conv"):
        MultiTaskModule(network, schema=funnel_schema, balance=MetaBalance(main="buy"))
    with pytest.raises(InputError, match=r"balance.method must be one of pcgrad, .*; got 'sum'"):
        GradientBalance("sum")
    with pytest.raises(InputError, match=r"balance.c must be .*, got 1"):
        GradientBalance("cagrad", c=1)
    with pytest.raises(InputError, match=r"balance.r must be .*, got 2"):
        MetaBalance(r=2)
    with pytest.raises(InputError, match=r"balance.beta must be .*, got 1"):
        MetaBalance(beta=1)
    with pytest.raises(InputError, match=r"balance.lr must be .*, got -1"):
        Uncertainty(lr=-1)
    with pytest.raises(InputError, match=r"balance.weight_decay must be .*, got -1"):
        FAMO(weight_decay=-1)
    with pytest.raises(InputError, match=r"cuda_graphs must be false for a balance that adapts"):
        MultiTaskModule(network, schema=funnel_schema, balance=FAMO(), cuda_graphs=True)
    MultiTaskModule(network, schema=funnel_schema, balance=Weights(), cuda_graphs=True)
    network.loss_weights = {"click": 1.0, "conversion": 0.0}
    for balance in (Uncertainty(), FAMO()):
        with pytest.raises(InputError, match=r"above 0, got weight 0 for conversion of MMoE. Cho"):
            MultiTaskModule(network, schema=funnel_schema, balance=balance)
    MultiTaskModule(network, schema=funnel_schema, balance=GradientBalance("mgda"))
    del network.loss_weights
    lazy = MultiTaskModule(
        network, schema=funnel_schema, balance=GradientBalance("mgda"), optimizer=LazyAdam
    )
    with pytest.raises(InputError, match=r"needs dense gradients, and optimizer=lazy_adam has sp"):
        train(lazy, batches)


@pytest.mark.parametrize("make", [partial(GradientBalance, "mgda"), FAMO])
def test_several_processes_are_refused(make, funnel_schema):
    module = MultiTaskModule(build(funnel_schema), schema=funnel_schema, balance=make())
    module.trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )

    with pytest.raises(InputError, match=r"must be sum, weights or uncertainty for several proce"):
        module.setup("fit")
