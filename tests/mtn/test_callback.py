"""The callback against the same penalty written inside the loss."""

import dataclasses
import runpy
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from mtnrec.batch import Batch
from mtnrec.checks import InputError
from mtnrec.model.esmm import ESMM
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.mtn.callback import MTN, measure_spectra
from mtnrec.mtn.penalty import Deviation, Penalty
from mtnrec.mtn.trace_norm import effective_rank
from mtnrec.optimizer.penalty import add_to_gradients, gradient_scale
from mtnrec.training.module import MultiTaskModule

ADAM = partial(torch.optim.Adam, lr=1e-2)
SGD = partial(torch.optim.SGD, lr=1e-1)
OPTIMIZERS = {"adam": ADAM, "sgd": SGD}
LAM = 0.05


def make_mtn(**keys):
    defaults = {
        "enabled": True,
        "lam": LAM,
        "target": "towers",
        "layers": "all",
        "subsets": "distinct",
        "alpha": "learned",
        "layer_weighting": "mean",
        "frobenius": True,
        "coupling": "gradient",
        "refresh_every": 1,
        "alpha_optimizer": ADAM,
    }
    return MTN(**{**defaults, **keys})


def make_network(schema, build=SharedBottom, seed=0, sizes=(5, 4)):
    torch.manual_seed(seed)
    keys = {"embedding_dim": 4, "bag_mode": "mean", "dropout": 0.0, "batch_norm": False}
    wide, narrow = sizes
    if build is ESMM:
        return ESMM(schema, tower_widths=[wide + 1, narrow + 1], **keys)
    if build is MMoE:
        return MMoE(schema, experts=3, expert_widths=[6, 5], tower_widths=[wide, narrow], **keys)
    return SharedBottom(schema, bottom_widths=[6], tower_widths=[wide, narrow], **keys)


class PenaltyInTheLoss(MultiTaskModule):
    """Adds ``lam * mean_i (sum_s alpha_s ||W_{s}||_* + ||W_i||_F)`` to the loss, by autograd."""

    def __init__(self, network, *, learn_alpha, **keys):
        super().__init__(network, **keys)
        self.theta = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        self.theta.requires_grad_(learn_alpha)

    def training_step(self, batch):
        terms = []
        for theta, layers in zip(self.theta, self.network.task_layers(), strict=True):
            stack = torch.stack([layer.weight for layer in layers])
            matrices = [stack.movedim(mode, 0).flatten(1) for mode in range(3)]
            norms = torch.stack([torch.linalg.svdvals(m).sum() for m in matrices])
            terms.append(theta.softmax(0) @ norms + torch.linalg.vector_norm(stack))
        loss = cross_entropies(self(batch), batch.labels).sum()
        return loss + LAM * torch.stack(terms).mean()

    def configure_optimizers(self):
        return self._optimizer([*self.network.parameters(), self.theta])


@pytest.fixture
def fit(funnel_schema, make_batch, tmp_path):
    """Train on eight fixed batches; returns the module and its trainer."""

    def run(network, *callbacks, module=MultiTaskModule, optimizer=SGD, keys=None, **trainer_keys):
        batches = [make_batch(funnel_schema, 32, seed) for seed in range(8)]
        if trainer_keys.get("precision", "64-true") == "64-true":
            batches = [
                dataclasses.replace(b, numerical=b.numerical.double(), labels=b.labels.double())
                for b in batches
            ]
        model = module(network, schema=funnel_schema, optimizer=optimizer, **(keys or {}))
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "64-true",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer = L.Trainer(callbacks=list(callbacks), **{**settings, **trainer_keys})
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(model, loader, loader)
        return model, trainer

    return run


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize(
    ("clip", "alpha"),
    [
        ({}, "learned"),
        ({"gradient_clip_val": 0.05}, "uniform"),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, "uniform"),
    ],
    ids=["no clip", "clip norm", "clip value"],
)
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_same_penalty_inside_the_loss(name, accumulate, clip, alpha, fit, funnel_schema):
    # Clipping would reach an alpha inside the loss, but not the callback's: there it is fixed.
    optimizer = OPTIMIZERS[name]
    keys = {"optimizer": optimizer, "accumulate_grad_batches": accumulate, **clip}
    mtn = make_mtn(alpha=alpha, alpha_optimizer=optimizer)

    with_callback, _ = fit(make_network(funnel_schema), mtn, **keys)
    inside, _ = fit(
        make_network(funnel_schema),
        module=PenaltyInTheLoss,
        keys={"learn_alpha": alpha == "learned"},
        **keys,
    )
    without, _ = fit(make_network(funnel_schema), **keys)

    assert distance(with_callback.network, inside.network) < 1e-9
    assert distance(with_callback.network, without.network) > 1e-4


