"""A network is built if its weights fit in memory."""

from functools import partial

import pytest
import torch
from torch import nn

from mtnrec.checks import InputError
from mtnrec.model import network
from mtnrec.model.esmm import ESMM
from mtnrec.model.mmoe import MMoE
from mtnrec.model.network import build_network, require_network
from mtnrec.model.shared_bottom import SharedBottom


def test_the_network_and_the_random_stream_are_those_of_the_constructor():
    torch.manual_seed(0)
    expected, after = nn.Linear(3, 2), torch.rand(1)
    torch.manual_seed(0)

    made = build_network(lambda: nn.Linear(3, 2))

    assert torch.equal(made.weight, expected.weight)
    assert torch.equal(torch.rand(1), after)


def test_weights_that_exceed_the_memory_are_refused_before_allocation(monkeypatch):
    monkeypatch.setattr(network, "memory_bytes", lambda: 4 * 3 * 10**6)

    build_network(lambda: nn.Linear(3, 10**6, bias=False))
    with pytest.raises(InputError, match=r"memory \(12,000,000 bytes\), got 16,000,000"):
        build_network(lambda: nn.Linear(3, 10**6))


@pytest.mark.parametrize("size", [10**12, 10**18, 10**30])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(
        InputError, match=r"the weights must fit in .*memory.*\. Choose smaller widths"
    ):
        build_network(lambda: nn.Embedding(size, 128))


def test_keywords_of_another_model_are_refused(funnel_schema):
    with pytest.raises(InputError, match=r"^model: .*MMoE.__init__\(\) got an unexpected keyword"):
        build_network(partial(MMoE, funnel_schema, colour=1))


@pytest.mark.parametrize("build", [SharedBottom, ESMM, MMoE])
def test_a_model_is_a_network(build, funnel_schema):
    model = build(funnel_schema)

    require_network(model)
    assert isinstance(model, nn.Module)


def test_a_model_without_a_method_of_a_network_is_refused():
    message = r"got Linear without task_layers\(\) and shared_layers\(\)\. Add them"

    with pytest.raises(InputError, match=message):
        require_network(nn.Linear(2, 1))


def test_other_errors_of_the_constructor_pass_through():
    with pytest.raises(RuntimeError, match="negative dimension"):
        build_network(lambda: nn.Linear(3, -1))
