import csv
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.metrics import log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mtnrec.batch import Batch
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.schema import CategoricalField, Schema

QUICK = ["esmm"]
SLOW = ["mmoe", "shared_bottom", "single_task", "omoe", "ple", "adatt", "mmoe_cross", "stem"]
MODELS = [*QUICK, *(pytest.param(model, marks=pytest.mark.slow) for model in SLOW)]
# Rates at which every split has both classes of every task.
LOG = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
# MTN acts, and the best epoch is neither the first nor the last.
OVERFIT = ["mtn.enabled=true", "trainer.max_epochs=4", "optimizer.lr=0.03", "data.batch_size=128"]
OVERFIT += ["model.embedding_init=per_field"]


def read_record(folder):
    return json.loads((folder / "result.json").read_text())


def read_checkpoint(folder):
    return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)


def read_csv(folder):
    """Return the logged values of each name by epoch, in order."""
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = rows[0].keys() - {"epoch", "step"}
    return {n: {int(row["epoch"]): float(row[n]) for row in rows if row[n]} for n in names}


@pytest.fixture(scope="module")
def run(train):
    return train(*LOG, *OVERFIT)


@pytest.fixture(scope="module")
def plain_run(train):
    return train(*LOG)


def test_the_record_keeps_the_contract(run):
    record = read_record(run)

    assert record["status"] == "finished"
    assert re.fullmatch("[0-9a-f]{16}", record["cell"])
    assert record["seed"] == 0
    assert record["config"]["model"]["_target_"] == "mtnrec.model.esmm.ESMM"
    assert record["config"]["output_dir"] == str(run)
    assert record["mtn"] == record["config"]["mtn"]
    assert record["mtn"]["enabled"] is True
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["data"]["name"] == "synthetic"
    assert re.fullmatch("[0-9a-f]{64}", record["data"]["checksum"])
    assert record["data"]["rows"] == {"train": 1920, "val": 480, "test": 600}
    assert record["data"]["suspected_leaks"] == record["data"]["leaks_not_judged"] == []
    assert record["seconds"].keys() == {"setup", "fit", "test"}
    assert record["samples_per_second"].keys() == {"train", "evaluate"}
    assert min(*record["seconds"].values(), *record["samples_per_second"].values()) > 0
    assert record["peak_memory_bytes"] > 2**20
    assert record["parameters"] == {"embeddings": 508, "network": 2754}


def test_the_record_counts_the_rows_and_positives_of_every_task(run):
    counts = read_record(run)["counts"]
    datamodule = open_data(run)

    for split in ("val", "test"):
        click, conversion = datamodule.column(split, "labels").T.astype(int)
        clicks, conversions = int(click.sum()), int(conversion.sum())
        assert counts[f"{split}/ctr"] == {"rows": len(click), "positives": clicks}
        assert counts[f"{split}/cvr"] == {"rows": clicks, "positives": conversions}
        assert counts[f"{split}/ctcvr"] == {"rows": len(click), "positives": conversions}


def open_data(folder):
    config = OmegaConf.create(read_record(folder)["config"])
    datamodule = instantiate(config.data, _convert_="all")
    datamodule.setup()
    return datamodule


def score(folder, split):
    """Return ``P(label = 1)`` of the best checkpoint in the plain network, ``(rows, 2)``."""
    config = OmegaConf.create(read_record(folder)["config"])
    datamodule = open_data(folder)
    network = instantiate(config.model, _partial_=True, _convert_="all")(schema=datamodule.schema)
    state = read_checkpoint(folder)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): state[name] for name in state})
    network.eval()
    features = [torch.from_numpy(datamodule.column(split, f)) for f in ("categorical", "numerical")]
    batches = zip(*(f.split(config.data.batch_size) for f in features), strict=True)
    with torch.inference_mode():
        return torch.cat([network(Batch(*batch)).positive for batch in batches]).double().exp()


