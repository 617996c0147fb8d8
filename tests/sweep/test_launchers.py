import json
import os
import pickle
import subprocess
import sys

import cloudpickle
import pytest
import yaml
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

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
QUICK = [*LOG, "trainer.max_epochs=1"]
SEARCH = [*QUICK, "experiment=lambda_search", "data=synthetic", "hydra.sweeper.n_trials=3"]


def records(root):
    return {path: json.loads(path.read_text()) for path in sorted(root.rglob("result.json"))}


def sweep(folder, *overrides):
    command = [
        *(sys.executable, "-m", "mtnrec.train", "-m", f"hydra.sweep.dir={folder}", *LOG),
        *(f"data_root={folder.parent / 'data'}", "trainer.accelerator=cpu", "threads=1"),
        *("model=shared_bottom", "model.embedding_dim=4", "model.bottom_widths=[16]"),
        *("model.tower_widths=[8]", "seed=0,1", *overrides),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=400)


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
    search = OmegaConf.create({"hydra": {"sweeper": {"_target_": "optuna.OptunaSweeper"}}})

    with pytest.raises(SystemExit, match=r"hydra\.launcher\.wait must be true in a search"):
        MtnrecSlurmLauncher(wait=False).setup(hydra_context=None, task_function=None, config=search)


@pytest.mark.slow
def test_submitit_gives_the_results_of_one_process(tmp_path):
    sweep(tmp_path / "one", "trainer.max_epochs=1")
    sweep(tmp_path / "jobs", "trainer.max_epochs=1", "hydra/launcher=submitit_local")

    one, jobs = ([*records(tmp_path / name).values()] for name in ("one", "jobs"))
    assert len(one) == 2
    assert [record["metrics"] for record in jobs] == [record["metrics"] for record in one]


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
@pytest.mark.filterwarnings("ignore")  # Optuna 2, on import
def test_a_search_maximises_the_monitor_and_again_takes_what_is_finished(train, tmp_path):
    train(*SEARCH, "monitor=val/ctr_auc", folder=tmp_path)
    found = records(tmp_path)
    best = max(record["metrics"]["val/ctr_auc"] for record in found.values())
    written = {path: path.stat().st_mtime_ns for path in found}

    train(*SEARCH, "monitor=val/ctr_auc", folder=tmp_path)

    results = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert len(found) == 3
    assert results["best_value"] == best
    assert {path: path.stat().st_mtime_ns for path in records(tmp_path)} == written


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Optuna 2, on import
def test_a_trial_that_fails_does_not_end_a_search_and_the_command_line_narrows_it(train, tmp_path):
    narrow = ["mtn.coupling=gradient", "mtn.lam=choice(-1,1e-3)", "hydra.sweeper.sampler.seed=0"]

    train(*SEARCH, *narrow, folder=tmp_path)

    (record,) = records(tmp_path).values()
    assert record["mtn"]["lam"] == 1e-3
    assert record["mtn"]["coupling"] == "gradient"
    states = [run_state(path.parent) for path in tmp_path.rglob(".lock")]
    assert sorted(states) == [State.FAILED, State.FINISHED]


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
    workers = ["hydra/launcher=workers", "hydra.launcher.n_jobs=2"]
    sweep(tmp_path / "one", *keys, "data.batch_size=480")
    sweep(tmp_path / "two", *keys, *two)
    sweep(tmp_path / "workers", *keys, *two, *workers)

    expected = list(records(tmp_path / "one").values())
    assert len(expected) == 2
    for name in ("two", "workers"):
        found = list(records(tmp_path / name).values())
        for record, of_one in zip(found, expected, strict=True):
            assert record["counts"] == of_one["counts"]
            assert record["counts"]["test/ctr"]["rows"] == 600
            assert record["metrics"] == pytest.approx(of_one["metrics"], rel=1e-6)
            assert len(record["history"]) == 2
