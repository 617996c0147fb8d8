"""Scores of prepared rows, of raw values and of pandas frames are those of the trained network."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from reference import ali_ccp_log
from sklearn.metrics import roc_auc_score

from mtnrec import load_checkpoint
from mtnrec.batch import Batch
from mtnrec.data.prepared.store import open_prepared

TASKS = ["ctr", "cvr", "ctcvr"]


def checkpoint_of(run):
    return run / "checkpoints" / "best.ckpt"


def scores_of_network(run, directory, split="test"):
    """Probabilities of the tasks by the plain network on the prepared arrays."""
    config = OmegaConf.create(json.loads((run / "result.json").read_text())["config"])
    manifest, arrays = open_prepared(directory)
    network = instantiate(config.model, _partial_=True, _convert_="all")(schema=manifest.schema)
    state = torch.load(checkpoint_of(run), weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): state[name] for name in state})
    features = (torch.from_numpy(np.array(arrays[split][f])) for f in ("categorical", "numerical"))
    with torch.inference_mode():
        click, buy = network.eval()(Batch(*features)).positive.double().exp().numpy().T
    return np.stack([click, np.minimum(buy / click, 1), buy], axis=1)


def test_prepared_rows_and_raw_values_have_the_scores_of_the_network(shop, predict, tmp_path):
    run, rows, data = shop
    directory = Path(data[-1].removeprefix("data.dir="))
    checkpoint = f"checkpoint={checkpoint_of(run)}"
    table = tmp_path / "rows.csv"
    rows.drop(columns=["click", "buy"]).to_csv(table, index=False)

    predict(checkpoint, *data, f"out={tmp_path}/prepared.parquet")
    predict(checkpoint, f"table={table}", "keep=[id]", f"out={tmp_path}/raw.parquet")

    prepared = pd.read_parquet(tmp_path / "prepared.parquet")
    raw = pd.read_parquet(tmp_path / "raw.parquet")
    assert list(prepared.columns) == TASKS
    assert list(raw.columns) == ["id", *TASKS]
    assert raw["id"].tolist() == [str(number) for number in rows["id"]]  # the cells are text
    pd.testing.assert_frame_equal(raw[TASKS], prepared)
    np.testing.assert_allclose(prepared, scores_of_network(run, directory), rtol=1e-5)


def test_a_pandas_frame_has_the_same_scores_in_any_order_of_columns(shop, predict, tmp_path):
    run, rows, data = shop
    predict(f"checkpoint={checkpoint_of(run)}", *data, f"out={tmp_path}/scores.parquet")
    expected = pd.read_parquet(tmp_path / "scores.parquet").to_numpy()
    frame = rows.set_index(rows["id"] + 100)[["price", "shop", "click", "age", "brand"]]

    scorer = load_checkpoint(checkpoint_of(run), device="cpu")
    scores = scorer.score(frame)
    few = scorer.score(frame, batch_size=7)

    assert list(scores.columns) == TASKS
    assert scores.index.equals(frame.index)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_allclose(few, expected, rtol=1e-5)
    as_category = frame.astype({"brand": "category", "shop": float})
    np.testing.assert_array_equal(scorer.score(as_category), scores)
    assert scorer.score(frame.head(0)).shape == (0, 3)


def test_unseen_values_score_as_missing_ones_and_are_counted(shop):
    run, rows, _ = shop
    scorer = load_checkpoint(checkpoint_of(run), device="cpu")
    unseen = rows.assign(brand="never", shop=10**12)
    missing = rows.assign(brand=None, shop=None)

    scores = scorer.score(unseen)

    assert scorer.encoder.unseen == {"brand": 90, "shop": 90}
    np.testing.assert_array_equal(scores, scorer.score(missing))
    assert scorer.encoder.unseen == {"brand": 90, "shop": 90}
    assert scorer.encoder.missing["brand"] == 90
    assert scorer.encoder.missing["price"] == 2 * rows["price"].isna().sum() > 0
    half = rows.assign(shop=2.5)
    np.testing.assert_array_equal(scorer.score(half), scorer.score(rows.assign(shop=None)))


def test_a_missing_number_takes_the_mean_of_the_training_rows(shop, tmp_path):
    run, rows, data = shop
    prices = pd.read_csv(data[1].removeprefix("data.train="))["price"]
    scorer = load_checkpoint(checkpoint_of(run), device="cpu")

    filled = scorer.score(rows.fillna({"price": prices.mean()}))

    np.testing.assert_allclose(scorer.score(rows), filled, rtol=1e-6)


def raw_rows(directory, split):
    """The raw values of a prepared split, by its own vocabularies."""
    manifest, arrays = open_prepared(directory)
    arrays = arrays[split]

    def values_of(name):
        known = pl.read_parquet(directory / "vocabulary" / f"{name}.parquet")
        return dict(zip(known["index"], known["value"], strict=True))

    columns = {}
    for column, field in enumerate(manifest.schema.categorical):
        values = values_of(field.name)
        columns[field.name] = [values.get(i) for i in arrays["categorical"][:, column].tolist()]
    for column, name in enumerate(manifest.schema.numerical):
        columns[name] = arrays["numerical"][:, column].astype(float)
    for column, field in enumerate(manifest.schema.multivalued):
        values = values_of(field.name)
        stem = f"bags/{field.name}"
        offsets = arrays[f"{stem}/offsets"]
        bags = [slice(offsets[b], offsets[b + 1]) for b in arrays["bag"][:, column]]
        columns[field.name] = [
            [values.get(token, -7) for token in arrays[f"{stem}/tokens"][bag].tolist()]
            for bag in bags
        ]
        columns[f"{field.name}_weights"] = [arrays[f"{stem}/weights"][bag] for bag in bags]
    return pl.DataFrame(columns)


def test_multi_valued_fields_are_lists(train, predict, prepare, tmp_path):
    ali_ccp_log.write_log(tmp_path / "raw", 800, history=0.02, rows_per_common=20)
    for skeleton in (tmp_path / "raw").glob("sample_skeleton_*.csv"):  # conversions are too rare
        lines = [line.split(",", 3) for line in skeleton.read_text().splitlines()]
        labels = [f"{int(row % 3 == 0)},{int(row % 6 == 0)}" for row in range(len(lines))]
        texts = [f"{line[0]},{two},{line[3]}\n" for line, two in zip(lines, labels, strict=True)]
        skeleton.write_text("".join(texts))
    data = ["data=ali_ccp", "data.preset=null", "data.fields=[101,205,210,853,109_14]"]
    data += ["data.tokens=all", f"data.dir={tmp_path}/log", "data.min_count=2"]
    prepare(*data, f"data.raw_dir={tmp_path}/raw")
    run = train(*data)
    checkpoint = f"checkpoint={checkpoint_of(run)}"
    rows = raw_rows(tmp_path / "log", "test")
    lists = [name for name, dtype in rows.schema.items() if isinstance(dtype, pl.List)]
    rows.write_parquet(tmp_path / "rows.parquet")

    predict(checkpoint, *data, f"out={tmp_path}/prepared.parquet")
    predict(checkpoint, f"table={tmp_path}/rows.parquet", f"out={tmp_path}/raw.parquet")

    assert lists
    prepared, raw = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("prepared", "raw"))
    np.testing.assert_allclose(raw, prepared, rtol=1e-5)
    frame = load_checkpoint(checkpoint_of(run), device="cpu").score(rows.to_pandas())
    np.testing.assert_allclose(frame, prepared, rtol=1e-5)


@pytest.mark.slow
def test_the_raw_csv_of_aliexpress_is_scored(train, predict, prepare, write_aliexpress, tmp_path):
    raw = write_aliexpress(tmp_path / "raw")
    data = ["data=aliexpress_nl", f"data.dir={tmp_path}/prepared"]
    prepare(*data, f"data.raw_dir={raw}")
    run = train(*data, model="shared_bottom")
    checkpoint = f"checkpoint={checkpoint_of(run)}"

    predict(checkpoint, *data, f"out={tmp_path}/prepared.parquet")
    predict(checkpoint, f"table={raw}/test.csv", f"out={tmp_path}/raw.parquet")

    scores = [pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("prepared", "raw")]
    pd.testing.assert_frame_equal(*scores)
    expected = scores_of_network(run, tmp_path / "prepared")
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns="brand"), "the rows lack the column 'brand', which the"),
        (
            lambda rows: rows.assign(age=["old"] + ["1"] * 89),
            "row 0, column 'age': a number must be finite in 32 bits, got 'old'",
        ),
        (lambda rows: rows.assign(age=[1.0] * 89 + [1e39]), "row 89, column 'age': a number must"),
        (
            lambda rows: rows.assign(age=[1.0] * 11 + [None] * 79),
            "row 11, column 'age': a number is missing, but the model's data had none",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(change, message, train, tmp_path, shop):
    _, rows, data = shop
    without_fill = [key for key in data if not key.startswith("data.fill")][:-1]
    if "missing" in message:
        run = train(
            *without_fill,
            "data.exclude=[id,price]",
            f"data.dir={tmp_path}/whole",
            model="shared_bottom",
        )
    else:
        run = shop[0]

    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint_of(run), device="cpu").score(change(rows), batch_size=8)


def test_a_table_that_does_not_fit_leaves_no_file(shop, predict, tmp_path):
    run, rows, _ = shop
    rows.assign(age=["1"] * 50 + ["old"] * 40).to_csv(tmp_path / "rows.csv", index=False)

    with pytest.raises(SystemExit, match=r"rows.csv, line 52, column 'age': a number must"):
        predict(
            f"checkpoint={checkpoint_of(run)}",
            f"table={tmp_path}/rows.csv",
            f"out={tmp_path}/out/scores.parquet",
        )

    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_set_with_other_vocabularies_is_refused(shop, predict, prepare, tmp_path):
    run, _, data = shop
    other = [*data[:-1], f"data.dir={tmp_path}/other"]
    for change, what in (([], "vocabularies"), (["data.fill=0"], "fields and scales")):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        path = data[1].removeprefix("data.train=")
        frame = pd.read_csv(path, dtype=str)  # pandas 2 would round the numbers
        if not change:
            frame["brand"] = frame["brand"].replace("beta", "gamma")
        frame.to_csv(tmp_path / "train.csv", index=False)
        keys = [*other, f"data.train={tmp_path}/train.csv", *change]
        prepare(*keys)

        with pytest.raises(SystemExit, match=f"must have the {what} of the data set that the"):
            predict(f"checkpoint={checkpoint_of(run)}", *keys, f"out={tmp_path}/s.parquet")


@pytest.mark.parametrize(
    "column",
    [
        pd.period_range("2024-01", periods=90, freq="D"),
        pd.cut(pd.Series(range(90)), 3),
        pd.to_timedelta(range(90), unit="s"),
        [b"a"] * 90,
        [[1]] * 90,
        [{"a": 1}] * 90,
    ],
)
def test_types_without_a_text_are_refused(column, shop):
    run, rows, _ = shop

    with pytest.raises(ValueError, match="the frame: the column 'brand' is of type"):
        load_checkpoint(run, "cpu").score(rows.assign(brand=column))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def truncate(path, content):
    path.write_bytes(content[: len(content) // 2])


def foreign(path, content):
    torch.save({"state_dict": {}}, path)


def other_version(path, content):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["mtnrec"]["format_version"] = 99
    torch.save(checkpoint, path)


def payload(path, content):
    torch.save({"state_dict": {}, "mtnrec": Payload()}, path)


def plain_pickle(path, content):
    path.write_bytes(pickle.dumps(Payload()))


def a_call(path, content):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["mtnrec"]["network"] = {"_target_": "os.mkdir", "path": "executed"}
    torch.save(checkpoint, path)


def a_class(path, content):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["mtnrec"]["network"] = {"_target_": "subprocess.Popen", "args": ["ls"]}
    torch.save(checkpoint, path)


def other_widths(path, content):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["mtnrec"]["network"]["embedding_dim"] = 5
    torch.save(checkpoint, path)


def with_card(**entries):
    def damage(path, content):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["mtnrec"] |= entries
        torch.save(checkpoint, path)

    return damage


def with_layers(layers):
    widths = [1] * layers if isinstance(layers, int) else layers
    name = "mtnrec.model.shared_bottom.SharedBottom"
    return with_card(network={"_target_": name, "tower_widths": widths})


def with_vocabulary_size(path, content):
    manifest = torch.load(path, weights_only=True)["mtnrec"]["manifest"]
    with_card(
        manifest=re.sub(r'"vocabulary_size": \d+', '"vocabulary_size": 2000000000', manifest)
    )(path, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_card(manifest=7), "its model metadata is incomplete"),
        (with_card(network=None), "its model metadata is incomplete"),
        (with_card(network={7: 8}), "its model metadata is incomplete"),
        (with_card(vocabularies={"shop": b"x"}), "its model metadata is incomplete"),
        (with_card(vocabularies={"shop": torch.zeros(9)}), "its model metadata is incomplete"),
        (with_card(vocabularies={"shop": torch.zeros(9, dtype=torch.uint8)}), "cannot be read"),
        (with_card(format_version=torch.zeros(2)), "must have format version 1 .* got tensor"),
        (with_card(manifest="[" * 100_000), "is not the schema of a prepared data set"),
        (
            with_card(network={"_target_": "torch.nn.Linear"}),
            r"model of mtnrec or of an allowed module, got torch.nn.Linear.*allow=\[torch.nn\]",
        ),
        (
            with_card(network={"_target_": "mtnrec.model.esmm.torch.nn.Linear"}),
            "which cannot be imported",
        ),
        (with_card(network={"_target_": "mtnrec.model.mlp.count"}), "cannot be imported|must be a"),
        (
            with_card(network={"_target_": "mtnrec.model.esmm.ESMM", "schema": 1}),
            "cannot be built from its config and weights",
        ),
        (with_layers(10**5), "it has more layers than the checkpoint has weights"),
        (with_layers([[1]] * 3), "cannot be built from its config"),
        (with_vocabulary_size, "the vocabulary of '.*' is damaged"),
        (truncate, "is damaged or not a checkpoint"),
        (lambda path, _: path.write_bytes(b""), "is damaged or not a checkpoint"),
        (lambda path, _: path.write_bytes(os.urandom(5000)), "is damaged or not a checkpoint"),
        (lambda path, _: path.unlink(), "is missing"),
        (foreign, "is not a checkpoint of mtnrec"),
        (other_version, "must have format version 1 for this version of mtnrec, got 99"),
        (payload, "is damaged or not a checkpoint"),
        (plain_pickle, "is damaged or not a checkpoint"),
        (a_call, "or of an allowed module, got os.mkdir, whose code would run"),
        (a_class, "or of an allowed module, got subprocess.Popen, whose code would run"),
        (other_widths, r"is of another model or schema: .* there and .* here\. Train again"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_runs_no_code(
    damage, message, shop, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.ckpt"
    shutil.copy(checkpoint_of(shop[0]), path)
    damage(path, path.read_bytes())

    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)

    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "one of data and table must be given, got neither.*data=NAME .* or table=FILE"),
        (["data=synthetic", "table=rows.csv"], "one of data and table must be given, got both"),
        (["table=rows.csv", "out=s.txt"], r"out must be a .parquet or .csv file, got s.txt"),
        (["table=whole.csv", "out=/proc/s.csv"], r"/proc/s.csv could not be written .*Choose"),
        (["data=synthetic", "keep=[id]"], r"keep must come with table=FILE, got keep=\['id'\]"),
        (["data=synthetic", "decimal='.'"], "decimal must come with table=FILE, got decimal=. "),
        (["table=whole.csv", "decimal=x"], "decimal must be one of ., ,; got 'x'"),
        (["table=whole.csv", "separator=ab"], "separator must be one character, got 'ab'"),
        (["checkpoint=runs"], r"checkpoint: runs is missing. Choose another file or"),
        (["table=rows.csv", "batch_size=0"], "batch_size must be an integer >= 1, got 0"),
        (["table=rows.csv"], "table: rows.csv is missing"),
        (["table=small.csv"], "small.csv lacks the column 'age', 'price', 'shop'|lacks the column"),
        (["table=whole.csv", "keep=[name]"], "lacks the column 'name' of keep"),
        (["table=whole.csv", "keep=[ctr]"], "keep must not name columns of the scores, got 'ctr'"),
        (["table=whole.csv", "device=abacus"], "device='abacus' cannot be used"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides, message, shop, predict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.csv").write_text("brand\nzeta\n")
    shop[1].assign(ctr=1).to_csv("whole.csv", index=False)

    with pytest.raises(SystemExit, match=message):
        predict(f"checkpoint={checkpoint_of(shop[0])}", "out=scores.parquet", *overrides)


def test_a_runs_folder_and_a_csv_file_give_the_same_scores(shop, predict, tmp_path):
    run, rows, _ = shop
    rows.to_csv(tmp_path / "rows.csv", index=False)
    table = f"table={tmp_path}/rows.csv"

    predict(f"checkpoint={run}", table, "keep=[id,brand]", f"out={tmp_path}/scores.csv")
    predict(f"checkpoint={checkpoint_of(run)}", table, f"out={tmp_path}/scores.parquet")

    written = pd.read_csv(tmp_path / "scores.csv", dtype=dict.fromkeys(TASKS, np.float32))
    assert list(written.columns) == ["id", "brand", *TASKS]
    assert written["id"].tolist() == rows["id"].tolist()
    pd.testing.assert_frame_equal(written[TASKS], pd.read_parquet(tmp_path / "scores.parquet"))


@pytest.fixture(scope="module")
def european(train, tmp_path_factory):
    """A model of a csv file with semicolons and decimal commas, and rows to score."""
    folder = tmp_path_factory.mktemp("european")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "size": rng.choice([0.5, 1.5, 2.25], 400),
            "price": rng.lognormal(0, 1, 400).round(3),
            "click": rng.integers(0, 2, 400),
        }
    )
    frame.to_csv(folder / "train.csv", index=False, sep=";", decimal=",")
    data = ["data=table", f"data.train={folder}/train.csv", "data.labels=[click]"]
    data += ["data.categorical=[size]", f"data.dir={folder}/prepared", "monitor=val/click_auc"]
    return train(*data, model="shared_bottom"), frame[:90]


@pytest.mark.parametrize(
    ("separator", "decimal", "keys"),
    [
        (",", ".", []),
        (";", ",", []),
        ("\t", ",", []),
        (":", ",", ["separator=':'"]),
        (",", ",", ["decimal=','"]),
    ],
)
def test_the_scores_do_not_depend_on_separator_and_decimal_sign(
    separator, decimal, keys, european, predict, evaluate, tmp_path, capsys
):
    run, rows = european
    rows = rows.assign(note="8,14")
    rows.to_csv(tmp_path / "rows.csv", index=False, sep=separator, decimal=decimal)
    keys = [f"checkpoint={run}", f"table={tmp_path}/rows.csv", *keys]

    predict(*keys, "keep=[note]", f"out={tmp_path}/scores.parquet")
    evaluate(*keys, f"out={tmp_path}/metrics.json")

    expected = load_checkpoint(run, "cpu").score(rows)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(scores[["click"]], expected)
    assert scores["note"].eq("8,14").all()
    auc = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["click_auc"]
    assert auc == pytest.approx(roc_auc_score(rows["click"], expected["click"]))
    said = f"rows.csv: separator {separator!r}, decimal sign {decimal!r}"
    assert shown(capsys).count(said) == 2


def test_a_number_of_another_decimal_sign_is_refused_with_the_remedy(european, predict, tmp_path):
    (tmp_path / "rows.csv").write_text("size;price\n0.5;1,250\n")
    keys = [f"checkpoint={european[0]}", f"table={tmp_path}/rows.csv", f"out={tmp_path}/s.csv"]

    with pytest.raises(SystemExit, match=r"line 2, column 'price': .* got '1,250'.* set decimal"):
        predict(*keys)


def test_kept_columns_are_unchanged(shop, predict, tmp_path):
    run, rows, _ = shop
    kept = {
        "code": pl.Series([b"\x00\xff", b"", None] * 30),
        "at": pl.Series([0, 1, None] * 30).cast(pl.Time),
        "empty": pl.Series(["", None, "a"] * 30),
        "nan": pl.Series([np.nan, None, 1.0] * 30),
        "lists": pl.Series([[1], [], None] * 30),
    }
    frame = pl.from_pandas(rows).with_columns(**kept)
    frame.write_parquet(tmp_path / "rows.parquet")
    keys = [f"checkpoint={run}", f"table={tmp_path}/rows.parquet", f"keep=[{','.join(kept)},brand]"]

    predict(*keys, f"out={tmp_path}/scores.parquet")

    written = pl.read_parquet(tmp_path / "scores.parquet")
    assert written.select(*kept, "brand").equals(frame.select(*kept, "brand"))
    with pytest.raises(SystemExit, match=r"keep must .* csv file can hold, got 'code', 'lists'"):
        predict(*keys, f"out={tmp_path}/scores.csv")


def shown(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_the_mean_prediction_is_shown_next_to_the_rate(shop, predict, tmp_path, capsys):
    run, rows, data = shop
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.drop(columns="buy").to_csv(tmp_path / "unlabelled.csv", index=False)
    scores = load_checkpoint(run, device="cpu").score(rows)
    clicked = rows["click"] == 1

    predict(f"checkpoint={run}", f"table={tmp_path}/rows.csv", f"out={tmp_path}/s.csv")
    text = shown(capsys)

    assert "observed rate" in text
    for task, mean, rate, count in (
        ("ctr", scores["ctr"].mean(), clicked.mean(), 90),
        ("cvr", scores["cvr"][clicked].mean(), rows["buy"][clicked].mean(), clicked.sum()),
        ("ctcvr", scores["ctcvr"].mean(), rows["buy"].mean(), 90),
    ):
        mean = np.float64(scores[task][clicked if task == "cvr" else slice(None)].mean())
        found = re.search(rf" {task} ([\d.]+) ([\d.]+) ([\d.]+) (\d+) ", text).groups()
        assert [float(value) for value in found] == pytest.approx(
            [mean, rate, mean / rate, count], abs=2e-6
        )

    predict(f"checkpoint={run}", f"table={tmp_path}/unlabelled.csv", f"out={tmp_path}/s.csv")
    text = shown(capsys)

    train = pd.read_csv(data[1].removeprefix("data.train="))
    rate = train["buy"][train["click"] == 1].mean()
    assert "training rate" in text
    assert "the rows lack the labels 'click', 'buy'" in text
    found = re.search(r" cvr ([\d.]+) ([\d.]+) [\d.]+ 90 ", text).groups()
    mean = scores["cvr"].astype(float).mean()
    assert [float(value) for value in found] == pytest.approx([mean, rate], abs=2e-6)


def test_a_column_whose_values_are_all_unseen_is_a_warning(shop, predict, tmp_path, caplog, capsys):
    run, rows, _ = shop
    scorer = load_checkpoint(run, device="cpu")
    scorer.score(rows)
    assert caplog.messages == []
    rows.assign(shop="x").to_csv(tmp_path / "rows.csv", index=False)
    expected = "column 'shop': none of its 90 values occurs in the training rows"

    scorer.score(rows.assign(shop=10**9))
    assert [message.startswith(expected) for message in caplog.messages] == [True]
    predict(f"checkpoint={run}", f"table={tmp_path}/rows.csv", f"out={tmp_path}/s.csv")

    assert expected in shown(capsys)


def test_a_model_outside_mtnrec_runs_only_if_its_module_is_allowed(
    shop, predict, tmp_path, monkeypatch
):
    run, rows, _ = shop
    (tmp_path / "evil.py").write_text(
        "import pathlib\n"
        "from mtnrec.model.shared_bottom import SharedBottom\n"
        "pathlib.Path('executed').touch()\n"
        "class Net(SharedBottom): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    network = torch.load(checkpoint_of(run), weights_only=True)["mtnrec"]["network"]
    path = tmp_path / "own.ckpt"
    shutil.copy(checkpoint_of(run), path)
    with_card(network=network | {"_target_": "evil.Net"})(path, None)
    keys = [f"checkpoint={path}", f"table={tmp_path}/rows.csv", f"out={tmp_path}/s.csv"]

    with pytest.raises(SystemExit, match=r"got evil.Net, whose code .* set allow=\[evil\]"):
        predict(*keys)
    for other in ("ev", "evil.Net.x", "", "evi*"):
        with pytest.raises(ValueError, match="of an allowed module"):
            load_checkpoint(path, allow=[other])
    assert not (tmp_path / "executed").exists()

    predict(*keys, "allow=[evil]")
    scores = load_checkpoint(path, "cpu", allow="evil").score(rows)
    pd.testing.assert_frame_equal(scores, load_checkpoint(run, "cpu").score(rows))


def test_a_row_without_a_finite_probability_is_named(shop, predict, tmp_path):
    run, rows, data = shop
    path, out = tmp_path / "best.ckpt", tmp_path / "out" / "scores.parquet"
    checkpoint = torch.load(checkpoint_of(run), weights_only=True)
    checkpoint["state_dict"]["network.bottom.0.weight"][3, 2] = torch.inf
    torch.save(checkpoint, path)

    with pytest.raises(SystemExit, match=r"row 0 of .*/prepared/test has no finite probability"):
        predict(f"checkpoint={path}", *data, f"out={out}")
    with pytest.raises(ValueError, match="row 0 has no finite probability"):
        load_checkpoint(path).score(rows)

    assert list(out.parent.iterdir()) == []


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import mtnrec

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mtnrec.nothing
