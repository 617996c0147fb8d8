"""Single-task: joint training equals separate trainings, and MTN alone couples the networks."""

import dataclasses
from functools import partial

import pytest
import torch
from reference import literal_moe

from mtnrec.model.esmm import ESMM
from mtnrec.model.loss import cross_entropies
from mtnrec.model.network import count_parameters
from mtnrec.model.single_task import SingleTask

STEPS = 20


@pytest.fixture
def network(funnel_schema):
    torch.manual_seed(0)
    keys = {"embedding_dim": 4, "embedding_init": "per_field", "tower_widths": [7, 5]}
    return SingleTask(funnel_schema, **keys).double()


def in_float64(batch):
    return dataclasses.replace(
        batch, numerical=batch.numerical.double(), labels=batch.labels.double()
    )


def test_steps_of_adam_equal_those_of_separate_trainings(network, funnel_schema, make_batch):
    sizes = [field.vocabulary_size for field in funnel_schema.categorical]
    rows = partial(literal_moe.Row, sizes, len(funnel_schema.numerical), 4)
    batches = [in_float64(make_batch(funnel_schema, 32, seed)) for seed in range(STEPS)]
    start = {name: weights.clone() for name, weights in network.state_dict().items()}

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropies(network(batch), batch.labels).sum().backward()
        optimizer.step()

    found = network.state_dict()
    for task in range(2):
        alone = literal_moe.SingleTask(rows, 1, [7, 5]).double()
        own = {
            name: f"{part}.{task}.{rest}"
            for name in alone.state_dict()
            for part, _, rest in [name.split(".", 2)]
        }
        alone.load_state_dict({name: start[own[name]] for name in own})
        optimizer = torch.optim.Adam(alone.parameters(), lr=1e-3)
        for batch in batches:
            optimizer.zero_grad()
            (p,) = alone(batch.categorical, batch.numerical)
            torch.nn.BCELoss()(p, batch.labels[:, task]).backward()
            optimizer.step()
        for name, weights in alone.state_dict().items():
            torch.testing.assert_close(found[own[name]], weights, rtol=0, atol=1e-12)
            if "tables" not in name:  # a table may have one row that is never updated
                assert not torch.equal(weights, start[own[name]])


@pytest.mark.parametrize("task", [0, 1])
def test_a_loss_has_no_gradient_for_the_other_network(task, network, funnel_schema, make_batch):
    batch = in_float64(make_batch(funnel_schema))

    cross_entropies(network(batch), batch.labels)[task].backward()

    for name, parameter in network.named_parameters():
        own = int(name.split(".")[1]) == task
        gradient = torch.zeros(1) if parameter.grad is None else parameter.grad
        assert gradient.ne(0).any() == own, name


def test_the_embeddings_take_as_many_times_the_parameters_as_there_are_labels(funnel_schema):
    keys = {"embedding_dim": 4, "tower_widths": [7, 5]}

    own, shared = (count_parameters(b(funnel_schema, **keys)) for b in (SingleTask, ESMM))

    numerical_map = 4 * (len(funnel_schema.numerical) + 1)
    assert own["embeddings"] == 2 * shared["embeddings"] == 2 * 4 * (3 + 40 + 2)
    assert own["network"] == shared["network"] + numerical_map