def rows_of_tasks(labels, probabilities, groups):
    """Return the labels, scores and groups of each task, by the definition of the tasks."""
    click, conversion = labels.T
    p_click, p_conversion = np.asarray(probabilities).T
    clicked = click == 1
    return {
        "ctr": (click, p_click, groups),
        "cvr": (conversion[clicked], (p_conversion / p_click)[clicked], groups[clicked]),
        "ctcvr": (conversion, p_conversion, groups),
    }


def mean_auc_of_groups(labels, scores, groups):
    members = [groups == group for group in np.unique(groups)]
    mixed = [rows for rows in members if 0 < labels[rows].sum() < rows.sum()]
    aucs = [roc_auc_score(labels[rows], scores[rows]) for rows in mixed]
    return np.average(aucs, weights=[rows.sum() for rows in mixed])


@pytest.mark.parametrize("mtn", ["true", pytest.param("false", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_every_auc_is_that_of_the_best_checkpoint(model, mtn, train):
    folder = train(*LOG, f"mtn.enabled={mtn}", model=model)

    expected = {}
    datamodule = open_data(folder)
    for split in ("val", "test"):
        columns = [datamodule.column(split, stem) for stem in ("labels", "probabilities", "group")]
        labels, true_probabilities, groups = columns
        for task, rows in rows_of_tasks(labels, score(folder, split), groups).items():
            expected[f"{split}/{task}_auc"] = roc_auc_score(*rows[:2])
            expected[f"{split}/{task}_grouped_auc"] = mean_auc_of_groups(*rows)
        aucs = [expected[f"{split}/{task}_auc"] for task in ("ctr", "cvr", "ctcvr")]
        expected[f"{split}/mean_auc"] = np.mean(aucs)
        for task, rows in rows_of_tasks(labels, true_probabilities, groups).items():
            expected[f"{split}/{task}_bayes_auc"] = roc_auc_score(*rows[:2])
    metrics = read_record(folder)["metrics"]
    found = {name: value for name, value in metrics.items() if name.endswith("_auc")}
    of_labels = {name: value for name, value in found.items() if "all_rows" not in name}
    assert of_labels == pytest.approx(expected, abs=1e-12)


def test_cvr_over_all_rows_is_that_of_the_best_checkpoint(run):
    metrics, datamodule = read_record(run)["metrics"], open_data(run)

    for split in ("val", "test"):
        # In float32 as in the metric, which ranks by a difference of logs: rounding makes ties.
        logs = score(run, split).log().float()
        predicted = np.asarray((logs[:, 1] - logs[:, 0]).double().exp())
        q = datamodule.column(split, "probabilities")
        true = q[:, 1] / q[:, 0]
        # Each row twice: as a positive that weighs the true CVR, and as a negative.
        labels = np.repeat([1, 0], len(true))
        rows = labels, np.tile(predicted, 2), np.concatenate([true, 1 - true])
        auc = roc_auc_score(*rows[:2], sample_weight=rows[2])
        assert metrics[f"{split}/cvr_all_rows_auc"] == pytest.approx(auc, abs=1e-5)
        expected = log_loss(*rows[:2], sample_weight=rows[2])
        assert metrics[f"{split}/cvr_all_rows_log_loss"] == pytest.approx(expected, rel=1e-5)


def test_every_log_loss_is_that_of_the_best_checkpoint(run):
    metrics = read_record(run)["metrics"]
    datamodule = open_data(run)

    for split in ("val", "test"):
        labels, groups = (datamodule.column(split, stem) for stem in ("labels", "group"))
        for task, rows in rows_of_tasks(labels, score(run, split), groups).items():
            found = metrics[f"{split}/{task}_log_loss"]
            assert found == pytest.approx(log_loss(*rows[:2]), rel=1e-6)


def test_the_best_epoch_has_the_largest_validation_auc(run):
    record, logged = read_record(run), read_csv(run)

    aucs = logged["val/cvr_auc"]
    assert list(aucs) == [0, 1, 2, 3]
    assert record["best_epoch"] == max(aucs, key=aucs.get)
    assert 0 < record["best_epoch"] < 3  # so that neither the first nor the last epoch would pass
    assert read_checkpoint(run)["epoch"] == record["best_epoch"]
    for name, values in logged.items():
        if name.startswith("val/"):
            found = record["metrics"][name]
            assert found == pytest.approx(values[record["best_epoch"]], rel=1e-6)


@pytest.mark.slow
def test_the_best_epoch_has_the_largest_mean_auc_if_that_is_the_monitor(train):
    folder = train(*LOG, *OVERFIT, "monitor=val/mean_auc", "mtn.enabled=false")

    logged = read_csv(folder)
    tasks = [logged[f"val/{task}_auc"] for task in ("ctr", "cvr", "ctcvr")]
    means = {epoch: np.mean([aucs[epoch] for aucs in tasks]) for epoch in tasks[0]}
    best = max(means, key=means.get)
    assert read_record(folder)["best_epoch"] == best
    assert read_record(folder)["metrics"]["val/mean_auc"] == pytest.approx(means[best], rel=1e-6)


@pytest.mark.slow
def test_the_best_epoch_has_the_smallest_log_loss_if_that_is_the_monitor(train):
    folder = train(*LOG, "monitor=val/ctr_log_loss", "trainer.max_epochs=3", "optimizer.lr=0.1")

    losses = read_csv(folder)["val/ctr_log_loss"]
    assert read_record(folder)["best_epoch"] == min(losses, key=losses.get)


def test_the_test_set_is_read_once(run):
    record, logged = read_record(run), read_csv(run)

    names = [name for name in logged if name.startswith("test/")]
    assert "test/ctcvr_auc" in names
    for name in names:
        (value,) = logged[name].values()
        assert record["metrics"][name] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_a_validation_every_other_epoch_is_recorded_under_its_epoch(train):
    folder = train(*LOG, "+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4")

    record, aucs = read_record(folder), read_csv(folder)["val/cvr_auc"]
    assert list(aucs) == [1, 3]
    assert record["best_epoch"] == max(aucs, key=aucs.get)
    assert record["metrics"]["val/cvr_auc"] == pytest.approx(max(aucs.values()), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [*QUICK, *SLOW])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(model, train):
    random = ["mtn.enabled=true", "model.dropout=0.2", "noise.proportion=0.15"]
    first, second, other = (train(*LOG, *random, f"seed={seed}", model=model) for seed in (5, 5, 6))

    one, two = (read_checkpoint(folder)["state_dict"] for folder in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_record(first)["metrics"] == read_record(second)["metrics"]
    assert read_record(first)["counts"] == read_record(other)["counts"]
    assert read_record(first)["metrics"] != read_record(other)["metrics"]
    assert read_record(first)["cell"] == read_record(second)["cell"] != read_record(other)["cell"]


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=pytest.mark.slow) for m in ("ple", "adatt")]
)
def test_mtn_acts_on_the_experts_of_all_levels(model, train):
    keys = ["mtn.enabled=true", "mtn.target=shared", "trainer.max_epochs=1"]

    (epoch,) = read_record(train(*LOG, *keys, model=model))["history"]

    levels = {key.split("/")[1] for key in epoch if key.startswith("mtn/layer_")}
    assert len(levels) == 2


def test_mtn_on_shared_layers_is_refused_where_nothing_is_shared(train, tmp_path):
    with pytest.raises(SystemExit, match=r"^mtnrec: SingleTask must have parallel shared "):
        train(
            *(*LOG, "mtn.enabled=true", "mtn.target=shared"), model="single_task", folder=tmp_path
        )

    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_bf16_keeps_the_weights_in_float32(train):
    folder = train(*LOG, "mtn.enabled=true", "trainer.precision=bf16-mixed")

    weights = read_checkpoint(folder)["state_dict"].values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert 0 < read_record(folder)["metrics"]["test/ctr_auc"] < 1


def test_training_stops_when_patience_runs_out(train):
    folder = train(*LOG, "optimizer.lr=0.0", "stop=patience", "patience=2", "trainer.max_epochs=9")

    assert list(read_csv(folder)["val/cvr_auc"]) == [0, 1, 2]
    assert read_record(folder)["best_epoch"] == 0


@pytest.mark.slow
def test_training_stops_after_patience_decreases_of_the_monitor_in_a_row(train):
    folder = train(*LOG, "optimizer.lr=0.03", "patience=2", "trainer.max_epochs=30")

    record = read_record(folder)
    curve = [epoch["val/cvr_auc"] for epoch in record["history"]]
    falls = [b < a for a, b in itertools.pairwise(curve)]
    pairs = [all(pair) for pair in itertools.pairwise(falls)]
    assert 3 <= len(curve) < 30
    assert pairs.index(True) == len(pairs) - 1
    assert record["best_epoch"] == int(np.argmax(curve))


@pytest.mark.slow
def test_repeats_may_redraw_validation_rows_and_noise(train):
    keys = [*LOG, "noise.proportion=0.2", "trainer.max_epochs=1"]
    seeds = [read_record(train(*keys, f"seed={seed}")) for seed in (1, 2)]
    all_drawn = [
        read_record(train(*keys, "repeats=seed_split_noise", f"seed={seed}")) for seed in (1, 2)
    ]

    assert len({record["noise"]["checksum"] for record in seeds}) == 1
    assert len({record["noise"]["checksum"] for record in all_drawn}) == 2
    assert {tuple(record["keys_of_seed"]) for record in all_drawn} == {
        ("data.split_seed", "noise.seed", "seed")
    }
    positives = [record["counts"]["val/ctr"]["positives"] for record in all_drawn]
    assert positives[0] != positives[1]
    assert seeds[0]["counts"]["val/ctr"] == seeds[1]["counts"]["val/ctr"]


def test_a_seed_of_the_data_set_is_refused(train):
    with pytest.raises(SystemExit, match=r"data.seed must be left out, got 3. Set seed, which"):
        train(*LOG, "+data.seed=3")


def test_repeats_that_redraw_with_a_fixed_seed_are_refused(train):
    message = (
        "repeats=seed_split_noise draws validation rows and noise per seed, so "
        "noise.seed must be the seed 0, got 5. Leave noise.seed out, or set repeats=seed."
    )

    with pytest.raises(SystemExit, match=re.escape(message)):
        train(*LOG, "repeats=seed_split_noise", "noise.seed=5")


@pytest.mark.slow
def test_the_mean_of_the_tasks_losses_is_half_their_sum(train):
    keys = [*LOG, "optimizer.lr=0.0", "trainer.max_epochs=1"]
    losses = [
        read_record(train(*keys, f"task_loss={kind}"))["history"][0]["train/loss"]
        for kind in ("sum", "mean")
    ]

    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)


