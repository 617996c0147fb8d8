import csv
import json
import shutil

import pandas as pd
import pytest

from mtnrec.checks import InputError
from mtnrec.reporting.runs import (
    read_runs,
    unfinished,
)
from mtnrec.reporting.table.scores import comparisons


def edit(folder, change):
    path = folder / "result.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def arms(root):
    return read_runs(root).settings.set_index("run")


def test_runs_are_found_at_any_depth_and_sorted_by_name(tmp_path, write_run):
    for seed, name in enumerate(("b", "a/c/d", "a/b")):
        write_run(tmp_path, name, seed=seed)

    runs = read_runs(tmp_path)

    assert [run.name for run in runs] == ["a/b", "a/c/d", "b"]
    assert [run.folder for run in runs] == [tmp_path / run.name for run in runs]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a folder\. Choose the one"):
        read_runs(tmp_path / "nowhere")


def test_a_folder_without_a_finished_run_names_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"no finished run \(result.json\).*mtnrec.train -m .*"):
        read_runs(tmp_path)


@pytest.mark.parametrize("content", [b'{"status": "fin', b"\xff\xfe"])
def test_a_record_that_is_not_json_is_refused(tmp_path, write_run, content):
    (write_run(tmp_path, "a") / "result.json").write_bytes(content)

    with pytest.raises(InputError, match=r"a/result\.json is not valid JSON"):
        read_runs(tmp_path)


@pytest.mark.parametrize("key", ["cell", "config.mtn.enabled", "noise.checksum", "history.step"])
def test_a_record_that_lacks_a_key_names_it(tmp_path, write_run, key):
    *parents, last = key.split(".")

    def drop(record):
        for parent in parents:
            record = record[parent][0] if parent == "history" else record[parent]
        del record[last]

    edit(write_run(tmp_path, "a"), drop)

    with pytest.raises(InputError, match=f"a/result.json lacks the key {key}"):
        read_runs(tmp_path)


def test_an_odd_record_is_named_and_the_others_are_read(tmp_path, write_run, caplog):
    for name in "abcd":
        write_run(tmp_path, name, seed=ord(name))
    (tmp_path / "b" / "result.json").write_text("[1]")
    edit(tmp_path / "c", lambda record: record.update(seed="0"))
    edit(tmp_path / "d", lambda record: record["counts"].pop("val/ctr"))

    runs = read_runs(tmp_path)

    assert [run.name for run in runs] == ["a"]
    assert len(runs.results) == len(read_runs(tmp_path / "a").results)
    assert [run.name for run in runs.unreadable] == ["b", "c", "d"]
    for name, message in zip("bcd", caplog.messages, strict=True):
        assert message.startswith(f"left out: {tmp_path}/{name}/result.json ")
    assert "lacks the key counts.val/ctr" in runs.unreadable[2].reason


def test_a_copy_of_a_run_counts_once(tmp_path, write_run):
    shutil.copytree(write_run(tmp_path, "a"), tmp_path / "b")

    assert [run.name for run in read_runs(tmp_path)] == ["a"]


