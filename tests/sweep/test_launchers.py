import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import cloudpickle
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from submitit.core.utils import FailedJobError

import mtnrec.train
from hydra_plugins.mtnrec_slurm_launcher import MtnrecSlurmLauncher
from mtnrec.command.config import CONF_DIR
from mtnrec.run.folder import State, lock_run_folder, run_state
from mtnrec.sweep.progress import read_progress
from mtnrec.sweep.subprocess_job import run_in_subprocess
from mtnrec.system.files import read_json

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
QUICK = [*LOG, "trainer.max_epochs=1"]

WORKERS = ["hydra/launcher=workers", "hydra.launcher.n_jobs=2"]


def records(root):
    return {path: json.loads(path.read_text()) for path in sorted(root.rglob("result.json"))}


def command(folder, *overrides):
    return [
        *(sys.executable, "-m", "mtnrec.train", "-m", f"hydra.sweep.dir={folder}", *LOG),
        *(f"data_root={folder.parent / 'data'}", "trainer.accelerator=cpu", "threads=1"),
        *("model=shared_bottom", "model.embedding_dim=4", "model.bottom_widths=[16]"),
        *("model.tower_widths=[8]", "seed=0,1", *overrides),
    ]


def sweep(folder, *overrides):
    subprocess.run(command(folder, *overrides), check=True, capture_output=True, timeout=400)


@contextmanager
def started(folder, *overrides):
    """Start a sweep that takes a few seconds, in a process group like that of a terminal."""
    keys = ["data.batch_size=32", "trainer.max_epochs=12", "patience=99", *overrides]
    process = subprocess.Popen(
        command(folder, *keys),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def processes_after_an_epoch(root, process):
    """Wait until a run has a checkpoint, and return the processes of such runs."""
    while process.poll() is None:
        folders = [path.parents[1] for path in root.rglob("last.ckpt")]
        if found := [read_json(folder / "running.json") for folder in folders]:
            return [running["pid"] for running in found]
        time.sleep(0.05)
    raise AssertionError("the sweep ended")


def test_the_command_can_be_sent_to_other_processes():
    # `__main__` is pickled with everything it refers to.
    cloudpickle.register_pickle_by_value(mtnrec.train)
    try:
        sent = cloudpickle.dumps(mtnrec.train.main)
    finally:
        cloudpickle.unregister_pickle_by_value(mtnrec.train)

    assert callable(pickle.loads(sent))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put shell scripts in place of Slurm's programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def write(**scripts):
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)

    return write


def test_slurm_gets_the_settings_of_the_config(train, tmp_path, slurm):
    slurm(sbatch=f'cp "$1" {tmp_path}/batch; exit 1', srun="exit 0")
    keys = ["partition=long", "mem_gb=8", "array_parallelism=2"]
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{key}" for key in keys)]

    with pytest.raises(FailedJobError):
        train(*QUICK, "hydra.mode=MULTIRUN", "seed=0,1,2", *launcher, folder=tmp_path / "runs")

    batch = (tmp_path / "batch").read_text().splitlines()
    for line in [
        "#SBATCH --array=0-2%2",
        "#SBATCH --time=240",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=8GB",
        "#SBATCH --partition=long",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
    ]:
        assert line in batch


@pytest.mark.slow
def test_slurm_without_waiting_submits_the_runs_and_status_follows_them(
    train, tmp_path, slurm, capsys
):
    jobs, queue, root = tmp_path / "jobs", tmp_path / "queue", tmp_path / "runs"
    jobs.write_text("")
    slurm(
        sbatch=f"echo job >> {jobs}; echo Submitted batch job $(wc -l < {jobs})",
        srun="exit 0",
        squeue=f"cat {queue}",
    )
    command = [*QUICK, "hydra.mode=MULTIRUN", "seed=0,1,2"]
    command += ["hydra/launcher=slurm", "hydra.launcher.wait=false"]

    def submitted():
        return list(json.loads((root / "sweep.json").read_text())["submitted"].values())

    train(*command, folder=root)
    out = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 runs are submitted" in out
    assert f"python -m mtnrec.status runs={root}" in out
    assert submitted() == ["1_0", "1_1", "1_2"]
    runs = read_progress(root)
    assert [run.state for run in runs] == [State.SUBMITTED] * 3

    queue.write_text("1_0\n1_2\n9\n")  # 1_1 was cancelled
    train(*command, folder=root)
    assert submitted() == ["1_0", "2", "1_2"]

    with lock_run_folder(root / runs[0].name, [], []):
        queue.unlink()  # squeue fails
        train(*command, folder=root)
        states = [run.state for run in read_progress(root)]
        assert states == [State.RUNNING, State.SUBMITTED, State.SUBMITTED]
    assert submitted() == ["1_0", "3_0", "3_1"]


def test_a_search_refuses_a_launcher_that_does_not_wait():
    target = "hydra_plugins.mtnrec_tuned_sweeper.TunedSweeper"
    search = OmegaConf.create({"hydra": {"sweeper": {"_target_": target}}})

    with pytest.raises(SystemExit, match=r"hydra\.launcher\.wait must be true in a search"):
        MtnrecSlurmLauncher(wait=False).setup(hydra_context=None, task_function=None, config=search)


@pytest.mark.slow
def test_submitit_gives_the_results_of_one_process(tmp_path):
    sweep(tmp_path / "one", "trainer.max_epochs=1")
    sweep(tmp_path / "jobs", "trainer.max_epochs=1", "hydra/launcher=submitit_local")

    one, jobs = ([*records(tmp_path / name).values()] for name in ("one", "jobs"))
    assert len(one) == 2
    assert [record["metrics"] for record in jobs] == [record["metrics"] for record in one]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], WORKERS], ids=["basic", "workers"])
