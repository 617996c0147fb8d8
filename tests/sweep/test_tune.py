import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from mtnrec.checks import InputError
from mtnrec.command.config import CONF_DIR
from mtnrec.run.folder import State, record_failure, run_state
from mtnrec.run.identity import RunIdentity
from mtnrec.run.record import RunRecord
from mtnrec.sweep import launch, tune
from mtnrec.tuning.record import Budget, Tuning

pytest.importorskip("optuna", minversion="4", exc_type=ImportError)

LOG = ["data.rows=300", "data.click_rate=0.3", "data.conversion_rate=0.4"]
NETWORK = ["model.embedding_dim=4", "model.bottom_widths=[8]", "model.tower_widths=[4]"]
TINY = ["data=synthetic", *LOG, "model=shared_bottom", *NETWORK, "trainer.accelerator=cpu"]
PARAMS = {"optimizer.lr": "tag(log,interval(1e-4,1e-2))", "mtn.enabled": False}
ARMS = {
    "plain": {"patience": 3},
    "mtn": {
        "mtn.enabled": True,
        "mtn.lam": "tag(log,interval(1e-6,1e-1))",
        "mtn.coupling": "choice(gradient,decoupled)",
    },
}
SEEDS = [1, 2]


def make_studies(*arguments, arms=ARMS, params=PARAMS, trials=6, batch=1, only=None):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        lines = [*TINY, *arguments]
        config = loader.load_configuration("train", lines, RunMode.MULTIRUN)
        budget = Budget(trials, batch, sampler_seed=0, trial_seed=0)
        return tune.plan_studies(config, loader, params, arms, budget, lines, only), config


class Stub:
    """In place of training: a noisy function of the settings, written as records.

    Args:
        fails: Whether the run of a config fails.
        kill_after: Runs after which the process ends.
        shuffled: Whether the runs of a launch end in a random order.
    """

    def __init__(self, fails=lambda config: False, kill_after=math.inf, shuffled=False):
        self.fails, self.kill_after, self.shuffled = fails, kill_after, shuffled
        self.made = []

    def __call__(self, pending, launcher, config, jobs):
        order = list(pending)
        if self.shuffled:
            random.Random(len(self.made)).shuffle(order)
        for job in order:
            if len(self.made) == self.kill_after:
                raise SystemExit(143)
            self.made.append(job)
            job.folder.mkdir(parents=True, exist_ok=True)
            if self.fails(job.config):
                record_failure(job.folder, InputError("diverged"), job.overrides, job.command)
            else:
                record(job).write(job.folder)


