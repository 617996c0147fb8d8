import gzip
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import wandb
from omegaconf import OmegaConf
from wandb.proto.wandb_internal_pb2 import Record

from mtnrec.checks import InputError
from mtnrec.command.config import seed_keys
from mtnrec.reporting.runs import read_runs
from mtnrec.run.identity import RunIdentity
from mtnrec.tracking.loggers import check_login, make_loggers
from mtnrec.tracking.tables import record_tables
from mtnrec.training.recorder import RunRecorder

# Rates at which every split has both classes of every task.
LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]


@pytest.fixture
def labels(compose_config):
    def make(*overrides, checksum="1"):
        config = compose_config("output_dir=out", *overrides)
        resolved = OmegaConf.to_container(config, resolve=True)
        return RunIdentity(resolved, checksum, seed_keys(config))

    return make


@pytest.mark.slow
def test_seed_and_unused_settings_do_not_change_the_arm(labels):
    group = labels().group

    for override in ("seed=3", "mtn.lam=1", "noise.seed=4", "output_dir=other", "data.dir=there"):
        assert labels(override).group == group


@pytest.mark.parametrize(
    "override",
    [
        "noise.seed=${seed}",
        pytest.param("repeats=seed_split_noise", marks=pytest.mark.slow),
        pytest.param("data.split_seed=${seed}", marks=pytest.mark.slow),
    ],
)
def test_settings_drawn_from_the_seed_do_not_change_the_arm(override, labels):
    groups = {labels("noise.proportion=0.1", override, f"seed={n}").group for n in range(3)}

    assert len(groups) == 1
    assert groups != {labels("noise.proportion=0.1").group}


@pytest.mark.slow
def test_settings_that_determine_the_result_change_the_arm(labels):
    overrides = ["mtn.enabled=true", "model=mmoe", "noise.proportion=0.1", "optimizer.lr=0.1"]
    groups = {labels(*override).group for override in [[], *([o] for o in overrides)]}

    assert len(groups | {labels(checksum="2").group}) == 6


def test_a_data_set_may_be_named_by_a_number(labels):
    found = labels("data.name=5")

    assert found.group.startswith("5 ")
    assert found.tags[0] == "5"


def test_name_and_tags_contain_model_data_mtn_and_noise(labels):
    found = labels("model=mmoe", "mtn.enabled=true", "noise.proportion=0.15", "seed=7")

    assert found.group.startswith("synthetic mmoe mtn lam=1e-05 noise_0.15 ")
    assert found.name == f"{found.group} seed=7"
    assert found.tags == ["synthetic", "mmoe", "mtn", "noise_0.15"]


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """A home without credentials of W&B."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("no_login")
@pytest.mark.parametrize("names", ["wandb", "[csv,wandb]"])
def test_wandb_without_a_key_is_refused(names, compose_config):
    config = compose_config(f"logger={names}", "output_dir=out")

    with pytest.raises(InputError, match=r"an API key.*`wandb login`.*logger\.offline=true"):
        check_login(config.logger)


@pytest.mark.usefixtures("no_login")
def test_wandb_without_a_key_is_refused_before_the_data_are_prepared(train, tmp_path):
    with pytest.raises(SystemExit, match=r"^mtnrec: logger=wandb must have an API key"):
        train(*LOG, f"data.dir={tmp_path / 'log'}", "logger=wandb", folder=tmp_path / "run")

    assert not (tmp_path / "log").exists()


@pytest.mark.usefixtures("no_login")
@pytest.mark.parametrize(
    "overrides",
    [
        ["logger=csv"],
        ["logger=tensorboard"],
        ["logger=wandb", "logger.offline=true"],
        ["logger=wandb", "+logger.settings.mode=offline"],
        ["logger=wandb", f"+logger.settings.api_key={40 * '0'}"],
    ],
)
def test_a_logger_that_needs_no_key_is_accepted(overrides, compose_config):
    check_login(compose_config("output_dir=out", *overrides).logger)


@pytest.mark.usefixtures("no_login")
@pytest.mark.slow
def test_wandb_with_a_key_or_switched_off_by_its_variable_is_accepted(compose_config, monkeypatch):
    node = compose_config("logger=wandb", "output_dir=out").logger
    for variable, value in (("WANDB_MODE", "disabled"), ("WANDB_API_KEY", 40 * "0")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            wandb.teardown()
            check_login(node)


def test_a_given_name_is_kept_and_tags_are_added(compose_config, tmp_path):
    config = compose_config(
        "logger=wandb", f"output_dir={tmp_path}", "logger.name=mine", "logger.tags=[pilot]"
    )

    resolved = OmegaConf.to_container(config, resolve=True)
    (logger,) = make_loggers(config.logger, RunIdentity(resolved, "1", ["seed"]))

    assert logger.name == "mtnrec"  # Lightning's is the project's
    assert logger._wandb_init["name"] == "mine"
    assert logger._wandb_init["tags"] == ["pilot", "synthetic", "esmm", "baseline", "clean"]


def test_tables_hold_the_values_of_the_record(tmp_path):
    (tmp_path / "spectra").mkdir()
    np.savez(tmp_path / "spectra" / "epoch_001.npz", **{"layer_0/task": np.array([3.0, 1.0])})
    record = {
        "added_metrics": {},
        "best_epoch": 1,
        "config": {"output_dir": str(tmp_path)},
        "counts": {
            "test/buy": {"rows": 9, "positives": 2},
            "test/buy_now": {"rows": 9, "positives": 1},
        },
        "metrics": {"test/buy_auc": 0.7, "test/buy_now_auc": 0.6},
        "history": [
            {"epoch": 0, "mtn/layer_0/alpha_task": 0.4, "mtn/layer_0/effective_rank_task": 1.5}
        ],
        "calibration_curves": {"test/buy": {"predicted": [0.1], "observed": [0.2], "rows": [9]}},
        "expert_distances": [[0.0, 2.0], [2.0, 0.0]],
    }

    rows = {name: rows for name, (_, rows) in record_tables(SimpleNamespace(**record)).items()}

    nothing = [None] * 8
    assert rows["metrics"] == [
        ["test", "buy", 9, 2, 0.7, *nothing],
        ["test", "buy_now", 9, 1, 0.6, *nothing],
    ]
    assert rows["alphas"] == [[0, 0, "task", 0.4, 1.5]]
    assert rows["spectra"] == [["layer_0", "task", 0, 3.0], ["layer_0", "task", 1, 1.0]]
    assert rows["calibration"] == [["test", "buy", 0.1, 0.2, 9]]
    assert rows["expert_distances"] == [[0, 0.0, 2.0], [1, 2.0, 0.0]]


def test_a_record_without_history_and_curves_has_its_metrics_only(tmp_path):
    record = {
        "added_metrics": {},
        "best_epoch": 0,
        "config": {"output_dir": str(tmp_path)},
        "counts": {"test/ctr": {"rows": 9, "positives": 2}},
        "metrics": {"test/ctr_auc": None},
        "history": [],
        "calibration_curves": {},
        "expert_distances": None,
    }

    assert list(record_tables(SimpleNamespace(**record))) == ["metrics"]


def read_wandb(path):
    """Yield the records of an offline run: LevelDB's log format, after a header of 7 bytes."""
    content, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # too short for a header: the block is padded
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield Record.FromString(b"".join(parts))
            parts.clear()


