"""Trace norms of other papers: the files of conf/mtn against independent decompositions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from mtnrec.checks import InputError
from mtnrec.model.esmm import ESMM
from mtnrec.model.mmoe import MMoE
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.mtn.polar import add_polar_from_vectors, tower_factors, tower_side, tower_vectors

SHAPES = ((5, 4), (3, 7))  # outputs and inputs of two depths


class Towers(nn.Module):
    """Two towers with random weights, of two depths, in float64."""

    def __init__(self, tasks=2, shapes=SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.depths = nn.ModuleList(
            nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(tasks))
            for outputs, inputs in shapes
        ).double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def task_layers(self):
        return [list(depth) for depth in self.depths]

    def stacks(self):
        return [
            torch.stack([layer.weight.detach() for layer in depth]) for depth in self.task_layers()
        ]


@pytest.fixture
def start(compose_config):
    """Start the callback of a file on a network; overrides as on the command line."""

    def make(choice, network, *overrides):
        config = compose_config(f"mtn={choice}", "mtn.enabled=true", *overrides)
        mtn = instantiate(config.mtn, _convert_="all")
        mtn.setup(None, SimpleNamespace(network=network), "fit")
        trainer = SimpleNamespace(precision_plugin=SimpleNamespace(), global_step=0)
        mtn.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
        return mtn

    return make


def norms(mtn):
    return mtn._penalty.norms().detach().tolist()


def directions(mtn):
    """The gradient of each R_i."""
    return [mtn._penalty.current(depth) for depth in mtn._penalty.depths]


def nuclear(matrix):
    return np.linalg.svd(np.asarray(matrix), compute_uv=False).sum()


def unfolded(stack):
    return [stack.movedim(mode, 0).flatten(1) for mode in range(3)]


def test_gttn_is_the_mean_of_three_trace_norms_before_alpha_learns(start):
    network = Towers()
    mtn = start("gttn", network)

    assert list(mtn._penalty.depths) == [1]
    expected = np.mean([nuclear(matrix) for matrix in unfolded(network.stacks()[1])])
    assert norms(mtn) == pytest.approx([expected])


def test_gttn_moves_the_weights_and_not_only_alpha(start):
    network = Towers()
    mtn = start("gttn", network)

    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(), global_step=0)
    mtn.on_before_optimizer_step(trainer, None, torch.optim.SGD(network.parameters(), lr=1))

    assert all(layer.weight.grad.ne(0).all() for layer in network.task_layers()[1])


@pytest.mark.parametrize(
    ("build", "keys", "depth"),
    [
        (SharedBottom, {"tower_widths": [5, 4]}, 1),
        (MMoE, {"tower_widths": [5]}, 0),
        (ESMM, {"tower_widths": [6, 5, 4, 3]}, 3),
    ],
)
def test_the_last_hidden_layer_is_the_one_before_the_logit(
    build, keys, depth, start, funnel_schema
):
    network = build(funnel_schema, embedding_dim=4, **keys)

    assert list(start("gttn", network)._penalty.depths) == [depth]


def test_the_last_hidden_layer_of_experts_is_their_last(start, funnel_schema):
    network = MMoE(funnel_schema, embedding_dim=4, experts=3, expert_widths=[6, 5])

    mtn = start("gttn", network, "mtn.target=shared")

    assert list(mtn._penalty.depths) == [1]


def test_towers_of_a_logit_alone_have_no_hidden_layer(start):
    with pytest.raises(InputError, match=r"needs a layer with more than one output.*layers=all"):
        start("gttn", Towers(shapes=[(1, 4)]))


def test_tucker_is_the_mean_of_the_unfoldings(start):
    network = Towers()

    expected = [np.mean([nuclear(m) for m in unfolded(stack)]) for stack in network.stacks()]
    assert norms(start("tucker", network)) == pytest.approx(expected)


def test_tt_is_the_mean_over_the_cuts_of_the_tensor_with_the_task_last(start):
    network = Towers()

    expected = []
    for stack in network.stacks():
        tensor = stack.permute(2, 1, 0).numpy()  # (I, O, T)
        cuts = [tensor.reshape(len(tensor), -1), tensor.reshape(-1, 2)]
        expected.append(np.mean([nuclear(cut) for cut in cuts]))
    assert norms(start("tt", network)) == pytest.approx(expected)


def test_laf_flattens_all_axes_but_the_task(start):
    network = Towers()

    expected = [nuclear(stack.permute(2, 1, 0).reshape(-1, 2)) for stack in network.stacks()]
    assert norms(start("laf", network)) == pytest.approx(expected)


def capped_by_autograd(stack, cap):
    """Mean over the unfoldings of the capped norm, and its gradient at a fixed threshold."""
    stack = stack.clone().requires_grad_()
    total = 0
    for matrix in unfolded(stack):
        values = torch.linalg.svdvals(matrix)
        threshold = cap * values.detach().max()
        total = total + torch.minimum(values, threshold).sum() / 3
    total.backward()
    return total.item(), stack.grad


@pytest.mark.parametrize("cap", [0.3, 0.5, 0.9])
def test_capped_norm_and_gradient_are_those_of_autograd(cap, start):
    network = Towers(tasks=3)
    mtn = start("capped", network, f"mtn.cap={cap}")

    expected = [capped_by_autograd(stack, cap) for stack in network.stacks()]
    assert norms(mtn) == pytest.approx([value for value, _ in expected])
    for direction, (_, gradient) in zip(directions(mtn), expected, strict=True):
        torch.testing.assert_close(direction, gradient, rtol=1e-9, atol=1e-11)


def test_a_cap_above_one_is_the_trace_norm_and_one_of_zero_is_nothing(start):
    network = Towers()
    tucker, whole, none = (
        start("tucker", network, "mtn.refresh_every=1"),
        start("capped", network, "mtn.cap=1.01"),
        start("capped", network, "mtn.cap=0"),
    )

    assert norms(whole) == pytest.approx(norms(tucker))
    torch.testing.assert_close(directions(whole), directions(tucker))
    assert norms(none) == [0, 0]
    assert all(direction.eq(0).all() for direction in directions(none))


def test_a_capped_task_unfolding_only_makes_two_towers_parallel(start):
    """The gradient is that of the second singular value alone."""
    network = Towers()
    with torch.no_grad():  # nearly parallel, so that only the first value is above the cap
        for first, second in network.task_layers():
            second.weight.copy_(2 * first.weight + 0.1 * second.weight)
    mtn = start("capped", network, "mtn.alpha=[1,0,0]")

    for direction, stack in zip(directions(mtn), network.stacks(), strict=True):
        stack.requires_grad_()
        torch.linalg.svdvals(stack.flatten(1))[1].backward()
        torch.testing.assert_close(direction, stack.grad, rtol=1e-8, atol=1e-10)


def test_nuclear_norm_and_gradient_are_those_of_each_tower(start):
    network = Towers(tasks=3)
    mtn = start("nuclear", network)

    stacks = network.stacks()
    assert norms(mtn) == pytest.approx([sum(map(nuclear, stack)) for stack in stacks])
    for direction, stack in zip(directions(mtn), stacks, strict=True):
        stack.requires_grad_()
        sum(torch.linalg.svdvals(matrix).sum() for matrix in stack).backward()
        torch.testing.assert_close(direction, stack.grad, rtol=1e-9, atol=1e-11)


def test_nuclear_norm_of_equal_towers_is_that_of_one_times_their_number(start):
    network = Towers(tasks=3)
    with torch.no_grad():
        for first, *others in network.task_layers():
            for other in others:
                other.weight.copy_(first.weight)

    expected = [3 * nuclear(stack[0]) for stack in network.stacks()]
    assert norms(start("nuclear", network)) == pytest.approx(expected)


@pytest.mark.parametrize("choice", ["tucker", "capped", "nuclear", "laf", "tt"])
def test_the_order_of_the_tasks_does_not_matter(choice, start):
    network, other = Towers(tasks=3), Towers(tasks=3)
    with torch.no_grad():
        for layers, permuted in zip(network.task_layers(), other.task_layers(), strict=True):
            for source, target in enumerate((2, 0, 1)):
                permuted[target].weight.copy_(layers[source].weight)

    assert norms(start(choice, network)) == pytest.approx(norms(start(choice, other)))


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 7, 5)])
def test_kept_vectors_of_towers_give_their_polar_factors(shape):
    stack = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vectors, largest = tower_vectors(stack)

    factor = torch.zeros_like(stack)
    lengths = add_polar_from_vectors(factor, 1.0, stack, tower_side(shape), vectors, 1e-12)

    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    torch.testing.assert_close(factor, left @ right, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lengths.sort().values, values.flatten().sort().values)
    torch.testing.assert_close(largest, values.max())
    torch.testing.assert_close(tower_factors(stack).factor, left @ right, rtol=1e-9, atol=1e-11)


def test_nuclear_norm_is_followed_between_two_decompositions(start):
    network = Towers(shapes=[(5, 7), (7, 5)])
    mtn = start("nuclear", network, "mtn.refresh_every=8")
    generator = torch.Generator().manual_seed(2)
    for step in range(500, 520):
        with torch.no_grad():
            for layer in (layer for depth in network.task_layers() for layer in depth):
                noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
                layer.weight.add_(noise, alpha=1e-3)
        mtn._penalty.update(step, None)

    for depth, stack in enumerate(network.stacks()):
        left, _, right = torch.linalg.svd(stack, full_matrices=False)
        torch.testing.assert_close(mtn._penalty.current(depth), left @ right, rtol=0, atol=0.02)
    assert [d.gap < 1e-3 for d in mtn._penalty.pop_deviations()] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["gttn", "tucker", "tt", "laf", "capped", "nuclear"])
def test_each_relative_trains(choice, train):
    folder = train(f"mtn={choice}", "mtn.enabled=true", "data.rows=2000", "trainer.max_epochs=1")

    (spectra,) = (folder / "spectra").glob("*.npz")
    names = {name.partition("/")[2] for name in np.load(spectra)}
    assert names == {"task", "output", "input"}
