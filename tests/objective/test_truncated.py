"""Truncated cross entropy: which positives are dropped, and its windows."""

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from shared_fixtures import Killed
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from mtnrec.batch import LogProbabilities
from mtnrec.checks import InputError
from mtnrec.model.loss import cross_entropies
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.objective.balance import Weights
from mtnrec.objective.truncated import Truncated
from mtnrec.system.files import read_json
from mtnrec.training.module import MultiTaskModule

LABELS = ("click", "conversion")
TAIL = 1e-6


def predict(logits):
    return LogProbabilities(logsigmoid(logits), logsigmoid(-logits))


def draw(rows, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 2, generator=generator)
    labels = torch.rand(rows, 2, generator=generator).lt(share).float()
    return logits.requires_grad_(), labels


def make(*args, **settings):
    loss = Truncated(*args, **settings)
    loss.prepare(LABELS)
    return loss


def gradient(loss, logits, labels):
    return torch.autograd.grad(loss(predict(logits), labels).sum(), logits)[0]


def test_rate_0_is_the_cross_entropy_to_the_bit():
    loss = make(0.0, window=50, warm_up=0)

    for seed in range(5):
        logits, labels = draw(100, seed)
        value, expected = loss(predict(logits), labels), cross_entropies(predict(logits), labels)
        assert torch.equal(value, expected)
        assert torch.equal(*(torch.autograd.grad(v.sum(), logits)[0] for v in (value, expected)))


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_of_a_stream_of_losses_the_share_of_the_rate_is_dropped(rate):
    loss = make([rate, 0.0], window=500, warm_up=0)
    dropped = positives = 0

    for seed in range(60):
        logits, labels = draw(400, seed)
        found = gradient(loss, logits, labels)
        if seed >= 10:
            dropped += int(((found == 0) & (labels == 1))[:, 0].sum())
            positives += int(labels[:, 0].sum())
        assert (found[:, 1] != 0).all()

    # The largest of 501 exchangeable losses, floor(rate * 501) of them.
    assert binomtest(dropped, positives, int(rate * 501) / 501).pvalue > TAIL
    assert binomtest(dropped, positives, 2 * rate).pvalue < TAIL
    assert loss.measured["dropped_click"].item() == pytest.approx(rate, abs=0.05)
    assert loss.measured["dropped_conversion"] == 0


def test_the_positives_above_the_quantile_of_the_window_are_dropped():
    loss = make(0.1, window=1000, warm_up=0)
    seen = []

    for seed in range(8):
        logits, labels = draw(100, seed)
        found = gradient(loss, logits, labels)
        losses = -logsigmoid(logits.detach()[:, 0])
        rank = int(0.1 * (len(seen) + 1))
        limit = sorted(seen)[-rank] if rank else np.inf
        assert ((found[:, 0] == 0) == (labels[:, 0] == 1) & (losses > limit)).all()
        if rank:
            assert loss.measured["threshold_click"].item() == pytest.approx(limit)
        seen += losses[labels[:, 0] == 1].tolist()


def test_the_gradient_of_negatives_and_of_kept_positives_is_untouched():
    loss = make(0.3, window=200, warm_up=0)
    for seed in range(4):
        logits, labels = draw(150, seed)
        found = gradient(loss, logits, labels)
        plain = torch.autograd.grad(cross_entropies(predict(logits), labels).sum(), logits)[0]

    negative, kept = labels == 0, (labels == 1) & (found != 0)
    assert kept.any()
    assert ((labels == 1) & (found == 0)).any()
    assert torch.equal(found[negative], plain[negative])
    assert torch.equal(found[kept], plain[kept])


def test_a_batch_of_few_positives_is_not_emptied():
    # The published rule drops the top 0.2 of all rows, which are more than the positives.
    loss = make(0.2, window=1000, warm_up=0)
    dropped = 0
    for seed in range(40):
        logits, labels = draw(200, seed, share=0.05)
        dropped += int(((gradient(loss, logits, labels) == 0) & (labels == 1)).sum())

    positives = sum(int(draw(200, seed, share=0.05)[1].sum()) for seed in range(40))
    assert 0.1 < dropped / positives < 0.3


def test_flipped_labels_are_most_of_what_is_dropped():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 5, generator=generator)
    chance = torch.sigmoid(6 * inputs[:, 0] - 3)
    true = torch.rand(4000, generator=generator) < chance
    flipped = ~true & (torch.rand(4000, generator=generator) < 0.05)  # from 0 to 1
    labels = (true | flipped).float()
    share = flipped.sum() / labels.sum()
    model = torch.nn.Linear(5, 1)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loss = Truncated(share.item(), window=1000, warm_up=2000)
    loss.prepare(("click",))
    dropped_rows = []

    for step in range(200):
        rows = torch.randint(0, 4000, (200,), generator=generator)
        logits = model(inputs[rows])
        logits.retain_grad()
        optimizer.zero_grad()
        loss(predict(logits), labels[rows, None]).sum().backward()
        optimizer.step()
        if step >= 100:
            dropped_rows.append(rows[(logits.grad[:, 0] == 0) & (labels[rows] == 1)])

    dropped = torch.cat(dropped_rows)
    assert len(dropped) > 100
    assert flipped[dropped].float().mean() > 0.6 > 4 * share


