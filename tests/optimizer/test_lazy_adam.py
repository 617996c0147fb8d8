"""Rows against torch's own Adam and SparseAdam."""

import copy
import io
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtnrec.checks import InputError
from mtnrec.mtn.callback import gradient_scale
from mtnrec.optimizer.lazy_adam import LazyAdam

ROWS, WIDTH = 12, 5
KEYS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


def make_table(rows=ROWS, seed=0):
    torch.manual_seed(seed)
    return nn.Parameter(torch.randn(rows, WIDTH))


def draw(number, *, rows=ROWS, count=20):
    """The tokens of a batch, some of them more than once, and a target for each."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, rows, (count,), generator=generator)
    return tokens, torch.randn(count, WIDTH, generator=generator)


def add_gradient(table, tokens, target, *, sparse):
    (F.embedding(tokens, table, sparse=sparse) - target).square().sum().backward()


def train(table, optimizer, batches, *, sparse=True):
    for tokens, target in batches:
        optimizer.zero_grad()
        add_gradient(table, tokens, target, sparse=sparse)
        optimizer.step()
    return table


def test_rows_that_are_in_every_batch_move_as_under_adam():
    batches = []
    for number in range(20):
        tokens, target = draw(number, count=ROWS + 20)
        tokens[:ROWS] = torch.randperm(ROWS)
        batches.append((tokens, target))
    lazy, adam = make_table(), make_table()

    train(lazy, LazyAdam([lazy], **KEYS), batches)
    train(adam, torch.optim.Adam([adam], **KEYS), batches, sparse=False)

    torch.testing.assert_close(lazy, adam, rtol=1e-5, atol=1e-6)


def test_rows_move_as_under_sparse_adam():
    # Which adds eps to another multiple of the root: far below the tolerance.
    batches = [draw(number, count=6) for number in range(50)]
    lazy, reference = make_table(), make_table()

    train(lazy, LazyAdam([lazy], **KEYS), batches)
    train(reference, torch.optim.SparseAdam([reference], **KEYS), batches)

    torch.testing.assert_close(lazy, reference, rtol=1e-5, atol=1e-6)


def test_a_row_that_a_batch_lacks_is_unchanged_to_the_bit():
    table = make_table()
    optimizer = LazyAdam([table], **KEYS)
    train(table, optimizer, [draw(0, count=100)])
    state = optimizer.state[table]
    before = [x.detach().clone() for x in (table, state["exp_avg"], state["exp_avg_sq"])]
    tokens, target = draw(1, count=6)
    absent = [row for row in range(ROWS) if row not in tokens]

    train(table, optimizer, [(tokens, target)] * 3)

    for old, new in zip(before, (table, state["exp_avg"], state["exp_avg_sq"]), strict=True):
        assert torch.equal(old[absent], new[absent])
        assert old[tokens].ne(new[tokens]).all()
    assert len(absent) > 3


def test_dense_gradients_move_weights_to_the_bit_as_under_fused_adam():
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3))
    fused = copy.deepcopy(lazy)
    optimizers = (
        LazyAdam(lazy.parameters(), **KEYS),
        torch.optim.Adam(fused.parameters(), **KEYS, fused=True),
    )

    for _ in range(10):
        x = torch.randn(8, 7)
        for network, optimizer in zip((lazy, fused), optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()

    assert all(map(torch.equal, lazy.parameters(), fused.parameters()))


@pytest.mark.parametrize(("sparse", "rates"), [(True, 3.162), (False, 31.62)])
def test_a_late_batch_moves_its_row_once_and_adam_ten_times_as_far(sparse, rates):
    table = make_table()
    build = LazyAdam if sparse else torch.optim.Adam
    optimizer = build([table], **KEYS)
    others, target = torch.arange(1, ROWS), torch.zeros(ROWS - 1, WIDTH)
    train(table, optimizer, [(others, target)], sparse=sparse)
    optimizer.state[table]["step"].fill_(1e6)
    start = table[0].detach().clone()

    train(table, optimizer, [(torch.tensor([0]), torch.full((1, WIDTH), 50.0))], sparse=sparse)
    train(table, optimizer, [(others, target)] * 200, sparse=sparse)

    torch.testing.assert_close(
        table[0] - start, torch.full((WIDTH,), rates * KEYS["lr"]), rtol=0.01, atol=0
    )


def test_gradients_of_several_batches_add_up():
    apart, joined = make_table(), make_table()
    batches = [draw(number) for number in range(4)]
    optimizers = LazyAdam([apart], **KEYS), LazyAdam([joined], **KEYS)

    for tokens, target in batches:
        add_gradient(apart, tokens, target, sparse=True)
    add_gradient(joined, *map(torch.cat, zip(*batches, strict=True)), sparse=True)
    for optimizer in optimizers:
        optimizer.step()

    torch.testing.assert_close(apart, joined)


def test_a_batch_without_tokens_moves_nothing():
    table, untouched = make_table(), make_table(seed=1)
    optimizer = LazyAdam([table, untouched], **KEYS)
    before = [x.detach().clone() for x in (table, untouched)]

    train(table, optimizer, [draw(0, count=0)])

    assert torch.equal(table, before[0])
    assert torch.equal(untouched, before[1])


def test_resumes_from_a_saved_state_to_the_same_bits():
    batches = [draw(number, count=6) for number in range(8)]
    whole, first = make_table(), make_table()
    optimizer, file = LazyAdam([first], **KEYS), io.BytesIO()

    train(whole, LazyAdam([whole], **KEYS), batches)
    train(first, optimizer, batches[:4])
    torch.save({"table": first.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = nn.Parameter(saved["table"])
    optimizer = LazyAdam([second], **KEYS | {"lr": 0.5})
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, batches[4:])

    assert torch.equal(second, whole)


def test_its_state_has_the_format_of_adams():
    lazy, fused = make_table(), make_table()
    optimizers = LazyAdam([lazy], **KEYS), torch.optim.Adam([fused], **KEYS, fused=True)

    train(lazy, optimizers[0], [draw(0)])
    train(fused, optimizers[1], [draw(0)], sparse=False)

    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.testing.assert_close(states[0]["state"], states[1]["state"])
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_a_closure_computes_the_loss_with_gradients():
    table = make_table()
    optimizer = LazyAdam([table], **KEYS)
    start = table.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = table.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == start.square().sum()
    assert table.ne(start).all()


def test_gradients_are_unscaled_before_the_step():
    plain, scaled = make_table(), make_table()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = LazyAdam([scaled], **KEYS)
    tokens, target = draw(0)

    train(plain, LazyAdam([plain], **KEYS), [(tokens, target)])
    loss = (F.embedding(tokens, scaled, sparse=True) - target).square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # as Lightning does for clipping, before MTN's hook
    scale = gradient_scale(
        SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler)), optimizer
    )
    scaler.step(optimizer)

    assert scale == 1
    torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": -0.1}, "lr must be a number in [0, inf), got -0.1"),
        ({"lr": "fast"}, "lr must be a number in [0, inf), got 'fast'"),
        ({"betas": [0.9, 1.0]}, "betas must be a number in [0, 1), got 1.0"),
        ({"betas": [-0.1, 0.9]}, "betas must be a number in [0, 1), got -0.1"),
        ({"betas": [0.9]}, "betas must be a list of two numbers, got [0.9]"),
        ({"betas": 0.9}, "betas must be a list of two numbers, got 0.9"),
        ({"eps": -1e-8}, "eps must be a number in [0, inf), got -1e-08"),
    ],
)
def test_a_bad_value_is_refused(keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        LazyAdam([make_table()], **KEYS | keys)
