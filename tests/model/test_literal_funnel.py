"""The models of a funnel against loops of layers, probabilities and BCE in float64."""

import dataclasses
import itertools
import math
import re
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from reference import literal_funnel as literal

from mtnrec.checks import InputError
from mtnrec.command.compose import group_config
from mtnrec.model.aitm import AITM
from mtnrec.model.dcmt import DCMT
from mtnrec.model.escm2 import ESCM2
from mtnrec.model.esmm import ESMM
from mtnrec.model.naive_cvr import NaiveCVR
from mtnrec.objective.objective import Objective
from mtnrec.schema import CategoricalField, Schema

SIZES = [3, 40, 2]
FIELDS = tuple(CategoricalField(f"c{i}", size) for i, size in enumerate(SIZES))
SCHEMA = Schema(FIELDS, ("x", "y"), ("click", "conversion"), funnel=True)
INDEPENDENT = Schema(FIELDS, ("x", "y"), ("like", "share"), funnel=False)
PLAIN = {"tower_widths": [7, 4]}
MIXED = {"experts": 3, "expert_widths": [7, 6], "tower_widths": [5, 4]}
DR = {"estimator": "dr"}
# Of each case: our class, its keys, the literal layout, and its losses.
CASES = {
    "aitm": (AITM, PLAIN, partial(literal.AITM, head_widths=()), literal.aitm_losses),
    "aitm_bottom": (
        AITM,
        {**PLAIN, "head_widths": [5, 3]},
        partial(literal.AITM, head_widths=(5, 3)),
        literal.aitm_losses,
    ),
    "esmm": (
        ESMM,
        {**PLAIN, "clicked_weight": 3.0, "unclicked_weight": 0.25},
        literal.Funnel,
        literal.esmm_losses,
    ),
    "esmm_gated": (
        ESMM,
        {**PLAIN, "click_gate": True, "unclicked_weight": 0.0},
        partial(literal.Funnel, second="click_gate"),
        literal.esmm_losses,
    ),
    "naive": (NaiveCVR, PLAIN, literal.Funnel, literal.naive_losses),
    "naive_mixed": (NaiveCVR, MIXED, literal.Funnel, literal.naive_losses),
    "ips": (ESCM2, {**PLAIN, "experts": 0}, literal.Funnel, literal.escm2_losses),
    "ips_mixed": (
        ESCM2,
        {**MIXED, "clip_ratio": 1.0},
        literal.Funnel,
        partial(literal.escm2_losses, ratio=1.0),
    ),
    "snips": (
        ESCM2,
        {**MIXED, "self_normalise": True},
        literal.Funnel,
        partial(literal.escm2_losses, normalised=True),
    ),
    "dr": (
        ESCM2,
        {**PLAIN, **DR, "experts": 0},
        partial(literal.Funnel, towers=3),
        literal.escm2_losses,
    ),
    "dr_mixed": (ESCM2, {**MIXED, **DR}, partial(literal.Funnel, towers=3), literal.escm2_losses),
    "dcmt": (
        DCMT,
        {**PLAIN, "experts": 0},
        partial(literal.Funnel, second="counterfactual"),
        literal.dcmt_losses,
    ),
    "dcmt_mixed": (
        DCMT,
        MIXED,
        partial(literal.Funnel, second="counterfactual"),
        literal.dcmt_losses,
    ),
}


def make_networks(case):
    build, keys, layout, losses = CASES[case]
    torch.manual_seed(1)
    network = build(SCHEMA, embedding_dim=5, embedding_init="per_field", **keys).double()
    bottom = {} if build is AITM else {k: v for k, v in keys.items() if k in MIXED}
    row = literal.Row(SIZES, 2, 5)
    other = layout(row, **{"tower_widths": keys["tower_widths"], **bottom}).double()
    with torch.no_grad():
        for parameter in network.parameters():  # so that gates do not start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(network.state_dict())
    return network, other, losses


def in_float64(batch):
    numbers = {"numerical": batch.numerical.double(), "labels": batch.labels.double()}
    return dataclasses.replace(batch, **numbers)


