import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import cloudpickle
import pytest
import torch
import yaml
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate

from mtnrec.command.config import CONF_DIR, resolve_settings
from mtnrec.run.folder import State, lock_run_folder, run_state
from mtnrec.schema import Schema
from mtnrec.sweep import launch as sweep
from mtnrec.train import main as train_main

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3", "trainer.max_epochs=1"]
SWEEP = [*LOG, "hydra.mode=MULTIRUN", "mtn.enabled=true", "seed=0,1", "mtn.lam=1e-4,-1"]


def read_json(path):
    return json.loads(path.read_text())


def states(root):
    return {path.name: run_state(path) for path in root.iterdir() if path.is_dir()}


@pytest.fixture
def plan():
    """Plan the runs of a command line, as the sweeper does."""

    def make(grids, *arguments, experiment=None):
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            lines = [] if experiment is None else [f"experiment={experiment}"]
            config = loader.load_configuration("train", [*arguments, *lines], RunMode.MULTIRUN)
            sweeper = config.hydra.sweeper
            grids = grids or [{**sweeper.params, **g} for g in (sweeper.grids or {"": {}}).values()]
            of_runs = [a for a in arguments if not a.removeprefix("~").startswith("hydra.")]
            return sweep.plan(config, loader, grids, [*of_runs, *lines])

    return make


@pytest.mark.slow
def test_several_grids_make_one_sweep(plan):
    grids = [
        {"seed": "range(0,2)", "model": "esmm,mmoe"},
        {"seed": "range(0,2)", "model": "mmoe", "mtn.enabled": True, "mtn.lam": "1e-4,1e-3"},
    ]

    jobs = plan(grids)

    assert len(jobs) == 4 + 4
    assert len({job.folder for job in jobs}) == 8
    assert {job.folder.parent for job in jobs} == {Path("runs")}
    assert jobs[0].overrides == ("seed=0", "model=esmm")
    assert jobs[-1].config["mtn"]["lam"] == 1e-3


def test_a_run_that_two_grids_share_is_planned_once(plan):
    (job,) = plan([{"mtn.enabled": "false", "mtn.lam": "1e-5,1e-4"}, {"seed": 0}])

    assert job.config["mtn"]["enabled"] is False


def test_every_swept_key_is_in_the_name_of_a_run_folder(plan):
    jobs = plan([{"optimizer.lr": "1e-3,1e-2", "model": "esmm,mmoe"}])

    names = [job.folder.name.rpartition("-")[0] for job in jobs]
    assert sorted(names) == [
        f"synthetic-{model}-lr_{rate}-seed0" for model in ("esmm", "mmoe") for rate in (0.001, 0.01)
    ]


def test_a_run_keeps_the_folder_that_another_sweep_gave_it(plan):
    (before,) = plan([{"optimizer.lr": "1e-2"}])
    before.folder.mkdir(parents=True)

    (same, other) = plan([{"optimizer.lr": "1e-2", "patience": "3,4"}])

    assert same.folder == before.folder
    assert "patience_4" in other.folder.name


@pytest.mark.slow
def test_a_sweep_over_rivals_includes_none(plan):
    jobs = plan(None, "regularizer=none,l2", "scheduler=constant,cosine", "balance=sum,pcgrad")

    norms = [(job.config["regularizer"] or {}).get("norm") for job in jobs]
    assert sorted(norms, key=str) == [None] * 4 + ["l2"] * 4


def test_the_command_line_narrows_every_grid(plan):
    grids = [{"seed": "range(0,9)", "model": model} for model in ("esmm", "mmoe")]

    jobs = plan(grids, "seed=7", "patience=1")

    assert [job.config["seed"] for job in jobs] == [7, 7]
    assert {job.config["patience"] for job in jobs} == {1}


