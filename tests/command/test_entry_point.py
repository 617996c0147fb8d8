import io
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import mtnrec.train
from mtnrec import __main__ as umbrella
from mtnrec.command import interrupt
from mtnrec.command.config import CONF_DIR
from mtnrec.command.entry_point import _keep_writing
from mtnrec.command.help import (
    command_names,
    configured_commands,
    print_help,
    read_choice,
    read_head,
    read_keys,
)

LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]


def words(text):
    return " ".join(text.split())


def said(capsys):
    return words(capsys.readouterr().out)


@pytest.mark.parametrize("name", configured_commands())
def test_the_help_of_a_command_has_its_examples_and_keys_with_their_comments(name, capsys):
    text = (CONF_DIR / f"{name}.yaml").read_text()

    print_help(name, [])

    out = said(capsys)
    assert len([line for line in read_head(text) if f"python -m mtnrec.{name}" in line]) == 3
    assert words(" ".join(read_head(text))) in out
    for key in read_keys(text):
        assert key.name in out
        assert key.comment
    assert "Keys of" not in out
    for group in ("optimizer", "trainer"):
        assert (f" {group} " in out) == (name == "train")


def test_the_help_lists_the_keys_of_a_named_choice(capsys):
    print_help("train", ["--help", "data=ali_ccp", "model=mmoe"])

    out = said(capsys)
    for group, choice in (("data", "ali_ccp"), ("model", "mmoe")):
        assert f"Keys of {group}={choice}:" in out
        for key in read_choice(CONF_DIR / group / f"{choice}.yaml"):
            assert key.name.startswith("_") or f"{group}.{key.name}" in out
    assert "data.batch_size" in out


def test_asking_for_help_composes_nothing(prepare, capsys):
    prepare("--help")

    assert said(capsys).startswith("Turn raw logs or a table into a prepared data set.")


def test_the_umbrella_lists_the_commands_and_refuses_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mtnrec"])
    umbrella.main()
    out = said(capsys)
    monkeypatch.setattr(sys, "argv", ["mtnrec", "trian"])

    assert all(f" {name} " in out for name in command_names())
    with pytest.raises(SystemExit, match=r"^mtnrec: the command must be one of .*; got 'trian'"):
        umbrella.main()


@pytest.mark.parametrize("arguments", [["mtnrec", "--version"], ["mtnrec-train", "--version"]])
def test_the_version_is_that_of_the_package(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", arguments)

    (umbrella.main if arguments[0] == "mtnrec" else mtnrec.train.main)()

    assert re.fullmatch(r"mtnrec \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_each_console_script_is_a_command_of_the_umbrella():
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "scripts"
    ]

    assert {*scripts} == {"mtnrec", *(f"mtnrec-{name}" for name in command_names())}


def test_the_umbrella_runs_a_command_as_its_module(write_run, tmp_path):
    runs = [write_run(tmp_path, "a"), write_run(tmp_path, "b", seed=1)]
    arguments = [sys.executable, "-m", "mtnrec", "compare", *runs]

    done = subprocess.run(arguments, capture_output=True, text=True)

    assert done.returncode == 0
    assert "test/ctcvr_auc" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle=mmoe"], "modle is not a key of mtnrec train. Did you mean model?"),
        (["+modle=mmoe"], "modle is not a key of mtnrec train. Did you mean model?"),
        (["++sede=3"], "sede is not a key of mtnrec train. Did you mean seed?"),
        (["experimnt=table_1"], "experimnt is not a key of mtnrec train. Did you mean experiment?"),
        (
            ["batch_size=3"],
            "batch_size is not a key of mtnrec train. Did you mean data.batch",
        ),
        (["+xyz=3"], "xyz is not a key of mtnrec train. Choose from data, noise, "),
        (
            ["mtn.enabledd=true"],
            "mtn.enabledd is not a key of mtnrec.mtn.callback.MTN. Did you mean mtn.enabled?",
        ),
        (
            ["+mtn.enabledd=true"],
            "mtn.enabledd is not a key of mtnrec.mtn.callback.MTN. Did you mean mtn.enabled?",
        ),
        (
            ["+noise.prop=0.1"],
            "noise.prop is not a key of mtnrec.data.noise.Noise. Did you mean noise.proportion?",
        ),
        (["+optimizer.lrr=1"], "optimizer.lrr is not a key of torch.optim.Adam. Did you mean "),
        (
            ["+mtn.alpha_optimizer.lrr=1"],
            "mtn.alpha_optimizer.lrr is not a key of torch.optim.Adam. Did you mean mtn.alpha_opt",
        ),
        (
            ["+trainer.max_epoch=3"],
            "trainer.max_epoch is not a key of lightning.Trainer. Did you mean trainer.max_epochs?",
        ),
        (["+data.colour=red"], "data.colour is not a key of mtnrec.data.synthetic.Synthetic. "),
        (["~patience"], "~patience removes a key of mtnrec train. Leave it out."),
        (["model=esm"], "model must be one of "),
        (
            ["experiment=[alpha,lambda]"],
            "experiment must be one choice, got [alpha,lambda].",
        ),
        (["logger=null"], "a config group must be one of its choices or a list of them, got None"),
        (["model=3"], "a config group must be one of its choices or a list of them, got int"),
        (["seed=abc"], "Error merging override seed=abc: Value 'abc' of type 'str' could not be"),
        (["seed=0,1"], "Ambiguous value for argument 'seed=0,1'"),
        (["data.name=a{b"], "data.name=a{b is not in Hydra's grammar. Quote the value, and the"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast'"),
        (
            ["model.bottom_widths=[3]"],
            "model.bottom_widths is not a key of mtnrec.model.esmm.ESMM. ",
        ),
        (["dry_run=true"], "dry_run lists the runs of a sweep, got a single run"),
    ],
)
def test_a_bad_command_line_ends_in_one_message(overrides, message, train, tmp_path):
    with pytest.raises(SystemExit) as ended:
        train("optimizer=adam", *overrides, folder=tmp_path)

    assert str(ended.value).startswith(f"mtnrec: {message}")
    assert "To append to your config" not in str(ended.value)
    assert not (tmp_path / "result.json").exists()


