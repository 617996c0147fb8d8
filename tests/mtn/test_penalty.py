"""How long factors serve, and what takes their place on a GPU."""

import itertools

import pytest
import torch
from torch import nn

from mtnrec.mtn import penalty as module
from mtnrec.mtn.penalty import Penalty, longest_service
from mtnrec.mtn.trace_norm import polar_iteration
from mtnrec.mtn.weights import PenaltyWeights


def make_penalty(refresh_every, shape=(2, 24, 40)):
    torch.manual_seed(0)
    tasks, outputs, inputs = shape
    layers = [nn.Linear(inputs, outputs) for _ in range(tasks)]
    weights = PenaltyWeights(
        layers=1,
        unfoldings=3,
        alpha="uniform",
        alpha_sharing="per_layer",
        layer_weighting="mean",
        decay=0.5,
    )
    keys = {"frobenius": True, "biases": False, "refresh_every": refresh_every}
    return Penalty({0: layers}, weights, **keys), layers


def factors_taken(penalty, steps, move):
    """Make steps that ``move`` the weights; return those at which each unfolding had a new factor.

    What takes decompositions is watched, not the record of it.
    """
    taken = []
    penalty.measure(0)
    for step in range(1, steps):
        with torch.no_grad():
            for layer in penalty.depths[0]:
                layer.weight.add_(move(layer.weight))
        before = [id(factor) for factor in penalty._of(0)]
        penalty.refresh(step)
        after = [id(factor) for factor in penalty._of(0)]
        taken.append([a != b for a, b in zip(before, after, strict=True)])
    return list(zip(*taken, strict=True))


def shrink(weight):
    return -1e-3 * weight  # the factors stay what they are


def shake(weight):
    return 0.3 * weight.std() * torch.randn_like(weight)


def test_one_is_the_exact_method():
    for move in (shrink, shake):
        assert all(map(all, factors_taken(make_penalty(1)[0], 10, move)))


def test_factors_that_stay_right_serve_twice_as_long_each_time_up_to_the_longest():
    for taken in factors_taken(make_penalty(12)[0], 50, shrink):
        steps = [step for step, new in enumerate(taken, start=1) if new]
        assert [b - a for a, b in itertools.pairwise([0, *steps])] == [1, 2, 4, 8, 12, 12]


def test_factors_that_go_wrong_fast_are_replaced_at_each_step():
    penalty, _ = make_penalty(12)

    assert all(map(all, factors_taken(penalty, 10, shake)))
    (gap,) = penalty.take_gaps()
    assert gap > 0.01


@pytest.mark.parametrize("drift", [1e-3, 3e-3, 1e-2])
def test_a_steady_drift_misses_less_than_a_hundredth_of_the_norm(drift):
    penalty, layers = make_penalty(256, shape=(2, 64, 128))
    towards = [layer.weight.std() * torch.randn_like(layer.weight) for layer in layers]
    step = itertools.count()

    taken = factors_taken(penalty, 300, lambda weight: drift * towards[next(step) % 2])

    assert all(1 < sum(column) < 300 for column in taken)
    (gap,) = penalty.take_gaps()
    assert 1e-4 < gap < 0.01


def test_how_long_a_factor_may_serve_grows_with_its_cost():
    sides = [8, 64, 256, 1024, 8192]

    steps = [longest_service((2, side, 10**4), 1) for side in sides]

    assert steps == sorted(steps)
    assert steps[0] == 64


def test_gpus_take_factors_by_matrix_products(monkeypatch):
    exact, iterated = (make_penalty(4)[0] for _ in range(2))
    gradients = []
    for penalty in (exact, iterated):
        penalty.measure(0)
        if penalty is iterated:
            monkeypatch.setattr(module, "quick_polar_factor", polar_iteration)
        with torch.no_grad():
            for layer in penalty.depths[0]:
                layer.weight.mul_(0.5).add_(0.01)
        penalty.refresh(1)
        gradients.append([gradient for _, gradient, _ in penalty.gradients()])

    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "name"),
    [((2, 900), "polar_factor"), ((900, 2), "polar_factor"), ((64, 256), "polar_iteration")],
)
def test_gpus_decompose_where_a_side_is_short(shape, name, monkeypatch):
    called = []
    for function in ("polar_factor", "polar_iteration"):
        monkeypatch.setattr(module, function, lambda matrix, f=function: called.append(f))

    module.quick_polar_factor(torch.empty(shape, device="meta"))  # any that is no CPU

    assert called == [name]


def test_the_gap_is_how_far_the_old_factor_misses_the_norm():
    penalty, layers = make_penalty(4)
    penalty.measure(7)
    assert penalty.take_gaps() is None
    old = torch.stack([layer.weight.detach().clone() for layer in layers])
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))

    penalty.measure(8)

    new = torch.stack([layer.weight.detach() for layer in layers])
    norms, bounds = 0.0, 0.0
    for mode in range(3):
        before, after = (w.movedim(mode, 0).flatten(1).double() for w in (old, new))
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        norms += torch.linalg.svdvals(after).sum().item()
        bounds += (u @ vh * after).sum().item()
    (gap,) = penalty.take_gaps()
    assert gap == pytest.approx((norms - bounds) / norms, rel=1e-4)
    assert 0.001 < gap < 0.5