@pytest.mark.parametrize(
    ("name", "swept", "narrowed", "runs"),
    [
        ("table_1", 10 * 4 * 3 * 2, [], 2),
        ("table_2", 10 * 3 * 3 * 2, ["noise.proportion=0.1"], 2),
        ("analysis_3_target", 10 * 2 * 2, [], 3),
        ("denoising", 10 * 2 * 2 * 3, ["noise.proportion=0", "noise.label_flip={click:0.1}"], 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("figure_1", 10 * 6, ["noise.proportion=0,0.1"], 2),
                ("figure_3", 10 * 2 * 2, [], 3),  # without MTN its target makes no difference
                ("analysis_3_layers", 10 * 2 * 4, ["mtn.layers=all,[0]"], 3),
                ("lambda", 5 * 2 * 2 * 6, ["mtn.lam=1e-4"], 3),
                ("alpha", 10 * 2 * 5, ["mtn.alpha=uniform,[0,0,1]"], 3),
                ("layer_weighting", 10 * 2 * 4, ["mtn.layer_weighting=mean,gated"], 3),
                ("zoo", 3 * 2, [], 2),  # of each grid; the three grids narrow to the same runs
            )
        ),
    ],
)
def test_an_experiment_sweeps_its_grid_and_narrows(name, swept, narrowed, runs, plan):
    file = yaml.safe_load((CONF_DIR / "experiment" / f"{name}.yaml").read_text())
    folder = "analysis_3_target" if name == "figure_3" else name  # they share their runs
    if "hydra" in file:
        params = [f"{key}={value}" for key, value in file["hydra"]["sweeper"]["params"].items()]
        overrides = OverridesParser.create().parse_overrides(params)
        assert len(BasicSweeper.split_arguments(overrides, None)[0]) == swept

    jobs = plan(None, "seed=3", "data=synthetic", "model=mmoe", *narrowed, experiment=name)

    assert len(jobs) == runs
    assert {job.folder.parent.as_posix() for job in jobs} == {f"runs/{folder}"}
    assert {job.config["seed"] for job in jobs} == {3}
    assert {job.config["data"]["name"] for job in jobs} == {"synthetic"}


@pytest.mark.slow
def test_mtn_and_each_rival_have_a_grid_of_seven_strengths_and_one_baseline(plan):
    jobs = plan(None, "data=synthetic", "seed=0", experiment="regularizers")

    arms = Counter((job.config["mtn"]["enabled"], job.folder.name.split("-")[2]) for job in jobs)
    assert arms.pop((False, "seed0")) == 1
    assert {name for _, name in arms} == {
        *("mtn", "gttn", "tucker", "tt", "laf", "capped", "nuclear"),
        *("l2", "frobenius", "soft_sharing", "group_lasso", "optimizer_adamw"),
    }
    assert set(arms.values()) == {7}


@pytest.mark.slow
def test_the_zoo_has_every_model_without_and_with_mtn(plan):
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONF_DIR.glob("model/*.yaml")}
    models = {settings["_target_"] for settings in files.values() if "defaults" not in settings}

    jobs = plan(None, "seed=0", experiment="zoo")

    runs = [(job.config["model"]["_target_"], job.config["mtn"]["enabled"]) for job in jobs]
    assert len(runs) == len(set(runs))
    assert {model for model, _ in runs} == models
    without_towers = {"mtnrec.model.heac.HEAC"}
    assert {model for model, mtn in runs if mtn} == models - without_towers


@pytest.mark.parametrize(
    ("schema", "grids", "models"),
    [
        (Schema((), ("x",), ("buy", "like"), funnel=False), ["funnel", "two_stages"], 8),
        (Schema((), ("x",), ("click", "cart", "buy"), funnel=True), ["two_stages"], 10),
    ],
    ids=["independent", "three_stages"],
)
@pytest.mark.slow
def test_the_zoo_leaves_out_the_models_that_do_not_fit_the_labels(schema, grids, models, plan):
    dropped = [f"~hydra.sweeper.grids.{grid}" for grid in grids]

    jobs = plan(None, "seed=0", "mtn.enabled=false", *dropped, experiment="zoo")

    with torch.device("meta"):
        networks = [instantiate(job.config["model"], schema=schema) for job in jobs]
    assert len(networks) == models


@pytest.mark.slow
def test_the_debiased_models_and_their_controls_share_experts_and_towers(plan):
    jobs = plan(None, "seed=0", experiment="debiasing")

    models = [job.config["model"] for job in jobs]
    arms = [
        (
            model["_target_"].rpartition(".")[2],
            model.get("clicked_weight", model.get("estimator")),
        )
        for model in models
    ]
    assert arms == [
        *(("ESMM", weight) for weight in (0, 1, 10, 20)),
        ("NaiveCVR", None),
        ("ESCM2", "ips"),
        ("ESCM2", "dr"),
        ("DCMT", None),
    ]
    (sizes,) = {
        str([model[key] for key in ("experts", "expert_widths", "tower_widths")])
        for model in models
    }
    assert sizes == "[8, [512, 256], [128, 64]]"
    assert jobs[3].config["data"]["click_rate"] == 1 / 20


