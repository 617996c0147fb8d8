"""A network is made if the memory holds it."""

from functools import partial

import pytest
import torch
from torch import nn

from mtnrec.checks import InputError
from mtnrec.model import network
from mtnrec.model.mmoe import MMoE
from mtnrec.model.network import make_network


def test_the_network_is_that_of_its_constructor_and_the_random_stream_too():
    torch.manual_seed(0)
    expected, after = nn.Linear(3, 2), torch.rand(1)
    torch.manual_seed(0)

    made = make_network(lambda: nn.Linear(3, 2))

    assert torch.equal(made.weight, expected.weight)
    assert torch.equal(torch.rand(1), after)


def test_weights_that_exceed_the_memory_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(network, "memory_bytes", lambda: 4 * 3 * 10**6)

    make_network(lambda: nn.Linear(3, 10**6, bias=False))
    with pytest.raises(InputError, match=r"take 16,000,000 bytes and the memory is 12,000,000"):
        make_network(lambda: nn.Linear(3, 10**6))


@pytest.mark.parametrize("size", [10**12, 10**18, 10**30])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(InputError, match=r"the weights (take|are more).*: choose smaller widths"):
        make_network(lambda: nn.Embedding(size, 128))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"colour": 1}, "got an unexpected keyword argument 'colour'"),
        ({}, "missing 7 required keyword-only arguments"),
    ],
)
def test_keywords_of_another_model_are_refused(keys, message, funnel_schema):
    with pytest.raises(InputError, match=rf"^model: .*MMoE.__init__\(\) {message}"):
        make_network(partial(MMoE, funnel_schema, **keys))


def test_another_error_of_the_constructor_is_its_own():
    with pytest.raises(RuntimeError, match="negative dimension"):
        make_network(lambda: nn.Linear(3, -1))
