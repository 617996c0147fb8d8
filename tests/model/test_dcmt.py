"""DCMT: the counterfactual head learns from unclicked rows and agrees with the factual one."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mtnrec.model.dcmt import DCMT
from mtnrec.model.escm2 import ESCM2


def build(make, schema, **keys):
    torch.manual_seed(0)
    keys = {"embedding_dim": 4, "experts": 2, "expert_widths": [5], "tower_widths": [8, 6], **keys}
    return make(schema, **keys).double()


@pytest.fixture
def batch(funnel_schema, make_batch):
    found = make_batch(funnel_schema, 30)
    found.numerical, found.labels = found.numerical.double(), found.labels.double()
    return found


def test_with_all_rows_clicked_the_loss_of_cvr_is_that_of_ips(funnel_schema, batch):
    batch.labels[:, 0] = 1
    network = build(DCMT, funnel_schema, agreement_weight=0.0)
    ips = build(ESCM2, funnel_schema, cvr_weight=1.0)

    found, expected = network.losses(batch), ips.losses(batch)

    weighted, total = (
        {name: net.loss_weights[name] * loss.item() for name, loss in losses.items()}
        for net, losses in ((network, found), (ips, expected))
    )
    assert weighted.pop("agreement") == 0
    assert weighted == pytest.approx(total, rel=1e-12)


def test_unclicked_rows_teach_the_counterfactual_head_a_constant_label(funnel_schema, batch):
    batch.labels.zero_()
    network = build(DCMT, funnel_schema)

    loss = network.losses(batch)["weighted_cvr"]
    loss.backward()

    click, _, counterfactual = network.logits(batch).detach().squeeze(2)
    rows = binary_cross_entropy_with_logits(
        counterfactual, torch.ones_like(counterfactual), reduction="none"
    )
    expected = (rows / (1 - click.sigmoid())).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert network.counterfactual.bias.grad < 0  # its probability rises
    assert not network.towers[1][-1].weight.grad.any()  # the factual head learns nothing here
    assert all(p.grad is None or not p.grad.any() for p in network.towers[0].parameters())


def test_the_agreement_is_zero_if_and_only_if_the_heads_sum_to_one(funnel_schema, batch):
    network = build(DCMT, funnel_schema)
    assert network.losses(batch)["agreement"] > 1e-3

    with torch.no_grad():
        network.counterfactual.weight.copy_(-network.towers[1][-1].weight)
        network.counterfactual.bias.copy_(-network.towers[1][-1].bias)

    assert network.losses(batch)["agreement"].item() == pytest.approx(0, abs=1e-15)


def test_the_agreement_lowers_cvr_once_the_counterfactual_head_is_sure(funnel_schema, batch):
    network = build(DCMT, funnel_schema)
    with torch.no_grad():
        network.counterfactual.bias.fill_(40)

    network.losses(batch)["agreement"].backward()

    assert network.towers[1][-1].bias.grad > 0
