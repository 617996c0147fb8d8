"""HEAC against its special cases, and without the faults of MTReclib's version."""

import math

import mpmath
import pytest
import torch
from torch import nn

from mtnrec.checks import InputError
from mtnrec.model.heac import HEAC
from mtnrec.model.log_probabilities import label_log_probabilities, mixture_log_probabilities
from mtnrec.schema import CategoricalField, Schema

SIZES = {"embedding_dim": 5, "experts": 3, "expert_widths": [7, 6]}


def build(schema, **keys):
    torch.manual_seed(0)
    return HEAC(schema, **SIZES, embedding_init="per_field", **keys).double()


@pytest.fixture
def batch(funnel_schema, make_batch):
    batch = make_batch(funnel_schema, 64)
    batch.numerical, batch.labels = batch.numerical.double(), batch.labels.double()
    return batch


def test_one_critic_is_a_plain_mixture_of_experts_with_that_head(funnel_schema, batch):
    network = build(funnel_schema, critics=1)
    seen = {}
    for name in ("expert_outputs", "expert_gate"):
        getattr(network, name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: output})
        )

    found = network(batch)

    shares = seen["expert_gate"].softmax(dim=2)  # (T, B, E)
    mixtures = torch.einsum("tbe,beo->tbo", shares, seen["expert_outputs"])
    expected = label_log_probabilities(network.critics(mixtures))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_equal_critics_make_the_critic_gate_irrelevant(funnel_schema, batch):
    network = build(funnel_schema, critics=4)
    with torch.no_grad():
        for parameter in network.critics.parameters():
            parameter[:] = parameter[0].clone()
    before = network(batch)

    with torch.no_grad():
        for parameter in network.critic_gate.parameters():
            parameter.normal_(std=2)

    torch.testing.assert_close(network(batch), before, rtol=1e-12, atol=0)


# MTReclib divides the mixture by the number of critics: no probability exceeds 1/5.
def test_a_probability_can_exceed_nine_tenths(funnel_schema, batch):
    network = build(funnel_schema)
    with torch.no_grad():
        network.critics.bias[:] = 5

    assert network(batch).positive.exp().min() > 0.9


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixtures_of_saturated_critics_equal_high_precision_arithmetic(signs, dtype):
    critics = torch.tensor([60.0 * sign for sign in signs], dtype=dtype)
    gate = torch.tensor([0.25, -1.5], dtype=dtype)

    found = mixture_log_probabilities(gate[None, None], critics[None, None])

    with mpmath.workdps(60):
        shares = [mpmath.exp(mpmath.mpf(g)) for g in gate.tolist()]
        logits = [mpmath.mpf(c) for c in critics.tolist()]
        expected = [
            float(
                mpmath.log(
                    sum(g / (1 + mpmath.exp(-s * c)) for g, c in zip(shares, logits, strict=True))
                    / sum(shares)
                )
            )
            for s in (1, -1)
        ]
    tolerance = 4 * torch.finfo(dtype).eps
    assert found.positive.item() == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert found.negative.item() == pytest.approx(expected[1], rel=tolerance, abs=tolerance)
    total = math.exp(found.positive) + math.exp(found.negative)
    assert total == pytest.approx(1, abs=tolerance)


def test_the_gradient_of_saturated_critics_is_that_of_float64_autograd():
    gate = torch.tensor([[[0.3, -0.2, 0.1]]], dtype=torch.float64, requires_grad=True)
    critics = torch.tensor([[[-9.0, 2.0, 7.0]]], dtype=torch.float64, requires_grad=True)
    p = (gate.softmax(dim=2) * critics.sigmoid()).sum()
    expected = torch.autograd.grad(p.log() - 2 * (1 - p).log(), (gate, critics))

    found = mixture_log_probabilities(gate, critics)
    gradients = torch.autograd.grad((found.positive - 2 * found.negative).sum(), (gate, critics))

    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)


# MTReclib's meta-learning keeps weights of the last batch that no checkpoint holds.
def test_the_state_dict_determines_the_probabilities(funnel_schema, batch):
    network, other = build(funnel_schema), HEAC(funnel_schema, **SIZES).double()
    network(batch).positive.sum().backward()

    other.load_state_dict(network.state_dict())

    assert torch.equal(other(batch).positive, network(batch).positive)


def test_tasks_differ_by_their_vectors_alone(funnel_schema, batch):
    network = build(funnel_schema)
    assert not torch.equal(*network(batch).positive.T)

    with torch.no_grad():
        network.tasks[1] = network.tasks[0].clone()

    torch.testing.assert_close(*network(batch).positive.T, rtol=1e-12, atol=0)


def test_no_layer_belongs_to_a_task_and_the_experts_are_shared(funnel_schema):
    network = build(funnel_schema)

    assert network.task_layers() == []
    assert [len(depth) for depth in network.shared_layers()] == [3, 3]
    layers = {id(layer) for depth in network.shared_layers() for layer in depth}
    experts = {id(part) for part in network.experts.modules() if isinstance(part, nn.Linear)}
    assert layers == experts


def test_independent_labels_have_a_vector_each(make_batch):
    schema = Schema((CategoricalField("a", 30),), ("x",), ("like", "share", "buy"), funnel=False)

    network = HEAC(schema, **SIZES)

    assert network.tasks.shape == (3, 5)
    assert network(make_batch(schema)).positive.shape == (16, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 0}, "model.experts must be an integer from 1 to 10000, got 0"),
        ({"critics": 0}, "model.critics must be an integer from 1 to 10000, got 0"),
        ({"gate_widths": []}, "model.gate_widths must be a list of at least one width"),
        (
            {"embedding_dim": {"default": 5, "categorical_1": 4}},
            r"model.embedding_dim of HEAC.* one width, got {'default': 5.* model.embedding_dim=128",
        ),
    ],
)
def test_keys_out_of_range_are_refused(keys, message, funnel_schema):
    with pytest.raises(InputError, match=message):
        HEAC(funnel_schema, **{**SIZES, **keys})