@pytest.mark.parametrize(
    ("sent", "to_all", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 143), (signal.SIGTERM, False, 143)],
)
def test_an_interrupted_sweep_says_what_it_keeps_and_the_command_resumes_it(
    sent, to_all, status, launcher, tmp_path
):
    root = tmp_path / "a sweep"
    with started(root, *launcher) as process:
        processes_after_an_epoch(root, process)
        (os.killpg if to_all else os.kill)(process.pid, sent)
        message = process.communicate(timeout=60)[1]

    assert process.returncode == status
    begun = len(list(root.rglob("running.json")))
    assert f"mtnrec: interrupted. {root} keeps 0 of 2 runs finished, " in message
    assert f"of {begun} interrupted. " in message
    resume = shlex.split(message.splitlines()[-1])
    assert resume[:3] == ["python", "-m", "mtnrec.train"]
    subprocess.run([sys.executable, *resume[1:]], check=True, capture_output=True, timeout=400)
    assert len(records(root)) == 2
    logs = [path.read_text() for path in root.rglob("train.log")]
    assert any("resumes from" in log for log in logs)


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_worker_was_killed_once(tmp_path):
    root = tmp_path / "runs"
    with started(root, *WORKERS) as process:
        pid, *_ = processes_after_an_epoch(root, process)
        os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=400)

    assert process.returncode == 0
    assert len(records(root)) == 2
    logs = [path.read_text() for path in root.rglob("train.log")]
    assert any("resumes from" in log for log in logs)


@pytest.mark.slow
def test_a_sweep_with_a_run_whose_process_is_always_killed_has_status_1(tmp_path):
    root = tmp_path / "runs"
    killed = set()
    with started(root, *WORKERS) as process:
        while process.poll() is None:
            for path in root.glob("*-seed0-*/running.json"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    pid = json.loads(path.read_text())["pid"]
                    if pid not in killed:
                        killed.add(pid)
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        message = process.communicate(timeout=200)[1]

    assert len(killed) == 3
    assert process.returncode == 1
    # The other run may have been in progress each time, and its worker ends with the killed one.
    finished = len(records(root))
    assert message.endswith(f"mtnrec: {2 - finished} of 2 runs are not finished\n")
    (failure,) = root.glob("*-seed0-*/failure.json")
    assert "its process died 3 times" in json.loads(failure.read_text())["message"]


def test_ray_cluster_composes():
    pytest.importorskip("ray")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration(
            "train", ["hydra/launcher=ray_cluster"], RunMode.MULTIRUN
        )

    assert config.hydra.launcher.ray.init == {"address": "auto", "object_store_memory": None}


@pytest.mark.slow
def test_ray_gives_the_results_of_one_process(tmp_path):
    pytest.importorskip("ray")
    keys = ["init.address=local", "+init.num_cpus=2", "init.object_store_memory=100000000"]
    ray = [f"{'+' * key.startswith('+')}hydra.launcher.ray.{key.lstrip('+')}" for key in keys]
    ray = ["hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_cpus=1", *ray]
    sweep(tmp_path / "one", "trainer.max_epochs=1")
    sweep(tmp_path / "jobs", "trainer.max_epochs=1", *ray)

    one, jobs = ([*records(tmp_path / name).values()] for name in ("one", "jobs"))
    assert len(one) == 2
    assert [record["metrics"] for record in jobs] == [record["metrics"] for record in one]


@pytest.mark.slow
def test_other_ranks_do_not_lock_the_run_folder(train, tmp_path, monkeypatch):
    train(*QUICK, folder=tmp_path)
    with lock_run_folder(tmp_path, [], []):
        with pytest.raises(SystemExit, match="is in use by another process"):
            train(*QUICK, folder=tmp_path)
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        train(*QUICK, folder=tmp_path)


def test_a_run_in_a_subprocess_that_dies_counts_as_failed(tmp_path, monkeypatch):
    command = ["python", "-c", "import os; print('so it goes'); os.kill(os.getpid(), 9)"]
    monkeypatch.setattr("mtnrec.sweep.subprocess_job.job_command", lambda folder: command)
    monkeypatch.setattr("mtnrec.sweep.subprocess_job.job_overrides", lambda: ["seed=0"])
    monkeypatch.setattr("mtnrec.sweep.subprocess_job.owns_screen", lambda: False)

    with pytest.raises(RuntimeError, match="one of its processes ended with exit status -9"):
        run_in_subprocess(tmp_path)

    assert run_state(tmp_path) is State.FAILED


@pytest.mark.slow
def test_a_sweep_of_two_processes_per_run_counts_each_row_once_and_equals_one(tmp_path):
    # In float64, where the order of a sum hardly matters; 1920 rows in batches of 480.
    keys = ["trainer.precision=64-true", "trainer.max_epochs=2", "mtn.enabled=true", "mtn.lam=0.1"]
    two = ["trainer=ddp", "trainer.devices=2", "data.batch_size=240"]
    sweep(tmp_path / "one", *keys, "data.batch_size=480")
    sweep(tmp_path / "two", *keys, *two)
    sweep(tmp_path / "workers", *keys, *two, *WORKERS)

    expected = list(records(tmp_path / "one").values())
    assert len(expected) == 2
    for name in ("two", "workers"):
        found = list(records(tmp_path / name).values())
        for record, of_one in zip(found, expected, strict=True):
            assert record["counts"] == of_one["counts"]
            assert record["counts"]["test/ctr"]["rows"] == 600
            assert record["metrics"] == pytest.approx(of_one["metrics"], rel=1e-6)
            assert len(record["history"]) == 2
