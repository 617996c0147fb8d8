"""The objective: its default, losses of a network, weights, and what is logged."""

from typing import ClassVar

import lightning as L
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from mtnrec.checks import InputError
from mtnrec.model.esmm import ESMM
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.objective.balance import Weights
from mtnrec.objective.loss import CrossEntropy
from mtnrec.training.module import MultiTaskModule

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


class Counting(CrossEntropy):
    """The cross entropy, which also measures the rows of its batch."""

    def forward(self, output, labels):
        """Return the cross entropies."""
        self.measured = {"batch_rows": torch.tensor(len(labels))}
        return super().forward(output, labels)


class WithOwnLosses(ESMM):
    """ESMM with a squared click score as a third loss."""

    loss_weights: ClassVar = {"click": 1.0, "conversion": 2.0, "square": 0.5}

    def losses(self, batch):
        """Return the three losses."""
        output = self(batch)
        entropies = -torch.where(batch.labels == 1, *output).mean(dim=0)
        return {
            "click": entropies[0],
            "conversion": entropies[1],
            "square": output.positive[:, 0].square().mean(),
        }


def build(make, schema, seed=0):
    torch.manual_seed(seed)
    return make(schema, embedding_dim=4, tower_widths=[8])


def train(module, batches, **trainer):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def batches(funnel_schema, make_batch):
    return [make_batch(funnel_schema, 40 + seed, seed) for seed in range(10)]


@pytest.mark.parametrize("task_loss", ["sum", "mean"])
@pytest.mark.parametrize("weights", [{}, {"click": 1}])
def test_ten_steps_of_the_default_are_those_of_plain_cross_entropies_to_the_bit(
    task_loss, weights, funnel_schema, batches
):
    literal = build(SharedBottom, funnel_schema)
    optimizer = torch.optim.Adam(literal.parameters(), lr=1e-3, fused=True)
    for batch in batches:
        output, labels = literal(batch), batch.labels
        losses = -(labels * output.positive + (1 - labels) * output.negative).mean(dim=0)
        optimizer.zero_grad()
        (losses.sum() if task_loss == "sum" else losses.mean()).backward()
        optimizer.step()
    network = build(SharedBottom, funnel_schema)

    train(
        MultiTaskModule(
            network, schema=funnel_schema, balance=Weights(weights), task_loss=task_loss
        ),
        batches,
    )

    expected = literal.state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in network.state_dict().items())


def test_the_logged_losses_are_means_over_the_rows(funnel_schema, batches):
    network = build(SharedBottom, funnel_schema)
    rate = torch.optim.SGD
    module = MultiTaskModule(
        network, schema=funnel_schema, loss=Counting(), optimizer=lambda p: rate(p, lr=0.0)
    )

    logged = train(module, batches)

    rows = sum(len(batch) for batch in batches)
    logits = torch.cat([torch.sub(*network(batch)) for batch in batches]).double()
    labels = torch.cat([batch.labels for batch in batches]).double()
    expected = binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=0)
    assert logged["train/loss_click"] == pytest.approx(expected[0].item(), rel=1e-5)
    assert logged["train/loss_conversion"] == pytest.approx(expected[1].item(), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(expected.sum().item(), rel=1e-5)
    sizes = [len(batch) for batch in batches]
    assert logged["train/batch_rows"] == pytest.approx(sum(n * n for n in sizes) / rows)


def test_a_network_with_its_own_losses_is_trained_on_their_weighted_sum(funnel_schema, batches):
    network = build(WithOwnLosses, funnel_schema)
    module = MultiTaskModule(network, schema=funnel_schema)

    found = module.objective(network, batches[0])
    found[0].backward()

    losses = network.losses(batches[0])
    gradient = network.towers[0][0].weight.grad.clone()
    network.zero_grad()
    (losses["click"] + 2 * losses["conversion"] + 0.5 * losses["square"]).backward()
    torch.testing.assert_close(gradient, network.towers[0][0].weight.grad)
    entropy = losses["click"] + losses["conversion"]
    torch.testing.assert_close(found[1:], torch.stack([entropy, *losses.values()]).detach())
    names = ["loss", "loss_click", "loss_conversion", "loss_square"]
    assert module.objective.value_names == names


def test_weights_multiply_the_losses(funnel_schema, batches):
    network = build(ESMM, funnel_schema)
    weighted, plain = (
        MultiTaskModule(network, schema=funnel_schema, balance=Weights(weights)).objective
        for weights in ({"conversion": 3}, {})
    )

    click, conversion = plain(network, batches[0])[2:]
    assert weighted(network, batches[0])[0].item() == pytest.approx((click + 3 * conversion).item())


def test_what_does_not_fit_is_refused(funnel_schema):
    network = build(WithOwnLosses, funnel_schema)

    with pytest.raises(InputError, match=r"loss must be cross_entropy for WithOwnLosses"):
        MultiTaskModule(network, schema=funnel_schema, loss=torch.nn.Identity())
    with pytest.raises(
        InputError, match=r"must name losses of the model .click, conversion, square.*got 'buy'"
    ):
        MultiTaskModule(network, schema=funnel_schema, balance=Weights({"buy": 2}))
    with pytest.raises(InputError, match=r"balance.weights.click must be a number in .*got -1"):
        Weights({"click": -1})
