"""The cross network against its definition, and as an option of the models."""

import math

import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.model.cross import CrossNetwork
from mtnrec.model.esmm import ESMM
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.mmoe import MMoE
from mtnrec.model.shared_bottom import SharedBottom

BUILD = {"shared_bottom": SharedBottom, "esmm": ESMM, "mmoe": MMoE}
SIZES = {
    "shared_bottom": {"bottom_widths": [7, 6], "tower_widths": [4]},
    "esmm": {"tower_widths": [7, 6]},
    "mmoe": {"experts": 3, "expert_widths": [7, 6], "tower_widths": [4]},
}


def build(model, schema, **keys):
    torch.manual_seed(0)
    return BUILD[model](schema, embedding_dim=5, embedding_init="per_field", **SIZES[model], **keys)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_without_biases_the_output_is_a_polynomial_of_degree_layers_plus_one(layers):
    torch.manual_seed(0)
    network = CrossNetwork(6, layers, 3).double()
    for up in network.up:
        torch.nn.init.zeros_(up.bias)
    row = torch.randn(1, 6, dtype=torch.float64)

    def difference(order):
        """Finite difference of ``f(s x)`` of an order; a polynomial's of a higher order is 0."""
        return sum(
            (-1) ** (order - s) * math.comb(order, s) * network(s * row) for s in range(order + 1)
        )

    highest, beyond = difference(layers + 1), difference(layers + 2)
    torch.testing.assert_close(beyond, torch.zeros_like(row), rtol=0, atol=1e-9)
    assert highest.abs().max() > 1e-3


def test_with_full_rank_the_matrices_are_full():
    torch.manual_seed(0)
    network = CrossNetwork(6, 3, 6).double()
    rows = torch.randn(4, 6, dtype=torch.float64)
    for down in network.down:
        torch.nn.init.eye_(down.weight)

    expected = rows
    for up in network.up:  # x_0 * (W x + c) + x
        products = torch.einsum("oi,bi->bo", up.weight, expected)
        expected = rows * (products + up.bias) + expected

    torch.testing.assert_close(network(rows), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", BUILD)
def test_without_layers_the_wide_rows_are_not_built(model, funnel_schema, make_batch, monkeypatch):
    plain = build(model, funnel_schema)
    crossed = build(model, funnel_schema, cross_layers=1)
    monkeypatch.setattr(FeatureInput, "vectors", lambda self, batch: pytest.fail("built"))

    plain(make_batch(funnel_schema))

    with pytest.raises(pytest.fail.Exception, match="built"):
        crossed(make_batch(funnel_schema))
    assert not any("cross" in name for name in plain.state_dict())


@pytest.mark.parametrize("model", BUILD)
def test_layers_of_zeros_give_the_probabilities_of_the_network_without(
    model, funnel_schema, make_batch
):
    crossed = build(model, funnel_schema, cross_layers=2, cross_rank=3).double()
    plain = build(model, funnel_schema).double()
    batch = make_batch(funnel_schema)
    batch.numerical = batch.numerical.double()
    plain.load_state_dict(
        {k: v for k, v in crossed.state_dict().items() if not k.startswith("input.cross.")}
    )
    assert not torch.equal(crossed(batch).positive, plain(batch).positive)

    for up in crossed.input.cross.up:
        torch.nn.init.zeros_(up.weight)
        torch.nn.init.zeros_(up.bias)

    torch.testing.assert_close(crossed(batch), plain(batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("model", BUILD)
def test_first_layers_read_the_crossed_rows(model, funnel_schema, make_batch):
    network = build(model, funnel_schema, cross_layers=3, cross_rank=4).double()
    batch = make_batch(funnel_schema)
    batch.numerical = batch.numerical.double()
    layers = [torch.nn.Linear(network.input.out_features, 3).double() for _ in range(2)]

    rows = network.input.cross(torch.cat(network.input.vectors(batch), dim=1))
    (found,) = network.input.first_layers(batch, layers)

    expected = torch.stack([rows @ layer.weight.T + layer.bias for layer in layers])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        network.input.first_layer(batch, layers[0]), expected[0], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cross_layers": -1}, "model.cross_layers must be an integer from 0 to 100, got -1"),
        ({"cross_layers": True}, "model.cross_layers must be an integer from 0 to 100, got True"),
        ({"cross_rank": 0}, "model.cross_rank must be an integer >= 1, got 0"),
    ],
)
def test_keys_out_of_range_are_refused(keys, message, funnel_schema):
    with pytest.raises(InputError, match=message):
        FeatureInput(funnel_schema, 5, "mean", **keys)
