"""How long factors serve, and what takes their place on a GPU."""

import itertools

import pytest
import torch
from torch import nn

from mtnrec.mtn import penalty as module
from mtnrec.mtn.penalty import Penalty, service
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


@pytest.mark.parametrize("shape", [(2, 512, 2176), (2, 1, 64), (8, 512, 2176), (3, 64, 128)])
@pytest.mark.parametrize("column", range(3))
def test_one_is_the_exact_method_for_every_shape_and_step(shape, column):
    assert {service(shape, column, step, longest=1) for step in (0, 1, 50, 10**6)} == {1}


def test_a_factor_serves_no_longer_than_it_is_told_and_longer_the_larger_its_matrix():
    sides = [8, 64, 256, 1024, 8192]

    steps = [service((2, side, 10**5), 1, 10**6, longest=128) for side in sides]

    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (16, 128)


def test_the_first_factors_serve_few_steps():
    taken, step = [], 0
    while step < 1000:
        taken.append(step)
        step += service((2, 512, 2176), 2, step, longest=128)

    assert taken[:8] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert {b - a for a, b in itertools.pairwise(taken[8:])} == {128}


def test_gpus_take_factors_by_matrix_products(monkeypatch):
    exact, iterated = (make_penalty(4)[0] for _ in range(2))
    gradients = []
    for penalty in (exact, iterated):
        penalty.measure(0)
        if penalty is iterated:
            monkeypatch.setattr(module, "polar_factor", polar_iteration)
        with torch.no_grad():
            for layer in penalty.depths[0]:
                layer.weight.mul_(0.5).add_(0.01)
        penalty.refresh(1)
        gradients.append([gradient for _, gradient, _ in penalty.gradients()])

    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


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
    assert gap.item() == pytest.approx((norms - bounds) / norms, rel=1e-4)
    assert 0.001 < gap.item() < 0.5