@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_gradients_equal_the_literal_layout(case, make_batch):
    network, other, losses = make_networks(case)
    batch = in_float64(make_batch(SCHEMA, 40))
    weights = network.loss_weights

    output = network(batch)
    found = network.losses(batch)
    sum(weights[name] * loss for name, loss in found.items()).backward()
    probabilities = other(batch.categorical, batch.numerical)
    expected = losses(probabilities, *batch.labels.unbind(dim=1))
    sum(weights[name] * loss for name, loss in expected.items()).backward()

    click, conversion = probabilities[:2]
    conversion = conversion if case.startswith("aitm") else click * conversion
    joined = torch.stack([click, conversion], dim=1)
    torch.testing.assert_close(output.positive.exp(), joined, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.negative.exp(), 1 - joined, rtol=1e-10, atol=0)
    assert list(found) == list(weights) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for name, parameter in other.named_parameters():
        gradient = network.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("logits", [(60.0, 60.0), (60.0, -60.0), (-60.0, 60.0), (-60.0, -60.0)])
def test_losses_of_extreme_logits_are_right_in_float32_and_gradients_finite(
    case, labels, logits, make_batch
):
    network, _, _ = make_networks(case)
    network.float()
    batch = make_batch(SCHEMA, 4)
    batch.labels[:] = torch.tensor(labels)
    heads = network.heads if isinstance(network, AITM) else network.towers
    outputs = [mlp[-1] for mlp in heads] + [getattr(network, "counterfactual", heads[1][-1])]
    with torch.no_grad():
        for head, logit in zip(outputs, [*logits, logits[1]], strict=False):
            head.weight.zero_()
            head.bias.fill_(logit)

    losses = network.losses(batch)
    sum(network.loss_weights[name] * loss for name, loss in losses.items()).backward()

    assert all(value.isfinite() for value in getattr(network, "measured", {}).values())
    double = network.double().losses(in_float64(batch))
    for name, loss in losses.items():
        torch.testing.assert_close(loss.double(), double[name], rtol=1e-5, atol=1e-30)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_a_click_has_finite_losses_and_none_of_clicked_rows(case, make_batch):
    network, _, _ = make_networks(case)
    batch = in_float64(make_batch(SCHEMA, 6))
    batch.labels.zero_()

    losses = network.losses(batch)

    assert all(loss.isfinite() for loss in losses.values())
    if "clicked_cvr" in losses or case in ("ips", "ips_mixed", "snips"):
        assert losses.get("clicked_cvr", losses.get("weighted_cvr")).item() == 0


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_gradient_after_one_step_of_the_objective(case, make_batch):
    network, _, _ = make_networks(case)

    Objective(network, SCHEMA.labels)(network, in_float64(make_batch(SCHEMA, 40)))[0].backward()

    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("case", CASES)
def test_half_precision_gives_float32_losses(case, make_batch):
    network, _, _ = make_networks(case)
    network.float()
    batch = make_batch(SCHEMA, 40)

    with torch.autocast("cpu", torch.bfloat16):
        losses = network.losses(batch)

    full = network.losses(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses, full, rtol=0.1, atol=0.05)


def test_task_layers_are_those_of_the_labels_towers_and_shared_layers_the_experts():
    for case in CASES:
        network, _, _ = make_networks(case)
        depths = network.task_layers()
        assert all(len(depth) == 2 for depth in depths)
        expected = [*network.towers[0].linear_layers(), *network.towers[1].linear_layers()]
        if isinstance(network, AITM):
            expected += [layer for head in network.heads for layer in head.linear_layers()]
        found = [id(layer) for depth in depths for layer in depth]
        assert sorted(found) == sorted(map(id, expected))
        experts = 3 if CASES[case][1].get("experts") else 0
        assert [len(depth) for depth in network.shared_layers()] == [experts] * 2 * bool(experts)


@pytest.mark.parametrize("build", [AITM, ESCM2, DCMT, NaiveCVR, ESMM])
def test_independent_labels_are_refused(build):
    rule = rf"{build.__name__} needs a funnel.*like, share\. Choose model=shared_bottom or model=mm"
    with pytest.raises(InputError, match=rule):
        build(INDEPENDENT)