@pytest.mark.slow
def test_the_weights_of_the_debiasing_experiment_narrow_and_leave_out_no_model(plan):
    jobs = plan(None, "seed=0", "model.clicked_weight=0,26", experiment="debiasing")

    assert [job.config["model"].get("clicked_weight") for job in jobs] == [0, 26, *[None] * 4]


@pytest.mark.slow
def test_planted_worlds_compare_two_grids_of_equal_size_with_one_baseline(plan):
    narrowed = ["data.relatedness=0,1", "noise.proportion=0", "mtn.lam=1e-3,1e-2"]
    decays = 'hydra.sweeper.grids.weight_decay={optimizer.weight_decay:"1e-4,1e-3"}'

    whole = plan(None, "seed=0", "noise.proportion=0", experiment="planted")
    few = plan(None, "seed=0,1", *narrowed, decays, experiment="planted")

    for jobs, points, strengths in ((whole, 3, 4), (few, 4, 2)):
        arms = Counter(
            (job.config["mtn"]["enabled"], job.config["optimizer"]["weight_decay"] > 0)
            for job in jobs
        )
        assert arms == {
            (False, False): points,
            (True, False): points * strengths,
            (False, True): points * strengths,
        }
    # A world for each seed and relatedness, whatever the noise and the arm.
    worlds = {
        (j.config["seed"], j.config["data"]["relatedness"], j.config["data"]["dir"]) for j in few
    }
    assert len({directory for *_, directory in worlds}) == len(worlds) == 4
    assert {job.config["data"]["generator_seed"] for job in few} == {0, 1}


@pytest.mark.slow
def test_the_quickstart_runs_on_any_launcher(plan):
    jobs = plan(None, "hydra/launcher=basic", "seed=0", experiment="quickstart")

    assert len(jobs) == 12 / 3


def test_a_key_that_only_some_choices_have_is_left_out_of_the_other_runs(plan, caplog):
    jobs = plan([{}], "model=choice(shared_bottom,mmoe)", "model.experts=choice(4)", "seed=0,1")

    experts = {job.folder.name.split("-")[1]: job.config["model"].get("experts") for job in jobs}
    assert len(jobs) == 4
    assert experts == {"sharedbottom": None, "mmoe": 4}
    assert caplog.messages == [
        "model.experts does not fit model=shared_bottom: 2 of 4 runs are made without it"
    ]
    assert {len(job.overrides) for job in jobs} == {2, 3}


def test_a_swept_key_that_does_not_fit_makes_no_second_run(plan):
    jobs = plan([{}], "model=choice(shared_bottom,mmoe)", "model.experts=choice(4,8)")

    assert sorted(str(job.config["model"].get("experts")) for job in jobs) == ["4", "8", "None"]


@pytest.mark.slow
def test_keys_of_a_data_set_of_an_experiment_reach_its_runs(train, tmp_path, capsys):
    keys = ["experiment=table_1", "data.on_error=skip", "seed=0", "model=esmm", "dry_run=true"]

    train(*keys, "data=aliexpress_nl,synthetic", model="esmm", folder=tmp_path / "runs")

    out = " ".join(capsys.readouterr().out.split())
    assert "data.on_error does not fit data=synthetic: 2 of 4 runs are made without it" in out
    assert "4 runs in" in out
    assert out.count("data.on_error=skip") == 2


def test_a_key_that_fits_no_run_is_refused(train, tmp_path):
    with pytest.raises(SystemExit, match=r"^mtnrec: model.expert is not a key of .*model.experts"):
        train("hydra.mode=MULTIRUN", "model.expert=4", model="mmoe", folder=tmp_path)


