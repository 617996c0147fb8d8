"""The distances of the experts against scipy, on all rows of the test at once."""

import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from mtnrec.model.esmm import ESMM
from mtnrec.model.mmoe import MMoE
from mtnrec.training.expert_distances import ExpertDistances, output_distances
from mtnrec.training.module import MultiTaskModule

PLAIN = {"embedding_dim": 4, "bag_mode": "mean", "dropout": 0.0, "batch_norm": False}


def make_network(schema):
    torch.manual_seed(0)
    keys = {**PLAIN, "embedding_init": "per_field"}
    return MMoE(schema, experts=3, expert_widths=[7, 6], tower_widths=[4], **keys)


def scipy_distances(outputs):
    """Mean over the rows, in float64."""
    return np.mean([squareform(pdist(row)) for row in outputs.detach().double().numpy()], axis=0)


def in_float64(batch):
    batch.numerical, batch.labels = batch.numerical.double(), batch.labels.double()
    return batch


@pytest.fixture
def run_test(tmp_path):
    def run(network, schema, batches, precision="64-true"):
        measured = ExpertDistances()
        trainer = L.Trainer(
            accelerator="cpu",
            precision=precision,
            logger=False,
            callbacks=[measured],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = MultiTaskModule(network, schema=schema, optimizer=torch.optim.Adam)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.test(module, loader, verbose=False)
        return measured.distances

    return run


@pytest.mark.parametrize("scale", [1, 1e-6])
def test_distances_of_close_experts_lose_no_digits(scale):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 1, 32, generator=generator)
    outputs = base + scale * torch.randn(40, 5, 32, generator=generator)

    distances = output_distances(outputs)

    expected = [squareform(pdist(row)) for row in outputs.double().numpy()]
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_half_precision_outputs_are_measured_in_float32():
    outputs = torch.randn(9, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()

    distances = output_distances(outputs)

    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, output_distances(outputs.float()), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_mean_is_over_the_rows_of_all_batches(precision, run_test, funnel_schema, make_batch):
    batches = [make_batch(funnel_schema, rows, seed) for seed, rows in enumerate((16, 16, 3))]
    network = make_network(funnel_schema)

    found = np.array(run_test(network, funnel_schema, batches, precision))

    outputs = []
    network.expert_outputs.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad():
        for batch in batches:
            network.double()(in_float64(batch))
    outputs = torch.cat(outputs)
    np.testing.assert_allclose(found, scipy_distances(outputs), rtol=1e-5)
    assert (found == found.T).all()
    assert (found.diagonal() == 0).all()
    apart = squareform(pdist(outputs.mean(dim=0).numpy()))
    assert (found + np.eye(3) > 1.01 * apart).all()  # not the distance of the means


def test_batches_do_not_matter(run_test, funnel_schema, make_batch):
    whole = make_batch(funnel_schema, 50)
    parts = [
        type(whole)(*(tensor[piece] for tensor in vars(whole).values() if len(tensor)))
        for piece in torch.arange(50).split(9)
    ]

    one, many = (run_test(make_network(funnel_schema), funnel_schema, b) for b in ([whole], parts))

    np.testing.assert_allclose(many, one, rtol=1e-13)


def test_equal_experts_have_distance_zero(run_test, funnel_schema, make_batch):
    network = make_network(funnel_schema)
    for expert in network.experts:
        expert.load_state_dict(network.experts[0].state_dict())

    found = run_test(network, funnel_schema, [make_batch(funnel_schema)], "32-true")

    np.testing.assert_allclose(found, np.zeros((3, 3)), atol=1e-6)


def test_a_network_without_experts_has_no_distances(run_test, funnel_schema, make_batch):
    network = ESMM(funnel_schema, tower_widths=[6], **PLAIN)

    assert run_test(network, funnel_schema, [make_batch(funnel_schema)]) is None


def test_training_is_bit_identical_with_and_without_the_callback(
    tmp_path, funnel_schema, make_batch
):
    batches = [make_batch(funnel_schema, seed=seed) for seed in range(3)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trained = []
    for callbacks in ([], [ExpertDistances()]):
        network = make_network(funnel_schema)
        module = MultiTaskModule(network, schema=funnel_schema, optimizer=torch.optim.Adam)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader, loader)
        trainer.test(module, loader, verbose=False)
        trained.append((network.state_dict(), module.results))

    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_the_network_is_observed_only_during_the_test(run_test, funnel_schema, make_batch):
    network = make_network(funnel_schema)

    run_test(network, funnel_schema, [make_batch(funnel_schema)])

    assert not [module for module in network.modules() if module._forward_hooks]


TWO_RANKS = """
import sys
import lightning as L
import torch
from mtnrec.training.expert_distances import ExpertDistances
from mtnrec.training.module import MultiTaskModule

network, schema, ranks, out = torch.load(sys.argv[1], weights_only=False)

class Data(L.LightningDataModule):
    def test_dataloader(self):
        return torch.utils.data.DataLoader(ranks[self.trainer.global_rank], batch_size=None)

class Keeper(L.Callback):
    def teardown(self, trainer, module, stage):
        torch.save((measured.distances, module.calibration_curves), f"{out}/{trainer.global_rank}")

measured = ExpertDistances()
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp_fork", use_distributed_sampler=False, logger=False,
    callbacks=[measured, Keeper()], enable_progress_bar=False, enable_model_summary=False,
    precision="64-true",
)
module = MultiTaskModule(network, schema=schema, optimizer=torch.optim.Adam)
trainer.test(module, datamodule=Data(), verbose=False)
"""


@pytest.mark.slow
def test_two_processes_with_unequal_rows_find_the_values_of_one(
    tmp_path, run_test, funnel_schema, make_batch
):
    batches = [make_batch(funnel_schema, rows, seed) for seed, rows in enumerate((16, 9, 2))]
    network = make_network(funnel_schema)
    job = network, funnel_schema, [batches[:2], batches[2:]], str(tmp_path)
    torch.save(job, tmp_path / "job.pt")
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)

    command = [sys.executable, tmp_path / "two_ranks.py", tmp_path / "job.pt"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    assert process.returncode == 0, process.stderr
    expected = run_test(network, funnel_schema, batches)
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    np.testing.assert_allclose(found[0][0], expected, rtol=1e-12)
    assert found[0] == found[1]