def test_of_two_copies_the_one_that_kept_its_scores_counts(tmp_path, write_run):
    shutil.copytree(write_run(tmp_path, "a"), tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    path = tmp_path / "b" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": {"test": "abc"}}))

    assert [run.name for run in read_runs(tmp_path)] == ["b"]


def test_the_same_run_with_different_metrics_is_refused(tmp_path, write_run):
    write_run(tmp_path, "a", seed=3, auc={"ctr": 0.7})
    write_run(tmp_path, "b", seed=3, auc={"ctr": 0.8})

    with pytest.raises(
        InputError, match=r"a and b in .* the same settings and seed 3, but different"
    ):
        read_runs(tmp_path)


def test_unfinished_runs_are_named_with_the_first_line_of_their_error(tmp_path, write_run):
    failure = {"error": "InputError", "message": "lam must be >= 0\nsecond line"}
    for name, file, content in (
        ("failed", "failure", json.dumps(failure)),
        ("broken", "failure", "{"),
        ("running", "running", "{}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{file}.json").write_text(content)
    (write_run(tmp_path, "retried") / "failure.json").write_text(json.dumps(failure))

    found = {run.name: run.reason for run in unfinished(tmp_path)}

    assert found == {
        "broken": "failed; its failure.json cannot be read",
        "failed": "InputError: lam must be >= 0",
        "running": "has not finished",
    }


def test_runs_that_differ_in_seed_folder_and_display_are_one_arm(tmp_path, write_run):
    write_run(tmp_path, "a", seed=0)
    display = {
        "trainer.log_every_n_steps": 50,
        "data.dir": "elsewhere",
        "trainer.profiler": {"a": 1},
    }
    write_run(tmp_path, "b", seed=1, **display)
    write_run(tmp_path, "c", seed=2, **{"mtn.lam": 3.0, "noise.sampling": "empirical"})
    write_run(tmp_path, "d", seed=3, **{"noise.proportion": 0})

    table = arms(tmp_path)

    assert table["arm"].nunique() == 1
    assert set(table["model"]) == {"MMoE"}


def test_an_mtn_arm_and_its_baseline_share_only_the_baseline(tmp_path, write_run):
    write_run(tmp_path, "off")
    write_run(tmp_path, "on", mtn=True)
    write_run(tmp_path, "noisy", mtn=True, noise=0.1)

    table = arms(tmp_path)

    assert table["arm"].nunique() == 3
    assert table.loc["off", "baseline"] == table.loc["on", "baseline"]
    assert table.loc["off", "baseline"] != table.loc["noisy", "baseline"]
    assert table["variant"].to_dict() == {"off": "", "on": "+MTN", "noisy": "+MTN"}


def test_variants_name_only_the_mtn_settings_that_differ(tmp_path, write_run):
    write_run(tmp_path, "a", mtn={"lam": 1e-4, "layers": [0, 1], "target": "shared"})
    write_run(tmp_path, "b", mtn={"lam": 0.01, "layers": "all", "target": "shared"})

    table = arms(tmp_path)

    assert table.loc["a", "variant"] == "+MTN (lam=0.0001, layers=[0, 1])"
    assert table.loc["b", "variant"] == "+MTN (lam=0.01)"
    assert table.loc["a", "layers"] == "[0, 1]"


def test_a_variant_has_one_name_for_every_model(tmp_path, write_run):
    for model, variants in (
        ("ESMM", [{}]),
        ("MMoE", [{}, {"target": "shared"}]),
        ("Shared-bottom", [{}, {"lam": 0.1}, {"lam": 0.1, "coupling": "decoupled"}]),
    ):
        for number, keys in enumerate([None, *variants]):
            mtn = False if keys is None else {"lam": 1e-5} | keys
            write_run(tmp_path, f"{model}-{number}", model=model, mtn=mtn)

    table = arms(tmp_path)

    assert table["label"].to_dict() == {
        "ESMM-0": "ESMM",
        "ESMM-1": "ESMM +MTN",
        "MMoE-0": "MMoE",
        "MMoE-1": "MMoE +MTN",
        "MMoE-2": "MMoE +MTN (target=shared)",
        "Shared-bottom-0": "Shared-bottom",
        "Shared-bottom-1": "Shared-bottom +MTN",
        "Shared-bottom-2": "Shared-bottom +MTN (lam=0.1)",
        "Shared-bottom-3": "Shared-bottom +MTN (coupling=decoupled, lam=0.1)",
    }
    assert table.groupby("line")["color"].nunique().eq(1).all()
    assert set(table.loc[~table["treated"], "color"]) == {0}


def test_every_swept_setting_is_a_column(tmp_path, write_run):
    for name, keys in (
        ("a", {"optimizer.lr": 0.01, "model.widths": [8, 4]}),
        ("b", {"optimizer.lr": 0.1, "model.widths": [8]}),
    ):
        write_run(tmp_path, name, auc={"ctr": 0.7}, **keys)

    table = read_runs(tmp_path).results.drop_duplicates("run").set_index("run")

    assert table["optimizer.lr"].to_dict() == {"a": 0.01, "b": 0.1}
    assert table["model.widths"].to_dict() == {"a": "[8, 4]", "b": "[8]"}
    assert "trainer.max_epochs" not in table


@pytest.mark.parametrize(
    ("baseline", "compared"),
    [
        (None, {"MMoE": {"ESMM"}, "MMoE lr": {"ESMM"}, "ESMM lr": {"ESMM"}}),
        ("optimizer.lr=1e-2", {"MMoE": {"MMoE lr"}, "ESMM": {"ESMM lr"}}),
        ("model=mmoe", {"ESMM": {"MMoE"}, "ESMM lr": {"MMoE lr"}}),
        (
            "model=mmoe,optimizer.lr=1e-2",
            {"MMoE": {"MMoE lr"}, "ESMM": {"MMoE lr"}, "ESMM lr": {"MMoE lr"}},
        ),
    ],
)
def test_arms_are_compared_with_any_setting_of_the_baseline(
    baseline, compared, tmp_path, write_run
):
    for model in ("ESMM", "MMoE"):
        write_run(tmp_path, model, model=model)
        write_run(tmp_path, f"{model} lr", model=model, **{"optimizer.lr": 0.01})

    table = read_runs(tmp_path, baseline).settings.set_index("run")

    found = {
        run: set(table.index[(table["baseline"] == row["baseline"]) & ~table["treated"]])
        for run, row in table[table["treated"]].iterrows()
    }
    assert found == compared


def test_the_settings_of_a_baseline_may_hold_commas_and_mtn(tmp_path, write_run):
    for mtn in (False, {"lam": 0.1}, {"lam": 0.2}):
        for widths in ([8, 4], [8]):
            name = f"{mtn} {widths}"
            write_run(tmp_path, name, mtn=mtn, **{"model.widths": widths})

    runs = read_runs(tmp_path, "model.widths=[8,4],mtn.enabled=false")

    assert runs.settings["baseline"].nunique() == 1
    assert set(runs.settings.loc[~runs.settings["treated"], "run"]) == {"False [8, 4]"}


@pytest.mark.parametrize(
    "baseline",
    ["optimizer.lr=5", "optimizer.rate=1", "lr", "optimizer.lr=0.01,model.embedding_dim=5"],
)
def test_a_baseline_that_no_run_has_is_refused_with_the_choices(baseline, tmp_path, write_run):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", **{"optimizer.lr": 0.01})

    with pytest.raises(InputError, match=r"baseline must be .* 'optimizer.lr=0.001', 'optimizer.l"):
        _ = read_runs(tmp_path, baseline).settings


def test_tasks_are_in_the_order_of_the_labels(tmp_path, write_run):
    auc = {"click": 0.7, "fav": 0.8, "buy": 0.9}
    for seed in (0, 1):
        edit(
            write_run(tmp_path, f"{seed}", seed=seed, auc=auc),
            lambda record: record["data"]["parameters"].update(labels=["click", "fav", "buy"]),
        )

    runs = read_runs(tmp_path)

    assert runs.tasks == ["click", "fav", "buy"]
    assert list(runs.results["task"].unique()) == ["click", "fav", "buy"]
    assert list(runs.bins["task"].unique()) == ["click", "fav", "buy"]
    validated = runs.epochs.loc[runs.epochs["name"].str.startswith("val/"), "name"]
    assert list(validated.unique()) == ["val/click_auc", "val/fav_auc", "val/buy_auc"]


def test_a_setting_tuned_for_each_model_makes_no_variants(tmp_path, write_run):
    write_run(tmp_path, "a", model="MMoE", mtn={"lam": 1e-4})
    write_run(tmp_path, "b", model="ESMM", mtn={"lam": 1e-5})

    assert set(arms(tmp_path)["variant"]) == {"+MTN"}


def test_the_model_label_distinguishes_different_runs(tmp_path, write_run):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", **{"optimizer.lr": 0.01})
    write_run(tmp_path, "c", model="ESMM")
    write_run(tmp_path, "d", model="Shared-bottom", **{"model.dropout": 0.5})
    write_run(tmp_path, "e", model="Shared-bottom", noise=0.1)
    write_run(tmp_path, "f", model="Shared-bottom", noise=0.1, **{"noise.sampling": "empirical"})
    write_run(tmp_path, "g", model="Tower")

    assert arms(tmp_path)["model"].to_dict() == {
        "a": "MMoE (optimizer.lr=0.001)",
        "b": "MMoE (optimizer.lr=0.01)",
        "c": "ESMM",
        "d": "Shared-bottom",
        "e": "Shared-bottom (noise.sampling=uniform)",
        "f": "Shared-bottom (noise.sampling=empirical)",
        "g": "Tower",
    }


def test_a_label_names_a_class_and_of_its_settings_those_that_differ_within_it(tmp_path, write_run):
    truncated = {"_target_": "mtnrec.objective.truncated.Truncated", "window": 10000}
    for number, loss in enumerate(
        (
            {"_target_": "mtnrec.objective.loss.CrossEntropy"},
            {"_target_": "mtnrec.objective.reweighted.Reweighted", "beta": 0.25, "normalise": True},
            truncated | {"rate": 0.05},
            truncated | {"rate": 0.1},
        )
    ):
        write_run(tmp_path, str(number), loss=loss)

    assert read_runs(tmp_path).settings["model"].tolist() == [
        "MMoE",
        "MMoE (loss=Reweighted)",
        "MMoE (loss=Truncated, loss.rate=0.05)",
        "MMoE (loss=Truncated, loss.rate=0.1)",
    ]


def test_data_sets_of_one_name_are_distinguished_by_their_parameters(tmp_path, write_run):
    write_run(tmp_path, "a", **{"data.rows": 5000})
    write_run(tmp_path, "b")
    write_run(tmp_path, "c", data="aliexpress_nl")

    assert arms(tmp_path)["data"].to_dict() == {
        "a": "synthetic (rows=5000)",
        "b": "synthetic (rows=3000)",
        "c": "aliexpress_nl",
    }


def test_data_sets_of_the_same_parameters_are_distinguished_by_checksum(tmp_path, write_run):
    write_run(tmp_path, "a")
    edit(write_run(tmp_path, "b"), lambda record: record["data"].update(checksum="ab" * 32))

    assert arms(tmp_path).loc["b", "data"] == "synthetic (checksum=abababab)"


def test_labels_and_noise_distinguish_all_arms(tmp_path, write_run):
    changes = [{}, {"optimizer.lr": 0.1}, {"data.rows": 9}, {"data.batch_size": 64}]
    settings = [
        (noise, mtn, change)
        for noise in (0.0, 0.1)
        for mtn in (False, True, {"lam": 0.1})
        for change in [*changes, *([{"noise.seed": 5}] if noise else [])]
    ]
    for number, (noise, mtn, change) in enumerate(settings):
        for seed in (0, 1):
            name = f"{number}-{seed}"
            write_run(tmp_path, name, noise=noise, mtn=mtn, seed=seed, auc={"ctr": 0.7}, **change)

    table = arms(tmp_path)
    labels = table[["data", "model", "noise", "variant"]].apply(tuple, axis=1)

    assert table["arm"].nunique() == len(settings)
    assert labels.nunique() == table["arm"].nunique()
    assert (table.groupby("arm")["seed"].nunique() == 2).all()


FLIPS = {"noise.label_flip": {"conversion": 0.1}}


def test_label_noise_is_named_with_the_data_set(tmp_path, write_run):
    for mtn in (False, True):
        write_run(tmp_path, f"clean-{mtn}", mtn=mtn)
        write_run(tmp_path, f"zero-{mtn}", mtn=mtn, seed=1, **{"noise.label_flip": {"click": 0}})
        write_run(tmp_path, f"flipped-{mtn}", mtn=mtn, **FLIPS)
        write_run(tmp_path, f"both-{mtn}", mtn=mtn, noise=0.2, **FLIPS)

    runs = read_runs(tmp_path)

    table = runs.settings.set_index("run")
    noisy = "synthetic (label_flip.conversion=0.1)"
    names = {"clean": "synthetic", "zero": "synthetic", "flipped": noisy, "both": noisy}
    for name, data in names.items():
        for mtn in (False, True):
            row = table.loc[f"{name}-{mtn}"]
            assert (row["data"], row["model"]) == (data, "MMoE")
            assert row["noise"] == (0.2 if name == "both" else 0)
    assert table["baseline"].nunique() == 3
    assert not [key for key in runs.swept if "flip" in key]


def test_label_noise_that_all_runs_have_is_named(tmp_path, write_run):
    write_run(tmp_path, "a", **FLIPS)
    write_run(tmp_path, "b", mtn=True, **FLIPS)

    assert set(read_runs(tmp_path).settings["data"]) == {"synthetic (label_flip.conversion=0.1)"}


def test_different_noise_under_the_same_settings_is_refused(tmp_path, write_run):
    write_run(tmp_path, "a", noise=0.1)
    changed = write_run(tmp_path, "b", noise=0.1, mtn=True)
    edit(changed, lambda record: record["noise"].update(checksum="0" * 64))

    with pytest.raises(InputError, match="a and b have the same noise settings, but saw different"):
        read_runs(tmp_path)


def test_values_drawn_from_the_seed_do_not_define_an_arm(tmp_path, write_run):
    of_seed = ["data.seed", "data.split_seed", "noise.seed", "seed"]
    for mtn in (False, True):
        for seed in range(3):
            drawn = {"noise.seed": seed, "data.split_seed": seed}
            name = f"{mtn}-{seed}"
            folder = write_run(tmp_path, name, noise=0.1, mtn=mtn, seed=seed, **drawn)
            edit(folder, lambda record: record.update(keys_of_seed=of_seed))

    table = arms(tmp_path)

    assert table.groupby("variant")["arm"].nunique().to_dict() == {"": 1, "+MTN": 1}
    assert table["baseline"].nunique() == 1
    assert set(table["model"]) == {"MMoE"}


def test_repeats_on_data_sets_of_their_own_form_one_arm(tmp_path, write_run):
    of_seed = ["data.dir", "data.generator_seed", "data.seed", "seed"]
    for seed in (0, 1):
        for mtn in (False, True):
            name = f"{mtn}-{seed}"
            drawn = {"data.generator_seed": seed, "noise.seed": 0}
            folder = write_run(tmp_path, name, noise=0.1, mtn=mtn, seed=seed, **drawn)
            edit(folder, lambda record: record.update(keys_of_seed=of_seed))
            edit(folder, lambda r, seed=seed: r["noise"].update(checksum=str(seed) * 64))

    table = arms(tmp_path)

    assert table.groupby("variant")["arm"].nunique().to_dict() == {"": 1, "+MTN": 1}
    assert set(table["data"]) == {"synthetic"}
    assert table["checksum"].nunique() == table["baseline"].nunique() == 1


def test_one_seed_has_one_noise_even_if_drawn_from_the_seed(tmp_path, write_run):
    of_seed = ["data.seed", "noise.seed", "seed"]
    for name, mtn in (("a", False), ("b", True)):
        folder = write_run(tmp_path, name, noise=0.1, mtn=mtn, seed=1, **{"noise.seed": 1})
        edit(folder, lambda record: record.update(keys_of_seed=of_seed))
    edit(folder, lambda record: record["noise"].update(checksum="0" * 64))

    with pytest.raises(InputError, match="a and b have the same noise settings, but saw different"):
        read_runs(tmp_path)


def test_settings_of_mtn_are_missing_if_it_is_off(tmp_path, write_run):
    write_run(tmp_path, "off")
    write_run(tmp_path, "on", mtn={"refresh_every": 4})

    table = arms(tmp_path)

    assert table.loc["off", ["lam", "target", "refresh_every"]].isna().all()
    assert table.loc["on", "lam"] == 1e-5
    assert table.loc["on", "refresh_every"] == 4


def test_results_have_a_row_for_each_split_task_and_metric(tmp_path, write_run):
    auc = {"buy": 0.7, "buy_now": 0.8}
    write_run(tmp_path, "a", auc=auc, metrics={"test/buy_auc": None})

    table = read_runs(tmp_path).results.set_index(["split", "task", "metric"])

    assert len(table) == 2 * 2 * 6
    assert pd.isna(table.loc[("test", "buy", "auc"), "value"])
    assert table.loc[("test", "buy_now", "auc"), "value"] == 0.8
    assert table.loc[("test", "buy", "auc"), ["rows", "positives"]].tolist() == [600, 60]
    assert table.loc[("test", "buy_now", "log_loss"), ["rows", "positives"]].tolist() == [300, 54]


def test_epochs_hold_every_logged_value(tmp_path, write_run):
    folder = write_run(tmp_path, "a", mtn=True, epochs=2)
    history = json.loads((folder / "result.json").read_text())["history"]

    table = read_runs(tmp_path).epochs

    assert len(table) == sum(len(entry) - 2 for entry in history)
    values = table.set_index(["epoch", "name"])["value"]
    assert values[1, "mtn/layer_0/alpha_task"] == history[1]["mtn/layer_0/alpha_task"]


def test_costs_are_those_of_the_records(tmp_path, write_run):
    folder = write_run(tmp_path, "a")
    record = json.loads((folder / "result.json").read_text())

    (row,) = read_runs(tmp_path).costs.to_dict("records")

    assert row["seconds_fit"] == record["seconds"]["fit"]
    assert row["train_samples_per_second"] == record["samples_per_second"]["train"]
    assert row["peak_memory_bytes"] == record["peak_memory_bytes"]


def test_the_numbers_of_parameters_are_costs_and_missing_in_older_records(tmp_path, write_run):
    write_run(tmp_path, "old")
    edit(
        write_run(tmp_path, "recent", seed=1),
        lambda record: record.update(parameters={"embeddings": 508, "network": 2754}),
    )

    costs = read_runs(tmp_path).costs.set_index("run")

    assert costs.loc["recent", "network_parameters"] == 2754
    assert costs.loc["recent", "embeddings_parameters"] == 508
    assert costs.loc["old", ["network_parameters", "embeddings_parameters"]].isna().all()


def test_written_tables_keep_every_digit(tmp_path, write_run):
    for seed in range(3):
        write_run(tmp_path / "runs", f"{seed}", seed=seed, mtn=bool(seed))
    runs = read_runs(tmp_path / "runs")

    runs.write(tmp_path / "out")

    results = runs.results
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == results["value"].tolist()
    stored = pd.read_parquet(tmp_path / "out" / "results.parquet")
    pd.testing.assert_frame_equal(stored, results)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}.{kind}" for name in ("costs", "epochs", "results") for kind in ("csv", "parquet")
    ]