def values_of(items):
    return [(item.key or "/".join(item.nested_key), json.loads(item.value_json)) for item in items]


def read_wandb_run(path):
    """Return config, history, summary, axis of each metric, run and exit code."""
    history, axes, kept = {}, {}, {"config": {}, "summary": {}}
    for record in read_wandb(path):
        for part in ("config", "summary"):
            kept[part] |= values_of(getattr(record, part).update)
        for name, value in values_of(record.history.item):
            history.setdefault(name, []).append(value)
        kind = record.WhichOneof("record_type")
        if kind == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind in ("run", "exit"):
            kept[kind] = getattr(record, kind)
    return SimpleNamespace(**kept, history=history, axes=axes)


@pytest.mark.slow
def test_each_job_of_a_sweep_is_a_separate_offline_run_of_wandb(train):
    sweep = train(*LOG, "hydra.mode=MULTIRUN", "seed=0,1", "logger=wandb", "logger.offline=true")

    groups, names = set(), set()
    for seed in (0, 1):
        (path,) = sweep.glob(f"*-seed{seed}-*/wandb/offline-run-*/*.wandb")
        found = read_wandb_run(path)
        config, history = found.config, found.history
        result = json.loads((path.parents[2] / "result.json").read_text())
        groups.add(found.run.run_group)
        names.add(found.run.display_name)
        assert list(found.run.tags) == ["synthetic", "esmm", "baseline", "clean"]
        assert found.exit.exit_code == 0
        assert (config["model"], config["data"], config["seed"]) == ("esmm", "synthetic", seed)
        assert config["model_settings"] == result["config"]["model"]
        assert config["mtn"] == {"enabled": False}
        assert config["noise"] == {"proportion": 0}
        assert {found.axes[f"{part}/*"] for part in ("train", "val", "mtn")} == {"epoch"}
        assert len(history["val/cvr_auc"]) == 2
        assert history["val/cvr_auc"][result["best_epoch"]] == pytest.approx(
            result["metrics"]["val/cvr_auc"]
        )
        assert history["test/ctcvr_log_loss"] == pytest.approx(
            [result["metrics"]["test/ctcvr_log_loss"]]
        )
        assert history["tables/metrics/nrows"] == [len(result["counts"])]
        assert history["figures/training_curves/_type"] == ["image-file"]
        assert found.summary["best_epoch"] == result["best_epoch"]
        for name, value in result["metrics"].items():
            assert found.summary[name] == pytest.approx(value)
    assert len(names) == 2
    (group,) = groups
    (arm,) = set(read_runs(sweep).settings["arm"])
    assert group.endswith(f" {arm[:8]}")  # the report's arm


