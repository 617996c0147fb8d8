"""PLE against MMoE, and without the faults of public versions."""

import itertools

import pytest
import torch

from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.model.ple import PLE

PLAIN = {"embedding_dim": 4, "embedding_init": "per_field", "tower_widths": [12]}
TASK_EXPERTS = 3  # more than tasks, so that orders by task and by expert differ


def build(schema, levels, experts=2, task_experts=TASK_EXPERTS):
    torch.manual_seed(0)
    keys = {"experts": experts, "task_experts": task_experts, "levels": levels}
    return PLE(schema, **keys, **PLAIN).double()


@pytest.fixture
def batch(funnel_schema, make_batch):
    batch = make_batch(funnel_schema, 64)
    batch.numerical, batch.labels = batch.numerical.double(), batch.labels.double()
    return batch


def test_one_level_without_own_experts_equals_mmoe(funnel_schema, batch):
    network = build(funnel_schema, [[7, 6]], experts=3, task_experts=0)
    other = MMoE(funnel_schema, experts=3, expert_widths=[7, 6], **PLAIN).double()
    state = network.state_dict()
    other.load_state_dict({name.replace("levels.0.", ""): state[name] for name in state})

    found, expected = network(batch), other(batch)

    torch.testing.assert_close(found.positive, expected.positive, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.negative, expected.negative, rtol=1e-12, atol=0)


def experts_with_gradient(network, batch, task):
    """For each level, the numbers of the experts that the loss of a task trains."""
    cross_entropies(network(batch), batch.labels)[task].backward()
    return [
        {
            number
            for number, expert in enumerate(level.experts)
            if any(weights.grad.ne(0).any() for weights in expert.parameters())
        }
        for level in network.levels
    ]


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("levels", [[[7, 6]], [[7], [6]]], ids=["cgc", "ple"])
def test_a_loss_trains_the_experts_of_the_other_task_below_the_last_level_only(
    levels, task, funnel_schema, batch
):
    *lower, last = experts_with_gradient(build(funnel_schema, levels), batch, task)

    shared = {2 * TASK_EXPERTS, 2 * TASK_EXPERTS + 1}
    assert last == shared | set(range(task * TASK_EXPERTS, (task + 1) * TASK_EXPERTS))
    assert all(level == set(range(2 * TASK_EXPERTS + 2)) for level in lower)


# PaddlePaddle's version reads expert j of task i at i * tasks + j.
@pytest.mark.parametrize(("task", "expert"), [*itertools.product([0, 1], range(TASK_EXPERTS))])
def test_an_own_expert_acts_on_its_task_alone(task, expert, funnel_schema, batch):
    network = build(funnel_schema, [[7, 6]])
    before = network(batch).positive

    with torch.no_grad():
        for weights in network.levels[0].experts[task * TASK_EXPERTS + expert].parameters():
            weights += 0.5

    changed = network(batch).positive.ne(before).any(dim=0).tolist()
    assert changed == [task == 0, task == 1]


# MTReclib's and FuxiCTR's last level has a shared gate that nothing reads.
@pytest.mark.parametrize("levels", [[[24]], [[24], [16]], [[24], [16], [20]]], ids=len)
def test_every_parameter_has_a_gradient(levels, funnel_schema, batch):
    network = build(funnel_schema, levels)

    cross_entropies(network(batch), batch.labels).sum().backward()

    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


# FuxiCTR's shared gate sees the shared experts only.
def test_the_shared_gate_sees_all_experts(funnel_schema):
    network = build(funnel_schema, [[7], [6]])

    assert network.levels[0].shared_gate.out_features == 2 * TASK_EXPERTS + 2
    assert network.levels[1].shared_gate is None
    assert [gate.out_features for gate in network.levels[1].gates] == [TASK_EXPERTS + 2] * 2


# MMLRec makes as many shared experts as own ones.
@pytest.mark.parametrize(("experts", "task_experts"), [(1, 3), (3, 1), (4, 0)])
def test_shared_and_own_experts_have_their_own_numbers(experts, task_experts, funnel_schema):
    network = build(funnel_schema, [[7], [6]], experts, task_experts)

    assert [len(depth) for depth in network.shared_layers()] == [experts + 2 * task_experts] * 2


# MMLRec drops the axis of a batch of one row.
def test_a_row_has_the_same_probabilities_alone_and_in_a_batch(funnel_schema, make_batch):
    network = build(funnel_schema, [[7], [6]]).float()
    batch = make_batch(funnel_schema, 8)
    alone = type(batch)(batch.categorical[:1], batch.numerical[:1])

    torch.testing.assert_close(network(alone).positive, network(batch).positive[:1])


# PaddlePaddle's version starts all weights of an expert at one constant.
def test_the_units_of_an_expert_differ_from_the_start(funnel_schema):
    network = build(funnel_schema, [[7, 6], [5]])

    for depth in network.shared_layers():
        units = torch.cat([layer.weight for layer in depth])
        assert len(units.unique(dim=0)) == len(units)
