"""Weights of gradients, from their Gramian.

``G`` is the Gramian of the ``K`` gradients, ``(K, K)``: their inner products. The joint gradient is
their sum with the weights ``w``, ``(K,)``. Weights are in the scale of the plain sum, ``K`` times
that of methods defined as a mean. A gradient that is zero has weight 1 and is otherwise left out.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.optimize import brentq, nnls  # type: ignore[import-untyped]

from mtnrec.arrays import Float64Array

_EPSILON = float(np.finfo(np.float32).eps)  # relative error of a Gramian of float32 gradients
METHODS = ("pcgrad", "imtl_g", "mgda", "cagrad", "aligned_mtl")


def find_weights(method: str, gramian: Float64Array, *, c: float) -> Float64Array:
    """Return the weights by one of ``METHODS``.

    Args:
        method: The method.
        gramian: ``G``.
        c: Radius of CAGrad, relative to the mean gradient.
    """
    methods: dict[str, Callable[[Float64Array], Float64Array]] = {
        "pcgrad": pcgrad,
        "imtl_g": imtl_g,
        "mgda": mgda,
        "cagrad": partial(cagrad, c=c),
        "aligned_mtl": aligned_mtl,
    }
    weights = np.ones(len(gramian))
    (present,) = gramian.diagonal().nonzero()
    if len(present):
        part = gramian[np.ix_(present, present)]
        weights[present] = methods[method](part / part.trace())  # none depends on the scale
    return weights


def pcgrad(gramian: Float64Array) -> Float64Array:
    """Project each gradient off those that it conflicts with (Yu et al., NeurIPS 2020).

    For more than two losses the result depends on the order of the projections: here that of the
    losses, in the paper a random one. Without conflict the weights are exactly 1.
    """
    total = np.zeros(len(gramian))
    for own in range(len(gramian)):
        weights = np.zeros(len(gramian))
        weights[own] = 1
        for other in range(len(gramian)):
            product = gramian[other] @ weights
            if other != own and product < 0:
                weights[other] -= product / gramian[other, other]
        total += weights
    return total


def imtl_g(gramian: Float64Array) -> Float64Array:
    """Give the joint gradient equal projections on all gradients (Liu et al., ICLR 2021).

    The absolute weights sum to ``K``. With more than two losses some may be negative, but the
    projections are not.
    """
    lengths = np.sqrt(gramian.diagonal())
    cosines = gramian / np.outer(lengths, lengths)
    coefficients = np.linalg.pinv(cosines, rcond=_EPSILON, hermitian=True).sum(axis=1)
    if coefficients.sum() < _EPSILON:  # opposite directions: every projection is zero
        coefficients = np.ones(len(gramian))
    weights = coefficients / lengths
    scaled: Float64Array = weights * (len(weights) / np.abs(weights).sum())
    return scaled


def mgda(gramian: Float64Array) -> Float64Array:
    """Return the shortest convex combination (Désidéri, 2012; Sener and Koltun, NeurIPS 2018)."""
    return len(gramian) * _shortest(gramian)


def _shortest(gramian: Float64Array) -> Float64Array:
    """Return the ``w`` in the simplex that minimises ``w^T G w``.

    With ``G = A^T A`` it is the normalised ``v >= 0`` that minimises ``|A v|^2 + (1 - sum(v))^2``:
    for ``v = s w`` and ``q = w^T G w`` the best ``s`` leaves ``q / (1 + q)``, which grows with
    ``q``.
    """
    values, vectors = np.linalg.eigh(gramian / gramian.trace())
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    ones = np.ones((1, len(gramian)))
    target = np.zeros(len(gramian) + 1)
    target[-1] = 1
    found, _ = nnls(np.concatenate([root, ones]), target)
    weights: Float64Array = found / found.sum()
    return weights


def cagrad(gramian: Float64Array, *, c: float) -> Float64Array:
    """Improve the worst loss within a ball around the mean gradient (Liu et al., NeurIPS 2021).

    With ``g_w`` a convex combination, ``g_0`` the mean and ``k = c |g_0|``, the paper minimises
    ``g_w g_0 + k |g_w|`` over the simplex and steps along ``g_0 + k g_w / |g_w|``. Since ``|g_w|``
    is the least ``(|g_w|^2 / s + s) / 2``, the best ``w`` for a length ``s`` is that of the
    shortest combination of the gradients ``g_i + s / k g_0``, and ``s`` is a root.
    """
    count = len(gramian)
    mean = gramian.mean(axis=1)  # products with g_0
    radius = c * np.sqrt(mean.mean().clip(min=0))
    if radius**2 <= _EPSILON * gramian.trace():  # c or the mean is zero
        return np.ones(count)

    def combination(length: float) -> Float64Array:
        shift = length / radius
        return _shortest(gramian + shift * np.add.outer(mean, mean) + shift**2 * mean.mean())

    def excess(length: float) -> float:
        return length - _length(gramian, combination(length))

    longest = float(np.sqrt(gramian.diagonal().max()))
    shortest = _EPSILON * longest
    if excess(shortest) >= 0:  # no direction improves all losses
        return np.ones(count)
    length = brentq(excess, shortest, longest * (1 + _EPSILON), xtol=_EPSILON * shortest)
    weights = combination(length)
    scaled: Float64Array = 1 + count * radius / _length(gramian, weights) * weights
    return scaled


def _length(gramian: Float64Array, weights: Float64Array) -> float:
    return float(np.sqrt((weights @ gramian @ weights).clip(min=0)))


def aligned_mtl(gramian: Float64Array) -> Float64Array:
    """Make the gradients orthogonal and equally long (Senushkin et al., CVPR 2023).

    The length is the smallest singular value of the gradients, those that are zero left out.
    """
    values, vectors = np.linalg.eigh(gramian)
    kept = values > len(gramian) * _EPSILON * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    weights: Float64Array = vectors @ (np.sqrt(values[0] / values) * vectors.sum(axis=0))
    return weights
