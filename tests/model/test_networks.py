"""The networks against the formulas, written out layer by layer in float64."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from mtnrec.batch import Batch
from mtnrec.checks import InputError
from mtnrec.model.esmm import ESMM
from mtnrec.model.feature_input import FeatureInput
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mmoe import MMoE
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.schema import CategoricalField, Schema

BUILD = {
    "shared_bottom": lambda schema, **keys: SharedBottom(
        schema, bottom_widths=[7, 6], tower_widths=[4, 3], **keys
    ),
    "esmm": lambda schema, **keys: ESMM(schema, tower_widths=[7, 6, 4], **keys),
    "mmoe": lambda schema, **keys: MMoE(
        schema, experts=3, expert_widths=[7, 6], tower_widths=[4, 3], **keys
    ),
}
PLAIN = {"embedding_dim": 5, "dropout": 0.0, "batch_norm": False, "bag_mode": "mean"}
INDEPENDENT = Schema(
    (CategoricalField("a", 4), CategoricalField("b", 30)), ("x",), ("like", "share", "buy"), False
)


def fields(*sizes, letter="c"):
    return tuple(CategoricalField(f"{letter}{i}", size) for i, size in enumerate(sizes))


def bag_vectors(table, bags, bag_mode):
    """Row by row and token by token."""
    rows = []
    for start, end in itertools.pairwise(bags.offsets.tolist()):
        row = torch.zeros(table.shape[1], dtype=table.dtype)
        for token, weight in zip(bags.tokens[start:end], bags.weights[start:end], strict=True):
            share = weight / bags.weights[start:end].sum() if bag_mode == "mean" else weight
            row = row + share * table[token]
        rows.append(row)
    return torch.stack(rows)


def wide_row(weights, batch, bag_mode="mean"):
    columns = []
    for field in range(batch.categorical.shape[1]):
        columns.append(weights[f"input.tables.{field}.weight"][batch.categorical[:, field].long()])
    for field, bags in enumerate(batch.bags):
        columns.append(bag_vectors(weights[f"input.bag_tables.{field}.weight"], bags, bag_mode))
    if "input.numerical.weight" in weights:
        bias = weights["input.numerical.bias"]
        columns.append(batch.numerical @ weights["input.numerical.weight"].T + bias)
    return torch.cat(columns, dim=1)


def dense(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mlp(weights, name, x, hidden_layers):
    for layer in range(hidden_layers):
        x = dense(weights, f"{name}.{2 * layer}", x).clamp(min=0)
    return x


def tower_probability(weights, name, x, hidden_layers):
    hidden = mlp(weights, name, x, hidden_layers)
    return torch.sigmoid(dense(weights, f"{name}.{2 * hidden_layers}", hidden)[:, 0])


def reference(model, weights, batch, labels, bag_mode="mean"):
    """Probabilities of the labels, ``(B, T)``."""
    x = wide_row(weights, batch, bag_mode)
    if model == "esmm":
        click, conversion = (tower_probability(weights, f"towers.{t}", x, 3) for t in range(2))
        return torch.stack([click, click * conversion], dim=1)
    if model == "shared_bottom":
        inputs = [mlp(weights, "bottom", x, 2)] * labels
    else:
        experts = [mlp(weights, f"experts.{e}", x, 2) for e in range(3)]
        inputs = []
        for task in range(labels):
            gate = torch.exp(dense(weights, f"gates.{task}", x))
            shares = gate / gate.sum(dim=1, keepdim=True)
            inputs.append(sum(shares[:, e : e + 1] * experts[e] for e in range(3)))
    towers = [tower_probability(weights, f"towers.{t}", x, 2) for t, x in enumerate(inputs)]
    return torch.stack(towers, dim=1)


def in_float64(network, batch):
    bags = tuple(dataclasses.replace(b, weights=b.weights.double()) for b in batch.bags)
    return network.double(), dataclasses.replace(
        batch, numerical=batch.numerical.double(), labels=batch.labels.double(), bags=bags
    )


SCHEMAS = {
    "mixed": Schema(fields(3, 40, 2, 1), ("x", "y"), ("click", "conversion"), funnel=True),
    "all_large": Schema(fields(40, 60), ("x",), ("click", "conversion"), funnel=True),
    "no_numerical": Schema(fields(3, 40), (), ("click", "conversion"), funnel=True),
    "no_categorical": Schema((), ("x", "y"), ("click", "conversion"), funnel=True),
    "multivalued": Schema(
        fields(3, 40),
        ("x",),
        ("click", "conversion"),
        funnel=True,
        multivalued=fields(4, 30, letter="m"),
    ),
    "bags_alone": Schema((), (), ("click", "conversion"), funnel=True, multivalued=fields(30)),
    "all_small": Schema(fields(3, 2), ("x",), ("click", "conversion"), funnel=True),
    "widths": Schema(
        fields(3, 40, 9, 6, 20),
        ("x", "y"),
        ("click", "conversion"),
        funnel=True,
        multivalued=(CategoricalField("history", 4), CategoricalField("1_4", 30)),
    ),
}
# c0 and c3 are looked up, c2 is no wider than its vectors; YAML makes a number of 1_4.
WIDTHS = {"widths": {"default": 5, "c0": 2, "c1": 7, "c2": 9, "c3": 1, "history": 3, 14: 4}}


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("model", BUILD)
def test_outputs_and_gradients_equal_the_formulas(model, schema, rows, make_batch):
    keys = PLAIN | {"embedding_dim": WIDTHS.get(schema, 5)}
    schema = SCHEMAS[schema]
    torch.manual_seed(1)
    network, batch = in_float64(BUILD[model](schema, **keys), make_batch(schema, rows))
    weights = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()}

    output = network(batch)
    cross_entropies(output, batch.labels).sum().backward()
    p = reference(model, weights, batch, len(schema.labels))
    y = batch.labels
    (-(y * p.log() + (1 - y) * (1 - p).log()).mean(dim=0).sum()).backward()

    torch.testing.assert_close(output.positive.exp(), p, rtol=1e-11, atol=0)
    torch.testing.assert_close(output.negative.exp(), 1 - p, rtol=1e-11, atol=0)
    for name, parameter in network.named_parameters():
        expected = weights[name].grad  # None where the only bag is empty
        expected = torch.zeros_like(parameter) if expected is None else expected
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("model", BUILD)
def test_float32_equals_the_formulas_up_to_rounding(model, schema, make_batch):
    keys = PLAIN | {"embedding_dim": WIDTHS.get(schema, 5)}
    schema = SCHEMAS[schema]
    torch.manual_seed(1)
    network, batch = BUILD[model](schema, **keys), make_batch(schema, 64)
    weights = {n: p.detach().double().requires_grad_() for n, p in network.named_parameters()}

    output = network(batch)
    cross_entropies(output, batch.labels).sum().backward()
    _, batch = in_float64(torch.nn.Identity(), batch)
    p = reference(model, weights, batch, len(schema.labels))
    y = batch.labels
    (-(y * p.log() + (1 - y) * (1 - p).log()).mean(dim=0).sum()).backward()

    torch.testing.assert_close(output.positive.exp().double(), p, rtol=1e-5, atol=0)
    for name, parameter in network.named_parameters():
        error = torch.linalg.vector_norm(parameter.grad - weights[name].grad)
        assert error <= 1e-5 * torch.linalg.vector_norm(weights[name].grad), name


def test_a_field_has_the_width_it_is_given(make_batch):
    network = BUILD["esmm"](SCHEMAS["widths"], **PLAIN | {"embedding_dim": WIDTHS["widths"]})

    tables = [*network.input.tables, *network.input.bag_tables]
    assert [table.weight.shape[1] for table in tables] == [2, 7, 9, 1, 5, 3, 4]
    assert network.input.numerical.out_features == 5
    assert network.input(make_batch(SCHEMAS["widths"])).shape == (16, network.input.out_features)


def test_equal_widths_per_field_equal_one_width_for_all(funnel_schema, make_batch):
    networks = []
    for embedding_dim in (5, {"default": 5, "categorical_1": 5}):
        torch.manual_seed(0)
        networks.append(BUILD["mmoe"](funnel_schema, **PLAIN | {"embedding_dim": embedding_dim}))

    one, several = (network(make_batch(funnel_schema)).positive for network in networks)

    assert torch.equal(one, several)


@pytest.mark.parametrize(
    ("embedding_dim", "message"),
    [
        (
            {"default": 5, "c7": 2, 205: 2},
            r"must name fields of the data \(c0, c1\), got 'c7', '205'",
        ),
        ({"c0": 2}, r"must have a default for unnamed fields, got {'c0': 2}"),
        ({"default": 0}, "model.embedding_dim.default must be an integer >= 1, got 0"),
        ({"default": 5, "c1": 2.5}, "model.embedding_dim.c1 must be an integer >= 1, got 2.5"),
        ("wide", "model.embedding_dim must be an integer >= 1, got 'wide'"),
    ],
)
def test_widths_that_fit_no_field_are_refused(embedding_dim, message):
    schema = Schema(fields(3, 40), (), ("click", "conversion"), funnel=True)

    with pytest.raises(InputError, match=message):
        BUILD["esmm"](schema, **PLAIN | {"embedding_dim": embedding_dim})


@pytest.mark.parametrize("model", BUILD)
def test_bags_can_be_summed(model, make_batch):
    schema = SCHEMAS["multivalued"]
    network, batch = in_float64(
        BUILD[model](schema, **PLAIN | {"bag_mode": "sum"}), make_batch(schema)
    )

    output = network(batch)

    expected = reference(model, dict(network.named_parameters()), batch, 2, bag_mode="sum")
    torch.testing.assert_close(output.positive.exp(), expected, rtol=1e-10, atol=1e-12)


def test_a_bag_whose_weights_are_all_zero_equals_an_empty_one(make_batch):
    schema = SCHEMAS["multivalued"]
    network, batch = BUILD["esmm"](schema, **PLAIN), make_batch(schema)
    for bags in batch.bags:
        bags.weights[:] = 0

    rows = network.input(batch)
    cross_entropies(network(batch), batch.labels).sum().backward()

    assert rows[:, 10:20].eq(0).all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("model", ["shared_bottom", "mmoe"])
def test_three_independent_labels_have_a_tower_each(model, make_batch):
    network, batch = in_float64(BUILD[model](INDEPENDENT, **PLAIN), make_batch(INDEPENDENT))

    output = network(batch)

    expected = reference(model, dict(network.named_parameters()), batch, 3)
    torch.testing.assert_close(output.positive.exp(), expected, rtol=1e-10, atol=1e-12)
    assert [len(depth) for depth in network.task_layers()] == [3, 3, 3]


def test_esmm_demands_a_funnel():
    with pytest.raises(InputError, match=r"ESMM needs a funnel.*like, share, buy.*shared_bottom"):
        BUILD["esmm"](INDEPENDENT, **PLAIN)


@pytest.mark.parametrize("model", BUILD)
def test_fp32_agrees_with_fp64(model, funnel_schema, make_batch):
    network = BUILD[model](funnel_schema, **PLAIN)
    batch = make_batch(funnel_schema)

    single = network(batch).positive
    double = network.double()(in_float64(network, batch)[1]).positive

    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", BUILD)
def test_half_precision_outputs_are_float32(model, funnel_schema, make_batch):
    network = BUILD[model](funnel_schema, **PLAIN)

    with torch.autocast("cpu", torch.bfloat16):
        output = network(make_batch(funnel_schema))

    assert output.positive.dtype == output.negative.dtype == torch.float32
    reference_output = network(make_batch(funnel_schema))
    torch.testing.assert_close(output.positive, reference_output.positive, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("model", BUILD)
def test_task_layers_are_the_towers_linear_layers_in_order(model, funnel_schema):
    network = BUILD[model](funnel_schema, **PLAIN)

    depths = network.task_layers()

    widths = [7, 6, 4, 1] if model == "esmm" else [4, 3, 1]
    assert [depth[0].out_features for depth in depths] == widths
    tower_parameters = {id(p) for p in network.towers.parameters()}
    found = {id(p) for depth in depths for layer in depth for p in layer.parameters()}
    assert found == tower_parameters


def test_only_mmoe_has_shared_layers_side_by_side(funnel_schema):
    shared = {name: build(funnel_schema, **PLAIN).shared_layers() for name, build in BUILD.items()}

    assert shared["shared_bottom"] == shared["esmm"] == []
    assert [len(depth) for depth in shared["mmoe"]] == [3, 3]


def test_a_hook_at_expert_outputs_sees_the_outputs_of_the_experts(funnel_schema, make_batch):
    network, batch = in_float64(BUILD["mmoe"](funnel_schema, **PLAIN), make_batch(funnel_schema))
    seen = []
    network.expert_outputs.register_forward_hook(lambda _, inputs, output: seen.append(output))

    network(batch)

    weights = dict(network.named_parameters())
    x = wide_row(weights, batch)
    experts = torch.stack([mlp(weights, f"experts.{e}", x, 2) for e in range(3)], dim=1)
    torch.testing.assert_close(seen, [experts], rtol=1e-10, atol=1e-12)
    assert {name.split(".")[0] for name in network.state_dict()} == {
        "input",
        "experts",
        "gates",
        "towers",
    }


def test_dropout_acts_in_training_only(funnel_schema, make_batch):
    network = BUILD["mmoe"](funnel_schema, **PLAIN | {"dropout": 0.5})
    batch = make_batch(funnel_schema)

    training = [network(batch).positive for _ in range(2)]
    network.eval()
    evaluating = [network(batch).positive for _ in range(2)]

    assert not torch.equal(*training)
    assert torch.equal(*evaluating)


def test_batch_norm_follows_each_hidden_linear_layer(funnel_schema, make_batch):
    network = BUILD["esmm"](funnel_schema, **PLAIN | {"batch_norm": True})

    pairs = itertools.pairwise(network.towers[0])
    after_linear = [type(b).__name__ for a, b in pairs if isinstance(a, torch.nn.Linear)]
    assert after_linear == ["BatchNorm1d"] * 3
    assert network(make_batch(funnel_schema)).positive.isfinite().all()


def test_missing_values_start_neutral(funnel_schema):
    network = BUILD["esmm"](funnel_schema, **PLAIN)

    assert all(table.weight[0].eq(0).all() for table in network.input.tables)
    assert all(table.weight[1:].ne(0).any() for table in network.input.tables)


def test_a_data_set_without_features_is_refused():
    with pytest.raises(InputError, match="must have at least one feature"):
        BUILD["esmm"](Schema((), (), ("click", "conversion"), funnel=True), **PLAIN)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embedding_dim": 0}, "model.embedding_dim must be an integer >= 1, got 0"),
        ({"tower_widths": []}, "model.tower_widths must be a list of at least one width"),
        ({"tower_widths": [8, -1]}, "model.tower_widths must be an integer >= 1, got -1"),
        ({"tower_widths": 8}, "model.tower_widths must be a list"),
        ({"bottom_widths": ["a"]}, "model.bottom_widths must be an integer >= 1, got 'a'"),
        ({"dropout": 1.0}, r"model.dropout must be a number in \[0, 1\), got 1.0"),
        ({"batch_norm": 1}, "model.batch_norm must be true or false, got 1"),
        ({"bag_mode": "max"}, "model.bag_mode must be one of mean, sum; got 'max'"),
    ],
)
def test_sizes_out_of_range_are_refused(keys, message, funnel_schema):
    sizes = {"embedding_dim": 4, "bottom_widths": [4], "tower_widths": [4], **PLAIN, **keys}

    with pytest.raises(InputError, match=message):
        SharedBottom(funnel_schema, **sizes)


def test_scoring_needs_no_labels(funnel_schema, make_batch):
    batch = make_batch(funnel_schema)
    unlabelled = Batch(batch.categorical, batch.numerical)

    network = BUILD["esmm"](funnel_schema, **PLAIN)

    assert torch.equal(network(unlabelled).positive, network(batch).positive)


SIZES = [3, 50, 1200]
CATEGORICAL = Schema(
    tuple(CategoricalField(f"f{n}", size) for n, size in enumerate(SIZES)),
    (),
    ("click", "conversion"),
    funnel=True,
)


def made_vectors(**keys):
    torch.manual_seed(0)
    return [table.weight.detach() for table in FeatureInput(CATEGORICAL, 16, "mean", **keys).tables]


def test_embeddings_start_as_rows_of_one_table_for_all_fields():
    torch.manual_seed(1)
    joint = nn.init.xavier_uniform_(torch.empty(sum(SIZES), 16))  # MTReclib's

    found = made_vectors()

    for vectors in found:
        assert vectors[1:].abs().max() <= joint.abs().max() * 1.001
        assert torch.equal(vectors[0], torch.zeros(16))  # missing or unseen
    for vectors in found[1:]:
        assert vectors[1:].std().item() == pytest.approx(joint.std().item(), rel=0.05)


def test_embeddings_may_start_as_one_table_per_field():
    torch.manual_seed(0)
    tables = [nn.Embedding(size, 16) for size in SIZES]  # their constructors draw as well
    expected = [nn.init.xavier_uniform_(table.weight).detach() for table in tables]

    for vectors, table in zip(made_vectors(embedding_init="per_field"), expected, strict=True):
        assert torch.equal(vectors[1:], table[1:])


def test_an_unknown_initialisation_of_the_embeddings_is_refused():
    message = "model.embedding_init must be one of joint, per_field; got 'large'"
    with pytest.raises(InputError, match=message):
        FeatureInput(CATEGORICAL, 16, "mean", "large")