def test_a_foreign_key_is_refused_before_the_first_run(train, tmp_path):
    with pytest.raises(SystemExit, match=r"^mtnrec: sede is not a key of .* Did you mean seed\?"):
        train("hydra.mode=MULTIRUN", "+sede=1,2", folder=tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_swept_experiments_each_bring_their_grid_and_folder():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        arguments = ["experiment=alpha,figure_1", "seed=3", "data=synthetic"]
        config = loader.load_configuration("train", arguments, RunMode.MULTIRUN)

        sweeps = sweep.split_experiments(config, loader, arguments)

    folders = [part.hydra.sweep.dir for part, _ in sweeps]
    grids = [dict(part.hydra.sweeper.params) for part, _ in sweeps]
    assert folders == ["runs/alpha", "runs/figure_1"]
    assert ["mtn.alpha" in grids[0], "mtn.alpha" in grids[1]] == [True, False]
    assert [given for _, given in sweeps] == [
        ["seed=3", "data=synthetic", f"experiment={name}"] for name in ("alpha", "figure_1")
    ]


@pytest.mark.slow
def test_a_sweep_over_experiments_runs_the_grid_of_each(train, tmp_path, capsys):
    keys = ["experiment=alpha,figure_1", "seed=3", "data=synthetic", "dry_run=true"]

    train("hydra.mode=MULTIRUN", *keys, folder=tmp_path)

    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if " runs in " in line] == ["6", "6"]
    assert "mtn.alpha=[0,1,0]" in out
    assert "noise.proportion=0.25" in out


@pytest.mark.slow
def test_a_dry_run_lists_the_runs_and_trains_nothing(train, tmp_path, capsys):
    keys = [*LOG, "hydra.mode=MULTIRUN", f"data_root={tmp_path / 'data'}"]
    train(*keys, "seed=1", folder=tmp_path / "runs")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    train(*keys, "seed=0,1", "dry_run=true", folder=tmp_path / "runs")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 runs in ")
    assert "".join(lines).count("1 of them finished") == 1
    states = {line.split()[0]: line for line in lines if " seed=" in line}
    assert states.keys() == {"waiting", "finished"}
    assert "-seed0-" in states["waiting"]
    assert sorted(tmp_path.rglob("*")) == before


def test_secrets_are_hidden_in_the_list_of_a_dry_run(train, tmp_path, capsys):
    key = "+logger.settings.api_key=4f2a9c81d7e6"
    keys = [*LOG, "hydra.mode=MULTIRUN", "seed=0,1", "logger=wandb", key]

    train(*keys, "dry_run=true", folder=tmp_path)

    out = capsys.readouterr().out
    assert out.count("+logger.settings.api_key=<hidden>") == 2
    assert "4f2a9c81d7e6" not in out


@pytest.mark.parametrize("subdir", ["${hydra.job.num}", "mine"])
def test_run_folders_that_are_not_named_after_the_settings_are_refused(subdir, train, tmp_path):
    with pytest.raises(SystemExit, match=r"^mtnrec: hydra.sweep.subdir must name each run by its"):
        train("hydra.mode=MULTIRUN", "seed=0,1", f"hydra.sweep.subdir={subdir}", folder=tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_null_of_a_grid_is_null(plan):
    (job,) = plan([{"threads": None, "seed": 0}])

    assert job.config["threads"] is None


def test_a_failing_run_does_not_end_a_sweep_and_its_command_is_printed(train, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2 of 4 runs"):
        train(*SWEEP, folder=tmp_path)

    found = states(tmp_path)
    failed = [name for name, state in found.items() if state is State.FAILED]
    assert len(found) == 4
    assert len(failed) == 2
    assert sum(state is State.FINISHED for state in found.values()) == 2
    out = " ".join(capsys.readouterr().out.split())
    for name in failed:
        failure = read_json(tmp_path / name / "failure.json")
        assert failure["message"] == "mtn.lam must be a number in [0, inf), got -1"
        assert failure["command"] in out
        assert f"{tmp_path / name} failed: mtn.lam must be" in out


@pytest.mark.parametrize("name", [pytest.param("runs", marks=pytest.mark.slow), "a,b=é [c] 'd'"])
@pytest.mark.slow
def test_the_command_of_a_run_repeats_it_in_its_folder(name, train, tmp_path):
    experiment = tmp_path / "own conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\nseed: 3\n")
    sweep, own = (
        tmp_path / name,
        [f"hydra.searchpath=['{tmp_path / 'own conf'}']", "experiment=mine"],
    )
    with pytest.raises(SystemExit, match="1 of 1 runs are"):
        train(*own, *LOG, "hydra.mode=MULTIRUN", "mtn.lam=-1", folder=sweep)
    (folder,) = [path for path in sweep.iterdir() if path.is_dir()]
    command = shlex.split(read_json(folder / "failure.json")["command"])

    assert command[:3] == ["python", "-m", "mtnrec.train"]
    again = [argument for argument in command[3:] if argument != "mtn.lam=-1"]
    train(*again, folder=folder)

    record = read_json(folder / "result.json")
    assert record["seed"] == 3
    assert record["config"]["output_dir"] == str(folder)
    assert not (folder / "failure.json").exists()


@pytest.mark.parametrize(
    "value",
    [
        *(r"'a\'b'", "'a,b','c=d'", r"'\${seed}'"),
        *(pytest.param(v, marks=pytest.mark.slow) for v in ('"it\'s"', "'say \"a\"'", "'点击'")),
    ],
)
def test_the_command_of_a_run_has_its_settings_whatever_the_value(value, plan):
    jobs = plan(None, f"data.name={value}")

    for job in jobs:
        command = shlex.split(shlex.join(job.command))[3:]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            again = loader.load_configuration("train", command, RunMode.RUN)
        assert resolve_settings(again) == job.config


def test_the_same_sweep_again_runs_only_what_is_not_finished(train, tmp_path, capsys):
    train(*SWEEP, "mtn.lam=1e-4", folder=tmp_path)
    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}

    train(*SWEEP, "mtn.lam=1e-4", "seed=0,1,2", folder=tmp_path)

    assert len(records) == 2
    assert {path: path.stat().st_mtime_ns for path in records} == records
    assert len(list(tmp_path.rglob("result.json"))) == 3
    assert "3 of 3 runs are finished (2 from before)" in capsys.readouterr().out


