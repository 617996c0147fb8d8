"""AdaTT-sp against MMoE and against separate networks."""

import pytest
import torch

from mtnrec.model.adatt import AdaTT
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE

PLAIN = {"embedding_dim": 4, "embedding_init": "per_field", "tower_widths": [12]}


def build(schema, levels, task_experts=2):
    torch.manual_seed(0)
    return AdaTT(schema, levels=levels, task_experts=task_experts, **PLAIN).double()


@pytest.fixture
def batch(funnel_schema, make_batch):
    batch = make_batch(funnel_schema, 64)
    batch.numerical, batch.labels = batch.numerical.double(), batch.labels.double()
    return batch


def test_one_level_with_own_weights_of_zero_equals_mmoe(funnel_schema, batch):
    network = build(funnel_schema, [[7, 6]])
    other = MMoE(funnel_schema, experts=4, expert_widths=[7, 6], **PLAIN).double()
    state = {name.replace("levels.0.", ""): w for name, w in network.state_dict().items()}
    del state["own_weights"]
    other.load_state_dict(state)

    with torch.no_grad():
        network.levels[0].own_weights.zero_()

    torch.testing.assert_close(network(batch).positive, other(batch).positive, rtol=1e-12, atol=0)


def test_with_closed_gates_each_task_has_a_network_of_its_own(funnel_schema, batch):
    network = build(funnel_schema, [[7], [6]])
    with torch.no_grad():
        for level in network.levels:
            # All of each gate goes to the first own expert; the own weight adds the second.
            level.own_weights.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
            for task, gate in enumerate(level.gates):
                gate.weight.zero_()
                gate.bias.fill_(-1e4)
                gate.bias[2 * task] = 0

    logits = []
    for task in range(2):
        stream = network.input(batch)
        for level in network.levels:
            stream = level.experts[2 * task](stream) + level.experts[2 * task + 1](stream)
        logits.append(network.towers[task](stream))

    expected = torch.nn.functional.logsigmoid(torch.cat(logits, dim=1))
    torch.testing.assert_close(network(batch).positive, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("levels", [[[24]], [[24], [16]], [[24], [16], [20]]], ids=len)
@pytest.mark.parametrize("task_experts", [1, 2])
def test_every_parameter_has_a_gradient(levels, task_experts, funnel_schema, batch):
    network = build(funnel_schema, levels, task_experts)

    cross_entropies(network(batch), batch.labels).sum().backward()

    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_own_weights_start_within_their_bound_and_differ(funnel_schema):
    own = build(funnel_schema, [[7]], task_experts=25).levels[0].own_weights

    assert own.abs().max() <= 0.2
    assert own.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.2)  # of U(-0.2, 0.2)


def test_one_own_expert_has_no_weight(funnel_schema):
    names = dict(build(funnel_schema, [[7], [6]], task_experts=1).named_parameters())

    assert not [name for name in names if name.endswith("own_weights")]
