"""OMoE against the models that it equals in special cases."""

import pytest
import torch

from mtnrec.model.mmoe import MMoE
from mtnrec.model.omoe import OMoE
from mtnrec.model.shared_bottom import SharedBottom

PLAIN = {"embedding_dim": 4, "embedding_init": "per_field", "tower_widths": [5]}


@pytest.fixture
def batch(funnel_schema, make_batch):
    batch = make_batch(funnel_schema)
    batch.numerical = batch.numerical.double()
    return batch


def build(schema, experts):
    torch.manual_seed(0)
    return OMoE(schema, experts=experts, expert_widths=[7, 6], **PLAIN).double()


def test_it_equals_mmoe_whose_gates_have_the_same_weights(funnel_schema, batch):
    network = build(funnel_schema, experts=3)
    other = MMoE(funnel_schema, experts=3, expert_widths=[7, 6], **PLAIN).double()
    state = network.state_dict()
    for part in ("weight", "bias"):
        gate = state.pop(f"gate.{part}")
        state |= {f"gates.{task}.{part}": gate for task in range(2)}
    other.load_state_dict(state)

    found, expected = network(batch), other(batch)

    torch.testing.assert_close(found.positive, expected.positive, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.negative, expected.negative, rtol=1e-12, atol=0)


def test_with_one_expert_it_equals_shared_bottom_whatever_the_gate(funnel_schema, batch):
    network = build(funnel_schema, experts=1)
    other = SharedBottom(funnel_schema, bottom_widths=[7, 6], **PLAIN).double()
    state = {
        name.replace("experts.0", "bottom"): weights
        for name, weights in network.state_dict().items()
        if not name.startswith("gate")
    }
    other.load_state_dict(state)

    found, expected = network(batch), other(batch)

    torch.testing.assert_close(found.positive, expected.positive, rtol=1e-14, atol=0)
