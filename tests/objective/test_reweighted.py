"""Generalised cross entropy: its gradient, its fixed points and its rates."""

import lightning as L
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from mtnrec.batch import LogProbabilities
from mtnrec.checks import InputError
from mtnrec.data.noise import Noise
from mtnrec.model.loss import cross_entropies
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.objective.reweighted import Reweighted
from mtnrec.training.module import MultiTaskModule

LABELS = ("click", "conversion")
RATES = torch.tensor([0.3, 0.02], dtype=torch.float64)


def draw(rows=200, seed=0, dtype=torch.float64):
    """Logits of two labels, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, 2, generator=generator, dtype=dtype)
    labels = torch.rand(rows, 2, generator=generator).lt(0.3).to(dtype)
    return logits.requires_grad_(), labels


def predict(logits):
    return LogProbabilities(logsigmoid(logits), logsigmoid(-logits))


def make(beta, *, normalise=True, labels=LABELS, rates=RATES):
    loss = Reweighted(beta, normalise=normalise)
    loss.prepare(labels)
    loss.double().set_rates(rates)
    return loss


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("beta", [0, [0.0, 0.0]])
def test_beta_0_is_the_cross_entropy_to_the_bit(beta, normalise):
    logits, labels = draw(dtype=torch.float32)
    loss = Reweighted(beta, normalise=normalise)
    loss.prepare(LABELS)
    loss.set_rates(RATES)

    values, expected = loss(predict(logits), labels), cross_entropies(predict(logits), labels)

    assert torch.equal(values, expected)
    gradients = [torch.autograd.grad(v.sum(), logits)[0] for v in (values, expected)]
    assert torch.equal(*gradients)


def generalised(logits, labels, beta):
    """The generalised cross entropy with probabilities, as published."""
    probability = torch.sigmoid(logits)
    observed = torch.where(labels == 1, probability, 1 - probability)
    return (1 - observed**beta) / beta


@pytest.mark.parametrize("beta", [0.125, 0.25, 0.875])  # exact in float32
def test_without_rates_it_is_the_generalised_cross_entropy(beta):
    logits, labels = draw()
    expected = generalised(logits, labels, beta).mean(dim=0)

    found = make(beta, normalise=False)(predict(logits), labels)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(v.sum(), logits)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalise", [False, True])
def test_its_gradient_is_that_of_a_cross_entropy_with_constant_weights(normalise):
    logits, labels = draw()
    probability = torch.sigmoid(logits)
    rates = torch.where(labels == 1, RATES, 1 - RATES) if normalise else 1.0
    observed = torch.where(labels == 1, probability, 1 - probability)
    weights = (observed.detach() / rates) ** 0.25
    expected = -(weights * observed.log()).mean(dim=0)

    found = make(0.25, normalise=normalise)(predict(logits), labels)

    gradients = [torch.autograd.grad(v.sum(), logits)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.04, 0.1])
def test_a_constant_prediction_ends_at_the_fixed_point(share, normalise):
    beta, rate = 0.25, 0.04
    loss = make(beta, normalise=normalise, labels=("click",), rates=torch.tensor([rate]).double())
    labels = (torch.arange(100) < 100 * share).double()[:, None]

    def objective(value):
        return loss(predict(torch.full((100, 1), value, dtype=torch.float64)), labels).item()

    found = minimize_scalar(objective, bounds=(-12, 4), method="bounded", options={"xatol": 1e-9})

    shift = beta * logit(rate) if normalise else 0
    expected = (logit(share) - shift) / (1 - beta)
    assert found.x == pytest.approx(expected, abs=1e-5)
    table = {0.04: 0.04, 0.1: 0.134, 0.01: 0.006} if normalise else {0.04: 0.014}
    if share in table:
        assert round(expit(found.x), 3) == table[share]


def test_each_label_has_its_own_beta():
    logits, labels = draw()

    found = make([0.0, 0.2], normalise=False)(predict(logits), labels)

    entropies = cross_entropies(predict(logits), labels)
    assert found[0] == entropies[0]
    assert found[1].item() == pytest.approx(generalised(logits, labels, 0.2).mean(dim=0)[1].item())


def test_a_label_that_is_certainly_wrong_has_a_finite_loss_and_gradient():
    logits = torch.tensor([[-500.0], [500.0]], requires_grad=True)
    loss = Reweighted(0.25, normalise=False)
    loss.prepare(("click",))

    value = loss(predict(logits), torch.tensor([[1.0], [0.0]]))
    value.sum().backward()

    assert value.item() == pytest.approx(4)  # 1 / beta
    assert logits.grad.isfinite().all()


def fit(module, batches):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_without_a_data_module_the_rates_must_be_given(funnel_schema, make_batch):
    network = SharedBottom(funnel_schema, embedding_dim=4, bottom_widths=[8], tower_widths=[4])
    loss = Reweighted()
    module = MultiTaskModule(network, schema=funnel_schema, loss=loss)
    batches = [make_batch(funnel_schema)]

    with pytest.raises(InputError, match=r"call loss\.set_rates.*or set loss\.normalise=false"):
        fit(module, batches)

    loss.set_rates(RATES)
    fit(module, batches)
    fit(MultiTaskModule(network, schema=funnel_schema, loss=Reweighted(0)), batches)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_label_of_one_class_has_no_rate_to_divide_by(rate):
    rates = torch.tensor([0.5, rate])

    with pytest.raises(
        InputError, match=f"share of positives of {rate:g} for conversion. Set loss.beta to 0"
    ):
        make(0.1, rates=rates)
    make([0.1, 0.0], rates=rates)


def test_the_rates_are_those_of_the_noisy_training_labels(make_datamodule):
    datamodule = make_datamodule("synthetic", "rows=3000", "click_rate=0.3")
    datamodule.noise = Noise(label_flip={"click": 0.5})
    datamodule.prepare_data()
    datamodule.setup()
    network = SharedBottom(datamodule.schema, embedding_dim=4, bottom_widths=[8], tower_widths=[4])
    module = MultiTaskModule(network, schema=datamodule.schema, loss=Reweighted(0.5))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    trainer.fit(module, datamodule=datamodule)

    labels = torch.cat([batch.labels for batch in datamodule.train_dataloader()]).numpy()
    rates = labels.astype(np.float64).mean(axis=0)
    clean = datamodule.column("train", "labels").mean(axis=0)
    assert rates[0] == pytest.approx(clean[0] / 2, rel=0.1)
    scales = np.stack([1 - rates, rates]) ** -0.5
    np.testing.assert_allclose(module.objective.loss._scales.numpy(), scales, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1}, r"loss\.beta must be a number in \[0, 1\), got 1"),
        ({"beta": [0.1, -1]}, r"loss\.beta\[1\] must be a number in \[0, 1\), got -1"),
        ({"beta": "much"}, r"loss\.beta must be a number in \[0, 1\), got 'much'"),
        ({"normalise": 1}, r"loss\.normalise must be true or false, got 1"),
        ({"beta": [0.1]}, r"or one for each label \(click, conversion\), got 1\. Set loss\.beta="),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Reweighted(**settings).prepare(LABELS)