@pytest.mark.parametrize(
    ("build", "keys"),
    [(ESCM2, {}), (DCMT, {}), (NaiveCVR, {}), (ESMM, {"click_gate": True})],
)
def test_models_of_clicks_refuse_a_funnel_of_three_stages(build, keys):
    rule = rf"{build.__name__}.* needs a funnel of two labels.*got the stages click, cart, buy\. Ch"
    with pytest.raises(InputError, match=rule):
        build(Schema(FIELDS, (), ("click", "cart", "buy"), funnel=True), **keys)


@pytest.mark.parametrize(
    ("build", "keys", "message"),
    [
        (ESCM2, {"clip_ratio": 0.99}, "model.clip_ratio must be a number in [1, inf), got 0.99"),
        (DCMT, {"clip_ratio": 0}, "model.clip_ratio must be a number in [1, inf), got 0"),
        (ESCM2, {"estimator": "mrdr"}, "model.estimator must be one of ips, dr; got 'mrdr'"),
        (ESCM2, {**DR, "self_normalise": True}, "model.self_normalise must be false for est"),
        (ESCM2, {"experts": -1}, "model.experts must be an integer from 0 to 10000, got -1"),
        (ESCM2, {"cvr_weight": -1}, "model.cvr_weight must be a number in [0, inf), got -1"),
        (DCMT, {"agreement_weight": "a"}, "model.agreement_weight must be a number in"),
        (ESMM, {"clicked_weight": -1}, "model.clicked_weight must be a number in [0, inf)"),
        (ESMM, {"unclicked_weight": 1.5}, "model.unclicked_weight must be a number in [0, 1]"),
        (ESMM, {"click_gate": 1}, "model.click_gate must be true or false, got 1"),
        (AITM, {"calibrator_weight": -1}, "model.calibrator_weight must be a number in"),
        (AITM, {"head_widths": [0]}, "model.head_widths must be an integer >= 1, got 0"),
        (AITM, {"head_widths": 8}, "model.head_widths must be a list of at least one width"),
    ],
)
def test_values_out_of_range_are_refused(build, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build(SCHEMA, **keys)


D, FIELD_COUNT, NUMERICALS = 128, 16, 63
INPUTS = D * (FIELD_COUNT + 1)


def linear(*widths):
    """Parameters of an MLP with these widths, the first that of its input."""
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


MMOE = 8 * linear(INPUTS, 512, 256) + 2 * linear(INPUTS, 8) + 2 * linear(256, 128, 64, 1)


@pytest.mark.parametrize(
    ("model", "keys", "expected", "ratio"),
    [
        (
            "aitm",
            {},
            2 * linear(INPUTS, 512, 256, 128, 64, 1) + linear(64, 64) + 3 * 64 * 64,
            0.257,
        ),
        (
            "aitm_mtreclib",
            {},
            2 * linear(INPUTS, 512, 256, 128, 64, 1) + linear(256, 256) + 3 * 256 * 256,
            0.281,
        ),
        (
            "aitm_10m",
            {},
            2 * linear(INPUTS, 2048, 256, 128, 64, 1) + linear(64, 64) + 3 * 64 * 64,
            0.998,
        ),
        ("esmm_10m", {}, 2 * linear(INPUTS, 2048, 256, 128, 64, 1), 0.996),
        ("naive_cvr", {}, 2 * linear(INPUTS, 512, 256, 128, 64, 1), 0.255),
        ("escm2", {}, MMOE, 1.0),
        ("escm2", DR, MMOE + linear(INPUTS, 8) + linear(256, 128, 64, 1), 1.006),
        ("dcmt", {}, MMOE + linear(64, 1), 1.0),
    ],
)
def test_parameters_are_those_of_the_layout(model, keys, expected, ratio):
    fields = tuple(CategoricalField(f"c{i}", 9) for i in range(FIELD_COUNT))
    numerical = tuple(f"n{i}" for i in range(NUMERICALS))
    schema = Schema(fields, numerical, ("click", "conversion"), funnel=True)
    config = group_config("model", model, model)
    with torch.device("meta"):
        network = instantiate(config, _partial_=True, _convert_="all")(schema=schema, **keys)

    found = sum(p.numel() for n, p in network.named_parameters() if not n.startswith("input."))

    assert found == expected
    assert math.isclose(found / 10_084_882, ratio, abs_tol=5e-4)
