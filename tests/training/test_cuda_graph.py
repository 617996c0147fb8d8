"""Which batches are replayed; what a replay computes is in ``tests/test_cuda.py``."""

import dataclasses

import pytest
import torch
from torch import nn

from mtnrec.batch import Bags
from mtnrec.training.cuda_graph import CudaGraphLoss, can_be_captured


@pytest.fixture
def calls(monkeypatch):
    """How each loss was computed: by rows, and whether it was a replay."""
    found = []

    def record(self, batch):
        def replay(categorical, numerical, labels):
            found.append((len(labels), "replayed"))
            return torch.tensor(0.0)

        return replay

    monkeypatch.setattr(CudaGraphLoss, "_capture", record)
    return found


def test_batches_of_a_size_that_came_twice_in_a_row_are_replayed(calls, funnel_schema, make_batch):
    replay = CudaGraphLoss(nn.Identity(), lambda batch: calls.append((len(batch), "computed")))

    for rows in (3, 8, 8, 3, 8, 3, 3):
        replay(make_batch(funnel_schema, rows))

    ways = ["computed", "computed", "replayed", "computed", "replayed", "computed", "computed"]
    assert calls == list(zip((3, 8, 8, 3, 8, 3, 3), ways, strict=True))


def test_bags_are_never_replayed(calls, funnel_schema, make_batch):
    replay = CudaGraphLoss(nn.Identity(), lambda batch: calls.append((len(batch), "computed")))
    bags = Bags(torch.zeros(0), torch.zeros(0), torch.zeros(9, dtype=torch.int32))
    batch = dataclasses.replace(make_batch(funnel_schema, 8), bags=(bags,))

    for _ in range(3):
        replay(batch)

    assert calls == [(8, "computed")] * 3


def test_a_network_on_the_cpu_is_not_captured():
    network = nn.Linear(2, 2)
    network.supports_cuda_graphs = True

    assert not can_be_captured(network)
