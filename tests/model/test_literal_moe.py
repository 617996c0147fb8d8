"""Single-task, OMoE, PLE and AdaTT-sp against loops over layers, and their parameter counts."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from reference import literal_moe

from mtnrec.checks import InputError
from mtnrec.command.compose import group_config
from mtnrec.model.adatt import AdaTT
from mtnrec.model.loss import cross_entropies
from mtnrec.model.network import count_parameters
from mtnrec.model.omoe import OMoE
from mtnrec.model.ple import PLE
from mtnrec.model.single_task import SingleTask
from mtnrec.schema import CategoricalField, Schema

SIZES = [3, 40, 2]
FIELDS = tuple(CategoricalField(f"c{i}", size) for i, size in enumerate(SIZES))
SCHEMAS = {
    "funnel": Schema(FIELDS, ("x", "y"), ("click", "conversion"), funnel=True),
    "independent": Schema(FIELDS, ("x", "y"), ("like", "share", "buy"), funnel=False),
}
CASES = {
    "single_task": (SingleTask, "single_task", {"tower_widths": [7, 6, 4]}),
    "omoe": (OMoE, "omoe", {"experts": 3, "expert_widths": [7, 6], "tower_widths": [4, 3]}),
    "cgc": (PLE, "ple", {"experts": 3, "task_experts": 2, "levels": [[7, 6]]}),
    "ple": (PLE, "ple", {"experts": 2, "task_experts": 3, "levels": [[7], [6, 5], [4]]}),
    "shared_alone": (PLE, "ple", {"experts": 2, "task_experts": 0, "levels": [[7], [6]]}),
    "adatt": (AdaTT, "adatt", {"task_experts": 2, "levels": [[7], [6, 5], [4]]}),
    "one_own": (AdaTT, "adatt", {"task_experts": 1, "levels": [[7], [6]]}),
}


def make_networks(case, schema):
    build, name, sizes = CASES[case]
    sizes = {"tower_widths": [4, 3], **sizes}
    torch.manual_seed(1)
    network = build(schema, embedding_dim=5, embedding_init="per_field", **sizes).double()
    rows = partial(literal_moe.Row, SIZES, len(schema.numerical), 5)
    literal = literal_moe.MODELS[name](rows, len(schema.labels), **sizes).double()
    literal.load_state_dict(network.state_dict())
    return network, literal


def in_float64(batch):
    return dataclasses.replace(
        batch, numerical=batch.numerical.double(), labels=batch.labels.double()
    )


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_a_loop_over_layers(case, schema, rows, make_batch):
    schema = SCHEMAS[schema]
    network, literal = make_networks(case, schema)
    batch = in_float64(make_batch(schema, rows))

    output = network(batch)
    cross_entropies(output, batch.labels).sum().backward()
    expected = literal(batch.categorical, batch.numerical)
    losses = [torch.nn.BCELoss()(p, batch.labels[:, t]) for t, p in enumerate(expected)]
    sum(losses).backward()

    p = torch.stack(expected, dim=1)
    torch.testing.assert_close(output.positive.exp(), p, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.negative.exp(), 1 - p, rtol=1e-10, atol=0)
    gradients = {name: parameter.grad for name, parameter in literal.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_outputs_are_float32(case, make_batch):
    network = make_networks(case, SCHEMAS["funnel"])[0].float()
    batch = make_batch(SCHEMAS["funnel"])

    with torch.autocast("cpu", torch.bfloat16):
        output = network(batch)

    assert output.positive.dtype == output.negative.dtype == torch.float32
    torch.testing.assert_close(output.positive, network(batch).positive, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_is_of_the_input_a_gate_or_a_layer_that_mtn_can_reach(case):
    network, _ = make_networks(case, SCHEMAS["funnel"])

    depths = [*network.task_layers(), *network.shared_layers()]

    reached = [id(p) for depth in depths for layer in depth for p in layer.parameters()]
    names = {n for n, p in network.named_parameters() if id(p) not in reached}
    assert len(set(reached)) == len(reached)
    assert all(n.startswith("input") or "gate" in n or n.endswith("own_weights") for n in names)
    for depth in depths:
        assert len({tuple(layer.weight.shape) for layer in depth}) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case != "single_task"])
def test_a_hook_at_expert_outputs_sees_all_experts_of_the_last_level(case, make_batch):
    network, literal = make_networks(case, SCHEMAS["funnel"])
    batch = in_float64(make_batch(SCHEMAS["funnel"]))
    seen, expected = [], []
    network.expert_outputs.register_forward_hook(lambda _, inputs, output: seen.append(output))
    level = literal if case == "omoe" else literal.levels[-1]
    for expert in level.experts:
        expert.register_forward_hook(
            lambda module, inputs, output: expected.append((module, output))
        )

    network(batch)
    literal(batch.categorical, batch.numerical)

    outputs = dict(expected)
    expected = torch.stack([outputs[expert] for expert in level.experts], dim=1)
    torch.testing.assert_close(seen, [expected], rtol=1e-10, atol=1e-12)
    assert expected.shape[1] == len(network.shared_layers()[0])


@pytest.mark.parametrize("case", CASES)
def test_dropout_acts_in_training_only_and_batch_norm_normalises(case, make_batch):
    build, _, sizes = CASES[case]
    schema = SCHEMAS["funnel"]
    network = build(schema, embedding_dim=5, dropout=0.5, batch_norm=True, **sizes)
    batch = make_batch(schema)

    training = [network(batch).positive for _ in range(2)]
    network.eval()
    evaluating = [network(batch).positive for _ in range(2)]

    assert not torch.equal(*training)
    assert torch.equal(*evaluating)
    assert any(isinstance(part, torch.nn.BatchNorm1d) for part in network.modules())


# 16 categorical fields and a vector of all numerical features, 128 columns each.
ALIEXPRESS = Schema(
    tuple(CategoricalField(f"c{i}", 10) for i in range(16)),
    ("x",),
    ("click", "conversion"),
    funnel=True,
)
WIDTH = 17 * 128
MMOE = 10_084_882


def linear(*widths):
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


TOWERS = 2 * linear(256, 128, 64, 1)
COUNTS = {
    "mmoe": (8 * linear(WIDTH, 512, 256) + 2 * linear(WIDTH, 8) + TOWERS, "1.000"),
    "shared_bottom": (linear(WIDTH, 512, 256) + TOWERS, ".132"),
    "shared_bottom_10m": (linear(WIDTH, 4096, 256) + TOWERS, ".996"),
    "esmm": (2 * linear(WIDTH, 512, 256, 128, 64, 1), ".255"),
    "esmm_10m": (2 * linear(WIDTH, 2048, 256, 128, 64, 1), ".996"),
    "single_task": (2 * linear(WIDTH, 512, 256, 128, 64, 1), ".255"),
    "single_task_10m": (2 * linear(WIDTH, 2048, 256, 128, 64, 1), ".996"),
    "omoe": (8 * linear(WIDTH, 512, 256) + linear(WIDTH, 8) + TOWERS, ".998"),
    "ple": (
        8 * (linear(WIDTH, 512) + linear(512, 256))
        + 2 * (linear(WIDTH, 6) + linear(512, 6))
        + linear(WIDTH, 8)
        + TOWERS,
        "1.001",
    ),
    "ple_mtreclib": (
        12 * (linear(WIDTH, 512) + linear(512, 256))
        + 2 * (linear(WIDTH, 8) + linear(512, 8))
        + linear(WIDTH, 12)
        + TOWERS,
        "1.498",
    ),
    "adatt": (
        8 * (linear(WIDTH, 512) + linear(512, 256))
        + 2 * (linear(WIDTH, 8) + linear(512, 8))
        + 2 * 2 * 4
        + TOWERS,
        "1.001",
    ),
}


@pytest.mark.parametrize("model", COUNTS)
def test_parameters_are_those_of_the_closed_form(model):
    config = group_config("model", model, None)
    with torch.device("meta"):
        network = instantiate(config, _partial_=True, _convert_="all")(schema=ALIEXPRESS)

    counts = count_parameters(network)

    inputs = 2 if model.startswith("single_task") else 1
    count, ratio = COUNTS[model]
    assert counts["embeddings"] == inputs * 16 * 10 * 128
    assert counts["network"] == count + inputs * linear(1, 128)  # the numerical map
    assert f"{count / MMOE:.3f}".lstrip("0") == ratio


@pytest.mark.parametrize(
    ("build", "keys", "message"),
    [
        (OMoE, {"experts": 0}, "model.experts must be an integer from .*, got 0"),
        (PLE, {"experts": 0}, "model.experts must be an integer from .*, got 0"),
        (PLE, {"task_experts": -1}, "model.task_experts must be an integer from .*, got -1"),
        (AdaTT, {"task_experts": 0}, "model.task_experts must be an integer from .*, got 0"),
        (
            PLE,
            {"levels": []},
            r"model.levels must be a list with the expert .* \[256\]\], got \[\]",
        ),
        (PLE, {"levels": 512}, r"model.levels must be a list with the expert widths .*, got 512"),
        (PLE, {"levels": [512, 256]}, "model.levels must be a list of at least one .*, got 512"),
        (
            AdaTT,
            {"levels": [[512], []]},
            r"model.levels must be a list of at least one .*, got \[\]",
        ),
        (AdaTT, {"levels": [[8, 0]]}, "model.levels must be an integer >= 1, got 0"),
        (SingleTask, {"tower_widths": []}, "model.tower_widths must be a list of at least one"),
    ],
)
def test_sizes_out_of_range_are_refused(build, keys, message):
    with pytest.raises(InputError, match=message):
        build(SCHEMAS["funnel"], **keys)
