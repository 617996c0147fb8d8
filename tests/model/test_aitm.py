"""AITM: attention of a token with itself alone, transfer one way, and the calibrator."""

import dataclasses

import pytest
import torch
from reference import literal_funnel as literal

from mtnrec.batch import LogProbabilities
from mtnrec.model.aitm import AITM, Transfer, calibrator
from mtnrec.model.log_probabilities import funnel_log_probabilities
from mtnrec.schema import CategoricalField, Schema


@pytest.fixture
def network(funnel_schema):
    torch.manual_seed(0)
    return AITM(funnel_schema, embedding_dim=4, tower_widths=[8, 6])


def test_without_queries_the_state_is_the_mean_of_the_two_values():
    torch.manual_seed(0)
    transfer = Transfer(5, dropout=0.0)
    state, own = torch.randn(2, 7, 5)
    with torch.no_grad():
        transfer.attention.weight[:5] = 0
        values = transfer.attention.weight[10:]
        found = transfer(state, own)

        tokens = torch.relu(transfer.transfer(state)), own
        torch.testing.assert_close(found, (tokens[0] @ values.T + tokens[1] @ values.T) / 2)


def test_the_weight_of_a_token_is_the_logistic_function_of_the_difference_of_the_scores():
    torch.manual_seed(0)
    transfer = Transfer(5, dropout=0.0).double()
    state, own = torch.randn(2, 7, 5, dtype=torch.float64)
    query, key, value = transfer.attention.weight.detach().chunk(3)

    found = transfer(state, own).detach()

    for row in range(7):
        tokens = [torch.relu(transfer.transfer(state[row])).detach(), own[row]]
        scores = [(query @ token) @ (key @ token) / 5**0.5 for token in tokens]
        share = 1 / (1 + torch.exp(scores[1] - scores[0]))
        expected = share * (value @ tokens[0]) + (1 - share) * (value @ tokens[1])
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-14)


def test_dropout_acts_on_the_transferred_token():
    transfer = Transfer(400, dropout=0.5)

    first, second = (transfer(torch.ones(1, 400), torch.zeros(1, 400)) for _ in range(2))

    assert not torch.equal(first, second)
    transfer.eval()
    assert torch.equal(*(transfer(torch.ones(1, 400), torch.zeros(1, 400)) for _ in range(2)))


def test_the_loss_of_the_conversion_reaches_the_tower_of_the_click_and_not_the_reverse(
    network, funnel_schema, make_batch
):
    losses = network.losses(make_batch(funnel_schema))
    click, conversion = (list(tower.parameters()) for tower in network.towers)

    into_click = torch.autograd.grad(losses["conversion"], click, retain_graph=True)
    into_conversion = torch.autograd.grad(losses["click"], conversion, allow_unused=True)

    assert all(gradient.abs().sum() > 0 for gradient in into_click)
    assert all(gradient is None or not gradient.any() for gradient in into_conversion)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_the_calibrator_and_its_gradient_are_exactly_zero_for_a_product_of_probabilities(scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(2, 500, 1)).requires_grad_()

    loss = calibrator(funnel_log_probabilities(*logits))
    loss.backward()

    assert loss.item() == 0
    assert not logits.grad.any()


def test_the_calibrator_is_the_mean_over_rows_of_what_a_stage_exceeds_the_one_before():
    probabilities = torch.tensor([[0.1, 0.4, 0.3], [0.5, 0.2, 0.6], [0.3, 0.3, 0.1]])
    output = LogProbabilities(probabilities.log(), (1 - probabilities).log())

    assert calibrator(output).item() == pytest.approx((0.3 + 0.4) / 3)


def test_the_calibrator_does_not_grow_with_the_batch():
    torch.manual_seed(0)
    once = torch.rand(10, 2).log()
    twice = torch.cat([once, once])

    found, expected = (calibrator(LogProbabilities(p, p)) for p in (twice, once))

    torch.testing.assert_close(found, expected)


def test_the_share_of_violating_rows_is_measured(network, funnel_schema, make_batch):
    batch = make_batch(funnel_schema, 50)
    with torch.no_grad():
        network.towers[0][0].weight.mul_(20)
        network.heads[0][0].bias.fill_(-2)
        network.heads[0][0].weight.mul_(20)

    network.losses(batch)

    click, conversion = network(batch).positive.detach().unbind(dim=1)
    assert 0 < network.measured["violating_share"] < 1
    assert network.measured["violating_share"] == sum(conversion > click) / 50


def test_three_stages_equal_the_literal_layout(make_batch):
    fields = (CategoricalField("a", 4), CategoricalField("b", 30))
    schema = Schema(fields, ("x",), ("click", "cart", "buy"), funnel=True)
    torch.manual_seed(0)
    network = AITM(schema, embedding_dim=4, tower_widths=[8, 6]).double()
    other = literal.AITM(literal.Row([4, 30], 1, 4), [8, 6], (), stages=3).double()
    other.load_state_dict(network.state_dict())
    batch = make_batch(schema, 20)

    found = network(dataclasses.replace(batch, numerical=batch.numerical.double()))

    expected = torch.stack(other(batch.categorical, batch.numerical.double()), dim=1)
    torch.testing.assert_close(found.positive.exp(), expected, rtol=1e-10, atol=0)


def test_queries_keys_and_values_have_no_bias(network):
    assert all(pair.attention.bias is None for pair in network.transfers)
    assert len(network.transfers) == 1
