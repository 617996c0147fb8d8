"""Weight decay of the optimisers, of the embeddings apart from the rest."""

from functools import partial

import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.model.loss import cross_entropies
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.optimizer.lazy_adam import LazyAdam
from mtnrec.system.files import read_json
from mtnrec.training.module import MultiTaskModule


@pytest.fixture
def make_module(funnel_schema):
    def make(optimizer, **keys):
        torch.manual_seed(0)
        network = SharedBottom(funnel_schema, embedding_dim=4, bottom_widths=[6], tower_widths=[4])
        return MultiTaskModule(network, schema=funnel_schema, optimizer=optimizer, **keys)

    return make


def is_embedding(name):
    return "tables" in name


def step(module, batch):
    """Make one step; return the weights before and the gradients of the loss."""
    optimizer = module._make_optimizer()
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    cross_entropies(module(batch), batch.labels).sum().backward()
    gradients = {name: p.grad.to_dense().clone() for name, p in module.network.named_parameters()}
    optimizer.step()
    return before, gradients


@pytest.mark.parametrize(("decay", "own"), [(0.1, None), (0.1, 0.0), (0.0, 0.3), (0.1, 0.3)])
def test_l2_is_added_to_the_gradient_with_the_strength_of_the_group(
    decay, own, make_module, make_batch, funnel_schema
):
    sgd = partial(torch.optim.SGD, lr=0.5, weight_decay=decay)
    module = make_module(sgd, embedding_weight_decay=own)

    before, gradients = step(module, make_batch(funnel_schema))

    for name, parameter in module.network.named_parameters():
        strength = decay if own is None or not is_embedding(name) else own
        expected = before[name] - 0.5 * (gradients[name] + strength * before[name])
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("embeddings", [None, 0.5])
def test_adamw_decays_apart_from_the_gradient(embeddings, make_module, make_batch, funnel_schema):
    batch, keys = make_batch(funnel_schema), {"embedding_weight_decay": embeddings}
    decayed = make_module(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.2), **keys)
    plain = make_module(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0))
    before, _ = step(decayed, batch)
    step(plain, batch)

    pairs = zip(decayed.network.named_parameters(), plain.network.named_parameters(), strict=True)
    for (name, parameter), (_, without) in pairs:
        strength = 0.2 if embeddings is None or not is_embedding(name) else embeddings
        expected = without.detach() - 0.01 * strength * before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_lazy_adam_decays_the_rows_of_the_batch_alone(make_module, make_batch, funnel_schema):
    """Rows in the batch move as under Adam with weight decay, absent ones keep their bits."""
    batch = make_batch(funnel_schema)
    keys = {"embedding_weight_decay": 0.3}
    lazy = make_module(partial(LazyAdam, lr=0.01, weight_decay=0.1), **keys)
    dense = make_module(partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, fused=True), **keys)
    for module in (lazy, dense):
        module.network.input.make_gradients(sparse=module is lazy)
    before, _ = step(lazy, batch)
    step(dense, batch)

    table = lazy.network.input.tables[1].weight.detach()  # 40 values, of which 16 rows have some
    expected = dense.network.input.tables[1].weight.detach()
    present = torch.zeros(len(table), dtype=torch.bool)
    present[batch.categorical[:, 1].long()] = True
    assert 0 < present.sum() < len(table)
    torch.testing.assert_close(table[present], expected[present], rtol=1e-6, atol=1e-8)
    assert torch.equal(table[~present], before["input.tables.1.weight"][~present])
    moved = expected[~present] - before["input.tables.1.weight"][~present]
    assert moved.ne(0).any()  # Adam moves them by their decay


@pytest.mark.parametrize("build", [torch.optim.Adam, LazyAdam])
def test_a_decay_of_zero_changes_no_bit(build, make_module, make_batch, funnel_schema):
    with_key, without = make_module(partial(build, lr=0.01, weight_decay=0.0)), make_module(build)
    without._optimizer = partial(build, lr=0.01)
    own_group = make_module(partial(build, lr=0.01), embedding_weight_decay=0.0)
    for module in (with_key, without, own_group):
        step(module, make_batch(funnel_schema))

    for module in (with_key, own_group):
        assert all(map(torch.equal, module.parameters(), without.parameters()))


def test_an_optimiser_without_weight_decay_is_refused(make_module):
    module = make_module(partial(torch.optim.Rprop, lr=0.1), embedding_weight_decay=0.1)

    with pytest.raises(InputError, match=r"must be null for Rprop.*Choose optimizer=adam"):
        module._make_optimizer()


def test_a_negative_decay_is_refused(make_module):
    with pytest.raises(InputError, match=r"optimizer.embedding_weight_decay must be a number in"):
        make_module(torch.optim.Adam, embedding_weight_decay=-1)
    with pytest.raises(InputError, match=r"weight_decay must be a number in"):
        make_module(partial(LazyAdam, weight_decay=-1.0))._make_optimizer()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lazy_adam"])
@pytest.mark.slow
def test_the_command_decays_the_embeddings_apart(optimizer, train):
    run = [f"optimizer={optimizer}", "data.rows=1000", "trainer.max_epochs=1"]
    run += ["optimizer.weight_decay=0.01", "optimizer.embedding_weight_decay=0.1"]
    folder = train(*run, "trainer.checkpoint_every_n_steps=1")

    assert read_json(folder / "result.json")["config"]["optimizer"]["embedding_weight_decay"] == 0.1
