"""Log-probabilities against high-precision arithmetic."""

import mpmath
import pytest
import torch

from mtnrec.batch import LogProbabilities
from mtnrec.model.layer import funnel_log_probabilities, label_log_probabilities
from mtnrec.model.module import cross_entropies

LOGITS = [-60.0, -30.0, -1.5, 0.0, 1e-8, 2.0, 30.0, 60.0]


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("click", LOGITS)
@pytest.mark.parametrize("conversion", LOGITS)
def test_funnel_equals_high_precision_arithmetic(click, conversion, dtype):
    a, b = (torch.tensor([[x]], dtype=dtype) for x in (click, conversion))

    output = funnel_log_probabilities(a, b)

    with mpmath.workdps(80):
        p = sigmoid(mpmath.mpf(a.item()))
        pz = p * sigmoid(mpmath.mpf(b.item()))
        positive = [float(mpmath.log(p)), float(mpmath.log(pz))]
        negative = [float(mpmath.log(1 - p)), float(mpmath.log(1 - pz))]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        output.positive, torch.tensor([positive], dtype=dtype), rtol=tolerance, atol=1e-37
    )
    torch.testing.assert_close(
        output.negative, torch.tensor([negative], dtype=dtype), rtol=tolerance, atol=1e-37
    )


def test_labels_equal_high_precision_arithmetic():
    output = label_log_probabilities(torch.tensor([LOGITS], dtype=torch.float64)[..., None])

    with mpmath.workdps(80):
        positive = [float(mpmath.log(sigmoid(mpmath.mpf(x)))) for x in LOGITS]
        negative = [float(mpmath.log(sigmoid(mpmath.mpf(-x)))) for x in LOGITS]
    expected = torch.tensor([positive, negative], dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(torch.stack(list(output)), expected, rtol=1e-14, atol=0)


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
