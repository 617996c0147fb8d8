"""Norms of the regulariser against float64 autograd of their formulas, written as loops."""

from itertools import combinations

import pytest
import torch

from mtnrec.regularizer.norm import NORMS

FORMULAS = {
    "l2": lambda w: sum(x**2 for x in w.flatten()) / 2,
    "frobenius": lambda w: sum(x**2 for x in w.flatten()).sqrt(),
    "soft_sharing": lambda w: sum(((a - b) ** 2).sum() for a, b in combinations(w, 2)) / 2,
    "group_lasso": lambda w: sum(
        (w[:, :, i] ** 2).sum().sqrt() for i in range(w.shape[2]) if w[:, :, i].ne(0).any()
    ),
}


@pytest.fixture
def stack():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)


def test_every_norm_has_a_formula():
    assert FORMULAS.keys() == NORMS.keys()


@pytest.mark.parametrize("name", NORMS)
def test_value_and_gradient_are_those_of_autograd(name, stack):
    value, gradient = NORMS[name](stack)

    stack.requires_grad_()
    expected = FORMULAS[name](stack)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, stack.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_the_order_of_the_tasks_does_not_matter(name, stack):
    order = [2, 0, 1]
    value, gradient = NORMS[name](stack)
    permuted_value, permuted = NORMS[name](stack[order])

    torch.testing.assert_close(permuted_value, value)
    torch.testing.assert_close(permuted, gradient[order])


@pytest.mark.parametrize("name", NORMS)
def test_the_gradient_of_zero_weights_is_zero(name):
    value, gradient = NORMS[name](torch.zeros(2, 3, 4))

    assert value == 0
    assert gradient.eq(0).all()


def test_an_input_that_no_task_uses_gets_no_gradient_of_the_group_lasso(stack):
    stack[:, :, 2] = 0

    gradient = NORMS["group_lasso"](stack)[1]

    assert gradient[:, :, 2].eq(0).all()
    assert gradient[:, :, [0, 1, 3, 4]].ne(0).all()


def test_soft_sharing_of_equal_towers_is_zero(stack):
    value, gradient = NORMS["soft_sharing"](stack[:1].expand(3, -1, -1))

    assert value == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_the_group_lasso_of_one_input_is_its_frobenius_norm(stack):
    column = stack[:, :, :1]

    torch.testing.assert_close(NORMS["group_lasso"](column), NORMS["frobenius"](column))
