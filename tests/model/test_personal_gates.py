"""PPNet's gates of MMoE's towers."""

import dataclasses

import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.schema import CategoricalField, Schema

SCHEMA = Schema(
    (CategoricalField("101", 3), CategoricalField("109_14", 40)),
    ("price",),
    ("click", "conversion"),
    funnel=True,
    multivalued=(CategoricalField("brands", 9),),
)


def build(schema, fields, **keys):
    torch.manual_seed(0)
    sizes = {"experts": 3, "expert_widths": [7, 6], "tower_widths": [5, 4]}
    return MMoE(schema, embedding_dim=5, personal_fields=fields, **sizes, **keys)


def switch_off(network):
    for depth in network.personal_gates.outputs:
        for layer in depth:
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gates_of_zeros_leave_the_network_as_it_is_to_the_bit(
    batch_norm, funnel_schema, make_batch
):
    fields = ["categorical_1"]
    gated = build(funnel_schema, fields, batch_norm=batch_norm)
    plain = build(funnel_schema, None, batch_norm=batch_norm)
    batch = make_batch(funnel_schema)
    assert not torch.equal(gated(batch).positive, plain(batch).positive)

    switch_off(gated)
    for network in (gated, plain):
        network.zero_grad()
        cross_entropies(network(batch), batch.labels).sum().backward()

    assert torch.equal(gated(batch).positive, plain(batch).positive)
    gradients = {name: p.grad for name, p in gated.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_no_gradient_passes_through_the_towers_inputs_in_the_gates(funnel_schema, make_batch):
    network = build(funnel_schema, ["categorical_1"])
    batch = make_batch(funnel_schema)
    inputs = torch.randn(2, len(batch), 6, requires_grad=True)
    personal = network.input.tables[1].weight

    gates = network.personal_gates(network.input, batch, inputs)
    found = torch.autograd.grad(sum(g.sum() for g in gates), (inputs, personal), allow_unused=True)

    assert found[0] is None
    assert found[1].any()  # the personal fields' vectors are trained through the gates
    moved = network.personal_gates(network.input, batch, inputs + 1)
    assert all(not torch.equal(a, b) for a, b in zip(gates, moved, strict=True))


def test_a_gate_lies_between_0_and_2_and_has_the_width_of_its_layer(funnel_schema, make_batch):
    network = build(funnel_schema, ["categorical_1"])
    inputs = 100 * torch.randn(2, 16, 6)

    gates = network.personal_gates(network.input, make_batch(funnel_schema), inputs)

    assert [gate.shape for gate in gates] == [(2, 16, 5), (2, 16, 4)]
    assert all(gate.min() >= 0 and gate.max() <= 2 for gate in gates)
    assert max(gate.max() for gate in gates) > 1.5


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        (["101", "109_14"], ["101", "109_14"]),
        ([10914, 101], ["109_14", "101"]),  # what YAML makes of the names
        (["brands"], ["brands"]),
    ],
)
def test_gates_depend_on_the_values_of_the_named_fields_alone(fields, columns, make_batch):
    network, batch = build(SCHEMA, fields), make_batch(SCHEMA)
    inputs = torch.randn(2, len(batch), 6)

    def gates(batch):
        return network.personal_gates(network.input, batch, inputs)

    def changes(name):
        if name == "brands":
            bags = batch.bags[0]
            other = dataclasses.replace(
                batch, bags=(dataclasses.replace(bags, tokens=(bags.tokens + 1) % 9),)
            )
        else:
            field = [f.name for f in SCHEMA.categorical].index(name)
            categorical = batch.categorical.clone()
            categorical[:, field] = (categorical[:, field] + 1) % 3
            other = dataclasses.replace(batch, categorical=categorical)
        return not torch.equal(gates(batch)[0], gates(other)[0])

    assert {name for name in ("101", "109_14", "brands") if changes(name)} == set(columns)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            ["user_id", "101"],
            r"model.personal_fields must name fields of the data \(101, 109_14, brands\), got "
            "'user_id'",
        ),
        (["price"], r"must name fields of the data \(101, 109_14, brands\), got 'price'"),
        (
            [],
            r"must be a list of at least one field, or null, got \[\]. The data has 101, 109_14",
        ),
        ("101", "must be a list of at least one field, or null, got '101'"),
        (["101", 101], "must name a field once, got '101' more than once"),
    ],
)
def test_fields_that_the_data_lacks_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        build(SCHEMA, fields)
