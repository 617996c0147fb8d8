"""Weights of gradients, against closed forms for two, numerical solvers, and TorchJD."""

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize, minimize_scalar

from mtnrec.objective.gramian import METHODS, find_weights

C = 0.4


def draw(count, seed):
    """Draw the Gramian of ``count`` gradients of different lengths."""
    rng = np.random.default_rng([count, seed])
    gradients = rng.normal(size=(count, 5)) * np.exp(rng.normal(size=(count, 1)))
    return gradients @ gradients.T


def combined_length(gramian, weights):
    return np.sqrt(weights @ gramian @ weights)


def closed_form(method, gramian):
    """Return the weights of two gradients, in the scale of the sum (ZOO's table for T = 2)."""
    (a, b), (_, c) = gramian
    if method == "pcgrad":
        return np.array([1 - min(b, 0) / a, 1 - min(b, 0) / c])
    if method == "imtl_g":
        return 2 * np.sqrt([c, a]) / np.sqrt([a, c]).sum()
    if method == "mgda":
        share = np.clip((c - b) / (a + c - 2 * b), 0, 1)
        return 2 * np.array([share, 1 - share])
    root = np.sqrt(a * c - b * b)
    sqrt = (gramian + root * np.eye(2)) / np.sqrt(a + c + 2 * root)
    return np.sqrt(np.linalg.eigvalsh(gramian)[0]) * np.linalg.solve(sqrt, np.ones(2))


@pytest.mark.parametrize("method", ["pcgrad", "imtl_g", "mgda", "aligned_mtl"])
def test_the_weights_of_two_gradients_are_those_of_the_closed_form(method):
    for seed in range(20):
        gramian = draw(2, seed)

        np.testing.assert_allclose(
            find_weights(method, gramian, c=C), closed_form(method, gramian), rtol=1e-9, atol=1e-12
        )


def test_cagrad_solves_its_one_dimensional_problem_for_two_gradients():
    for seed in range(20):
        gramian = draw(2, seed)
        mean = np.array([0.5, 0.5])
        radius = C * combined_length(gramian, mean)

        def cost(share, gramian=gramian, mean=mean, radius=radius):
            weights = np.array([share, 1 - share])
            return weights @ gramian @ mean + radius * combined_length(gramian, weights)

        best = minimize_scalar(cost, bounds=(0, 1), options={"xatol": 1e-10}).x
        best = min([best, 0, 1], key=cost)
        weights = np.array([best, 1 - best])
        joint = mean + radius / combined_length(gramian, weights) * weights
        np.testing.assert_allclose(find_weights("cagrad", gramian, c=C), 2 * joint, atol=1e-5)


def test_cagrad_keeps_to_the_ball_and_improves_the_worst_loss_as_much_as_a_solver():
    for seed in range(10):
        gramian = draw(3, seed)
        mean = np.full(3, 1 / 3)
        radius = C * combined_length(gramian, mean)

        step = find_weights("cagrad", gramian, c=C) / 3

        gain = (gramian @ step).min()
        assert combined_length(gramian, step - mean) == pytest.approx(radius, rel=1e-6)
        found = minimize(  # the paper's primal problem: the largest t with g_i d >= t
            lambda x: -x[3],
            [*mean, (gramian @ mean).min()],
            method="SLSQP",
            constraints=[
                LinearConstraint(np.c_[gramian, -np.ones(3)], 0, np.inf),
                {
                    "type": "ineq",
                    "fun": lambda x, g=gramian, m=mean, r=radius: (
                        r**2 - (x[:3] - m) @ g @ (x[:3] - m)
                    ),
                },
            ],
            options={"ftol": 1e-14, "maxiter": 300},
        )
        assert gain == pytest.approx(found.x[3], rel=1e-4, abs=1e-6)