def test_the_rate_rises_with_the_positives_seen():
    loss = make(0.5, window=100, warm_up=400)
    logits = torch.zeros(10, 2)
    labels = torch.ones(10, 2)
    shares = []
    for step in range(60):
        logits = torch.randn(10, 2, generator=torch.Generator().manual_seed(step))
        logits.requires_grad_()
        shares.append((gradient(loss, logits, labels) == 0).double().mean().item())

    assert sum(shares[:4]) < 0.15 * 4
    assert 0.1 < np.mean(shares[15:25]) < 0.4  # half of the way
    assert 0.4 < np.mean(shares[40:]) < 0.6


def test_a_batch_with_more_positives_than_the_window_leaves_its_last():
    loss = make(0.5, window=4, warm_up=0)
    logits, labels = torch.arange(7.0)[:, None].repeat(1, 2), torch.ones(7, 2)

    loss(predict(logits), labels)
    loss(predict(logits[:1] + 9), labels[:1])

    kept = -logsigmoid(torch.tensor([9.0, 4, 5, 6]))
    torch.testing.assert_close(loss.rank_state()["losses"][0].sort().values, kept.sort().values)
    assert loss.rank_state()["seen"] == [8, 8]


def test_it_continues_from_its_state():
    whole, second = (make(0.3, window=64, warm_up=10) for _ in range(2))
    for seed in range(5):
        whole(predict(draw(50, seed)[0]), draw(50, seed)[1])
    second.load_rank_state(whole.rank_state())

    for seed in range(5, 9):
        logits, labels = draw(50, seed)
        assert torch.equal(gradient(whole, logits, labels), gradient(second, logits, labels))
        assert whole.measured == second.measured


class AfterStep(Weights):
    """Plain sum that looks at the losses again after each step."""

    def after_step(self, losses):
        """Keep the losses."""
        self.after = losses


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_each_batch_enters_the_windows_once_and_is_logged(funnel_schema, make_batch):
    batches = [make_batch(funnel_schema, 40, seed) for seed in range(4)]
    network = SharedBottom(funnel_schema, embedding_dim=4, bottom_widths=[8], tower_widths=[4])
    loss = Truncated(0.2, warm_up=0)
    module = MultiTaskModule(network, schema=funnel_schema, loss=loss, balance=AfterStep())
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    trainer.fit(module, DataLoader(batches, batch_size=None))

    positives = sum(batch.labels.sum(dim=0) for batch in batches)
    assert loss.rank_state()["seen"] == positives.tolist()
    logged = trainer.callback_metrics
    assert {f"train/{kind}_{name}" for kind in ("dropped", "threshold") for name in LABELS} <= set(
        logged
    )
    assert logged["train/loss"] > logged["train/loss_click"] + logged["train/loss_conversion"]


def test_its_steps_are_not_captured(funnel_schema):
    network = SharedBottom(funnel_schema, embedding_dim=4, bottom_widths=[8], tower_widths=[4])

    def supports(loss):
        module = MultiTaskModule(network, schema=funnel_schema, loss=loss)
        return module.objective.supports_cuda_graphs

    assert not supports(Truncated())
    assert not supports(torch.nn.Identity())  # a loss that does not say so
    assert supports(None)


LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3", "data.batch_size=128"]
RUN = [*LOG, "loss=truncated", "loss.rate=0.3", "loss.window=150", "loss.warm_up=100"]
RUN += ["trainer.max_epochs=2", "optimizer.lr=0.03", "trainer.checkpoint_every_n_steps=4"]
RUN += ["noise.label_flip={conversion:0.2}"]


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_ends_with_the_bits_of_an_uninterrupted_one(
    train, kill, tmp_path
):
    expected = train(*RUN)
    kill("on_train_batch_end", 22)
    with pytest.raises(Killed):
        train(*RUN, folder=tmp_path)

    train(*RUN, folder=tmp_path)

    assert ", step 20\n" in (tmp_path / "train.log").read_text()  # in the second epoch of 15
    first, second = (read_json(folder / "result.json") for folder in (expected, tmp_path))
    for key in ("cell", "metrics", "history", "noise"):
        assert first[key] == second[key]
    assert first["history"][1]["train/dropped_click"] > 0.1
    weights = [
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
        for folder in (expected, tmp_path)
    ]
    for name, weight in weights[0]["state_dict"].items():
        assert torch.equal(weight, weights[1]["state_dict"][name])
    for name in ("losses", "dropped"):
        assert torch.equal(*(w["loss"][0][name] for w in weights))
    assert not any(name.startswith("objective") for name in weights[0]["state_dict"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1}, r"loss\.rate must be a number in \[0, 1\), got 1"),
        ({"window": 0}, r"loss\.window must be an integer >= 1, got 0"),
        ({"warm_up": -1}, r"loss\.warm_up must be an integer >= 0, got -1"),
        ({"rate": [0.1] * 3}, r"one for each label \(click, conversion\), got 3\. Set loss\.rate="),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Truncated(**settings).prepare(LABELS)