def test_missing_data_are_reported_before_the_first_run(train, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2 of 2 runs cannot start, since their data set is miss"):
        train("hydra.mode=MULTIRUN", "data=aliexpress_nl", "seed=0,1", folder=tmp_path / "runs")

    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 runs will fail: there is no prepared data set" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_runs_without_data_fail_and_the_others_are_made(train, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 of 2 runs are not finished"):
        train("hydra.mode=MULTIRUN", *LOG, "data=aliexpress_nl,synthetic", folder=tmp_path)

    said = " ".join(capsys.readouterr().out.split())
    early = said.index("1 of 2 runs will fail: there is no prepared data set")
    assert early < said.index("runs are finished")


class Launcher:
    """A launcher that the run ``deadly`` kills each time it is launched."""

    def __init__(self, folders, deadly):
        self.folders, self.deadly, self.launches = folders, deadly, []

    def launch(self, job_overrides, initial_job_idx):
        self.launches.append([name for (name,) in job_overrides])
        for (name,) in job_overrides:
            folder = self.folders[name]
            folder.mkdir(exist_ok=True)
            if name == self.deadly:
                (folder / "running.json").write_text("{}")
                raise RuntimeError("a worker was killed")
            (folder / "result.json").write_text("{}")


def test_a_run_that_kills_its_worker_is_tried_three_times_and_the_others_continue(tmp_path):
    folders = {name: tmp_path / name for name in "abc"}
    jobs = [sweep.Job((name,), folder, {}) for name, folder in folders.items()]
    launcher = Launcher(folders, "b")

    sweep._launch(jobs, launcher)

    assert launcher.launches == [["a", "b", "c"], ["b", "c"], ["b"], ["c"]]
    assert read_json(folders["b"] / "failure.json")["message"] == (
        "its process died 3 times: a worker was killed"
    )
    assert run_state(folders["c"]) is State.FINISHED


def test_a_run_beside_one_that_kills_its_worker_is_not_called_failed(tmp_path):
    class SideBySide(Launcher):
        def launch(self, job_overrides, initial_job_idx):
            if (self.deadly,) in job_overrides:
                for (name,) in job_overrides:  # all are in progress, and end with the killed one
                    self.folders[name].mkdir(exist_ok=True)
                    (self.folders[name] / "running.json").write_text("{}")
            super().launch(sorted(job_overrides, key=(self.deadly,).__ne__), initial_job_idx)

    folders = {name: tmp_path / name for name in "abcd"}
    jobs = [sweep.Job((name,), folder, {}) for name, folder in folders.items()]
    launcher = SideBySide(folders, "c")

    sweep._launch(jobs, launcher)

    states = {name: run_state(folder) for name, folder in folders.items()}
    assert states.pop("c") is State.FAILED
    assert set(states.values()) == {State.FINISHED}
    assert len(launcher.launches) == 2 + 4  # twice together, then one by one


