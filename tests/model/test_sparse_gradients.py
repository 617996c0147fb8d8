"""Training under lazy_adam, whose gradients of large tables are sparse."""

import copy
import dataclasses
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.model.esmm import ESMM
from mtnrec.model.heac import HEAC
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.mtn.callback import MTN
from mtnrec.optimizer.lazy_adam import LazyAdam
from mtnrec.schema import CategoricalField, Schema
from mtnrec.training.module import MultiTaskModule

LAZY = partial(LazyAdam, lr=0.02, betas=[0.9, 0.999], eps=1e-8)
ADAM = partial(torch.optim.Adam, lr=0.02, fused=True)
SCHEMA = Schema(
    tuple(CategoricalField(name, size) for name, size in (("small", 3), ("a", 40), ("b", 30))),
    ("x", "y"),
    ("click", "conversion"),
    funnel=True,
    multivalued=(CategoricalField("history", 50), CategoricalField("few", 2)),
)
SPARSE = {"input.tables.1.weight", "input.tables.2.weight"} | {
    f"input.bag_tables.{field}.weight" for field in (0, 1)
}
PLAIN = {"embedding_dim": 4, "bag_mode": "mean", "dropout": 0.0, "batch_norm": False}
BUILD = {
    "shared_bottom": lambda: SharedBottom(SCHEMA, bottom_widths=[6], tower_widths=[5], **PLAIN),
    "esmm": lambda: ESMM(SCHEMA, tower_widths=[6, 5], **PLAIN),
    "mmoe": lambda: MMoE(SCHEMA, experts=3, expert_widths=[6], tower_widths=[5], **PLAIN),
    "personal": lambda: MMoE(
        SCHEMA, expert_widths=[6], tower_widths=[5], personal_fields=["a", "history"], **PLAIN
    ),
    "cross": lambda: SharedBottom(
        SCHEMA, bottom_widths=[6], tower_widths=[5], cross_layers=2, **PLAIN
    ),
    "heac": lambda: HEAC(SCHEMA, experts=3, expert_widths=[6], gate_widths=[5], **PLAIN),
}


def make_network(model="shared_bottom"):
    torch.manual_seed(0)
    return BUILD[model]()


def make_mtn(coupling):
    return MTN(
        enabled=True,
        lam=0.05,
        target="towers",
        layers="all",
        subsets="distinct",
        alpha="uniform",
        layer_weighting="mean",
        frobenius=True,
        coupling=coupling,
        refresh_every=1,
        alpha_optimizer=ADAM,
    )