def test_a_gpu_that_is_not_there_is_refused_before_the_data_are_prepared(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

    with pytest.raises(SystemExit, match=r"^mtnrec: trainer.accelerator must be available on this"):
        train("trainer.accelerator=gpu", f"data_root={tmp_path / 'data'}", folder=tmp_path / "run")

    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (SystemExit(130), 130),
        (SystemExit(143), 143),
        (SystemExit(), 143),  # Lightning's SIGTERMException
        (SystemExit(1), None),
        (SystemExit("message"), None),
    ],
)
def test_an_interrupt_has_the_status_of_its_signal(error, status):
    assert interrupt.interrupt_status(error) == status


def test_lightnings_exit_after_ctrl_c_is_an_interrupt():
    error = SystemExit(1)
    error.__context__ = KeyboardInterrupt()

    assert interrupt.interrupt_status(error) == 130


@pytest.fixture
def default_sigterm(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(interrupt, "_received", set())
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_raises_an_exit_with_its_status(default_sigterm):
    interrupt.exit_on_sigterm()

    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)

    assert ended.value.code == 143
    assert interrupt.got_sigterm()


def test_the_handler_of_a_cluster_stays(default_sigterm):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    interrupt.exit_on_sigterm()

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.fixture
def restored_sigint():
    """Restore the handler that Lightning replaces after Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("restored_sigint")
def test_an_interrupted_run_says_what_it_keeps_and_the_command_that_resumes_it(
    train, kill, monkeypatch, capsys, tmp_path
):
    folder, keys = tmp_path / "a run, é=1", [*LOG, "trainer.max_epochs=3", "seed=3"]
    monkeypatch.setattr("shared_fixtures.Killed", KeyboardInterrupt)
    kill("on_train_epoch_start", 2)

    with pytest.raises(SystemExit) as ended:
        train(*keys, folder=folder)

    assert ended.value.code == 130
    first, command = capsys.readouterr().err.splitlines()
    kept = f"{folder} keeps 1 complete epochs in checkpoints/last.ckpt. To resume:"
    assert first == f"mtnrec: interrupted. {kept}"
    program = [sys.executable, *shlex.split(command)[1:]]
    assert subprocess.run(program, capture_output=True).returncode == 0
    assert "resumes from" in (folder / "train.log").read_text()
    assert (folder / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
def test_a_terminated_training_has_status_143(sweep, tmp_path):
    keys = [*LOG, "model.embedding_dim=4", "model.tower_widths=[8]", "trainer.max_epochs=9999"]
    place = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    place = place if sweep else [f"hydra.run.dir={tmp_path}"]
    program = [sys.executable, "-m", "mtnrec.train", *place, *keys, "patience=9999"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.1)

    process.terminate()
    message = process.communicate(timeout=60)[1].decode()

    assert process.returncode == 143
    assert "interrupted. " in message
    assert "To resume:\n  python -m mtnrec.train " in message
    assert not list(tmp_path.rglob("result.json"))


def test_characters_that_stdout_lacks_are_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)

    _keep_writing()
    stream.write("é • ⠋")
    stream.flush()

    assert stream.buffer.getvalue() == "é ? ?".encode("latin-1")


def test_a_command_whose_stdout_closes_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failure.json").write_text('{"message": "no"}')
    program = [sys.executable, "-m", "mtnrec.status", f"runs={tmp_path}"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        message = process.stderr.read().decode()

    assert process.returncode == 0
    assert message == "mtnrec: stdout was closed; continuing without it\n"
