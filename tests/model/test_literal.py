"""The networks at their full sizes against the program that computes the layout literally."""

import pytest
import torch
from hydra.utils import instantiate
from reference import literal

from mtnrec.batch import Batch
from mtnrec.model.loss import cross_entropies
from mtnrec.schema import CategoricalField, Schema
from mtnrec.system.performance import prefer_onednn_matmul

SIZES = [2, 5, 8, 3, 22, 8, 51, 9, 8, 3, 3, 300]  # AliExpress's, and one that is looked up
NUMERICALS = 63
SCHEMA = Schema(
    tuple(CategoricalField(f"c{i}", size) for i, size in enumerate(SIZES)),
    tuple(f"n{i}" for i in range(NUMERICALS)),
    ("click", "conversion"),
    funnel=True,
)


def names_of_literal(network):
    """Each parameter of ours with the literal program's: a table is a part of its one table."""
    starts = [sum(SIZES[:field]) for field in range(len(SIZES))]
    for name, parameter in network.named_parameters():
        if name.startswith("input.tables."):
            field = int(name.split(".")[2])
            rows = slice(starts[field], starts[field] + SIZES[field])
            yield parameter, "embedding.table.weight", rows
        else:
            yield parameter, name.replace("input.numerical", "embedding.numerical"), slice(None)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "chosen"),
    [(torch.float32, 1e-5, False), (torch.float32, 1e-5, True), (torch.float64, 1e-11, False)],
    ids=str,
)
@pytest.mark.parametrize("model", ["shared_bottom", "esmm", "mmoe"])
def test_outputs_and_gradients_equal_the_literal_layout(
    model, dtype, tolerance, chosen, compose_config, make_batch, request
):
    if chosen:  # what multiplies on a processor of AMD
        request.getfixturevalue("product_setting")
        prefer_onednn_matmul(torch.device("cpu"))
    torch.manual_seed(0)
    config = compose_config(f"model={model}").model
    network = instantiate(config, _partial_=True, _convert_="all")(schema=SCHEMA).to(dtype)
    other = literal.MODELS[model](SIZES, NUMERICALS).double()
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for parameter, name, rows in names_of_literal(network):
            theirs[name][rows] = parameter.double()
    batch = make_batch(SCHEMA, 64)
    labels = batch.labels.double()

    output = network(Batch(batch.categorical, batch.numerical.to(dtype), batch.labels.to(dtype)))
    cross_entropies(output, batch.labels.to(dtype)).sum().backward()
    probabilities = other(batch.categorical, batch.numerical.double())
    losses = [torch.nn.BCELoss()(p, labels[:, task]) for task, p in enumerate(probabilities)]
    sum(losses).backward()

    expected = torch.stack(probabilities, dim=1)
    torch.testing.assert_close(output.positive.exp().double(), expected, rtol=tolerance, atol=0)
    for parameter, name, rows in names_of_literal(network):
        gradient = theirs[name].grad[rows]
        error = torch.linalg.vector_norm(parameter.grad - gradient)
        assert error <= tolerance * torch.linalg.vector_norm(gradient), name
