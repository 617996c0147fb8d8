"""The control of debiasing: CVR of clicked rows alone."""

import pytest
import torch

from mtnrec.model.naive_cvr import NaiveCVR


def build(schema):
    torch.manual_seed(0)
    return NaiveCVR(schema, embedding_dim=4, tower_widths=[8, 6])


def test_naive_cvr_learns_from_clicked_rows_alone(funnel_schema, make_batch):
    network = build(funnel_schema)
    batch = make_batch(funnel_schema, 40)
    clicked = batch.labels[:, 0] == 1

    losses = network.losses(batch)

    logits = network.logits(batch)[1, :, 0].double()[clicked]
    labels = batch.labels[:, 1].double()[clicked]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert losses["clicked_cvr"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert network.loss_weights == {"click": 1.0, "conversion": 0.0, "clicked_cvr": 1.0}
    assert 1 < sum(clicked) < 40


@pytest.mark.parametrize("labels", [(0, 0), (1, 0), (1, 1)])
def test_constant_labels_have_finite_losses(labels, funnel_schema, make_batch):
    batch = make_batch(funnel_schema, 8)
    batch.labels[:] = torch.tensor(labels)

    losses = build(funnel_schema).losses(batch)

    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["clicked_cvr"] == 0) == (labels[0] == 0)


def test_the_loss_of_ctcvr_has_no_gradient(funnel_schema, make_batch):
    network = build(funnel_schema)
    batch = make_batch(funnel_schema, 40)
    batch.labels.zero_()

    losses = network.losses(batch)
    sum(network.loss_weights[name] * loss for name, loss in losses.items()).backward()

    assert losses["conversion"] > 0
    assert not network.towers[1][0].weight.grad.any()
    assert network.towers[0][0].weight.grad.any()