def test_learned_alpha_equals_the_one_inside_the_loss(fit, funnel_schema):
    mtn = make_mtn(alpha_optimizer=ADAM)

    fit(make_network(funnel_schema), mtn, optimizer=ADAM)
    inside, _ = fit(
        make_network(funnel_schema),
        module=PenaltyInTheLoss,
        optimizer=ADAM,
        keys={"learn_alpha": True},
    )

    learned = mtn.state_dict()["weights"]["alpha_logits"].double()
    torch.testing.assert_close(learned, inside.theta.detach(), rtol=1e-4, atol=1e-6)
    assert learned.abs().max() > 0.01


TWO_PROCESSES = Path(__file__).with_name("two_processes.py")


def train_two_processes(folder, *arguments):
    command = [sys.executable, str(TWO_PROCESSES), "2", str(folder / "2"), *arguments]
    subprocess.run(command, check=True, timeout=120, cwd=folder, capture_output=True)
    return [torch.load(folder / f"2_{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "lazy_adam"])
def test_two_processes_equal_one(optimizer, tmp_path):
    runpy.run_path(str(TWO_PROCESSES))["main"](1, str(tmp_path / "1"), optimizer)
    one = torch.load(tmp_path / "1_0.pt")

    for two in train_two_processes(tmp_path, optimizer):
        for name, weight in one["model"].items():
            torch.testing.assert_close(two["model"][name], weight, rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(two["alpha"], one["alpha"], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_different_machines_keep_equal_weights_and_alphas(tmp_path):
    first, second = train_two_processes(tmp_path, "adam", "unlike")

    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_zero_lambda_is_bit_identical_to_no_callback(fit, funnel_schema):
    with_callback, _ = fit(make_network(funnel_schema), make_mtn(lam=0), optimizer=ADAM)
    without, _ = fit(make_network(funnel_schema), optimizer=ADAM)

    for a, b in zip(with_callback.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_disabled_is_bit_identical_to_no_callback(fit, funnel_schema):
    disabled, _ = fit(make_network(funnel_schema), make_mtn(enabled=False), optimizer=ADAM)
    without, _ = fit(make_network(funnel_schema), optimizer=ADAM)

    for a, b in zip(disabled.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("build", [SharedBottom, ESMM, MMoE])
def test_the_gradient_reaches_every_tower_weight(build, funnel_schema):
    network = make_network(funnel_schema, build)
    mtn = make_mtn()
    start(mtn, network)

    mtn.on_before_optimizer_step(fake_trainer(), None, SGD(network.parameters()))

    weights = {id(layer.weight) for depth in network.task_layers() for layer in depth}
    for parameter in network.parameters():
        if id(parameter) in weights:
            assert parameter.grad.ne(0).all()
        else:
            assert parameter.grad is None


def test_single_layers_and_experts_can_be_chosen(funnel_schema):
    network = make_network(funnel_schema, MMoE)

    for keys, chosen in [
        ({"layers": [1]}, network.task_layers()[1:2]),
        ({"target": "shared"}, network.shared_layers()),
        ({"target": "shared", "layers": [0]}, network.shared_layers()[:1]),
    ]:
        network.zero_grad()
        mtn = make_mtn(**keys)
        start(mtn, network)
        mtn.on_before_optimizer_step(fake_trainer(), None, SGD(network.parameters()))
        reached = {id(p) for p in network.parameters() if p.grad is not None}
        assert reached == {id(layer.weight) for depth in chosen for layer in depth}


def test_frobenius_term_can_be_switched_off(fit, funnel_schema):
    network = make_network(funnel_schema).double()
    stacks = [torch.stack([x.weight for x in depth]) for depth in network.task_layers()]
    logged = {}

    for frobenius in (True, False):
        mtn = make_mtn(lam=0, frobenius=frobenius)
        _, trainer = fit(make_network(funnel_schema), mtn, max_epochs=1, optimizer=frozen)
        logged[frobenius] = trainer.callback_metrics["mtn/norm"].item()

    expected = torch.stack([torch.linalg.vector_norm(w) for w in stacks]).mean().item()
    assert logged[True] - logged[False] == pytest.approx(expected, rel=1e-5)


def test_the_checkpoint_loads_into_the_plain_model(fit, funnel_schema, tmp_path):
    _, trainer = fit(make_network(funnel_schema), make_mtn())
    trainer.save_checkpoint(tmp_path / "mtn.ckpt")
    plain = MultiTaskModule(make_network(funnel_schema), schema=funnel_schema, optimizer=SGD)

    checkpoint = torch.load(tmp_path / "mtn.ckpt", weights_only=True)
    result = plain.load_state_dict(checkpoint["state_dict"], strict=True)

    assert not result.missing_keys
    assert not result.unexpected_keys
    assert any("alpha_logits" in s.get("weights", {}) for s in checkpoint["callbacks"].values())


@pytest.mark.slow
@pytest.mark.parametrize("build", [ESMM, SharedBottom, MMoE])
def test_the_exported_graph_is_the_same(build, fit, funnel_schema, make_batch):
    class Scorer(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, categorical, numerical):
            return tuple(self.network(Batch(categorical, numerical)))

    batch = make_batch(funnel_schema)
    graphs = []
    for callbacks in ([make_mtn()], []):
        model, _ = fit(make_network(funnel_schema, build), *callbacks, precision="32-true")
        inputs = batch.categorical, batch.numerical
        program = torch.export.export(Scorer(model.network), inputs, strict=False)
        graphs.append((str(program.graph), {k: v.shape for k, v in program.state_dict.items()}))

    assert graphs[0] == graphs[1]


def test_decoupled_moves_weights_next_to_the_optimisers_step(fit, funnel_schema):
    batches = {"max_steps": 1, "limit_train_batches": 1, "optimizer": ADAM}
    start_network = make_network(funnel_schema).double()

    mtn = make_mtn(alpha="uniform", coupling="decoupled")
    moved, _ = fit(make_network(funnel_schema), mtn, **batches)
    plain, _ = fit(make_network(funnel_schema), **batches)

    depths = zip(
        start_network.task_layers(),
        moved.network.task_layers(),
        plain.network.task_layers(),
        strict=True,
    )
    for old, new, without in depths:
        stack = torch.stack([layer.weight for layer in old]).detach().requires_grad_()
        norms = [torch.linalg.svdvals(stack.movedim(m, 0).flatten(1)).sum() for m in range(3)]
        (sum(norms) / 3 + torch.linalg.vector_norm(stack)).backward()
        step = torch.stack([a.weight - b.weight for a, b in zip(new, without, strict=True)])
        torch.testing.assert_close(step.detach(), -1e-2 * LAM / 3 * stack.grad, rtol=1e-7, atol=0)


IN_THE_DEFAULT_SUITE = [(ESMM, 1e-2, "gradient")]
SIDE_BY_SIDE = [
    pytest.param(*case, marks=[] if case in IN_THE_DEFAULT_SUITE else [pytest.mark.slow])
    for case in product(
        [SharedBottom, ESMM, MMoE], [1e-6, 1e-5, 1e-4, 1e-3, 1e-2], ["gradient", "decoupled"]
    )
]


@pytest.mark.parametrize(("build", "lam", "coupling"), SIDE_BY_SIDE)
def test_the_default_follows_the_exact_method_closely(
    build, lam, coupling, funnel_schema, make_batch
):
    """Norms, loss share, alphas, effective ranks and spectra after each epoch, dead units included.

    The exact method is trained in float64. One unit in three of each tower is dead.
    """
    exact = train_for_comparison(build, lam, coupling, 1, torch.float64, funnel_schema, make_batch)
    default = train_for_comparison(
        build, lam, coupling, 128, torch.float32, funnel_schema, make_batch
    )

    assert exact[-1]["zero share"] > 0.2
    for one, other in zip(exact, default, strict=True):
        for name in ("norms", "loss share", "alphas", "effective ranks"):
            torch.testing.assert_close(other[name], one[name], rtol=0.01, atol=0)
        for a, b in zip(one["spectra"], other["spectra"], strict=True):
            assert (a - b).abs().max() < 0.01 * a.max()


def train_for_comparison(build, lam, coupling, refresh_every, dtype, schema, make_batch):
    """Return what the logs say of the mechanism at the end of each of three epochs."""
    network = make_network(schema, build, sizes=(12, 16)).to(dtype)
    for depth in network.task_layers()[:-1]:
        for layer in depth:
            layer.bias.data[::3] = -100
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    mtn = make_mtn(
        lam=lam,
        coupling=coupling,
        refresh_every=refresh_every,
        alpha_optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    start(mtn, network)
    batches = [make_batch(schema, 64, seed) for seed in range(8)]
    batches = [
        dataclasses.replace(b, numerical=b.numerical.to(dtype), labels=b.labels.to(dtype))
        for b in batches
    ]
    found = []
    for step in range(150):
        batch = batches[step % 8]
        loss = cross_entropies(network(batch), batch.labels).sum()
        optimizer.zero_grad()
        loss.backward()
        zeros = [w.grad.eq(0).double().mean() for w in mtn._penalty.parameters()]
        mtn.on_before_optimizer_step(fake_trainer(step), None, optimizer)
        optimizer.step()
        if step % 50 == 49:
            spectra = [s for of in mtn._measure(mtn._penalty, step + 1) for s in of]
            norms = mtn._penalty.norms().detach()
            found.append(
                {
                    "norms": norms,
                    "loss share": lam
                    * norms.mean()
                    / (loss.detach().double() + lam * norms.mean()),
                    "alphas": mtn._penalty.weights.alpha().detach(),
                    "effective ranks": torch.stack([effective_rank(s) for s in spectra]),
                    "spectra": spectra,
                    "zero share": torch.stack(zeros).mean(),
                }
            )
    return found


class EachStep(L.Callback):
    """Asks for MTN's state after each step, so that no step of alpha waits."""

    def __init__(self, mtn):
        self.mtn = mtn

    def on_train_batch_end(self, *_):
        self.mtn.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("layer_weighting", ["mean", "gated"])
def test_steps_of_alpha_made_together_equal_those_made_one_by_one(
    fit, funnel_schema, layer_weighting
):
    keys = {"refresh_every": 6, "layer_weighting": layer_weighting}
    waiting, eager = make_mtn(**keys), make_mtn(**keys)
    one, _ = fit(make_network(funnel_schema), waiting, optimizer=ADAM, max_epochs=3)
    other, _ = fit(
        make_network(funnel_schema), eager, EachStep(eager), optimizer=ADAM, max_epochs=3
    )

    assert distance(one, other) == 0
    states = [mtn.state_dict() for mtn in (waiting, eager)]
    for name, learned in states[0]["weights"].items():
        assert learned.ne(0).any()
        assert torch.equal(learned, states[1]["weights"][name])
    steps = [s["step"].item() for s in states[0]["optimizer"]["state"].values()]
    assert steps == [24] * len(steps)


def test_a_new_direction_is_the_exact_one(funnel_schema):
    added = []
    for refresh_every in (1, 4):
        network = make_network(funnel_schema).double()
        mtn = make_mtn(refresh_every=refresh_every)
        start(mtn, network)
        mtn.on_before_optimizer_step(fake_trainer(), None, SGD(network.parameters()))
        added.append(network.towers[0][0].weight.grad)

    assert torch.equal(*added)


def test_each_epoch_logs_the_mechanism(fit, funnel_schema, tmp_path):
    mtn = make_mtn(spectra_every=1)
    model, trainer = fit(make_network(funnel_schema), mtn, optimizer=ADAM)

    logged = trainer.callback_metrics
    depths = model.network.task_layers()
    totals = []
    for depth, layers in enumerate(depths):
        stack = torch.stack([layer.weight for layer in layers]).detach()
        alpha = [logged[f"mtn/layer_{depth}/alpha_{m}"].item() for m in ("task", "output", "input")]
        spectra = [torch.linalg.svdvals(stack.movedim(m, 0).flatten(1)) for m in range(3)]
        norm = sum(a * s.sum().item() for a, s in zip(alpha, spectra, strict=True))
        norm += torch.linalg.vector_norm(stack).item()
        totals.append(norm)
        assert sum(alpha) == pytest.approx(1, abs=1e-5)
        assert logged[f"mtn/layer_{depth}/norm"].item() == pytest.approx(norm, rel=1e-4)
        saved = np.load(tmp_path / "spectra" / "epoch_001.npz")
        for name, spectrum in zip(("task", "output", "input"), spectra, strict=True):
            np.testing.assert_allclose(saved[f"layer_{depth}/{name}"], spectrum, rtol=1e-6)
            shares = spectrum / spectrum.sum()
            rank = torch.exp(-(shares * shares.log()).sum()).item()
            key = f"mtn/layer_{depth}/effective_rank_{name}"
            assert logged[key].item() == pytest.approx(rank, rel=1e-4)
    penalty = LAM * sum(totals) / len(totals)
    loss = logged["train/loss"].item()
    assert logged["mtn/penalty"].item() == pytest.approx(penalty, rel=1e-4)
    assert logged["mtn/loss_share"].item() == pytest.approx(penalty / (loss + penalty), rel=1e-4)
    assert 0 <= logged["mtn/zero_gradient_share"].item() <= 1


def test_between_exact_spectra_kept_vectors_give_them(fit, funnel_schema, tmp_path, monkeypatch):
    exact = []
    for name in ("measure", "refresh"):
        method = getattr(Penalty, name)
        monkeypatch.setattr(Penalty, name, lambda *a, n=name, m=method: [exact.append(n), m(*a)][1])
    mtn = make_mtn(refresh_every=4, spectra_every=2)

    model, _ = fit(make_network(funnel_schema), mtn, optimizer=ADAM, max_epochs=3)

    assert exact == ["measure", "refresh", "measure", "refresh"]  # the first when training starts
    for depth, layers in enumerate(model.network.task_layers()):
        stack = torch.stack([layer.weight for layer in layers]).detach()
        saved = np.load(tmp_path / "spectra" / "epoch_002.npz")
        for mode, name in enumerate(("task", "output", "input")):
            spectrum = torch.linalg.svdvals(stack.movedim(mode, 0).flatten(1)).numpy()
            error = np.abs(saved[f"layer_{depth}/{name}"] - spectrum).max()
            assert error < 0.02 * spectrum[0]


def test_spectra_are_measured_without_mtn_too(fit, funnel_schema, tmp_path):
    model, trainer = fit(make_network(funnel_schema), make_mtn(enabled=False), optimizer=ADAM)

    assert not [name for name in trainer.callback_metrics if name.startswith("mtn/")]
    with np.load(tmp_path / "spectra" / "epoch_001.npz") as saved:
        for depth, layers in enumerate(model.network.task_layers()):
            stack = torch.stack([layer.weight for layer in layers]).detach()
            for mode, name in enumerate(("task", "output", "input")):
                spectrum = torch.linalg.svdvals(stack.movedim(mode, 0).flatten(1))
                np.testing.assert_allclose(saved[f"layer_{depth}/{name}"], spectrum, rtol=1e-5)


def test_layers_that_mtn_could_not_stack_have_no_spectra():
    class Towers:
        def task_layers(self):
            broken = nn.Linear(2, 2)
            nn.init.constant_(broken.weight, torch.nan)
            return [
                [nn.Linear(3, 2), nn.Linear(3, 2)],
                [nn.Linear(2, 2), nn.Linear(2, 1)],
                [nn.Linear(2, 2)],
                [nn.Linear(2, 2), broken],
            ]

    assert set(measure_spectra(Towers())) == {f"layer_0/{m}" for m in ("task", "output", "input")}
    assert measure_spectra(nn.Linear(2, 2)) == {}


def test_the_share_of_weights_without_a_data_gradient_is_counted(fit, funnel_schema):
    network = make_network(funnel_schema)
    with torch.no_grad():
        network.towers[0][0].bias.fill_(-100)  # dead units: half of the first depth's weights

    _, trainer = fit(network, make_mtn(lam=0, layers=[0]), max_epochs=1)

    assert trainer.callback_metrics["mtn/zero_gradient_share"].item() >= 0.5


def test_a_collapsed_alpha_is_reported_once_and_names_the_layer(fit, funnel_schema, caplog):
    mtn = make_mtn(alpha_optimizer=partial(torch.optim.SGD, lr=1e5), layers=[1])

    fit(make_network(funnel_schema), mtn)

    messages = [r.message for r in caplog.records if "collapsed" in r.message]
    assert len(messages) == 1
    assert "alpha of layer 1" in messages[0]
    assert "mtn.alpha=uniform" in messages[0]


@pytest.mark.slow
def test_resuming_at_an_epoch_gives_the_same_bits(fit, funnel_schema, tmp_path):
    keys = {"optimizer": ADAM}
    whole = make_mtn(refresh_every=3)
    uninterrupted, _ = fit(make_network(funnel_schema), whole, max_epochs=4, **keys)

    _, trainer = fit(make_network(funnel_schema), make_mtn(refresh_every=3), max_epochs=2, **keys)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_mtn(refresh_every=3)
    # Lightning restores before it converts to float64, so the model must be float64 already.
    network = make_network(funnel_schema, seed=9).double()
    model = MultiTaskModule(network, schema=funnel_schema, optimizer=ADAM)
    loader = trainer.train_dataloader
    second = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[resumed],
        default_root_dir=tmp_path,
    )
    second.fit(model, loader, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)

    for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(a, b)
    first, again = (m.state_dict()["weights"]["alpha_logits"] for m in (whole, resumed))
    assert torch.equal(first, again)


@pytest.mark.parametrize("weighting", ["exponential_decay", "learned", "gated"])
def test_layer_weights_act_on_the_gradient(weighting, fit, funnel_schema):
    mtn = make_mtn(layer_weighting=weighting, alpha="uniform")

    _, trainer = fit(make_network(funnel_schema), mtn, optimizer=ADAM)

    weights = [trainer.callback_metrics[f"mtn/layer_{i}/weight"].item() for i in range(3)]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert len(set(weights)) == 3
    if weighting == "learned":  # linear in the weights, so the smallest norm gains
        norms = [trainer.callback_metrics[f"mtn/layer_{i}/norm"].item() for i in range(3)]
        assert int(np.argmax(weights)) == int(np.argmin(norms))


def test_only_fused_optimisers_under_a_scaler_get_scaled_gradients():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    parameter = nn.Parameter(torch.ones(3))
    scaler.scale(parameter.sum()).backward()
    fused = torch.optim.Adam([parameter], fused=True)

    scale = gradient_scale(trainer, fused)
    add_to_gradients([(parameter, torch.full((3,), 4.0), 0.5)], scale=scale)
    scaler.unscale_(fused)

    assert parameter.grad.tolist() == [3.0, 3.0, 3.0]
    assert gradient_scale(trainer, torch.optim.Adam([parameter])) == 1
    plain = SimpleNamespace(precision_plugin=SimpleNamespace())
    assert gradient_scale(plain, fused) == 1


def test_bf16_mixed_trains_under_the_penalty(fit, funnel_schema):
    model, trainer = fit(make_network(funnel_schema), make_mtn(), precision="bf16-mixed")

    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert trainer.callback_metrics["mtn/norm"].isfinite()


# Misuse.


def start(mtn, network):
    mtn.setup(None, SimpleNamespace(network=network), "fit")
    mtn.on_train_start(fake_trainer(), SimpleNamespace(device=torch.device("cpu")))


def fake_trainer(step=0):
    return SimpleNamespace(precision_plugin=SimpleNamespace(), global_step=step)


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_a_layer_that_does_not_exist_is_refused(funnel_schema):
    with pytest.raises(InputError, match=r"mtn.layers must be from 0 to 2, .*towers, got \[0, 3\]"):
        start(make_mtn(layers=[0, 3]), make_network(funnel_schema))


def test_towers_that_differ_in_shape_are_refused_with_both_shapes(funnel_schema):
    network = make_network(funnel_schema)
    network.towers[1][2] = nn.Linear(5, 9)

    with pytest.raises(InputError, match=r"layer 1 must have equal .* got \(4, 5\) and \(9, 5\)"):
        start(make_mtn(), network)
    start(make_mtn(layers=[0]), network)


@pytest.mark.parametrize("build", [SharedBottom, ESMM])
def test_shared_layers_that_do_not_exist_are_refused(build, funnel_schema):
    with pytest.raises(InputError, match=r"parallel shared layers.*mtn.target=towers"):
        start(make_mtn(target="shared"), make_network(funnel_schema, build))


def test_towers_that_do_not_exist_are_refused():
    network = SimpleNamespace(task_layers=list, shared_layers=list)

    with pytest.raises(
        InputError, match=r"have layers per task for mtn.target=towers, got none.*target=shared"
    ):
        start(make_mtn(), network)


def test_a_network_without_task_layers_is_refused():
    with pytest.raises(
        InputError, match=r"Linear must have a method task_layers\(\).*enabled=false"
    ):
        start(make_mtn(), nn.Linear(2, 2))


def test_one_tower_is_refused():
    network = SimpleNamespace(task_layers=lambda: [[nn.Linear(2, 1)]])

    with pytest.raises(
        InputError, match=r"layer 0 of mtn\.target=towers must have at least two .* one"
    ):
        start(make_mtn(), network)


def test_a_layer_whose_norm_was_far_off_gives_one_warning(fit, funnel_schema, monkeypatch, caplog):
    found = [Deviation(0.3, 20.0, 0.1), Deviation(0.05, 1.0, 0.0), Deviation(0.0, 0.0, 0.0)]
    monkeypatch.setattr(Penalty, "pop_deviations", lambda _: found)

    fit(make_network(funnel_schema), make_mtn(refresh_every=8), max_epochs=2)

    (message,) = [m for m in caplog.messages if "between two updates" in m]
    assert "layer 0 was up to 30 % off" in message
    assert "Set mtn.refresh_every below 8" in message


def test_directions_are_kept_for_fewer_steps_where_the_penalty_is_stronger(funnel_schema):
    kept = {}
    for coupling, lam in product(("gradient", "decoupled"), (1e-6, 1e-5, 1e-4, 1e-3)):
        mtn = make_mtn(lam=lam, coupling=coupling, refresh_every=128)
        start(mtn, make_network(funnel_schema))
        kept[coupling, lam] = mtn._penalty._policy.update_interval((2, 512, 2176), 10**6)

    assert [kept["gradient", lam] for lam in (1e-6, 1e-5, 1e-4, 1e-3)] == [32, 32, 3, 1]
    assert [kept["decoupled", lam] for lam in (1e-6, 1e-5, 1e-4, 1e-3)] == [32] * 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lam": -1e-5}, r"mtn.lam must be a number in \[0, inf\), got -1e-05"),
        ({"lam": float("nan")}, "mtn.lam must be a number"),
        ({"refresh_every": 0}, "mtn.refresh_every must be an integer >= 1, got 0"),
        ({"target": "gates"}, "mtn.target must be one of towers, shared; got 'gates'"),
        ({"layers": "first"}, "mtn.layers must be one of all"),
        ({"layers": []}, "mtn.layers must be `all`, `last_hidden` or a list"),
        (
            {"layers": [1, 1]},
            "mtn.layers must be `all`, `last_hidden` or a list of different depths",
        ),
        ({"layers": [-1]}, "mtn.layers must be an integer >= 0, got -1"),
        ({"alpha": "learnt"}, "mtn.alpha must be one of learned, uniform; got 'learnt'"),
        ({"alpha": [0.5, 0.5]}, "mtn.alpha must be `learned`, `uniform` or three weights"),
        ({"alpha": [0.5, 0.5, 0.5]}, "mtn.alpha must sum to 1.*sum 1.5"),
        ({"alpha": [1.5, -0.5, 0.0]}, "mtn.alpha must be a number in"),
        ({"layer_weighting": "median"}, "mtn.layer_weighting must be one of mean"),
        ({"coupling": "loose"}, "mtn.coupling must be one of gradient, decoupled"),
        ({"frobenius": "no"}, "mtn.frobenius must be true or false"),
        ({"enabled": 1}, "mtn.enabled must be true or false"),
        ({"norm": "spectral"}, "mtn.norm must be one of trace, capped, nuclear"),
        ({"cap": -1}, r"mtn.cap must be a number in \[0, inf\), got -1"),
        (
            {"norm": "capped", "refresh_every": 2},
            r"mtn.refresh_every must be 1 with mtn.norm=capped.*got 2\. Set mtn.refresh_every=1",
        ),
        (
            {"norm": "nuclear"},
            "mtn.alpha must be uniform .*mtn.norm=nuclear.*got learned and .*Choose mtn=nuclear",
        ),
    ],
)
def test_values_out_of_range_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        make_mtn(**keys)