def record(job):
    config = job.config
    checksum = json.loads(Path(config["data"]["dir"], "schema.json").read_text())["checksum"]
    noise = random.Random(json.dumps([config["seed"], config["optimizer"]])).gauss(0, 0.01)
    value = 0.7 - 0.1 * abs(math.log10(config["optimizer"]["lr"]) + 3) + noise
    splits = ["val", "test"] if config["test"] else ["val"]
    return RunRecord(
        cell=RunIdentity(config, checksum, ()).id,
        seed=config["seed"],
        config=config,
        data={
            "name": "synthetic",
            "checksum": checksum,
            "parameters": {},
            "rows": {"train": 192, "val": 48, "test": 60},
            "suspected_leaks": [],
        },
        noise={"checksum": None},
        best_epoch=0,
        metrics={f"{split}/cvr_auc": value for split in splits},
        counts={f"{split}/cvr": {"rows": 20, "positives": 8} for split in splits},
        history=[],
        calibration_curves={},
        expert_distances=None,
        seconds={"setup": 0.0, "fit": 1.0, "test": 0.0},
        samples_per_second={},
        peak_memory_bytes=1,
        keys_of_seed=["seed"],
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Config of the sweep, its studies and the config of a run of each."""
    data = f"data_root={tmp_path_factory.mktemp('data')}"
    studies, config = make_studies(data)
    setting = {key: knob.ends[0] for study in studies for key, knob in study.space.items()}
    jobs = [study.job({k: setting[k] for k in study.space}, 0, test=False) for study in studies]
    return config, studies, [job.config for job in jobs]


class LightStudy(tune.Study):
    """A study that makes its runs from the config of one, which is faster than composing each."""

    base: dict

    def job(self, setting, seed, *, test):
        config = OmegaConf.create({**self.base, "seed": seed, "test": test})
        for key, value in setting.items():
            OmegaConf.update(config, key, value)
        config = OmegaConf.to_container(config)
        name = f"{self.arm}-{RunIdentity(config, '', ()).id}-seed{seed}"
        return launch.Job((f"arm={self.arm}",), self.directory / name, config)


@pytest.fixture
def search(tmp_path, monkeypatch, planned):
    """Tune with a stub in place of the runs; return what ``tuning.json`` and the records hold."""

    def run(stub, *, folder="runs", trials=6, batch=1, dry_run=False):
        config, studies, bases = planned
        config = copy.deepcopy(config)
        config.hydra.sweep.dir, config.dry_run = str(tmp_path / folder), dry_run
        light = []
        for study, base in zip(studies, bases, strict=True):
            keys = ("arm", "title", "place", "lines", "own", "space", "composer", "named")
            own = {key: getattr(study, key) for key in keys}
            budget = Budget(trials, batch, sampler_seed=0, trial_seed=0)
            light.append(LightStudy(**own, budget=budget, directory=tmp_path / folder))
            light[-1].base = base
        monkeypatch.setattr(tune, "launch_jobs", stub)
        monkeypatch.setattr(launch, "launch_jobs", stub)
        tune.tune(light, SEEDS, None, config)
        return tables(tmp_path / folder)

    return run


def tables(folder):
    records = {
        path.parent.name: json.loads(path.read_text()) for path in folder.rglob("result.json")
    }
    metrics = {name: content["metrics"] for name, content in records.items()}
    return Tuning.read(folder / "tuning.json"), metrics


def test_every_arm_has_as_many_trials_and_fresh_seeds_as_any_other(search):
    stub = Stub()

    tuning, _ = search(stub)

    assert [arm.arm for arm in tuning.arms] == ["plain", "mtn"]
    assert [len(arm.trials) for arm in tuning.arms] == [6, 6]
    assert [[*arm.fresh] for arm in tuning.arms] == [["1", "2"]] * 2
    fits = Counter((job.config["test"], job.config["seed"]) for job in stub.made)
    assert fits == {(False, 0): 12, (True, 1): 2, (True, 2): 2}


@pytest.mark.slow
def test_each_place_has_the_same_arms_and_budget_and_a_baseline_of_its_own():
    studies, _ = make_studies("model=shared_bottom,esmm")

    assert [study.arm for study in studies] == ["plain", "mtn"] * 2
    assert len({study.place for study in studies}) == 2
    assert len({study.budget for study in studies}) == 1
    jobs = [s.job({k: v.ends[0] for k, v in s.space.items()}, 0, test=False) for s in studies]
    models = [job.config["model"]["_target_"].rpartition(".")[2] for job in jobs]
    assert models == ["SharedBottom"] * 2 + ["ESMM"] * 2
    assert [job.config["mtn"]["enabled"] for job in jobs] == [False, True] * 2
    assert {(job.config["seed"], job.config["test"]) for job in jobs} == {(0, False)}


def test_fresh_runs_have_the_setting_of_the_best_trial(search):
    stub = Stub()

    tuning, metrics = search(stub)

    jobs = {job.folder.name: job for job in stub.made}
    for arm in tuning.arms:
        best = max(arm.trials, key=lambda trial: metrics[trial.folder]["val/cvr_auc"])
        rate = jobs[best.folder].config["optimizer"]["lr"]
        assert best.setting["optimizer.lr"] == rate
        assert {jobs[name].config["optimizer"]["lr"] for name in arm.fresh.values()} == {rate}
        assert {jobs[name].config["mtn"]["lam"] for name in arm.fresh.values()} == {
            jobs[best.folder].config["mtn"]["lam"]
        }


ANYWHERE = pytest.param(range(16), marks=pytest.mark.slow, id="anywhere")


@pytest.mark.parametrize("killed", [pytest.param((1, 8, 14), id="thrice"), ANYWHERE])
@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_search_killed_after_any_run_ends_with_the_same_tables(batch, killed, search):
    whole = search(Stub(), folder="whole", batch=batch)
    assert len(whole[1]) == 2 * (6 + 2)

    for runs in killed:
        folder = f"killed_{runs}"
        with pytest.raises(SystemExit):
            search(Stub(kill_after=runs), folder=folder, batch=batch)
        rest = Stub()
        assert search(rest, folder=folder, batch=batch) == whole
        assert len(rest.made) == 16 - runs


@pytest.mark.slow
def test_the_order_in_which_trials_end_does_not_matter(search):
    one = search(Stub(), folder="one", batch=3)

    assert search(Stub(shuffled=True), folder="two", batch=3) == one


@pytest.mark.slow
def test_a_finished_search_runs_nothing_again_and_more_trials_continue_it(search):
    first, _ = search(Stub())
    again, more = Stub(), Stub()

    assert search(again)[0] == first
    longer, _ = search(more, trials=8)

    assert again.made == []
    assert [arm.trials[:6] for arm in longer.arms] == [arm.trials for arm in first.arms]
    assert sum(not job.config["test"] for job in more.made) == 4
    stale = {f for arm in first.arms for f in arm.fresh.values()}
    stale -= {f for arm in longer.arms for f in arm.fresh.values()}
    assert {*longer.superseded} == stale


def test_a_failed_trial_counts_and_stays_failed_when_the_search_resumes(search, tmp_path, caplog):
    def fails(config):
        return not config["test"] and config["optimizer"]["lr"] > 2e-3

    whole = search(Stub(fails), folder="whole")
    lost = [trial for arm in whole[0].arms for trial in arm.trials if trial.value is None]
    assert lost
    assert {len(arm.trials) for arm in whole[0].arms} == {6}
    for runs in (5, 11):
        with pytest.raises(SystemExit):
            search(Stub(fails, kill_after=runs), folder=f"killed_{runs}")
        rest = Stub()  # nothing fails any more
        resumed = search(rest, folder=f"killed_{runs}")
        states = {trial.folder: trial.value for arm in resumed[0].arms for trial in arm.trials}
        kept = [name for name in states if states[name] is None]
        assert kept
        assert not {job.folder.name for job in rest.made} & {*kept}
        assert "trials failed before and stay failed" in caplog.text


def test_an_arm_whose_trials_all_fail_is_named_and_the_others_are_finished(search, tmp_path):
    with pytest.raises(SystemExit, match=r"all 6 trials of mtn failed: diverged"):
        search(Stub(lambda config: config["mtn"]["enabled"]))

    tuning, _ = tables(tmp_path / "runs")
    assert [len(arm.fresh) for arm in tuning.arms] == [2, 0]
    assert [arm.best is None for arm in tuning.arms] == [False, True]


def test_a_dry_run_lists_arms_trials_and_fits_and_runs_nothing(search, capsys, tmp_path):
    stub = Stub()

    search(stub, dry_run=True)

    out = capsys.readouterr().out
    assert "2 searches of 6 trials, then 2 fresh seeds of each best setting: 16 fits" in out
    assert "mtn: 0 of 6 trials done" in out
    assert "mtn.coupling=choice(gradient,decoupled)" in out
    assert stub.made == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_range_of_the_command_line_replaces_that_of_the_arms_that_search_the_key():
    narrow = ["mtn.lam=tag(log,interval(1e-3,1e-2))", "mtn.coupling=gradient"]

    (plain, mtn), _ = make_studies(*narrow)
    wide, _ = make_studies("model.dropout=interval(0.0,0.3)")

    assert [*plain.space] == ["optimizer.lr"]
    assert [*mtn.space] == ["optimizer.lr", "mtn.lam"]
    assert mtn.space["mtn.lam"].ends == (1e-3, 1e-2)
    assert mtn.lines["mtn.coupling"] == "mtn.coupling=gradient"
    assert all("model.dropout" in study.space for study in wide)


def test_a_key_that_the_config_lacks_is_searched_with_a_plus():
    weights = ["balance=weights", "+balance.weights.conversion=tag(log,interval(0.1,10))"]

    studies, _ = make_studies(*weights)

    job = studies[0].job({"+balance.weights.conversion": 2.5, "optimizer.lr": 1e-3}, 0, test=False)
    assert job.config["balance"]["weights"] == {"conversion": 2.5}
    assert all("+balance.weights.conversion" in study.space for study in studies)


def arm(**keys):
    return {"arms": {"own": {key.replace("__", "."): value for key, value in keys.items()}}}


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (arm(mtn__lam="interval(1.0,0.1)"), [], r"mtn\.lam of arm own: a range must have finite"),
        (arm(mtn__lam="tag(log,interval(0,1))"), [], r"mtn\.lam of arm own: .* begin above 0"),
        (arm(mtn__lam="tag(lin,interval(0,1))"), [], "must have the tag log or none, got lin"),
        (arm(mtn__coupling="choice(gradient)"), [], "two or more different values"),
        (arm(mtn__coupling="gradient,decoupled"), [], r"got the sweep mtn\.coupling.*choice\("),
        (arm(mtn__lam="tag(log,interval(1e-9,1))", seed=3), [], "must not have seed"),
        (arm(model__experts="choice(2,4)"), [], r"arm own must have keys .* got model\.experts"),
        (arm(mtn__lam="interval(-1.0,1.0)"), [], r"lam must be at least 0|mtn\.lam"),
        ({"arms": {}}, [], "must have an arm, got none"),
        ({}, ["optimizer.lr=1e-3"], r"arm plain must have a range or a choice.*~hydra\.sweeper"),
        ({}, ["seed=3"], "seed must be left out of a tuned sweep, got seed=3"),
        ({}, ["test=true"], "test must be left out of a tuned sweep"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_runs(settings, arguments, message, tmp_path):
    with pytest.raises((InputError, HydraException), match=message):
        make_studies(*arguments, **settings)

    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("seeds", "found"), [("range(1,4)", [1, 2, 3]), ("5", [5]), ([4, 2], [4, 2]), ("1,7", [1, 7])]
)
def test_seeds_are_read_as_on_the_command_line(seeds, found):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        assert tune.parse_seeds(seeds, 0, GlobalHydra.instance().config_loader()) == found


@pytest.mark.parametrize("seeds", ["range(0,3)", "1,1", "-1", "x"])
def test_seeds_that_a_trial_had_or_that_are_none_are_refused(seeds):
    with (
        initialize_config_dir(str(CONF_DIR), version_base="1.3"),
        pytest.raises(InputError, match="seeds must be"),
    ):
        tune.parse_seeds(seeds, 0, GlobalHydra.instance().config_loader())


@pytest.mark.parametrize("key", ["trials", "batch", "sampler_seed", "trial_seed"])
def test_a_budget_out_of_range_is_refused(key):
    settings = {"trials": 3, "batch": 1, "sampler_seed": 0, "trial_seed": 0, key: -1}

    with pytest.raises(InputError, match=rf"hydra\.sweeper\.{key} must be"):
        tune.make_budget(settings)


TUNED = ["experiment=tuned", "trials=3", "seeds=1", "threads=1", "trainer.max_epochs=1"]
OTHERS = ("weight_decay", "mtn_gradient", "mtn_decoupled", "soft_sharing")
TUNED += [f"~hydra.sweeper.arms.{arm}" for arm in OTHERS]
WORKERS = ["hydra/launcher=workers", "hydra.launcher.n_jobs=2"]


def command(folder, *overrides):
    place = [f"hydra.sweep.dir={folder}", f"data_root={folder.parent / 'data'}"]
    return [sys.executable, "-m", "mtnrec.train", *place, *TINY, *TUNED, *overrides]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], WORKERS], ids=["basic", "workers"])
def test_a_tuned_sweep_killed_three_times_ends_with_the_same_tables(launcher, tmp_path):
    quiet = {"check": True, "capture_output": True, "timeout": 400}
    subprocess.run(command(tmp_path / "whole"), **quiet)
    whole = tables(tmp_path / "whole")
    folder = tmp_path / "killed"

    for fits in (1, 4, 7):  # of 6 trials and 2 fresh runs
        process = subprocess.Popen(
            command(folder, *launcher),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len([*folder.rglob("result.json")]) < fits:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(folder, *launcher), **quiet)

    assert tables(folder) == whole
    assert len(whole[1]) == 8
    assert {len(arm.trials) for arm in whole[0].arms} == {3}
    assert {state for path in folder.iterdir() if path.is_dir() for state in [run_state(path)]} == {
        State.FINISHED
    }


@pytest.mark.parametrize("only", ["mtn", ["mtn"]])
def test_only_the_named_arms_are_tuned_and_the_baseline_stays_the_first_of_all(only, tmp_path):
    (alone,), _ = make_studies(f"hydra.sweep.dir={tmp_path}", only=only)
    both, _ = make_studies(f"hydra.sweep.dir={tmp_path}", only="plain,mtn")

    assert (alone.arm, alone.is_baseline) == ("mtn", False)
    assert [study.is_baseline for study in both] == [True, False]
    assert alone.ask()[0].folder == both[1].ask()[0].folder


@pytest.mark.parametrize("only", ["mtnn", [], ["plain", "x"]])
def test_an_arm_that_is_not_there_is_refused(only):
    with pytest.raises(InputError, match=r"hydra\.sweeper\.only must be one of plain, mtn; got "):
        make_studies(only=only)
