"""Towers that start equal, in every model that has towers."""

import numpy as np
import pytest
import torch
from torch import nn

from mtnrec.checks import InputError
from mtnrec.model.adatt import AdaTT
from mtnrec.model.aitm import AITM
from mtnrec.model.dcmt import DCMT
from mtnrec.model.escm2 import ESCM2
from mtnrec.model.esmm import ESMM
from mtnrec.model.loss import cross_entropies
from mtnrec.model.mlp import init_towers
from mtnrec.model.mmoe import MMoE
from mtnrec.model.naive_cvr import NaiveCVR
from mtnrec.model.omoe import OMoE
from mtnrec.model.ple import PLE
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.model.single_task import SingleTask
from mtnrec.model.stem import STEM
from mtnrec.schema import CategoricalField, Schema

EXPERTS = {"experts": 2, "expert_widths": [7]}
LEVELS = {"task_experts": 2, "levels": [[7]]}
MODELS = {
    "shared_bottom": (SharedBottom, {"bottom_widths": [7]}),
    "esmm": (ESMM, {"batch_norm": True}),
    "esmm_with_experts": (ESMM, EXPERTS),
    "naive_cvr": (NaiveCVR, {}),
    "escm2": (ESCM2, EXPERTS | {"estimator": "dr"}),
    "dcmt": (DCMT, EXPERTS),
    "aitm": (AITM, {"head_widths": [4]}),
    "mmoe": (MMoE, EXPERTS | {"personal_fields": ["categorical_1"]}),
    "omoe": (OMoE, EXPERTS),
    "ple": (PLE, LEVELS | {"experts": 2}),
    "adatt": (AdaTT, LEVELS),
    "single_task": (SingleTask, {}),
    "stem": (STEM, EXPERTS | {"task_experts": 1, "gate_widths": [4]}),
}


@pytest.fixture(params=MODELS)
def build(request, funnel_schema):
    model, keys = MODELS[request.param]

    def make(**changes):
        torch.manual_seed(0)
        return model(funnel_schema, embedding_dim=6, tower_widths=[5, 4], **keys, **changes)

    return make


def unfoldings(network):
    """The task unfolding ``(T, O * I)`` of each depth."""
    return [
        np.stack([layer.weight.detach().numpy().ravel() for layer in depth])
        for depth in network.task_layers()
    ]


def test_the_default_is_independent_towers_of_full_rank(build):
    default, independent = build(), build(tower_init="independent")

    found = independent.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in default.state_dict().items())
    assert [np.linalg.matrix_rank(m) for m in unfoldings(default)] == [
        len(depth) for depth in default.task_layers()
    ]


def test_equal_towers_start_from_the_first_and_all_else_starts_as_before(build):
    independent, equal = build(), build(tower_init="equal")

    assert [np.linalg.matrix_rank(m) for m in unfoldings(equal)] == [1] * len(equal.task_layers())
    copied = {
        id(parameter)
        for depth in equal.task_layers()
        for layer in depth[1:]
        for parameter in layer.parameters()
    }
    others = dict(independent.named_parameters())
    for name, parameter in equal.named_parameters():
        assert id(parameter) in copied or torch.equal(parameter, others[name]), name
    for first, *rest in equal.task_layers():
        for layer in rest:
            assert torch.equal(layer.weight, first.weight)
            assert torch.equal(layer.bias, first.bias)
            assert layer.weight.data_ptr() != first.weight.data_ptr()


def test_equal_towers_are_functions_of_their_own_after_a_few_steps(
    build, funnel_schema, make_batch
):
    network, batch = build(tower_init="equal"), make_batch(funnel_schema, rows=64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    for _ in range(3):
        optimizer.zero_grad()
        cross_entropies(network(batch), batch.labels).sum().backward()
        optimizer.step()

    for first, second in network.task_layers():
        assert not torch.equal(first.weight, second.weight)


def test_a_single_tower_cannot_be_equal_to_another():
    schema = Schema((CategoricalField("a", 4),), ("x",), ("like",), funnel=False)

    for model in (SharedBottom, MMoE, SingleTask):
        message = (
            "model.tower_init must be independent where there is one tower, got equal. Leave it out"
        )
        with pytest.raises(InputError, match=message):
            model(schema, embedding_dim=2, tower_widths=[3], tower_init="equal")


def test_towers_of_different_shapes_are_refused():
    depths = [[nn.Linear(3, 2), nn.Linear(3, 2)], [nn.Linear(2, 4), nn.Linear(2, 5)]]

    init_towers(depths, "independent")
    with pytest.raises(
        InputError,
        match=r"model\.tower_init must be independent where towers differ in shape, got equal and "
        r"the shapes \(4, 2\), \(5, 2\) at depth 1\. Leave it out\.",
    ):
        init_towers(depths, "equal")


def test_other_starts_are_refused(funnel_schema):
    message = "model.tower_init must be one of independent, equal; got 'same'"
    with pytest.raises(InputError, match=message):
        ESMM(funnel_schema, embedding_dim=2, tower_widths=[3], tower_init="same")
