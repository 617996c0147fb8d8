"""ESCM2: unbiased over the clicks, no gradient through the propensity, a clip that is relative."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mtnrec.batch import Batch
from mtnrec.model.escm2 import ESCM2
from mtnrec.model.esmm import ESMM
from mtnrec.model.naive_cvr import NaiveCVR

ROWS = 6
CONVERSIONS = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # if clicked
LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.4, 1.0], dtype=torch.float64)  # of CVR
PROPENSITIES = torch.tensor([0.2, 0.7, 0.5, 0.35, 0.9, 0.1], dtype=torch.float64)
OTHERS = torch.tensor([0.6, 0.3, 0.25, 0.8, 0.4, 0.5], dtype=torch.float64)
UNCLIPPED = 1e12


def build(schema, make=ESCM2, **keys):
    torch.manual_seed(0)
    return make(schema, **{"embedding_dim": 4, "experts": 0, "tower_widths": [8, 6], **keys})


def with_logits(network, *logits):
    network.logits = lambda _: torch.stack([part.view(-1, 1) for part in logits])
    return network


def batch_of(clicks, conversions):
    labels = torch.stack([clicks, clicks * conversions], dim=1)
    return Batch(torch.zeros(len(labels), 0), torch.zeros(len(labels), 0), labels)


def expected_loss(network, propensities, name="weighted_cvr"):
    """Mean of the loss over all click patterns, each with its probability."""
    total = 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=ROWS):
        clicks = torch.tensor(pattern, dtype=torch.float64)
        chance = torch.where(clicks == 1, propensities, 1 - propensities).prod()
        total += (chance * network.losses(batch_of(clicks, CONVERSIONS))[name]).item()
    return total


def ideal_loss():
    return binary_cross_entropy_with_logits(LOGITS, CONVERSIONS).item()


def test_the_expected_loss_of_ips_over_all_clicks_is_the_loss_of_all_rows(funnel_schema):
    network = build(funnel_schema, clip_ratio=UNCLIPPED)

    with_logits(network, PROPENSITIES.logit(), LOGITS)

    assert expected_loss(network, PROPENSITIES) == pytest.approx(ideal_loss(), rel=1e-12)
    with_logits(network, OTHERS.logit(), LOGITS)
    assert abs(expected_loss(network, PROPENSITIES) - ideal_loss()) > 0.1


@pytest.mark.parametrize(
    ("propensities", "imputed", "unbiased"),
    [
        (PROPENSITIES, OTHERS.logit(), True),
        (OTHERS, 2000 * CONVERSIONS - 1000, True),  # exactly 0 and 1
        (OTHERS, PROPENSITIES.logit(), False),
    ],
    ids=["propensities are right", "imputation is right", "both are wrong"],
)
def test_doubly_robust_is_unbiased_if_propensities_or_imputation_are_right(
    propensities, imputed, unbiased, funnel_schema
):
    network = build(funnel_schema, estimator="dr", clip_ratio=UNCLIPPED)

    with_logits(network, propensities.logit(), LOGITS, imputed)

    error = expected_loss(network, PROPENSITIES) - ideal_loss()
    assert abs(error) < 1e-12 if unbiased else abs(error) > 0.01


@pytest.mark.parametrize("estimator", ["ips", "dr"])
def test_no_gradient_of_the_loss_of_cvr_reaches_the_tower_of_ctr(
    estimator, funnel_schema, make_batch
):
    network = build(funnel_schema, estimator=estimator, experts=2, expert_widths=[5])

    losses = network.losses(make_batch(funnel_schema, 40))
    sum(losses[name] for name in losses if name not in funnel_schema.labels).backward()

    own = [*network.towers[0].parameters(), *network.gates[0].parameters()]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in own)
    assert network.towers[1][0].weight.grad.any()
    assert network.input.tables[1].weight.grad.any()


def test_the_imputation_learns_alone_and_cvr_only_from_the_pseudo_label(funnel_schema, make_batch):
    network = build(funnel_schema, estimator="dr")
    batch = make_batch(funnel_schema, 40)
    losses = network.losses(batch)
    first = [tower[0].weight for tower in network.towers]

    of_imputation = torch.autograd.grad(
        losses["imputation"], first, retain_graph=True, allow_unused=True
    )
    of_cvr = torch.autograd.grad(losses["weighted_cvr"], first, allow_unused=True)

    reached = [[g is not None and bool(g.any()) for g in gs] for gs in (of_imputation, of_cvr)]
    assert reached == [[False, False, True], [False, True, False]]


def test_the_gradient_of_doubly_robust_is_that_of_the_pseudo_label_and_not_of_ips(funnel_schema):
    clicks = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    logits = LOGITS.clone().requires_grad_()
    network = build(funnel_schema, estimator="dr", clip_ratio=UNCLIPPED)
    with_logits(network, PROPENSITIES.logit(), logits, OTHERS.logit())

    network.losses(batch_of(clicks, CONVERSIONS))["weighted_cvr"].backward()

    weights = clicks / PROPENSITIES
    target = OTHERS + weights * (clicks * CONVERSIONS - OTHERS)
    expected = (torch.sigmoid(LOGITS) - target) / ROWS
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)
    assert (logits.grad[clicks == 0].abs() > 0.01).all()  # where that of ips is zero
    outside = ((target < 0) | (target > 1)).double().mean()
    assert 0 < network.measured["outside_share"] == outside < 1


def test_a_constant_propensity_gives_the_scaled_loss_of_clicked_rows(funnel_schema):
    clicks = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    logits = torch.full((ROWS,), math.log(0.25 / 0.75), dtype=torch.float64), LOGITS
    batch = batch_of(clicks, CONVERSIONS)

    ips, snips = (
        with_logits(build(funnel_schema, self_normalise=chosen), *logits).losses(batch)
        for chosen in (False, True)
    )

    clicked = with_logits(build(funnel_schema, ESMM, clicked_weight=4.0), *logits).losses(batch)
    naive = with_logits(build(funnel_schema, NaiveCVR), *logits).losses(batch)
    torch.testing.assert_close(ips["weighted_cvr"], 4 * clicked["clicked_cvr"])
    torch.testing.assert_close(snips["weighted_cvr"], naive["clicked_cvr"])
    expected = binary_cross_entropy_with_logits(LOGITS[clicks == 1], CONVERSIONS[clicks == 1])
    torch.testing.assert_close(naive["clicked_cvr"], expected)


def test_the_clip_is_relative_to_the_click_rate_and_so_binds_few_rows(funnel_schema):
    torch.manual_seed(0)
    propensities = 0.02 * torch.exp(0.7 * torch.randn(4000, dtype=torch.float64))
    clicks = torch.bernoulli(propensities)
    zeros = torch.zeros_like(clicks)
    network = with_logits(build(funnel_schema), propensities.logit(), zeros)

    network.losses(batch_of(clicks, zeros))

    largest = 10 / clicks.mean()
    assert network.measured["largest_weight"] <= largest * (1 + 1e-12)
    assert network.measured["clipped_share"] == sum(1 / propensities[clicks == 1] > largest) / sum(
        clicks
    )
    assert network.measured["clipped_share"] < 0.1
    assert np.quantile(1 / propensities, 0.05) > 15  # a fixed bound of 15 would bind nearly all


def test_the_diagnostics_are_those_of_the_weights(funnel_schema):
    clicks = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    network = with_logits(build(funnel_schema, clip_ratio=1.0), PROPENSITIES.logit(), LOGITS)

    network.losses(batch_of(clicks, CONVERSIONS))

    weights = np.minimum(1 / PROPENSITIES.numpy()[[0, 1, 4]], 2)  # 1 / mean(click) = 2
    cvr = 1 / (1 + np.exp(-LOGITS.numpy()))
    assert {name: value.item() for name, value in network.measured.items()} == pytest.approx(
        {
            "clipped_share": 1 / 3,
            "largest_weight": 2,
            "effective_share": weights.sum() ** 2 / (weights**2).sum() / 3,
            "mean_weight": weights.sum() / 6,
            "mean_cvr": cvr.mean(),
            "mean_clicked_cvr": cvr[[0, 1, 4]].mean(),
        },
        rel=1e-12,
    )
    assert not any(value.requires_grad for value in network.measured.values())


def test_calibrated_propensities_have_a_mean_weight_of_one(funnel_schema):
    network = with_logits(build(funnel_schema, clip_ratio=UNCLIPPED), PROPENSITIES.logit(), LOGITS)
    total = 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=ROWS):
        clicks = torch.tensor(pattern, dtype=torch.float64)
        network.losses(batch_of(clicks, CONVERSIONS))
        chance = torch.where(clicks == 1, PROPENSITIES, 1 - PROPENSITIES).prod()
        total += (chance * network.measured["mean_weight"]).item()

    assert total == pytest.approx(1, rel=1e-12)


def test_ips_and_doubly_robust_start_from_the_same_towers(funnel_schema):
    one, other = (build(funnel_schema, estimator=estimator) for estimator in ("ips", "dr"))

    assert all(torch.equal(w, other.state_dict()[name]) for name, w in one.state_dict().items())


def test_a_propensity_that_vanishes_in_float32_does_not_overflow(funnel_schema):
    clicks = torch.tensor([1.0, 0.0])
    logits = torch.full((2,), -200.0)
    network = with_logits(build(funnel_schema), logits, logits)

    losses = network.losses(batch_of(clicks, clicks))

    assert losses["weighted_cvr"].item() == pytest.approx(20 * 200 / 2)