def test_mtn_is_logged_each_epoch_when_it_acts(run, plain_run):
    logged = read_csv(run)

    assert list(logged["mtn/penalty"]) == [0, 1, 2, 3]
    assert min(logged["mtn/penalty"].values()) > 0
    assert "train/loss" in logged
    assert not [name for name in read_csv(plain_run) if name.startswith("mtn/")]


@pytest.mark.slow
def test_tensorboard_has_the_same_scalars_as_csv(run, train):
    folder = train(*LOG, *OVERFIT, "logger=tensorboard")

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    best = {name for name in events.Tags()["scalars"] if name.startswith("best/")}
    names = set(events.Tags()["scalars"]) - {"epoch"} - best
    found = {name: [event.value for event in events.Scalars(name)] for name in names}
    expected = {name: list(values.values()) for name, values in read_csv(run).items()}
    assert found.keys() == expected.keys()
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)

    metrics = read_record(folder)["metrics"]
    assert best == {f"best/{name}" for name, value in metrics.items() if value is not None}
    for name in ("val/cvr_auc", "test/ctr_auc"):
        (event,) = events.Scalars(f"best/{name}")
        assert event.value == pytest.approx(metrics[name], rel=1e-6)
    stored = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(stored).session_start_info.hparams
    assert settings["model"].string_value == "esmm"
    assert settings["mtn.enabled"].number_value == 1
    assert settings["mtn.lam"].number_value == 1e-5
    assert settings["noise.proportion"].number_value == 0
    assert settings["model_settings.tower_widths"].string_value == "[16, 8]"


