"""Training on a GPU compared with the CPU; skipped without a GPU."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from shared_fixtures import Killed

from mtnrec import load_checkpoint
from mtnrec.system.files import read_json
from mtnrec.training import module
from mtnrec.training.cuda_graph import CudaGraphLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3", "data.batch_size=128"]
ON_GPU = [*LOG, "trainer.accelerator=gpu"]
IN_FLOAT64 = "trainer.precision=64-true"
MODELS = (
    *("shared_bottom", "esmm", "mmoe", "single_task", "omoe", "ple", "adatt", "mmoe_cross", "stem"),
)


def read_capture(folder):
    return read_json(folder / "result.json")


def losses_of(folder):
    return [epoch["train/loss"] for epoch in read_capture(folder)["history"]]


def weights_of(folder):
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", "cpu", weights_only=True)
    return checkpoint["state_dict"]


def assert_same_bits(*folders):
    found, expected = map(weights_of, folders)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses_of(folders[0]) == losses_of(folders[1])
    assert read_capture(folders[0])["metrics"] == read_capture(folders[1])["metrics"]


def assert_close(*folders, rtol):
    found, expected = map(weights_of, folders)
    for name in expected:
        largest = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= rtol * largest, name
    np.testing.assert_allclose(losses_of(folders[0]), losses_of(folders[1]), rtol=rtol)


@pytest.fixture
def replays(monkeypatch):
    """Rows of each batch for which a graph was replayed."""
    counted, record = [], CudaGraphLoss._capture

    def recording(self, batch):
        recorded = record(self, batch)

        def replay(*tensors):
            counted.append(len(tensors[0]))
            return recorded(*tensors)

        return replay

    monkeypatch.setattr(CudaGraphLoss, "_capture", recording)
    return counted


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["mtn.enabled=true", "mtn.lam=0.01", "mtn.refresh_every=1"],
        ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.1"],
        ["data=synthetic_ali_ccp", "optimizer=lazy_adam", "noise.proportion=0.1"],
    ],
    ids=["plain", "MTN", "accumulation", "lazy_adam"],
)
def test_a_gpu_trains_the_same_weights_as_the_cpu(model, options, train):
    on_gpu = train(*ON_GPU, IN_FLOAT64, *options, model=model)

    on_cpu = train(*LOG, IN_FLOAT64, *options, model=model)

    assert_close(on_gpu, on_cpu, rtol=1e-8)
    for name, value in read_capture(on_cpu)["metrics"].items():
        assert read_capture(on_gpu)["metrics"][name] == pytest.approx(value, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("model", MODELS)
def test_factors_from_products_alone_miss_less_than_a_hundredth_of_the_norm(model, train):
    folder = train(*ON_GPU, "mtn.enabled=true", "trainer.max_epochs=4", model=model)

    history = read_capture(folder)["history"]
    gaps = [v for epoch in history for name, v in epoch.items() if name.endswith("/gap")]
    assert gaps
    assert all(-1e-4 < gap < 0.01 for gap in gaps)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("model", MODELS)
def test_replayed_steps_have_the_same_bits_as_eager_steps(
    model, precision, train, monkeypatch, replays
):
    keys = [*ON_GPU, f"trainer.precision={precision}", "mtn.enabled=true", "model.dropout=0.3"]
    keys += ["model.batch_norm=true"]
    replayed = train(*keys, model=model)
    assert set(replays) == {128}
    assert len(replays) == 2 * 15 - 1
    monkeypatch.setattr(module, "can_be_captured", lambda network: False)

    one_by_one = train(*keys, model=model)

    assert len(replays) == 2 * 15 - 1
    assert_same_bits(replayed, one_by_one)


@pytest.mark.parametrize(("step", "number"), [(11, 20), (11, 12), (15, 16)])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    step, number, train, kill, tmp_path
):
    keys = [*ON_GPU, "mtn.enabled=true", "model.dropout=0.3", "trainer.max_epochs=3"]
    keys += [f"trainer.checkpoint_every_n_steps={step}"]
    whole = train(*keys)
    kill("on_train_batch_end", number)
    with pytest.raises(Killed):
        train(*keys, folder=tmp_path)

    train(*keys, folder=tmp_path)

    assert_same_bits(tmp_path, whole)


def test_the_same_seed_gives_the_same_bits(train):
    keys = [*ON_GPU, "mtn.enabled=true", "data=synthetic_ali_ccp", "model.dropout=0.3"]

    assert_same_bits(*(train(*keys, model="mmoe") for _ in range(2)))


def test_a_checkpoint_gives_the_same_scores_on_both(train):
    path = train(*ON_GPU) / "checkpoints" / "best.ckpt"
    on_gpu, on_cpu = load_checkpoint(path), load_checkpoint(path, device="cpu")
    assert on_gpu.device.type == "cuda"
    rng = np.random.default_rng(0)
    columns = [*on_cpu.encoder.columns]
    frame = pd.DataFrame(rng.integers(0, 2, (50, len(columns))), columns=columns)

    scores = on_gpu.score(frame)

    np.testing.assert_allclose(scores, on_cpu.score(frame), rtol=1e-5)
    assert scores.nunique().min() > 10


def test_one_process_over_nccl_trains_like_one_without(train, tmp_path):
    keys = [*ON_GPU, IN_FLOAT64, "mtn.enabled=true", "trainer.max_epochs=2"]
    sizes = ["model=esmm", "model.embedding_dim=4", "model.tower_widths=[16,8]"]  # as `train` has
    run = [sys.executable, "-m", "mtnrec.train", *keys, *sizes, f"hydra.run.dir={tmp_path}"]
    subprocess.run([*run, "trainer=ddp", "trainer.devices=1"], check=True, timeout=120)

    assert_close(tmp_path, train(*keys), rtol=1e-8)