def test_cagrad_of_radius_zero_is_the_sum():
    np.testing.assert_array_equal(find_weights("cagrad", draw(3, 0), c=0), np.ones(3))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_mgda_is_the_shortest_combination_that_a_solver_finds(count):
    for seed in range(10):
        gramian = draw(count, seed)
        start = np.full(count, 1 / count)
        best = minimize(
            lambda w, g=gramian: w @ g @ w,
            start,
            jac=lambda w, g=gramian: 2 * g @ w,
            bounds=[(0, 1)] * count,
            constraints=LinearConstraint(np.ones((1, count)), 1, 1),
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 300},
        )

        weights = find_weights("mgda", gramian, c=C) / count

        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)
        assert weights @ gramian @ weights == pytest.approx(best.fun, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_imtl_g_has_equal_and_never_negative_projections(count):
    for seed in range(20):  # with 4, TorchJD's sum of 1 turns some of them around
        gramian = draw(count, seed)

        weights = find_weights("imtl_g", gramian, c=C)

        projections = gramian @ weights / np.sqrt(gramian.diagonal())
        np.testing.assert_allclose(projections, projections[0], rtol=1e-6)
        assert projections[0] > 0
        assert np.abs(weights).sum() == pytest.approx(count)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_aligned_gradients_are_orthogonal_and_as_long_as_the_smallest_singular_value(count):
    rng = np.random.default_rng(count)
    gradients = rng.normal(size=(count, 6))
    left, values, right = np.linalg.svd(gradients, full_matrices=False)

    weights = find_weights("aligned_mtl", gradients @ gradients.T, c=C)

    aligned = values[-1] * left @ right
    np.testing.assert_allclose(weights @ gradients, aligned.sum(axis=0), rtol=1e-9, atol=1e-12)


def test_pcgrad_projects_in_the_order_of_the_losses():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 3))
    expected = np.zeros(3)
    for own in range(4):
        projected = gradients[own].copy()
        for other in range(4):
            product = projected @ gradients[other]
            if other != own and product < 0:
                projected -= product / (gradients[other] @ gradients[other]) * gradients[other]
        expected += projected

    weights = find_weights("pcgrad", gradients @ gradients.T, c=C)

    np.testing.assert_allclose(weights @ gradients, expected, rtol=1e-10)


@pytest.mark.parametrize("count", [2, 3])
def test_pcgrad_without_conflict_is_exactly_the_sum(count):
    gramian = np.abs(draw(count, 1))

    np.testing.assert_array_equal(find_weights("pcgrad", gramian, c=C), np.ones(count))


@pytest.mark.parametrize("method", METHODS)
def test_orthogonal_gradients_of_equal_length_have_the_weights_of_the_sum(method):
    expected = 1 + C if method == "cagrad" else 1

    np.testing.assert_allclose(find_weights(method, 7 * np.eye(3), c=C), expected, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "gramian",
    [np.zeros((2, 2)), [[4, 0], [0, 0]], [[1, 1], [1, 1]], [[1, -1], [-1, 1]], [[4, -2], [-2, 1]]],
    ids=["zero", "one_zero", "equal", "opposite", "opposite_of_other_length"],
)
def test_degenerate_gradients_have_finite_weights(method, gramian):
    gramian = np.array(gramian, dtype=float)

    weights = find_weights(method, gramian, c=C)

    assert np.isfinite(weights).all()
    assert (gramian @ weights).max() >= 0  # one of the losses does not increase


@pytest.mark.parametrize(
    ("method", "name", "counts"),
    [
        ("pcgrad", "PCGradWeighting", [2]),  # with more, in a random order
        ("mgda", "MGDAWeighting", [2]),  # with more, far from converged
        ("imtl_g", "IMTLGWeighting", [2]),  # with more, its weights of sum 1 may point uphill
        ("aligned_mtl", "AlignedMTLWeighting", [2, 3, 5]),
    ],
)
def test_the_weights_are_those_of_torchjd_in_the_scale_of_the_sum(method, name, counts):
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = getattr(aggregation, name)()
    for count in counts:
        gramian = draw(count, 0)
        expected = weighting(torch.from_numpy(gramian)).numpy()
        factor = 1 if method == "pcgrad" else count

        found = find_weights(method, gramian, c=C)

        np.testing.assert_allclose(found, factor * expected, rtol=1e-6, atol=1e-9)
