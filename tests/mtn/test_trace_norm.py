"""The mathematics of the trace norms, against SVDs in float64."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from mtnrec.mtn.polar import (
    add_polar_from_vectors,
    left_vectors,
    multiply_along,
    polar_factor,
    polar_factors,
)
from mtnrec.mtn.trace_norm import (
    effective_rank,
    frobenius_norm,
    layer_norms,
    norms_along,
    tensor_trace_norm,
)
from mtnrec.mtn.unfolding import fold, short_side, unfold, unfoldings

SHAPES = [(2, 5, 7), (3, 6, 4), (2, 1, 8), (4, 3, 3), (2, 3, 2, 4)]
ALPHA = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(size, seed):
    return torch.linalg.qr(gaussian(size, size, seed=seed)).Q


def nuclear(stack, rows):
    """Trace norm of an unfolding, by numpy alone (eq. 3)."""
    array = stack.detach().numpy()
    columns = [mode for mode in range(array.ndim) if mode not in rows]
    height = int(np.prod([array.shape[mode] for mode in rows]))
    matrix = array.transpose(*rows, *columns).reshape(height, -1)
    return np.linalg.svd(matrix, compute_uv=False).sum()


def exact_norms(stack):
    return norms_along(polar_factors(stack), stack)


def polar_from_vectors(stack, side, vectors, least):
    """The factor that is added, taken out of a sum with a weight."""
    total = gaussian(*stack.shape, seed=9).to(stack.dtype)
    start = total.clone()
    lengths = add_polar_from_vectors(total, 0.25, stack, side, vectors, least)
    return 4 * (total - start), lengths


def degenerate_stacks():
    tower = gaussian(5, 7)
    low_rank = torch.einsum("tr,or,ir->toi", gaussian(2, 2), gaussian(5, 2), gaussian(7, 2))
    return {
        "zero": torch.zeros(2, 5, 7, dtype=torch.float64),
        "equal towers": torch.stack([tower, tower]),
        "one zero tower": torch.stack([tower, torch.zeros_like(tower)]),
        "opposite towers": torch.stack([tower, -tower]),
        "low rank": low_rank,
        "orthogonal": torch.eye(6, dtype=torch.float64).reshape(2, 3, 6),
    }


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_every_proper_unfolding_is_one_of_the_distinct_ones_or_its_transpose(order):
    modes = set(range(order))
    found = [frozenset(rows) for rows in unfoldings(order)]

    proper = [
        frozenset(rows) for size in range(1, order) for rows in itertools.combinations(modes, size)
    ]
    assert len(found) == len(set(found)) == 2 ** (order - 1) - 1
    assert all((rows in found) != (frozenset(modes - rows) in found) for rows in proper)


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_undoes_unfolding(shape):
    stack = gaussian(*shape)

    for rows in unfoldings(len(shape)):
        assert torch.equal(fold(unfold(stack, rows), rows, stack.shape), stack)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_the_weighted_sum_of_singular_values(shape):
    stack = gaussian(*shape)
    rows = unfoldings(len(shape))
    alpha = torch.rand(len(rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    value = tensor_trace_norm(stack, alpha)

    expected = sum(a.item() * nuclear(stack, r) for a, r in zip(alpha, rows, strict=True))
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 6, 4), (4, 3, 3), (2, 16, 40)])
def test_gradient_equals_autograd_through_an_svd(shape):
    stack = gaussian(*shape).requires_grad_()
    alpha = ALPHA.clone().requires_grad_()
    through_svd = stack.detach().clone().requires_grad_()

    tensor_trace_norm(stack, alpha).backward()
    norms = [torch.linalg.svdvals(unfold(through_svd, rows)).sum() for rows in unfoldings(3)]
    (ALPHA @ torch.stack(norms)).backward()

    torch.testing.assert_close(stack.grad, through_svd.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alpha.grad, torch.stack(norms).detach(), rtol=1e-10, atol=0)


def test_gradient_equals_finite_differences():
    stack = gaussian(2, 3, 4).requires_grad_()

    assert torch.autograd.gradcheck(lambda w: tensor_trace_norm(w, ALPHA), (stack,))


@pytest.mark.parametrize("name", degenerate_stacks())
def test_degenerate_stacks_have_finite_subgradients(name):
    stack = degenerate_stacks()[name]

    for rows, polar in zip(unfoldings(3), polar_factors(stack), strict=True):
        matrix, factor = unfold(stack, rows), unfold(polar.factor, rows)
        norm = nuclear(stack, rows)
        assert factor.isfinite().all()
        assert torch.linalg.matrix_norm(factor, 2) <= 1 + 1e-9
        assert (factor * matrix).sum().item() == pytest.approx(norm, rel=1e-9, abs=1e-12)
        assert polar.singular_values.sum().item() == pytest.approx(norm, rel=1e-7, abs=1e-12)


def test_float32_weights_keep_their_small_singular_values():
    matrix = gaussian(128, 128)

    factor = polar_factor(matrix.float()).factor

    u, _, vh = torch.linalg.svd(matrix.float().double())
    assert (factor.double() - u @ vh).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 30, 15), (2, 24, 60), (3, 40, 10), (4, 3, 2)], ids=str)
def test_left_vectors_give_the_polar_factor_and_the_spectrum(shape, dtype, error):
    stack = gaussian(*shape, dtype=dtype)

    for rows in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]:
        matrix = unfold(stack, rows)
        if matrix.shape[0] > matrix.shape[1]:
            continue
        factor, lengths = polar_from_vectors(stack, rows, left_vectors(matrix)[0], 1e-7)
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert left_vectors(matrix)[1].item() == pytest.approx(s[0].item(), rel=error)
        assert factor.dtype == dtype
        assert (unfold(factor, rows).double() - u @ vh).abs().max() < error
        torch.testing.assert_close(lengths.flip(0).double(), s, rtol=error, atol=error)


@pytest.mark.parametrize("name", degenerate_stacks())
def test_left_vectors_give_a_subgradient_everywhere(name):
    stack = degenerate_stacks()[name].float()

    for rows in unfoldings(3):
        side = short_side(stack.shape, rows)
        vectors, largest = left_vectors(unfold(stack, side))
        least = 3e-4 * largest.item() + 1e-30
        factor, _ = polar_from_vectors(stack, side, vectors, least)
        factor = unfold(factor, rows)
        assert torch.linalg.matrix_norm(factor.double(), 2) <= 1 + 1e-5
        norm = nuclear(stack, rows)
        assert (factor * unfold(stack, rows)).sum().item() == pytest.approx(norm, rel=1e-5)


def test_a_singular_value_that_has_passed_zero_pulls_the_other_way_at_once():
    stack = gaussian(2, 5, 7)
    u, s, vh = torch.linalg.svd(unfold(stack, (1,)), full_matrices=False)
    part = fold(torch.outer(u[:, -1], vh[-1]), (1,), stack.shape)
    old, _ = left_vectors(unfold(stack, (1,)))

    for passed in (0.99, 1.01):
        factor, _ = polar_from_vectors(stack - passed * s[-1] * part, (1,), old, 1e-4)
        assert (factor * part).sum().item() == pytest.approx(1 if passed < 1 else -1, abs=1e-9)


def test_any_orthonormal_vectors_give_at_least_the_norm():
    stack = gaussian(2, 5, 7)

    factor, lengths = polar_from_vectors(stack, (1,), orthogonal(5, 3), 1e-12)

    assert lengths.sum() > nuclear(stack, (1,))
    assert (factor * stack).sum().item() == pytest.approx(lengths.sum().item())


@pytest.mark.parametrize("modes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_multiplying_along_modes_is_multiplying_the_unfolding(modes):
    stack = gaussian(2, 5, 7)
    matrix = gaussian(unfold(stack, modes).shape[0], unfold(stack, modes).shape[0], seed=1)

    found = multiply_along(stack, modes, matrix)

    expected = fold(matrix @ unfold(stack, modes), modes, stack.shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_float32_weights_of_any_magnitude_have_their_norms_and_factors(scale):
    stack = gaussian(2, 5, 7, dtype=torch.float32)

    for one, other in zip(polar_factors(stack), polar_factors(scale * stack), strict=True):
        torch.testing.assert_close(other.factor, one.factor, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            other.singular_values / scale, one.singular_values, rtol=1e-5, atol=0
        )
    norm = frobenius_norm(scale * stack)
    assert norm.item() == pytest.approx(scale * torch.linalg.vector_norm(stack).item(), rel=1e-6)


def test_norms_do_not_change_with_the_order_of_tasks_or_units():
    stack = gaussian(3, 5, 7)
    permuted = stack[[2, 0, 1]][:, [4, 2, 0, 1, 3]][:, :, torch.randperm(7)]

    torch.testing.assert_close(exact_norms(permuted), exact_norms(stack), rtol=1e-12, atol=0)


def test_norms_do_not_change_under_orthogonal_changes_of_basis():
    stack = gaussian(3, 5, 7)
    q, r, s = orthogonal(3, 1), orthogonal(5, 2), orthogonal(7, 3)

    turned = torch.einsum("toi,at,bo,ci->abc", stack, q, r, s)

    torch.testing.assert_close(exact_norms(turned), exact_norms(stack), rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [-3.0, 0.0, 0.5])
def test_norms_are_absolutely_homogeneous(factor):
    stack = gaussian(2, 5, 7)

    scaled = exact_norms(factor * stack)

    torch.testing.assert_close(scaled, abs(factor) * exact_norms(stack), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["low rank", "equal towers", "orthogonal"])
def test_norms_lie_between_the_frobenius_norm_and_root_rank_times_it(name):
    stack = degenerate_stacks()[name]
    frobenius = torch.linalg.vector_norm(stack).item()

    for rows, norm in zip(unfoldings(3), exact_norms(stack), strict=True):
        rank = torch.linalg.matrix_rank(unfold(stack, rows)).item()
        assert frobenius * (1 - 1e-9) <= norm.item() <= rank**0.5 * frobenius * (1 + 1e-9)


def test_rank_one_stack_costs_its_frobenius_norm():
    stack = torch.einsum("t,o,i->toi", gaussian(2), gaussian(5), gaussian(7))

    norms = exact_norms(stack)

    frobenius = torch.linalg.vector_norm(stack).expand(3)
    torch.testing.assert_close(norms, frobenius, rtol=1e-7, atol=0)


def test_equal_towers_cost_root_t_times_one_of_them_in_the_task_mode():
    tower = gaussian(5, 7)

    norm = exact_norms(torch.stack([tower] * 4))[0]

    assert norm.item() == pytest.approx(2 * torch.linalg.matrix_norm(tower).item(), rel=1e-12)


def test_an_old_factor_gives_a_lower_bound():
    old, new = gaussian(2, 5, 7, seed=1), gaussian(2, 5, 7, seed=2)

    bounds = norms_along(polar_factors(old), new)

    assert (bounds < exact_norms(new)).all()


def test_the_last_layer_decomposes_one_spectrum_only():
    stack = gaussian(2, 1, 9)

    task, output, of_input = polar_factors(stack)

    assert task is of_input
    assert exact_norms(stack)[1].item() == pytest.approx(torch.linalg.vector_norm(stack).item())
    assert len(output.singular_values) == 1


def test_layer_norm_adds_the_frobenius_norm():
    norms = torch.tensor([[3.0, 4.0, 5.0], [1.0, 1.0, 1.0]])
    alpha = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])

    totals = layer_norms(norms, alpha, torch.tensor([2.0, 0.0]))

    torch.testing.assert_close(totals, torch.tensor([5.5, 1.0]))


def test_effective_rank_is_the_exponential_of_the_entropy():
    spectrum = torch.linalg.svdvals(gaussian(6, 9))

    rank = effective_rank(spectrum).item()

    assert rank == pytest.approx(np.exp(scipy.stats.entropy(spectrum.numpy())), rel=1e-12)
