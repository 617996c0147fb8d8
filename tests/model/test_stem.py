"""STEM: which loss trains which embeddings, and against MMoE."""

import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.model.loss import cross_entropies
from mtnrec.model.stem import STEM
from mtnrec.schema import CategoricalField, Schema

SIZES = {"experts": 2, "task_experts": 3, "expert_widths": [9, 8], "gate_widths": [12, 10]}
FIELDS = (CategoricalField("a", 4), CategoricalField("b", 30))
SCHEMAS = {
    "funnel": Schema(FIELDS, ("x",), ("click", "conversion"), funnel=True),
    "independent": Schema(FIELDS, ("x",), ("like", "share", "buy"), funnel=False),
}


def build(schema, **keys):
    torch.manual_seed(0)
    sizes = {"embedding_dim": 5 * (len(schema.labels) + 1), **SIZES, **keys}
    return STEM(schema, embedding_init="per_field", tower_widths=[8, 6], **sizes).double()


def in_float64(batch):
    batch.numerical, batch.labels = batch.numerical.double(), batch.labels.double()
    return batch


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_loss_trains_the_embeddings_of_its_task_and_the_shared_ones_alone(schema, make_batch):
    network = build(SCHEMAS[schema])
    batch = in_float64(make_batch(SCHEMAS[schema], 64))
    tasks = len(SCHEMAS[schema].labels)

    for task in range(tasks):
        network.zero_grad()
        cross_entropies(network(batch), batch.labels)[task].backward()

        trained = [
            [bool(p.grad is not None and p.grad.any()) for p in part.parameters()]
            for part in network.inputs
        ]
        expected = [owner in (task, tasks) for owner in range(tasks + 1)]
        assert trained == [[reached] * 4 for reached in expected]


@pytest.mark.parametrize("task", [0, 1])
def test_a_loss_trains_the_experts_of_its_task_and_the_shared_ones_alone(task, make_batch):
    network = build(SCHEMAS["funnel"])
    batch = in_float64(make_batch(SCHEMAS["funnel"], 64))

    cross_entropies(network(batch), batch.labels)[task].backward()

    trained = [expert[0].weight.grad.ne(0).any().item() for expert in network.experts]
    own = [task == 0] * 3 + [task == 1] * 3
    assert trained == [*own, True, True]


def test_the_probability_of_a_task_depends_on_the_embeddings_of_the_other(make_batch):
    network = build(SCHEMAS["funnel"])
    batch = in_float64(make_batch(SCHEMAS["funnel"], 64))
    before = network(batch).positive

    with torch.no_grad():
        network.inputs[0].tables[1].weight.mul_(2)

    assert network(batch).positive.ne(before).any(dim=0).tolist() == [True, True]


@pytest.mark.parametrize(
    ("schema", "embedding_dim", "widths"),
    [
        ("funnel", 128, [42, 42]),  # two tasks and the shared embeddings
        ("independent", 128, [32, 32]),
        ("funnel", {"default": 128, "a": 10}, [3, 42]),
    ],
)
def test_a_value_has_about_as_many_embedding_columns_as_in_other_models(
    schema, embedding_dim, widths
):
    network = build(SCHEMAS[schema], embedding_dim=embedding_dim)

    assert [[t.embedding_dim for t in part.tables] for part in network.inputs] == [widths] * (
        len(SCHEMAS[schema].labels) + 1
    )


def test_task_layers_are_the_towers_and_shared_layers_all_experts():
    network = build(SCHEMAS["funnel"])

    assert [[layer.out_features for layer in depth] for depth in network.task_layers()] == [
        [8, 8],
        [6, 6],
        [1, 1],
    ]
    assert [len(depth) for depth in network.shared_layers()] == [8, 8]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 0}, "model.experts must be an integer from 1 to 10000, got 0"),
        ({"task_experts": 0}, "model.task_experts must be an integer from 1 to 10000, got 0"),
        ({"gate_widths": 8}, "model.gate_widths must be a list of at least one width, got 8"),
        ({"embedding_dim": 2}, "model.embedding_dim of STEM must be at least 3, .*got 2"),
        ({"embedding_dim": {"default": 9, "b": 1}}, "must be at least 3, .*got 1. Set at least 3"),
        ({"embedding_dim": "wide"}, "model.embedding_dim must be an integer >= 1, got 'wide'"),
    ],
)
def test_keys_out_of_range_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        build(SCHEMAS["funnel"], **keys)