@pytest.mark.parametrize("own", [False, True])
def test_a_terminated_worker_is_tried_again_but_sigterm_of_the_sweep_ends_it(
    own, tmp_path, monkeypatch
):
    class Terminated(Launcher):
        def launch(self, job_overrides, initial_job_idx):
            try:
                super().launch(job_overrides, initial_job_idx)
            except RuntimeError:
                raise SystemExit(143) from None

    monkeypatch.setattr(sweep, "got_sigterm", lambda: own)
    folders = {name: tmp_path / name for name in "ab"}
    launcher = Terminated(folders, "a")
    jobs = [sweep.Job((name,), folder, {}) for name, folder in folders.items()]

    with pytest.raises(SystemExit) if own else nullcontext():
        sweep._launch(jobs, launcher)

    state = State.INTERRUPTED if own else State.FAILED
    assert run_state(folders["a"]) is state
    assert (run_state(folders["b"]) is State.FINISHED) == (not own)


class Sharing(Launcher):
    """Finds one run locked by another process, which leaves it unfinished."""

    def launch(self, job_overrides, initial_job_idx):
        super().launch(job_overrides, initial_job_idx)
        if len(self.launches) == 1:
            (self.folders["b"] / "result.json").unlink()
            other = lock_run_folder(self.folders["b"], [], "")
            other.__enter__()
            threading.Timer(0.1, other.__exit__, (None, None, None)).start()


def test_a_run_in_another_process_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_PAUSE", 0.02)
    folders = {name: tmp_path / name for name in "ab"}
    launcher = Sharing(folders, None)

    sweep._launch([sweep.Job((name,), folder, {}) for name, folder in folders.items()], launcher)

    assert launcher.launches == [["a", "b"], ["b"]]
    assert run_state(folders["b"]) is State.FINISHED


def test_an_error_of_the_launcher_ends_the_sweep(tmp_path):
    class Broken:
        def launch(self, job_overrides, initial_job_idx):
            raise RuntimeError("no such partition")

    with pytest.raises(RuntimeError, match="no such partition"):
        sweep._launch([sweep.Job(("a",), tmp_path / "a", {})], Broken())


def test_the_training_can_be_sent_to_a_worker_process():
    task = train_main.__wrapped__  # the function that Hydra's launchers pickle

    assert callable(cloudpickle.loads(cloudpickle.dumps(task)))


OUTCOME = ("cell", "metrics", "counts", "history", "best_epoch", "calibration_curves")


def outcomes(root):
    records = {path.parent.name: read_json(path) for path in root.rglob("result.json")}
    return {name: {key: record[key] for key in OUTCOME} for name, record in records.items()}


def command(folder, data_root, *overrides):
    return [
        *(sys.executable, "-m", "mtnrec.train", "-m", f"hydra.sweep.dir={folder}"),
        *(f"data_root={data_root}", "data.rows=12000", "data.click_rate=0.2"),
        *("data.conversion_rate=0.3", "data.batch_size=128", "model=shared_bottom"),
        *("model.embedding_dim=8", "model.bottom_widths=[16]", "model.tower_widths=[8]"),
        *("trainer.max_epochs=8", "threads=1", "mtn.enabled=false,true", "seed=0,1"),
        *overrides,
    ]


@pytest.mark.slow
def test_a_sweep_killed_three_times_and_two_workers_give_the_bits_of_one_process(tmp_path):
    data = tmp_path / "data"
    subprocess.run(command(tmp_path / "whole", data), check=True, capture_output=True)
    expected = outcomes(tmp_path / "whole")

    killed = command(tmp_path / "killed", data)
    for epochs in (2, 1, 1):
        process = subprocess.Popen(killed, start_new_session=True, stdout=subprocess.DEVNULL)
        wait_for_epochs(tmp_path / "killed", epochs, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(killed, check=True, capture_output=True)
    logs = [path.read_text() for path in (tmp_path / "killed").rglob("train.log")]

    workers = ["hydra/launcher=workers", "hydra.launcher.n_jobs=2"]
    subprocess.run(command(tmp_path / "two", data, *workers), check=True, capture_output=True)

    assert len(expected) == 4
    assert any(re.search("resumes from .*last.ckpt", log) for log in logs)
    assert outcomes(tmp_path / "killed") == expected
    assert outcomes(tmp_path / "two") == expected


def wait_for_epochs(root, epochs, process):
    """Wait until a run of a live sweep has finished some epochs."""
    while process.poll() is None:
        for path in root.rglob("running.json"):
            if read_json(path).get("epochs", 0) >= epochs and run_state(path.parent) == "running":
                return
        time.sleep(0.02)
    raise AssertionError("the sweep was done before it could be killed")
