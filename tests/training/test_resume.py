import csv
import json
import resource
import shutil

import pytest
import torch
from shared_fixtures import Killed, kill_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtnrec.system.files import read_json
from mtnrec.training.recorder import RunRecorder

# Dropout draws random numbers in each step; MTN learns; the best epoch is not the last.
LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
RUN = [
    *LOG,
    "data.batch_size=128",
    "optimizer.lr=0.03",
    "model.dropout=0.3",
    "mtn.enabled=true",
    "trainer.max_epochs=9",
    "model.embedding_init=per_field",
    "stop=patience",
    "patience=2",
]


def read_record(folder):
    return json.loads((folder / "result.json").read_text())


def outcome(folder):
    """All of a record that is no time."""
    record = read_record(folder)
    keys = ("cell", "metrics", "counts", "history", "best_epoch", "calibration_curves", "noise")
    return {key: record[key] for key in keys}


def assert_same_weights(*folders):
    paths = (folder / "checkpoints" / "best.ckpt" for folder in folders)
    found, expected = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def read_csv(folder):
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (name, row["step"]): pytest.approx(float(row[name]), rel=1e-6)
        for row in rows
        for name in row
        if row[name]
    }


@pytest.fixture(scope="module")
def whole(train):
    return train(*RUN)


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        pytest.param("on_train_epoch_start", 2, marks=pytest.mark.slow),
        pytest.param("on_validation_end", 3, marks=pytest.mark.slow),
        ("on_train_epoch_end", 2),  # best.ckpt is newer than last.ckpt
        pytest.param(
            "on_test_start", 1, marks=pytest.mark.slow
        ),  # what ended the training is not forgotten
    ],
)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    hook, number, whole, train, kill, tmp_path
):
    kill(hook, number)
    with pytest.raises(Killed):
        train(*RUN, folder=tmp_path)
    assert (tmp_path / "running.json").exists()
    assert not (tmp_path / "result.json").exists()

    train(*RUN, folder=tmp_path)

    assert outcome(tmp_path) == outcome(whole)
    assert 3 <= len(outcome(whole)["history"]) < 9  # patience ended it
    assert_same_weights(tmp_path, whole)
    assert read_csv(tmp_path) == read_csv(whole)
    epochs = [f"after epoch {number - 2}" if hook != "on_test_start" else "after epoch"]
    assert f"last.ckpt, {epochs[0]}" in (tmp_path / "train.log").read_text()
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_a_killed_run_of_towers_that_start_equal_ends_with_the_same_bits(train, kill, tmp_path):
    run = [*LOG, "model.tower_init=equal", "mtn.enabled=true"]
    expected = train(*run)
    kill("on_train_epoch_end", 2)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path)

    train(*run, folder=tmp_path)

    assert ", after epoch 0" in (tmp_path / "train.log").read_text()
    assert outcome(tmp_path) == outcome(expected)
    assert_same_weights(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "step", "overrides"),
    [
        (24, 22, []),  # in the second epoch of 15 steps
        pytest.param(12, 11, ["mtn.enabled=false"], marks=pytest.mark.slow),
        pytest.param(
            28,
            22,
            ["mtn.refresh_every=16", "trainer.precision=bf16-mixed"],
            marks=pytest.mark.slow,
        ),
        pytest.param(24, 22, ["balance=metabalance"], marks=pytest.mark.slow),
        pytest.param(24, 22, ["balance=uncertainty"], marks=pytest.mark.slow),
        pytest.param(24, 22, ["balance=famo"], marks=pytest.mark.slow),
        pytest.param(24, 22, ["balance=pcgrad"], marks=pytest.mark.slow),
        # In the second epoch too: 8 steps an epoch, of two batches each and the last of one.
        pytest.param(24, 11, ["trainer.accumulate_grad_batches=2"], marks=pytest.mark.slow),
        pytest.param(
            24,
            22,
            ["data=synthetic_ali_ccp", "optimizer=lazy_adam", "noise.proportion=0.1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_killed_within_an_epoch_ends_with_the_bits_of_an_uninterrupted_one(
    number, step, overrides, train, kill, tmp_path
):
    run = [*RUN, "trainer.max_epochs=3", "trainer.checkpoint_every_n_steps=11", *overrides]
    expected = train(*run)
    kill("on_train_batch_end", number)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path)

    train(*run, folder=tmp_path)

    assert f", step {step}\n" in (tmp_path / "train.log").read_text()
    assert outcome(tmp_path) == outcome(expected)
    assert_same_weights(tmp_path, expected)
    assert read_csv(tmp_path) == read_csv(expected)


@pytest.mark.slow
def test_a_run_whose_disk_was_full_ends_with_the_bits_of_an_uninterrupted_one(
    whole, train, tmp_path, monkeypatch
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = RunRecorder.on_train_epoch_end

    def fill(self, trainer, pl_module):  # from the second epoch on no checkpoint can be written
        original(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "on_train_epoch_end", fill)
        try:
            with pytest.raises(SystemExit) as stop:
                train(*RUN, folder=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written (File too large; " in stop.value.code
    assert read_json(tmp_path / "failure.json")["error"] == "InputError"

    train(*RUN, folder=tmp_path)

    assert "last.ckpt, after epoch 0" in (tmp_path / "train.log").read_text()
    assert outcome(tmp_path) == outcome(whole)
    assert_same_weights(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("ple", "adam"),
        pytest.param("adatt", "adam", marks=pytest.mark.slow),
        pytest.param("omoe", "adam", marks=pytest.mark.slow),
        pytest.param("single_task", "lazy_adam", marks=pytest.mark.slow),
    ],
)
def test_every_model_resumes_to_the_same_bits(model, optimizer, train, kill, tmp_path):
    run = [*RUN, "data.batch_size=512", "trainer.max_epochs=2", f"optimizer={optimizer}"]
    expected = train(*run, model=model)
    kill("on_train_epoch_start", 2)
    with pytest.raises(Killed):
        train(*run, model=model, folder=tmp_path)

    train(*run, model=model, folder=tmp_path)

    assert "last.ckpt, after epoch 0" in (tmp_path / "train.log").read_text()
    assert outcome(tmp_path) == outcome(expected)
    assert_same_weights(tmp_path, expected)


@pytest.mark.slow
def test_checkpoints_within_an_epoch_change_nothing_without_mtn(train):
    run = [*RUN, "mtn.enabled=false", "trainer.max_epochs=2"]

    folders = [train(*run, f"trainer.checkpoint_every_n_steps={n}") for n in ("null", 3)]

    assert outcome(folders[0]) == outcome(folders[1])
    assert_same_weights(*folders)


@pytest.mark.slow
def test_the_moments_of_rows_are_resumed(train, kill, tmp_path):
    lazy = [*LOG, "data=synthetic_ali_ccp", "optimizer=lazy_adam", "trainer.gradient_clip_val=0.1"]
    expected = train(*lazy, "trainer.max_epochs=3")
    kill("on_validation_end", 2)
    with pytest.raises(Killed):
        train(*lazy, "trainer.max_epochs=3", folder=tmp_path)

    train(*lazy, "trainer.max_epochs=3", folder=tmp_path)

    assert "last.ckpt, after epoch 0" in (tmp_path / "train.log").read_text()
    assert outcome(tmp_path) == outcome(expected)
    assert len(outcome(tmp_path)["history"]) == 3


@pytest.mark.slow
def test_a_resumed_run_counts_the_time_before(train, kill, tmp_path):
    kill("on_test_start", 1)
    with pytest.raises(Killed):
        train(*RUN, "logger=tensorboard", folder=tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]

    train(*RUN, "logger=tensorboard", folder=tmp_path)

    assert read_record(tmp_path)["seconds"]["fit"] > state["RunRecorder"]["fit_seconds"] > 0


@pytest.mark.slow
def test_a_run_of_other_settings_does_not_resume_from_the_checkpoint(train, kill, tmp_path):
    kill("on_train_epoch_start", 2)
    with pytest.raises(Killed):
        train(*RUN, folder=tmp_path)

    train(*RUN, "optimizer.lr=0.01", folder=tmp_path)

    assert "training restarts" in (tmp_path / "train.log").read_text()
    assert read_record(tmp_path)["config"]["optimizer"]["lr"] == 0.01


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """The folder of a run that was killed in its second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, "on_train_epoch_start", 2)
        with pytest.raises(Killed):
            train(*RUN, folder=folder)
    return folder


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(killed, tmp_path, dirs_exist_ok=True)


def refusal(train, folder, *overrides):
    with pytest.raises(SystemExit) as stop:
        train(*RUN, *overrides, folder=folder)
    assert "Delete last.ckpt, set resume=false to restart, or choose another" in stop.value.code
    return stop.value.code


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_kept(train, interrupted):
    last = interrupted / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-200])

    assert "last.ckpt is damaged or not a checkpoint" in refusal(train, interrupted)
    assert last.exists()
    train(*RUN, "resume=false", folder=interrupted)
    assert not last.exists()


def test_a_checkpoint_that_is_not_of_a_run_is_refused(train, interrupted):
    last = interrupted / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": {}, "callbacks": {}}, last)

    assert "last.ckpt is not a checkpoint of an mtnrec run" in refusal(train, interrupted)


def test_a_checkpoint_of_another_version_is_refused(train, interrupted):
    last = interrupted / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (state,) = (of for name, of in content["callbacks"].items() if name.startswith("ResumePoint"))
    del state["format"]
    torch.save(content, last)

    message = "must have format 1, got None: another version of mtnrec wrote it, and can"
    assert message in refusal(train, interrupted)


@pytest.mark.slow
def test_a_run_of_more_processes_does_not_resume_from_the_checkpoint_of_one(train, interrupted):
    last = interrupted / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (state,) = (of for name, of in content["callbacks"].items() if name.startswith("ResumePoint"))
    state["ranks"] = 2
    torch.save(content, last)

    train(*RUN, folder=interrupted)

    assert (
        "a different world size, or was moved: training" in (interrupted / "train.log").read_text()
    )


@pytest.mark.slow
def test_a_checkpoint_of_another_model_or_schema_is_refused(train, interrupted):
    widths = refusal(train, interrupted, "model.tower_widths=[8]")
    assert "of another model or schema: network.towers." in widths
    schema = refusal(train, interrupted, "data=synthetic_ali_ccp")
    assert "of another model or schema: network." in schema


@pytest.mark.slow
def test_a_missing_or_damaged_best_epoch_is_reported(train, interrupted):
    best = interrupted / "checkpoints" / "best.ckpt"
    content = best.read_bytes()
    best.write_bytes(content[:1000])
    assert "best.ckpt is damaged" in refusal(train, interrupted)
    best.unlink()
    assert "last.ckpt needs it" in refusal(train, interrupted)
    best.write_bytes(content)
    train(*RUN, folder=interrupted)


@pytest.mark.slow
def test_leftovers_of_a_killed_write_are_removed(train, interrupted):
    names = ["checkpoints/.last.ckpt.1.tmp", "checkpoints/.best.ckpt.1.tmp", ".running.json.1.tmp"]
    for name in names:
        (interrupted / name).write_bytes(b"half")

    train(*RUN, folder=interrupted)

    assert not list(interrupted.rglob("*.tmp"))


def test_a_restarted_run_does_not_leave_the_old_point_behind(train, kill, interrupted):
    kill("on_train_epoch_start", 1)
    with pytest.raises(Killed):
        train(*RUN, "optimizer.lr=0.01", folder=interrupted)

    assert not (interrupted / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_a_run_of_other_settings_leaves_nothing_of_the_one_before(train, tmp_path):
    run = [*LOG, "logger=[csv,tensorboard]", "mtn.enabled=true"]
    train(*run, folder=tmp_path)

    train(*run, "trainer.max_epochs=1", "optimizer.lr=0.01", folder=tmp_path)

    assert [path.name for path in (tmp_path / "spectra").iterdir()] == ["epoch_000.npz"]
    aucs = [epoch["val/cvr_auc"] for epoch in read_record(tmp_path)["history"]]
    assert points(tmp_path) == pytest.approx(aucs, rel=1e-6)
    assert len(aucs) == 1


def points(folder):
    """The validation AUCs of a folder's only event file with any."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("val/cvr_auc")]


@pytest.mark.slow
def test_a_resumed_run_has_each_epoch_once_in_tensorboard(train, kill, tmp_path):
    run = [*LOG, "logger=tensorboard", "trainer.max_epochs=3"]
    kill("on_train_epoch_start", 3)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path)

    train(*run, folder=tmp_path)

    assert len(points(tmp_path)) == 3


@pytest.mark.slow
def test_a_killed_run_with_fewest_epochs_ends_with_the_bits_of_an_uninterrupted_one(
    train, kill, tmp_path
):
    run = [*RUN, "+trainer.min_epochs=6"]
    whole = train(*run)
    assert len(outcome(whole)["history"]) == 6  # patience alone would end it before
    kill("on_train_epoch_start", 6)
    with pytest.raises(Killed):
        train(*run, folder=tmp_path)

    train(*run, folder=tmp_path)

    assert outcome(tmp_path) == outcome(whole)
    assert_same_weights(tmp_path, whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([0], "trainer.checkpoint_every_n_steps must be an integer >= 1, got 0"),
        ([5, "trainer.val_check_interval=0.5"], "with trainer.checkpoint_every_n_steps, got 0.5"),
    ],
)
def test_invalid_steps_are_refused(overrides, message, train, tmp_path):
    steps, *others = overrides
    others = [f"+{other}" for other in others]
    with pytest.raises(SystemExit) as stop:
        train(*RUN, f"trainer.checkpoint_every_n_steps={steps}", *others, folder=tmp_path)
    assert message in stop.value.code


def test_a_finished_run_is_kept_unless_resume_is_false(train, tmp_path):
    train(*LOG, "trainer.max_epochs=1", folder=tmp_path)
    record = tmp_path / "result.json"
    first = record.stat().st_mtime_ns

    train(*LOG, "trainer.max_epochs=1", folder=tmp_path)
    assert record.stat().st_mtime_ns == first
    assert "is finished; resume=false trains again" in (tmp_path / "train.log").read_text()

    train(*LOG, "trainer.max_epochs=1", "resume=false", folder=tmp_path)
    assert record.stat().st_mtime_ns > first
