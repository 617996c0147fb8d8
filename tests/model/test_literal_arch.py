"""HEAC, STEM, cross network and personal gates against loops over layers; parameter counts."""

import dataclasses
import itertools

import pytest
import torch
from hydra.utils import instantiate
from reference import literal_arch
from torch import nn

from mtnrec.command.compose import group_config
from mtnrec.model.heac import HEAC
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.model.stem import STEM
from mtnrec.schema import CategoricalField, Schema

SIZES = [3, 40, 2]
SCHEMA = Schema(
    tuple(CategoricalField(f"c{i}", size) for i, size in enumerate(SIZES)),
    ("x", "y"),
    ("click", "conversion"),
    funnel=True,
)
EXPERTS = {"experts": 3, "expert_widths": [14, 12]}
TOWERS = {"tower_widths": [12, 10]}
# Class, embedding width, keys common to both, keys of ours, keys of the literal program.
CASES = {
    "heac": (HEAC, 5, {**EXPERTS, "critics": 2, "gate_widths": [12, 10]}, {}, {}),
    "stem": (STEM, 15, {**EXPERTS, **TOWERS, "task_experts": 2, "gate_widths": [12, 10]}, {}, {}),
    "cross": (
        MMoE,
        5,
        {**EXPERTS, **TOWERS},
        {"cross_layers": 3, "cross_rank": 4},
        {"cross": (3, 4), "personal": None},
    ),
    "personal": (
        MMoE,
        5,
        {**EXPERTS, **TOWERS},
        {"personal_fields": ["c2", "c1"]},
        {"cross": None, "personal": [2, 1]},
    ),
    "both": (
        MMoE,
        5,
        {**EXPERTS, **TOWERS},
        {"cross_layers": 1, "cross_rank": 4, "personal_fields": ["c1"]},
        {"cross": (1, 4), "personal": [1]},
    ),
}


def make_networks(case):
    build, width, common, ours, theirs = CASES[case]
    torch.manual_seed(1)
    network = build(SCHEMA, embedding_dim=width, embedding_init="per_field", **common, **ours)
    literal = getattr(literal_arch, build.__name__)(SIZES, 2, 5, **common, **theirs).double()
    network = network.double()
    literal.load_state_dict(network.state_dict())
    return network, literal


def in_float64(batch):
    return dataclasses.replace(
        batch, numerical=batch.numerical.double(), labels=batch.labels.double()
    )


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_a_loop_over_layers(case, rows, make_batch):
    network, literal = make_networks(case)
    batch = in_float64(make_batch(SCHEMA, rows))

    output = network(batch)
    cross_entropies(output, batch.labels).sum().backward()
    p = torch.stack(literal(batch.categorical, batch.numerical), dim=1)
    sum(nn.BCELoss()(p[:, task], batch.labels[:, task]) for task in range(2)).backward()

    torch.testing.assert_close(output.positive.exp(), p, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.negative.exp(), 1 - p, rtol=1e-10, atol=0)
    gradients = {name: parameter.grad for name, parameter in literal.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_outputs_are_float32(case, make_batch):
    network, batch = make_networks(case)[0].float(), make_batch(SCHEMA)

    with torch.autocast("cpu", torch.bfloat16):
        output = network(batch)

    assert output.positive.dtype == output.negative.dtype == torch.float32
    torch.testing.assert_close(output.positive, network(batch).positive, rtol=0.05, atol=0.05)


# STEM's own code has a shared gate behind the last experts that nothing reads.
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_gradient(case, make_batch):
    network, batch = make_networks(case)[0], in_float64(make_batch(SCHEMA, 256))

    cross_entropies(network(batch), batch.labels).sum().backward()

    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("case", CASES)
def test_a_hook_at_expert_outputs_sees_the_outputs_of_all_experts(case, make_batch):
    network, literal = make_networks(case)
    batch = in_float64(make_batch(SCHEMA))
    seen, expected = [], []
    network.expert_outputs.register_forward_hook(lambda _, inputs, output: seen.append(output))
    for expert in literal.experts:
        expert.register_forward_hook(lambda _, inputs, output: expected.append(output))

    network(batch)
    literal(batch.categorical, batch.numerical)

    torch.testing.assert_close(seen, [torch.stack(expected, dim=1)], rtol=1e-10, atol=1e-12)
    assert len(network.shared_layers()[0]) == len(expected)


@pytest.mark.parametrize("case", CASES)
def test_dropout_acts_in_training_only_and_batch_norm_normalises(case, make_batch):
    build, width, common, ours, _ = CASES[case]
    network = build(SCHEMA, embedding_dim=width, dropout=0.5, batch_norm=True, **common, **ours)
    batch = make_batch(SCHEMA)

    training = [network(batch).positive for _ in range(2)]
    network.eval()
    evaluating = [network(batch).positive for _ in range(2)]

    assert not torch.equal(*training)
    assert torch.equal(*evaluating)
    assert any(isinstance(part, nn.BatchNorm1d) for part in network.modules())


# 16 categorical fields and a vector of all numerical features, 128 columns each in MMoE.
ALIEXPRESS = Schema(
    tuple(CategoricalField(f"c{i}", 10) for i in range(16)),
    ("x",),
    ("click", "conversion"),
    funnel=True,
)
WIDTH, STEM_WIDTH = 17 * 128, 17 * 42
MMOE = 10_084_882


def linear(*widths):
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


TOWER = linear(256, 128, 64, 1)
PERSONAL = linear(2 * 128 + 256, 128, 128) + linear(2 * 128 + 256, 64, 64)
COUNTS = {  # model, keys, parameters but those of embeddings and numerical maps, ratio to MMoE
    "heac": (
        "heac",
        {},
        8 * linear(WIDTH, 512, 256)
        + 2 * 128  # the tasks' vectors
        + linear(256, 128, 8)
        + linear(256, 128, 5)
        + 5 * linear(256, 1),
        ".995",
    ),
    "stem": (
        "stem",
        {},
        20 * linear(STEM_WIDTH, 512, 256) + 2 * linear(STEM_WIDTH, 128, 64, 20) + 2 * TOWER,
        "1.015",
    ),
    "small_stem": (
        "stem",
        {"experts": 4, "task_experts": 2},
        8 * linear(STEM_WIDTH, 512, 256) + 2 * linear(STEM_WIDTH, 128, 64, 8) + 2 * TOWER,
        ".423",
    ),
    "mmoe_cross": (
        "mmoe_cross",
        {},
        7 * linear(WIDTH, 512, 256)
        + 2 * linear(WIDTH, 7)
        + 2 * TOWER
        + 3 * (2 * WIDTH * 64 + WIDTH),
        ".960",
    ),
    "personal": ("mmoe", {"personal_fields": ["c0", "c5"]}, MMOE + 2 * PERSONAL, "1.024"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_parameters_are_those_of_the_closed_form(case):
    model, keys, count, ratio = COUNTS[case]
    config = group_config("model", model, None)
    with torch.device("meta"):
        build = instantiate(config, _partial_=True, _convert_="all")
        network = build(schema=ALIEXPRESS, **keys)

    parameters = {name: p.numel() for name, p in network.named_parameters()}

    embeddings = sum(size for name, size in parameters.items() if ".tables." in name)
    maps = sum(size for name, size in parameters.items() if ".numerical." in name)
    width = 3 * 42 if model == "stem" else 128  # of all tables together
    assert embeddings == 16 * 10 * width
    assert maps == linear(1, width)
    assert sum(parameters.values()) - embeddings - maps == count
    assert f"{count / MMOE:.3f}".lstrip("0") == ratio
