import pytest
import torch

from mtnrec.mtn.mixing import LAYER_WEIGHTINGS, MixingWeights

NORMS = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)


def make(**keys):
    defaults = {
        "layers": 3,
        "multiplicities": (1, 1, 1),
        "alpha": "learned",
        "layer_weighting": "mean",
    }
    return MixingWeights(**{**defaults, **keys})


@pytest.mark.parametrize("alpha", ["learned", "uniform"])
def test_alpha_starts_uniform(alpha):
    weights = make(alpha=alpha)

    torch.testing.assert_close(weights.alpha(), torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_fixed_alpha_is_taken_as_given_and_not_learned():
    weights = make(alpha=[0.2, 0.3, 0.5])

    torch.testing.assert_close(
        weights.alpha()[1], torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    )
    assert not list(weights.parameters())


@pytest.mark.parametrize("weighting", LAYER_WEIGHTINGS)
def test_layer_weights_sum_to_one(weighting):
    weights = make(layer_weighting=weighting).layer_weights(NORMS)

    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("weighting", ["mean", "learned", "gated"])
def test_layer_weights_start_equal(weighting):
    weights = make(layer_weighting=weighting).layer_weights(NORMS)

    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_exponential_decay_halves_from_layer_to_layer():
    weights = make(layer_weighting="exponential_decay").layer_weights(NORMS)

    torch.testing.assert_close(weights, torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64) / 7)


def test_a_gate_looks_at_the_shares_of_the_norm_without_a_gradient_through_them():
    weights = make(layer_weighting="gated")
    with torch.no_grad():
        weights.gate.copy_(torch.eye(3))
    norms = NORMS.clone().requires_grad_()

    gated = weights.layer_weights(norms)

    torch.testing.assert_close(gated, (NORMS / 6).softmax(dim=0))
    gated.sum().backward()
    assert norms.grad is None


def test_learned_alpha_drifts_to_the_smallest_norm():
    weights = make(layers=1)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    norms = torch.tensor([13.7, 12.7, 15.1], dtype=torch.float64)

    for _ in range(400):
        optimizer.zero_grad()
        (weights.alpha()[0] @ norms).backward()
        optimizer.step()

    assert weights.alpha()[0, 1] > 0.95


def test_creating_weights_does_not_move_the_global_random_stream():
    state = torch.get_rng_state()

    make(layer_weighting="gated")

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("alpha", ["learned", "uniform"])
def test_alpha_starts_equal_over_all_seven_subsets(alpha):
    found = make(multiplicities=(2, 2, 2, 1), alpha=alpha).alpha()

    expected = torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64) / 7
    torch.testing.assert_close(found, expected.expand(3, 4))


def test_alpha_over_all_subsets_learns_like_seven_separate_weights():
    weights = make(layers=1, multiplicities=(2, 2, 2, 1))
    norms, frobenius = torch.tensor([[3.0, 2.0, 1.5, 1.2]], dtype=torch.float64), NORMS[:1]
    seven = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizers = [torch.optim.SGD(p, lr=0.5) for p in (list(weights.parameters()), [seven])]

    for _ in range(20):
        weights.set_gradients(norms, frobenius, scale=1.0)
        optimizers[1].zero_grad()
        (seven.softmax(0) @ norms[0, [0, 0, 1, 1, 2, 2, 3]]).backward()
        for optimizer in optimizers:
            optimizer.step()

    alpha = seven.detach().softmax(0)
    merged = torch.stack([*alpha[:6].view(3, 2).sum(1), alpha[6]])
    torch.testing.assert_close(weights.alpha()[0], merged)


@pytest.mark.parametrize("alpha", ["learned", "uniform"])
@pytest.mark.parametrize("weighting", LAYER_WEIGHTINGS)
def test_gradients_are_those_of_autograd(alpha, weighting):
    generator = torch.Generator().manual_seed(0)
    weights = make(alpha=alpha, layer_weighting=weighting)
    norms = 10 * torch.rand(3, 3, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    weights.set_gradients(norms, NORMS, scale=0.3)

    of_layers = (weights.alpha() * norms).sum(dim=1) + NORMS
    value = 0.3 * (weights.layer_weights(of_layers) @ of_layers)
    learned = list(weights.parameters())
    expected = torch.autograd.grad(value, learned) if learned else ()
    torch.testing.assert_close([p.grad for p in learned], list(expected), rtol=1e-12, atol=1e-14)