@pytest.fixture
def fit(tmp_path):
    """Train on batches in float64 (unless told otherwise); return the module."""

    def run(network, batches, *callbacks, optimizer, **keys):
        module = MultiTaskModule(network, schema=SCHEMA, optimizer=optimizer)
        settings = {
            "accelerator": "cpu",
            "precision": "64-true",
            "deterministic": True,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer = L.Trainer(callbacks=list(callbacks), **settings | keys)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        try:
            trainer.fit(module, loader, loader)
        finally:
            torch.use_deterministic_algorithms(mode=False)
        return module

    return run


@pytest.fixture
def full_batches(make_batch):
    """Batches with every row of every table."""
    rng, batches = np.random.default_rng(0), []
    for number in range(8):
        batch = in_float64(make_batch(SCHEMA, 64, number))
        columns = [*batch.categorical.T, *(bags.tokens for bags in batch.bags)]
        for field, column in zip((*SCHEMA.categorical, *SCHEMA.multivalued), columns, strict=True):
            column[: field.vocabulary_size] = torch.from_numpy(
                rng.permutation(field.vocabulary_size)
            )
        batches.append(batch)
    return batches


def in_float64(batch):
    bags = tuple(dataclasses.replace(b, weights=b.weights.double()) for b in batch.bags)
    return dataclasses.replace(
        batch, numerical=batch.numerical.double(), labels=batch.labels.double(), bags=bags
    )


def gradients(network, batch):
    network.zero_grad()
    cross_entropies(network(batch), batch.labels).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("model", BUILD)
def test_sparse_gradients_equal_the_dense_ones(model, make_batch):
    network = make_network(model).double()
    batch = in_float64(make_batch(SCHEMA))
    dense = gradients(network, batch)

    network.input.make_gradients(sparse=True)
    sparse = gradients(network, batch)

    assert {name for name, gradient in sparse.items() if gradient.is_sparse} == SPARSE
    for name, gradient in sparse.items():
        torch.testing.assert_close(gradient.to_dense(), dense[name], rtol=1e-12, atol=1e-15)


def test_the_gradient_of_a_field_with_bags_has_a_row_per_token(make_batch):
    network, batch = make_network(), make_batch(SCHEMA, rows=64)
    network.input.make_gradients(sparse=True)

    gradient = gradients(network, batch)["input.bag_tables.0.weight"]

    tokens = batch.bags[0].tokens
    assert gradient._indices().flatten().tolist() == sorted(set(tokens.tolist()))
    assert len(set(tokens.tolist())) < len(tokens)


def test_sparse_gradients_change_neither_the_output_nor_the_state_dict(make_batch):
    dense, sparse, batch = make_network(), make_network(), make_batch(SCHEMA)
    sparse.input.make_gradients(sparse=True)

    assert torch.equal(dense(batch).positive, sparse(batch).positive)
    assert torch.equal(dense.input(batch), sparse.input(batch))
    assert list(dense.state_dict()) == list(sparse.state_dict())


@pytest.mark.parametrize(
    "coupling", [None, "gradient", pytest.param("decoupled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "clip",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gradient_clip_val": 0.01},
        pytest.param(
            {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no clip", "clip norm", "clip value"],
)
def test_equals_adam_if_every_batch_has_every_row(clip, accumulate, coupling, fit, full_batches):
    trained = []
    for optimizer in (LAZY, ADAM):
        callbacks = [] if coupling is None else [make_mtn(coupling)]
        keys = {"accumulate_grad_batches": accumulate, **clip}
        trained.append(
            fit(make_network(), full_batches, *callbacks, optimizer=optimizer, **keys).network
        )

    lazy, adam = trained
    for (name, weight), expected in zip(lazy.named_parameters(), adam.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    "keys",
    [{"precision": "32-true"}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("model", BUILD)
def test_rows_that_no_batch_has_are_unchanged_to_the_bit(model, keys, fit, make_batch):
    batches = [make_batch(SCHEMA, 32, number) for number in range(6)]
    for batch in batches:
        batch.categorical[:, 1:] //= 2
        for bags in batch.bags:
            bags.tokens //= 2
    network = make_network(model)
    before = copy.deepcopy(network.state_dict())

    fit(network, batches, optimizer=LAZY, **keys)

    for name, weight in network.state_dict().items():
        if name in SPARSE and "bag_tables.1" not in name:
            absent = len(weight) // 2
            assert torch.equal(weight[absent:], before[name][absent:])
        assert weight.ne(before[name]).any()


def test_only_the_optimiser_that_takes_sparse_gradients_gets_them(fit, full_batches):
    network = make_network()
    found = []

    for optimizer in (ADAM, LAZY, ADAM):
        fit(network, full_batches, optimizer=optimizer)
        of_parameters = gradients(network, full_batches[0])
        found.append({name for name, gradient in of_parameters.items() if gradient.is_sparse})

    assert found == [set(), SPARSE, set()]


def test_processes_that_cannot_sum_sparse_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    module = MultiTaskModule(make_network(), schema=SCHEMA, optimizer=LAZY)

    with pytest.raises(InputError, match=r"lazy_adam.*NCCL cannot sum.*optimizer=adam"):
        module.setup("fit")


def test_a_rate_out_of_range_is_refused_before_training():
    module = MultiTaskModule(
        make_network(), schema=SCHEMA, optimizer=partial(LazyAdam, lr=-1, betas=[0.9], eps=0)
    )

    with pytest.raises(InputError, match=r"optimizer: lr must be a number in \[0, inf\), got -1"):
        module.setup("fit")