@pytest.mark.slow
def test_a_secret_of_the_command_line_is_in_no_file_of_a_run(train, tmp_path):
    secret = f"{'4f2a9c81d7e6':0<40}"
    keys = ["logger=[csv,tensorboard,wandb]", "logger.offline=true"]

    train(*LOG, *keys, f"+logger.settings.api_key={secret}", folder=tmp_path)

    contents = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (of_wandb,) = (text for name, text in contents.items() if name.endswith(".wandb"))
    assert b"+logger.settings.api_key=<hidden>" in of_wandb  # its list of arguments
    assert [name for name, text in contents.items() if secret.encode() in text] == []
    assert any(name.startswith("events.out") for name in contents)


@pytest.mark.slow
def test_a_run_that_restarts_replaces_the_events_of_a_logger_of_another_name(train, tmp_path):
    run = [*LOG, "trainer.max_epochs=1", "logger=tensorboard", "logger.tensorboard.name=curves"]
    train(*run, folder=tmp_path)
    before = {path.name for path in tmp_path.glob("curves/events.*")}

    train(*run, "resume=false", folder=tmp_path)

    after = {path.name for path in tmp_path.glob("curves/events.*")}
    assert before
    assert after
    assert not before & after


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_of_wandb(train, tmp_path, monkeypatch):
    run = [*LOG, "logger=wandb", "logger.offline=true"]
    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "on_test_start", lambda *_: 1 // 0)
        with pytest.raises(ArithmeticError):
            train(*run, folder=tmp_path)

    train(*run, folder=tmp_path)
    train(*run, "resume=false", folder=tmp_path)

    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    first, second, third = (read_wandb_run(path).run.run_id for path in paths)
    assert first == second != third


@pytest.fixture
def wandb_at(monkeypatch):
    """Sends runs to a server; W&B's process keeps the address, so it restarts before and after."""

    def send(url):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
        wandb.teardown()

    yield send
    wandb.teardown()


@pytest.mark.slow
def test_a_server_that_does_not_answer_does_not_end_the_run(train, tmp_path, wandb_at):
    wandb_at("http://127.0.0.1:9")

    train(*LOG, "logger=wandb", "logger.settings.init_timeout=1", folder=tmp_path)

    assert "W&B does not answer" in (tmp_path / "train.log").read_text()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = read_wandb_run(path)
    assert len(found.history["val/cvr_auc"]) == 2
    assert found.exit.exit_code == 0


class WandbServer(BaseHTTPRequestHandler):
    """Accepts a run, and stops when the first values arrive."""

    answers = MappingProxyType(
        {
            "Viewer": {"viewer": {"id": "V", "entity": "team", "flags": "{}"}},
            "RunResumeStatus": {"model": None},
            "UpsertBucket": {
                "upsertBucket": {
                    "bucket": {
                        "id": "B",
                        "name": "taken",
                        "project": {"name": "mtnrec", "entity": {"name": "team"}},
                    }
                }
            },
        }
    )

    def do_POST(self):
        if self.path != "/graphql":
            self.server.gone.set()
            self.server.shutdown()
            self.server.server_close()
            return
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            text = gzip.decompress(text)
        data = self.answers.get(json.loads(text)["operationName"], {})
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_server_that_goes_away_does_not_end_the_run(train, tmp_path, wandb_at):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.gone = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wandb_at(f"http://127.0.0.1:{server.server_port}")

    times = ["init_timeout=20", "finish_timeout=5"]
    train(*LOG, "logger=wandb", *(f"logger.settings.{time}" for time in times), folder=tmp_path)

    assert server.gone.is_set()
    assert (tmp_path / "result.json").exists()
    assert "W&B does not answer" in (tmp_path / "train.log").read_text()
    (path,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert len(read_wandb_run(path).history["val/cvr_auc"]) == 2


@pytest.mark.slow
def test_tables_that_the_server_refuses_do_not_end_the_run(train, tmp_path, monkeypatch):
    def refuse(*_):
        raise wandb.errors.CommError("gone")

    monkeypatch.setattr(wandb.Run, "log_artifact", refuse)

    train(*LOG, "logger=wandb", "logger.offline=true", folder=tmp_path)

    assert "W&B does not answer (gone)" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_a_run_that_fails_closes_its_run_of_wandb_as_failed(train, tmp_path):
    with pytest.raises(SystemExit, match="ESMM must have parallel shared layers"):
        train(
            *LOG,
            "logger=wandb",
            "logger.offline=true",
            "mtn.enabled=true",
            "mtn.target=shared",
            folder=tmp_path,
        )

    assert wandb.run is None
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert read_wandb_run(path).exit.exit_code == 1
