"""Log-probabilities against high-precision arithmetic."""

import functools
import itertools
import math

import mpmath
import pytest
import torch

from mtnrec.batch import LogProbabilities
from mtnrec.model.log_probabilities import funnel_log_probabilities, label_log_probabilities
from mtnrec.model.loss import cross_entropies

SIZES = [1e-30, 1e-8, 1e-3, 0.5, 1.5, 5.0, 10.0, 17.0, 30.0, 60.0, 100.0, 745.0, 1e4]
# Numbers that float32 holds, so that both types have the same ones.
LOGITS = torch.tensor([0.0, *SIZES, *(-size for size in SIZES)]).tolist()
PAIRS = list(itertools.product(LOGITS, LOGITS))
# What comes out below the smallest normal number may be rounded to 0.
TYPES = [(torch.float32, 1.2e-38), (torch.float64, 2.3e-308)]


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def log_sigmoid(x):
    return mpmath.log(sigmoid(x)) if x < 0 else mpmath.log1p(-sigmoid(-x))


@functools.cache
def exact_funnel():
    """Log-probabilities of all pairs and their gradients, in fifty digits.

    For each pair ``log p``, ``log pq``, ``log (1 - p)``, ``log (1 - pq)``, and the derivatives of
    each by both logits.
    """
    values, gradients = [], []
    with mpmath.workdps(50):
        for a, b in (map(mpmath.mpf, pair) for pair in PAIRS):
            p, q, not_p, not_q = map(sigmoid, (a, b, -a, -b))
            neither = not_p + p * not_q  # 1 - pq, with nothing to cancel
            log_neither = mpmath.log1p(-p * q) if p * q < 0.5 else mpmath.log(neither)
            odds = p * q / neither
            rows = log_sigmoid(a), log_sigmoid(a) + log_sigmoid(b), log_sigmoid(-a), log_neither
            values.append([float(value) for value in rows])
            derivatives = [not_p, 0], [not_p, not_q], [-p, 0], [-odds * not_p, -odds * not_q]
            gradients.append([[float(value) for value in row] for row in derivatives])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def funnel(dtype):
    """The same values from the code, ``(pairs, 4)``, and the logits, ``(pairs, 1)`` each."""
    logits = [
        torch.tensor(column, dtype=dtype)[:, None].requires_grad_()
        for column in zip(*PAIRS, strict=True)
    ]
    return torch.cat(funnel_log_probabilities(*logits), dim=1), logits


@pytest.mark.parametrize(("dtype", "tiny"), TYPES, ids=str)
def test_funnel_equals_high_precision_arithmetic(dtype, tiny):
    found, _ = funnel(dtype)

    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact_funnel()[0], rtol=tolerance, atol=tiny)


@pytest.mark.parametrize(("dtype", "tiny"), TYPES, ids=str)
@pytest.mark.parametrize("column", range(4), ids=["p", "pq", "1-p", "1-pq"])
def test_gradients_of_the_funnel_equal_high_precision_arithmetic(column, dtype, tiny):
    found, logits = funnel(dtype)

    gradients = torch.autograd.grad(found[:, column].sum(), logits)

    # That of 1 - pq goes through an exponential, which multiplies an error by its exponent.
    tolerance = (64 if column == 3 else 2) * torch.finfo(dtype).eps
    expected = exact_funnel()[1][:, column]
    result = torch.cat(gradients, dim=1).double()
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tiny)


@pytest.mark.parametrize(("dtype", "tiny"), TYPES, ids=str)
def test_labels_equal_high_precision_arithmetic(dtype, tiny):
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)

    positive, negative = label_log_probabilities(logits[:, None, None])

    with mpmath.workdps(50):
        numbers = [mpmath.mpf(x) for x in LOGITS]
        exact = [
            [float(function(sign * x)) for x in numbers]
            for function in (log_sigmoid, sigmoid)
            for sign in (1, -1)
        ]
    log_p, log_not_p, p, not_p = torch.tensor(exact, dtype=torch.float64)
    of_positive, of_negative = (
        torch.autograd.grad(part.sum(), logits)[0] for part in (positive, negative)
    )
    for result, expected in (
        (positive[0], log_p),
        (negative[0], log_not_p),
        (of_positive, not_p),
        (-of_negative, p),
    ):
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tiny)


@pytest.mark.parametrize("labels", [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize(("dtype", "tiny"), TYPES, ids=str)
def test_the_loss_of_a_batch_equals_high_precision_arithmetic(labels, dtype, tiny):
    found, _ = funnel(dtype)
    output = LogProbabilities(found[:, :2], found[:, 2:])

    losses = cross_entropies(output, torch.tensor(labels, dtype=dtype).expand(len(PAIRS), 2))

    columns = [task if label else task + 2 for task, label in enumerate(labels)]
    expected = [-math.fsum(exact_funnel()[0][:, c].tolist()) / len(PAIRS) for c in columns]
    assert losses.tolist() == pytest.approx(expected, rel=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("logit", [-60.0, 60.0])
def test_the_gradient_survives_saturation(logit):
    a = torch.tensor([[logit]], requires_grad=True)
    wrong = torch.tensor([[float(logit < 0)]])

    cross_entropies(label_log_probabilities(a[None]), wrong).sum().backward()

    assert a.grad.abs().item() == pytest.approx(1)  # BCELoss clamps and gives 0 in float32


def test_the_loss_is_the_mean_over_all_rows_for_each_label():
    p = torch.tensor([[0.9, 0.2], [0.4, 0.1], [0.5, 0.3]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)

    losses = cross_entropies(LogProbabilities(p.log(), (1 - p).log()), labels)

    expected = [torch.nn.functional.binary_cross_entropy(p[:, t], labels[:, t]) for t in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected))