def test_the_results_do_not_depend_on_the_cost_of_runs(tmp_path, write_run):
    def slow(record):
        record["seconds"]["fit"] *= 7
        record["samples_per_second"]["train"] /= 7
        record["peak_memory_bytes"] += 1

    for root in ("first", "second"):
        folder = write_run(tmp_path / root, "a")
    edit(folder, slow)

    for root in ("first", "second"):
        read_runs(tmp_path / root).write(tmp_path / f"out_{root}")

    for kind in ("csv", "parquet"):
        first, second = (
            tmp_path / f"out_{root}" / f"results.{kind}" for root in ("first", "second")
        )
        assert first.read_bytes() == second.read_bytes()


def test_the_mean_auc_of_the_tasks_has_a_row_and_a_table_of_its_own(tmp_path, write_run):
    for seed, mean in enumerate((0.71, 0.75)):
        write_run(tmp_path, f"run{seed}", seed=seed, metrics={"val/mean_auc": mean})

    results = read_runs(tmp_path).results

    of_mean = results[results["metric"] == "mean_auc"]
    assert of_mean["value"].tolist() == [0.71, 0.75]
    assert set(of_mean["split"] + "/" + of_mean["task"]) == {"val/all"}
    assert of_mean["rows"].isna().all()
    assert "all" not in set(results.loc[results["metric"] == "auc", "task"])
    (cell,) = comparisons(results, metric="mean_auc", split="val").to_dict("records")
    assert cell["mean"] == pytest.approx(0.73)