@pytest.mark.slow
def test_a_second_run_in_a_folder_replaces_the_first(plain_run, train, tmp_path):
    train(*LOG, "seed=1", folder=tmp_path)

    train(*LOG, folder=tmp_path)

    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.ckpt"]
    expected, found = (read_checkpoint(folder)["state_dict"] for folder in (plain_run, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_record(tmp_path)["metrics"] == read_record(plain_run)["metrics"]


@pytest.mark.parametrize(("click_rate", "conversion_rate"), [(0.4, 0.03), (0.02, 0.3)])
@pytest.mark.slow
def test_a_validation_set_of_one_class_trains_to_the_end(
    click_rate, conversion_rate, train, tmp_path
):
    rates = [f"data.click_rate={click_rate}", f"data.conversion_rate={conversion_rate}"]
    few = ["data.rows=1000", "data.validation_share=0.01"]
    own = [f"data.dir={tmp_path / 'log'}", "patience=1", "trainer.max_epochs=3"]

    folder = train(*rates, *few, *own, "mtn.enabled=true")

    record = read_record(folder)
    assert record["best_epoch"] == 2
    assert record["counts"]["val/ctcvr"] == {"rows": 8, "positives": 0}
    assert record["metrics"]["val/cvr_auc"] is None
    assert (record["metrics"]["val/ctr_auc"] is None) == (click_rate < 0.1)
    assert "val/cvr_auc is undefined" in (folder / "train.log").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_prepared_aliexpress_trains(model, train, prepare, write_aliexpress, tmp_path):
    data = ["data=aliexpress_nl", f"data_root={tmp_path / 'data'}"]
    prepare(*data, f"data.raw_dir={write_aliexpress(tmp_path / 'raw')}")

    record = read_record(train(*data, "mtn.enabled=true", model=model))

    assert record["data"]["name"] == "aliexpress_nl"
    assert record["data"]["rows"] == {"train": 48, "val": 12, "test": 60}
    assert record["counts"]["test/cvr"] == {"rows": 20, "positives": 10}
    assert 0 <= record["metrics"]["test/ctcvr_auc"] <= 1
    assert not [name for name in record["metrics"] if "bayes" in name or "all_rows" in name]


def test_a_suspected_leak_is_logged_and_recorded(train, tmp_path):
    rng = np.random.default_rng(0)
    schema = Schema(
        (CategoricalField("shop", 5),), ("spend",), ("click", "conversion"), funnel=True
    )
    with write_prepared(tmp_path / "log", ("train", "test")) as writer:
        for split in ("train", "test"):
            click = rng.random(600) < 0.5
            conversion = click & (rng.random(600) < 0.5)
            spend = (conversion + 0.1 * rng.random(600))[:, None]
            labels = np.stack([click, conversion], axis=1)
            shop = rng.integers(0, 5, (600, 1))
            writer.append(split, {"categorical": shop, "numerical": spend, "labels": labels})
        writer.finish(source="shops", parameters={}, schema=schema, report={})

    folder = train("data=aliexpress_nl", f"data.dir={tmp_path / 'log'}", folder=tmp_path)

    data = read_record(folder)["data"]
    assert data["leaks_not_judged"] == []
    assert data["suspected_leaks"] == [
        {"feature": "spend", "task": task, "definition": definition, "auc": 1.0}
        for task, definition in (
            ("cvr", "conversion where click = 1"),
            ("ctcvr", "conversion on all rows"),
        )
    ]
    lines = (folder / "train.log").read_text().splitlines()
    warnings = [line for line in lines if "[WARNING] spend alone predicts conversion" in line]
    assert len(warnings) == 2
    assert all(line.endswith("is it known before the label?") for line in warnings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mtn.lam=-1"], r"mtn\.lam must be a number in \[0, inf\), got -1"),
        (["monitor=test/cvr_auc"], r"monitor=test/cvr_auc would choose .* on the test set"),
        (
            ["mtn.enabled=true", "mtn.target=shared"],
            r"ESMM must have parallel shared .* model=mmoe",
        ),
        (["trainer.max_epochs=0"], r"trainer\.max_epochs must be an integer >= 1, got 0"),
        (
            ["+trainer.check_val_every_n_epoch=9"],
            r".* before its first validation.*no epoch to test",
        ),
        (["+trainer.max_steps=1"], r".* before its first validation.*after 4 steps.*max_steps=1"),
        (["+trainer.fast_dev_run=true"], r"trainer\.fast_dev_run must be false.* Set debug=fast"),
        (["+trainer.limit_val_batches=0"], r"trainer\.limit_val_batches must be above 0, got 0"),
        (["+trainer.limit_val_batches=0.01"], r"trainer: .* increase the `limit_val_batches`"),
        (["+trainer.val_check_interval=9"], r"trainer\.val_check_interval must be at most 4"),
        (
            ["model.batch_norm=true", "data.batch_size=1919"],
            r"data\.batch_size must not leave .* Set data\.batch_size=1918 or 1920, or",
        ),
        (["optimizer.lr=-1"], r"optimizer: Invalid learning rate: -1"),
        (["optimizer.lr=fast"], r"optimizer\.lr must be a number, got 'fast'"),
        (
            ["mtn.enabled=true", "mtn.alpha_optimizer.lr=-1"],
            r"mtn\.alpha_optimizer: Invalid learning rate: -1",
        ),
        (["seed=99999999999"], r"seed must be an integer from 0 to 4294967295, got 99999999999"),
        (["threads=1000000000"], r"threads must be an integer from 1 to 1024, got 1000000000"),
        (
            ["model.embedding_dim=1000000000000"],
            r"the weights must fit in .*memory.*\. Choose smaller",
        ),
        (["trainer.precision=odd"], r"Trainer: Precision 'odd' is invalid"),
    ],
)
def test_bad_input_ends_in_one_message_and_no_record(overrides, message, train, tmp_path):
    with pytest.raises(SystemExit, match=f"^mtnrec: {message}"):
        train(*LOG, *overrides, folder=tmp_path)

    assert not (tmp_path / "result.json").exists()


def test_a_run_begins_with_a_panel_and_ends_with_where_things_are(train, tmp_path, capsys):
    folder = tmp_path / ("long [x] " * 12).strip()

    groups = ["mtn.enabled=true", "regularizer=l2", "scheduler=cosine"]
    train(*LOG, "trainer.max_epochs=1", *groups, f"hydra.run.dir='{folder}'")

    ends = capsys.readouterr().out.splitlines()
    panel = "\n".join(ends[:16])
    assert "ESMM: 2,754 parameters, 508 more in embeddings" in panel
    assert "synthetic: 1,920 training, 480 validation, 600 test rows" in panel
    assert "cpu, 1 thread" in panel
    assert "lam=1e-05 on towers" in panel
    assert "Regularizer(norm=l2, lam=1e-05, target=towers" in panel
    assert "CosineAnnealingLR(eta_min=0.0)" in panel
    assert "balance" not in panel  # the default
    assert "Training ended after all 1 epoch of trainer.max_epochs." in ends
    assert f"The record of the run is {folder / 'result.json'}" in ends
    assert f"{'model':<12}{(folder / 'checkpoints' / 'best.ckpt').as_uri()}" in ends
    assert f"{'epochs':<12}{(folder / 'csv' / 'metrics.csv').as_uri()}" in ends
    assert f"{'spectra':<12}{(folder / 'spectra').as_uri()}" in ends


@pytest.mark.slow
def test_a_score_that_is_not_a_number_ends_the_run_with_its_row(train, tmp_path):
    data = [*LOG, f"data.dir={tmp_path / 'log'}", "data.verify=false"]
    train(*data, "trainer.max_epochs=1")
    path = tmp_path / "log" / "test" / "numerical.npy"
    array = np.load(path, mmap_mode="r+")
    array[5] = np.inf
    array.flush()

    with pytest.raises(SystemExit) as stop:
        train(*data, "trainer.max_epochs=1")

    assert (
        "test scores must be numbers, got NaN for 1 of 600 rows (row 5 of the test file, from 0)"
        in (stop.value.code)
    )
    assert "Their numerical features reach inf. Scale them, or leave" in stop.value.code


@pytest.mark.slow
def test_scores_worse_than_chance_are_warned_of(train, tmp_path):
    folder = train(*LOG, "trainer.max_epochs=1", "optimizer.lr=30", folder=tmp_path)

    log = (folder / "train.log").read_text()
    assert re.search(r"\[WARNING\] .*the test log loss is above .*\(ctr .* > 0\.[0-9]+, cvr", log)


@pytest.mark.parametrize(
    "name", ["fast", *(pytest.param(n, marks=pytest.mark.slow) for n in ("overfit", "limit"))]
)
def test_each_preset_for_debugging_runs_to_its_end(name, train):
    few = ["data.batch_size=32", "monitor=val/ctr_log_loss"]
    short = [] if name != "overfit" else ["trainer.max_epochs=6", "optimizer.lr=0.02"]

    record = read_record(train(*LOG, *few, f"debug={name}", *short))

    rows = {"fast": 128, "limit": 32, "overfit": 64}[name]
    assert record["counts"]["test/ctr"]["rows"] == rows
    assert not {"test/ctr_bayes_auc", "test/cvr_all_rows_auc"} & record["metrics"].keys()
    if name == "overfit":
        losses = [epoch["train/loss"] for epoch in record["history"]]
        assert losses == sorted(losses, reverse=True)


def test_missing_data_ends_in_one_message_with_a_remedy(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train("data=aliexpress_nl", folder=tmp_path)

    message = str(ended.value)
    assert message.startswith("mtnrec: there is no prepared data set in ")
    assert "https://tianchi.aliyun.com/dataset/74690" in message
    assert message.endswith("Then: python -m mtnrec.prepare data=aliexpress_nl data.raw_dir=DIR")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_a_run_without_a_test_never_reads_the_test_rows(plain_run, train, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(read_record(plain_run)["config"]["data"]["dir"], folder)
    for path in folder.glob("test/*.npy"):  # NaN, index -1, label 255
        array = np.load(path, mmap_mode="r+")
        array.view(np.uint8)[:] = 255
        array.flush()
    keys = [*LOG, f"data.dir={folder}", "data.verify=false"]

    untested = read_record(train(*keys, "test=false"))

    tested = read_record(plain_run)
    assert [key for key in untested["metrics"] if not key.startswith("val/")] == []
    assert untested["history"] == tested["history"]
    expected = {key: v for key, v in tested["metrics"].items() if key.startswith("val/")}
    assert untested["metrics"] == expected
    assert untested["seconds"]["test"] == 0
    assert untested["cell"] != tested["cell"]
    with pytest.raises(RuntimeError, match="out of bounds"):  # a test notices the poison
        train(*keys)


@pytest.mark.slow
def test_noise_of_the_test_rows_is_not_drawn_without_a_test(train):
    noise = ["noise.label_flip={click:0.2}", "noise.splits=[train,val,test]"]

    tested, untested = (read_record(train(*LOG, *noise, f"test={t}")) for t in ("true", "false"))

    counts = tested["noise"]["flipped_labels"]
    assert counts.pop("test")["click"] > 0
    assert untested["noise"]["flipped_labels"] == counts
