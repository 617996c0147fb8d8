"""The direction of the penalty between two decompositions, against exact ones in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from mtnrec.mtn.mixing import MixingWeights
from mtnrec.mtn.penalty import Deviation, Penalty
from mtnrec.mtn.schedule import RefreshPolicy
from mtnrec.mtn.unfolding import short_sides

POLICY = RefreshPolicy()


def make_penalty(refresh_every, shape=(2, 24, 40), multiplicities=(1, 1, 1), dtype=torch.float32):
    torch.manual_seed(0)
    tasks, outputs, inputs = shape
    layers = [nn.Linear(inputs, outputs, dtype=dtype) for _ in range(tasks)]
    weights = MixingWeights(
        layers=1,
        multiplicities=multiplicities,
        alpha="uniform",
        layer_weighting="mean",
    )
    keys = {"frobenius": True, "policy": RefreshPolicy(longest=refresh_every)}
    return Penalty({0: layers}, weights, **keys), layers


def stack_of(layers):
    return torch.stack([layer.weight.detach() for layer in layers])


def exact_direction(stack, alpha=(1 / 3, 1 / 3, 1 / 3), frobenius=1.0):
    """By autograd through SVDs, in float64."""
    stack = stack.double().requires_grad_()
    norms = [torch.linalg.svdvals(stack.movedim(m, 0).flatten(1)).sum() for m in range(3)]
    total = sum(a * n for a, n in zip(alpha, norms, strict=True))
    (total + frobenius * torch.linalg.vector_norm(stack)).backward()
    return stack.grad


def move(layers, by):
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(by(layer.weight))


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 24, 100), (3, 40, 10), (2, 1, 9), (4, 3, 2)])
def test_unfoldings_share_a_side_only_if_they_are_transposes(shape):
    stack = torch.randn(shape, dtype=torch.float64)
    spectra = [torch.linalg.svdvals(stack.movedim(m, 0).flatten(1)) for m in range(3)]

    sides = short_sides(shape)

    assert len(sides) == 3
    for column, side in enumerate(sides):
        torch.testing.assert_close(spectra[column], spectra[sides.index(side)])


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 24, 100), (3, 40, 10), (2, 1, 9), (4, 3, 2)])
def test_the_direction_at_a_decomposition_is_the_gradient_of_the_norm(shape):
    penalty, layers = make_penalty(8, shape, dtype=torch.float64)
    penalty.measure(0)
    move(layers, lambda w: 0.1 * torch.randn_like(w))

    penalty.update(1, None)

    expected = exact_direction(stack_of(layers))
    torch.testing.assert_close(penalty.current(0), expected, rtol=0, atol=1e-9)


def test_between_decompositions_the_direction_follows_the_weights():
    penalty, layers = make_penalty(128)
    penalty.measure(10_000)
    before = penalty.current(0).double()

    for step in range(10_001, 10_011):
        move(layers, lambda w: 2e-3 * torch.randn_like(w))
        penalty.update(step, None)

    exact = exact_direction(stack_of(layers))
    kept, followed = (torch.dist(d.double(), exact).item() for d in (before, penalty.current(0)))
    assert 0 < followed < 0.75 * kept


def test_refreshing_at_every_step_is_the_exact_method():
    penalty, layers = make_penalty(1)
    penalty.measure(0)
    for step in range(1, 5):
        move(layers, lambda w: 0.3 * w.std() * torch.randn_like(w))
        penalty.update(step, None)
        expected = exact_direction(stack_of(layers)).float()
        torch.testing.assert_close(penalty.current(0), expected, rtol=0, atol=1e-6)
    assert penalty.pop_deviations() == [(0, 0, 0)]


def test_intervals_start_at_one_step_and_grow_to_their_limits():
    small, large = (2, 128, 256), (2, 512, 2176)
    steps = [0, 100, 1000, 10_000, 10**6]

    decomposed = [POLICY.decomposition_interval(small, step) for step in steps]
    kept = [POLICY.update_interval(large, step) for step in steps]

    assert [POLICY.update_interval(small, step) for step in steps] == [1] * 5
    assert decomposed[0] == kept[0] == 1
    assert decomposed == sorted(decomposed)
    assert kept == sorted(kept)
    assert decomposed[-1] == 32
    assert kept[-1] == 32
    assert POLICY.decomposition_interval(large, 10**6) == 128
    assert all(
        POLICY.decomposition_interval(large, step) >= k for step, k in zip(steps, kept, strict=True)
    )
    short = RefreshPolicy(longest=10)
    assert short.update_interval(large, 10**6) == short.decomposition_interval(large, 10**6) == 10


@pytest.mark.slow
def test_the_deviation_is_that_of_the_direction_that_would_have_been_used():
    penalty, layers = make_penalty(128, shape=(2, 512, 1100))  # large: its direction is kept
    penalty.measure(10_000)
    assert penalty.pop_deviations() is None
    used = penalty.current(0).double().clone()
    move(layers, lambda w: 0.1 * w.std() * torch.randn_like(w))
    stack = stack_of(layers)

    penalty.measure(10_001)

    exact = exact_direction(stack)
    cosine = torch.nn.functional.cosine_similarity(used.flatten(), exact.flatten(), dim=0)
    norm = (exact * stack).sum()
    (found,) = penalty.pop_deviations()
    assert found.angle == pytest.approx(math.degrees(torch.acos(cosine)), rel=1e-3)
    assert found.length == pytest.approx(abs(used.norm() / exact.norm() - 1).item(), abs=1e-6)
    assert found.gap == pytest.approx(abs((used * stack).sum() / norm - 1).item(), rel=1e-3)
    assert found.angle > 1


def test_the_largest_deviation_since_the_last_reading_is_kept():
    penalty, layers = make_penalty(4)
    penalty.measure(10_000)
    for step, by in ((10_008, 0.2), (10_016, 0.01)):
        move(layers, lambda w, by=by: by * w.std() * torch.randn_like(w))
        penalty.measure(step)
    (both,) = penalty.pop_deviations()
    move(layers, lambda w: 0.01 * w.std() * torch.randn_like(w))
    penalty.measure(10_024)
    (small,) = penalty.pop_deviations()

    assert both.angle > 3 * small.angle > 0


def test_equal_directions_do_not_deviate():
    direction, stack = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    assert Deviation.of(direction, direction, stack) == (0, 0, 0)
    turned = Deviation.of(-direction, direction, stack)
    assert turned.angle == 180
    assert turned.gap == pytest.approx(2)


def kept_penalty(strength):
    """A large layer after two recomputations, between which rows without a gradient shrank."""
    penalty, layers = make_penalty(128, shape=(2, 512, 1100))
    penalty.measure(10_000)
    for layer in layers:
        layer.weight.grad = torch.full_like(layer.weight, 1e-3)  # far more than the penalty's
        layer.weight.grad[::2] = 0
        layer.weight.data[::2] *= 0.3
    penalty.update(10_032, strength)
    return penalty, layers


def test_a_direction_that_is_kept_fades_as_weights_without_a_gradient_come_to_rest():
    penalty, layers = kept_penalty(1e-5)
    before = penalty.current(0)
    for layer in layers:
        layer.weight.data[::2] *= 0.1
    after = penalty.current(0)

    assert after[:, ::2].norm() < 0.8 * before[:, ::2].norm()
    assert torch.equal(after[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("shape", [(2, 24, 40), (3, 40, 10), (2, 1, 9)])
def test_fresh_vectors_give_the_spectra_norms_and_directions_of_a_decomposition(shape):
    penalty, layers = make_penalty(128, shape, dtype=torch.float64)
    (exact,) = penalty.measure(10_000)
    norms, direction = penalty.norms(), penalty.current(0).clone()

    (found,) = penalty.refresh(10_000)

    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(penalty.norms(), norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(penalty.current(0), direction, rtol=0, atol=1e-9)
    spectra = [torch.linalg.svdvals(stack_of(layers).movedim(m, 0).flatten(1)) for m in range(3)]
    for one, other in zip(found, spectra, strict=True):
        torch.testing.assert_close(one[: len(other)], other[: len(one)], rtol=1e-9, atol=1e-9)


def test_kept_vectors_give_spectra_near_those_of_the_moved_weights_and_never_too_low_a_norm():
    penalty, layers = make_penalty(128, (2, 24, 40))
    penalty.measure(10_000)
    move(layers, lambda w: 0.02 * w.std() * torch.randn_like(w))

    (found,) = penalty.refresh(10_005)
    (exact,) = penalty.measure(10_005)

    for one, other in zip(found, exact, strict=True):
        assert 1 - 1e-6 < (one.sum() / other.sum()).item() < 1.01
        assert (one - other).abs().max() < 0.02 * other[0]


def test_the_last_deviation_is_reported_until_the_next_decomposition():
    penalty, layers = make_penalty(128, (2, 24, 40))
    penalty.measure(10_000)
    move(layers, lambda w: 0.1 * w.std() * torch.randn_like(w))
    penalty.measure(10_001)
    first = penalty.pop_deviations()
    penalty.refresh(10_002)

    assert penalty.pop_deviations() == first
    move(layers, lambda w: 0.01 * w.std() * torch.randn_like(w))
    penalty.measure(10_003)
    assert penalty.pop_deviations()[0].angle < 0.5 * first[0].angle


def test_a_kept_direction_does_not_change_if_the_penalty_is_not_in_the_gradient():
    penalty, layers = kept_penalty(None)
    before = penalty.current(0).clone()
    for layer in layers:
        layer.weight.data *= 0.1

    assert torch.equal(penalty.current(0), before)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["measure", "refresh"])
def test_a_restored_slope_gives_the_same_bits(method):
    whole, layers = kept_penalty(1e-5)
    getattr(whole, method)(10_040)
    state = copy.deepcopy(whole.state_dict())
    restored = Penalty({0: layers}, whole.weights, frobenius=True, policy=POLICY)
    restored.load_state_dict(state, 10_040)

    assert torch.equal(whole.norms(), restored.norms())
    assert bool(state["vectors"]) == (method == "refresh")
    for step in (10_040, 10_050, 10_072, 10_073):
        move(layers, lambda w: 1e-3 * torch.randn_like(w))
        for penalty in (whole, restored):
            penalty.update(step, 1e-5)
        assert torch.equal(whole.current(0), restored.current(0))


@pytest.mark.parametrize("refresh_every", [1, 8])
@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_directions_and_norms_hold_at_any_magnitude_of_the_weights(scale, refresh_every):
    penalty, _ = make_penalty(refresh_every)
    scaled = copy.deepcopy(penalty)
    for layer in scaled.depths[0]:
        layer.weight.data.mul_(scale)
    found = []
    for one, by in ((penalty, 1.0), (scaled, scale)):
        one.measure(0)
        spectra = one.measure(1)
        move(one.depths[0], lambda w, by=by: by * 1e-3)
        one.update(2, 1e-5)
        found.append((one.current(0), one.norms(), spectra))

    (direction, norms, spectra), (large, large_norms, large_spectra) = found
    torch.testing.assert_close(large, direction, rtol=0, atol=1e-5)
    torch.testing.assert_close(large_norms / scale, norms, rtol=1e-5, atol=0)
    for a, b in zip(large_spectra[0], spectra[0], strict=True):
        torch.testing.assert_close(a / scale, b, rtol=1e-5, atol=1e-6)


def test_a_zero_stack_has_the_direction_zero():
    for refresh_every in (1, 8):
        penalty, layers = make_penalty(refresh_every)
        for layer in layers:
            layer.weight.data.zero_()
        penalty.measure(0)
        penalty.update(1, None)

        assert penalty.current(0).eq(0).all()
        assert penalty.norms().item() == 0


def test_all_subsets_of_the_modes_weigh_the_full_set_as_well():
    penalty, layers = make_penalty(8, multiplicities=(2, 2, 2, 1), dtype=torch.float64)
    stack = stack_of(layers)
    # The seven non-empty subsets of the modes, each by its own SVD.
    subsets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    norms = []
    for rows in subsets:
        columns = [m for m in range(3) if m not in rows]
        sizes = [stack.shape[m] for m in rows]
        matrix = stack.permute(*rows, *columns).reshape(math.prod(sizes), -1)
        norms.append(torch.linalg.svdvals(matrix).sum())
    frobenius = torch.linalg.vector_norm(stack)

    penalty.measure(0)

    expected = sum(norms) / 7 + frobenius
    torch.testing.assert_close(penalty.norms()[0], expected, rtol=1e-12, atol=0)
    expected_direction = exact_direction(stack, (2 / 7, 2 / 7, 2 / 7), 1 + 1 / 7)
    torch.testing.assert_close(penalty.current(0), expected_direction, rtol=0, atol=1e-9)
