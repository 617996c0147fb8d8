"""ESMM's ablations and controls; those that are off change no bit."""

import pytest
import torch

from mtnrec.model.escm2 import ESCM2
from mtnrec.model.esmm import ESMM
from mtnrec.objective.objective import Objective


def build(make, schema, **keys):
    torch.manual_seed(0)
    return make(schema, **{"embedding_dim": 4, "tower_widths": [8, 6], **keys})


def train(network, schema, make_batch):
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    objective = Objective(network, schema.labels)
    for seed in range(10):
        optimizer.zero_grad()
        objective(network, make_batch(schema, 32, seed))[0].backward()
        optimizer.step()
    return network.state_dict()


def without_extra_weight(schema):
    """ESMM whose extra losses are computed and have weight 0."""
    network = build(ESMM, schema, clicked_weight=1.0)
    network.loss_weights["clicked_cvr"] = 0.0
    return network


@pytest.mark.parametrize(
    "make",
    [
        without_extra_weight,
        lambda schema: build(ESCM2, schema, experts=0, cvr_weight=0.0),
    ],
    ids=["clicked_cvr", "ips"],
)
def test_ten_steps_with_weight_zero_of_the_other_losses_are_those_of_esmm_to_the_bit(
    make, funnel_schema, make_batch
):
    expected = train(build(ESMM, funnel_schema), funnel_schema, make_batch)

    found = train(make(funnel_schema), funnel_schema, make_batch)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_switched_off_ablations_leave_the_losses_to_the_group(funnel_schema):
    network = build(ESMM, funnel_schema)

    assert not hasattr(network, "loss_weights")
    assert network.click_gate is None


def test_a_new_gate_is_esmm_to_the_bit(funnel_schema, make_batch):
    plain, gated = build(ESMM, funnel_schema), build(ESMM, funnel_schema, click_gate=True)
    batch = make_batch(funnel_schema)

    for found, expected in zip(gated(batch), plain(batch), strict=True):
        assert torch.equal(found, expected)
    objectives = [
        Objective(network, funnel_schema.labels)(network, batch) for network in (plain, gated)
    ]
    for objective in objectives:
        objective[0].backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(gated.get_parameter(name).grad, parameter.grad)
    assert gated.click_gate.weight.grad.any()


def test_no_gradient_of_the_gated_cvr_reaches_the_tower_of_ctr(funnel_schema, make_batch):
    network = build(ESMM, funnel_schema, click_gate=True)
    with torch.no_grad():
        network.click_gate.weight.normal_()

    network.logits(make_batch(funnel_schema))[1].sum().backward()

    assert all(p.grad is None or not p.grad.any() for p in network.towers[0].parameters())
    assert network.towers[1][0].weight.grad.any()
    assert network.input.tables[1].weight.grad.any()


def test_without_unclicked_rows_the_gradient_of_ctcvr_is_that_of_the_clicked_rows(
    funnel_schema, make_batch
):
    network = build(ESMM, funnel_schema, unclicked_weight=0.0)
    batch = make_batch(funnel_schema, 40)
    names = [name for name, _ in network.towers[1].named_parameters()]

    Objective(network, funnel_schema.labels)(network, batch)[0].backward()
    found = [network.towers[1].get_parameter(name).grad.clone() for name in names]
    network.zero_grad()
    log_p, log_q = (part[:, 1] for part in network(batch))
    clicks = batch.labels[:, 0] == 1
    rows = torch.where(batch.labels[:, 1] == 1, -log_p, -log_q)[clicks]
    (rows.sum() / 40).backward()

    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, network.towers[1].get_parameter(name).grad)


def test_experts_are_read_by_both_towers_and_seen_by_a_hook(funnel_schema, make_batch):
    keys = {"experts": 3, "expert_widths": [7, 5], "tower_widths": [32, 16]}
    network = build(ESMM, funnel_schema, **keys)
    seen = []
    network.expert_outputs.register_forward_hook(lambda _, inputs, output: seen.append(output))

    network(make_batch(funnel_schema)).positive.sum().backward()

    assert [tuple(outputs.shape) for outputs in seen] == [(16, 3, 5)]
    assert all(parameter.grad.any() for parameter in network.gates.parameters())
