"""Several processes against one: ``python -m mtnrec.train trainer=ddp``."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from stress import kill
from stress.ddp import LOSSES, MODELS, OPTIONS, compare, settings
from stress.ddp import train as train_apart

from mtnrec.run.folder import State, run_state
from mtnrec.system.files import read_json
from mtnrec.training.fit import leaving_process_group

FAILING_RANK = Path(__file__).with_name("failing_rank.py")
TRUNCATED = ["loss=truncated", "loss.rate=0.3", "loss.window=20", "loss.warm_up=10"]
IN_THE_DEFAULT_SUITE = [("esmm", True, "all")]


PRODUCT = [
    pytest.param(*case, marks=[] if case in IN_THE_DEFAULT_SUITE else [pytest.mark.slow])
    for case in [*product(MODELS, (False, True), OPTIONS), *product(["esmm"], [False], LOSSES)]
]


@pytest.mark.filterwarnings("ignore")  # of Lightning, about evaluating here
@pytest.mark.parametrize(("model", "mtn", "option"), PRODUCT)
def test_two_processes_train_like_one_process_and_measure_it_exactly(
    model, mtn, option, train, tmp_path
):
    root = f"data_root={tmp_path / 'data'}"
    one, two = (settings(mtn=mtn, option=option, devices=devices) for devices in (1, 2))

    train(root, *one, model=model, folder=tmp_path / "one")
    train_apart(tmp_path / "two", root, *MODELS[model], *two)

    weights, alphas, metrics_equal = compare(tmp_path / "one", tmp_path / "two")
    assert weights < 1e-9
    assert alphas < 1e-6  # they are logged in float32
    assert metrics_equal
    files = [
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_a_run_leaves_its_process_group(tmp_path):
    rendezvous = f"file://{tmp_path / 'rendezvous'}"

    with leaving_process_group():
        torch.distributed.init_process_group("gloo", rendezvous, rank=0, world_size=1)

    assert not torch.distributed.is_initialized()
    with leaving_process_group():  # a run of one process has none
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, about evaluating here
def test_all_ranks_evaluate_with_the_saved_batch_norm(tmp_path):
    keys = [*MODELS["esmm"], *settings(mtn=False, option="none", devices=2)]

    train_apart(tmp_path, f"data_root={tmp_path / 'data'}", *keys, "model.batch_norm=true")

    assert compare(tmp_path, tmp_path).metrics_equal


@pytest.mark.slow
def test_processes_train_in_a_folder_whose_name_has_quotes(tmp_path):
    keys = [*MODELS["esmm"], *settings(mtn=False, option="none", devices=2)]

    train_apart(tmp_path / 'say "a"\\', f"data_root={tmp_path / 'data'}", *keys)

    assert run_state(tmp_path / 'say "a"\\') is State.FINISHED


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raise", "kill"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_early_ends_the_run_with_an_error(rank, failure, tmp_path):
    environment = os.environ | {"FAILING_RANK": str(rank), "FAILURE": failure}
    keys = [*MODELS["esmm"], *settings(mtn=True, option="none", devices=2)]
    command = [sys.executable, FAILING_RANK, f"hydra.run.dir={tmp_path / 'run'}", *keys]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert done.returncode != 0
    assert not (tmp_path / "run" / "result.json").exists()
    assert ("ArithmeticError: so it goes" in done.stderr) == (failure == "raise")
    failed = read_json(tmp_path / "run" / "failure.json")
    if failure == "raise":
        assert failed["message"] == "so it goes"
    elif failed is not None:
        assert "onnection" in failed["message"]
    else:  # the launcher was faster than the other rank
        assert run_state(tmp_path / "run") is State.INTERRUPTED


# With three processes the sum of their gradients depends on its order.
@pytest.mark.slow
@pytest.mark.parametrize(("devices", "loss"), [(2, []), (3, []), (2, TRUNCATED)])
def test_processes_resumed_within_an_epoch_end_with_the_bits_of_an_uninterrupted_run(
    devices, loss, tmp_path
):
    keys = [*MODELS["esmm"], *settings(mtn=True, option="all", devices=devices), *loss]
    keys += ["model.dropout=0.2", "trainer.precision=32-true", "data.batch_size=40"]
    keys += ["trainer.checkpoint_every_n_steps=1", f"data_root={tmp_path / 'data'}"]
    train_apart(tmp_path / "whole", *keys)
    environment = os.environ | {"FAILING_RANK": "1", "FAILURE": "raise", "FAILING_BATCH": "8"}
    command = [sys.executable, FAILING_RANK, f"hydra.run.dir={tmp_path / 'run'}", *keys]
    subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)

    train_apart(tmp_path / "run", *keys)

    assert ", after epoch 0, step 2\n" in (tmp_path / "run" / "train.log").read_text()
    kill.compare(tmp_path / "run", tmp_path / "whole")
    if loss:  # each rank has the losses of its own rows
        best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
        seen = [state["seen"] for state in best["loss"]]
        assert len(seen) == 2
        assert seen[0] != seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2])
def test_a_loss_of_one_rank_that_is_not_finite_is_named_with_its_rows(devices, tmp_path):
    environment = os.environ | {"FAILING_RANK": "1", "FAILURE": "diverge"}
    keys = [*MODELS["esmm"], *settings(mtn=True, option="none", devices=devices)]
    command = [sys.executable, FAILING_RANK, f"hydra.run.dir={tmp_path}", *keys]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    message = read_json(tmp_path / "failure.json")["message"]
    assert message.startswith("the loss must be finite, got nan at step 2 (epoch 0, batch 2: 120 ")
    assert done.stderr.count(message) == devices  # no rank waits for another
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, about evaluating here
def test_processes_that_slurm_starts_on_two_machines_make_one_run(tmp_path):
    keys = [*MODELS["esmm"], *settings(mtn=True, option="none", devices=1)]
    keys.append(f"data_root={tmp_path / 'data'}")
    train_apart(tmp_path / "one", *keys)
    keys += ["trainer=slurm", "trainer.num_nodes=2", "trainer.devices=1", "data.batch_size=120"]
    command = [sys.executable, "-m", "mtnrec.train", *keys, f"hydra.run.dir={tmp_path / 'run'}"]
    of_job = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": 2, "SLURM_LOCALID": 0}
    of_job |= {"SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NAME": "mtn", "SLURM_NODELIST": "127.0.0.1"}
    tasks = []
    for rank in range(2):
        own = of_job | {"SLURM_PROCID": rank, "SLURM_NODEID": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        tasks.append(subprocess.Popen(command, env=environment))

    assert [task.wait(timeout=120) for task in tasks] == [0, 0]

    weights, alphas, metrics_equal = compare(tmp_path / "one", tmp_path / "run")
    assert weights < 1e-9
    assert alphas < 1e-6
    assert metrics_equal
