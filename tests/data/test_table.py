"""People's own tables against pandas' reading of the same files."""

import gzip
import hashlib
import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import NotPreparedError
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_prepared
from mtnrec.data.raw import blocks, tabular
from mtnrec.data.table import Table
from mtnrec.serving.encoder import Encoder

HILLSTROM = Path(__file__).parents[3] / "shared" / "data" / "hillstrom" / "hillstrom.csv"
RECHUB = HILLSTROM.parents[1] / "aliccp_sample_rechub"
ROWS = 300
SETTINGS = {
    "labels": ["click", "conversion"],
    "funnel": True,
    "fill": "mean",
    "standardise": False,
}


@pytest.fixture
def frame():
    """Texts with commas and quotes, few and many integers, gaps, booleans."""
    rng = np.random.default_rng(0)
    click = rng.integers(0, 2, ROWS)
    return pd.DataFrame(
        {
            "row": np.arange(ROWS) + 0.5,  # whole numbers would be categories
            "city": rng.choice(["Rome, Italy", 'the "Hague"', "Łódź", "Nîmes", None], ROWS),
            "shop": pd.array(rng.choice([3, 40, -7, 11, None], ROWS), dtype="Int64"),
            "item": rng.permutation(10 * ROWS)[:ROWS] / 2,
            "price": np.where(rng.random(ROWS) < 0.2, np.nan, rng.lognormal(0, 3, ROWS)),
            "open": rng.random(ROWS) < 0.5,
            "click": click,
            "conversion": click & rng.integers(0, 2, ROWS),
        }
    )


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "data" / "mine"


@pytest.fixture
def prepared(directory, tmp_path):
    """Write a frame or a text as csv, prepare it, and return the manifest and the arrays."""

    def make(content, **changes):
        path = tmp_path / "rows.csv"
        write(content, path)
        manifest = table(directory, path, **changes).prepare()
        found, arrays = open_prepared(directory)
        assert found == manifest
        verify_prepared(directory, manifest)
        return manifest, arrays

    return make


def table(directory, train, **changes):
    return Table(**SETTINGS | {"dir": directory, "train": train} | changes)


def test_one_name_is_a_list_of_one(tmp_path):
    made = table(tmp_path, None, labels="click", funnel=False, exclude="id", categorical="shop")

    assert (made.labels, made.exclude, made.categorical) == (["click"], ["id"], ["shop"])


def write(content, path):
    """Write what a file of this name holds; bools as csv files of most tools have them."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif path.suffix == ".parquet":
        content.to_parquet(path)
    else:
        text = {True: "true", False: "false"}
        bools = {name: content[name].map(text) for name in content.select_dtypes(bool)}
        content.assign(**bools).to_csv(path, index=False)
    return path


def bytes_of(directory, pattern="*"):
    paths = (path for path in sorted(directory.rglob(pattern)) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def values_of(directory, arrays, manifest):
    """The raw texts that the indices of a split stand for."""
    columns = {}
    for column, field in enumerate(manifest.schema.categorical):
        stored = pl.read_parquet(directory / "vocabulary" / f"{field.name}.parquet")
        texts = dict(zip(stored["index"], stored["value"], strict=True))
        columns[field.name] = [texts.get(i) for i in arrays["categorical"][:, column].tolist()]
    return columns


def as_texts(column):
    """What pandas holds, as text; None where it is missing or no training row has it."""
    text = {True: "true", False: "false"}
    return [None if pd.isna(x) else text.get(x) if isinstance(x, bool) else str(x) for x in column]


def test_every_cell_is_that_of_the_table(prepared, directory, frame):
    manifest, arrays = prepared(frame)

    assert [field.name for field in manifest.schema.categorical] == ["city", "shop", "open"]
    assert manifest.schema.numerical == ("row", "item", "price")
    assert manifest.schema.labels == ("click", "conversion")
    assert sum(manifest.rows.values()) == ROWS
    for split in ("train", "test"):
        rows = frame.iloc[arrays[split]["numerical"][:, 0].astype(int)]
        for name, texts in values_of(directory, arrays[split], manifest).items():
            assert texts == as_texts(rows[name].tolist())
        assert manifest.missing[split] == {name: n for name, n in rows.isna().sum().items() if n}
        np.testing.assert_array_equal(arrays[split]["numerical"][:, 1], rows["item"])
        np.testing.assert_array_equal(arrays[split]["labels"], rows[["click", "conversion"]])


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_chunk", [64, 1 << 16])
def test_the_form_of_the_file_does_not_matter(tmp_path, frame, monkeypatch, rows_per_chunk):
    monkeypatch.setattr(tabular, "_ROWS_PER_CHUNK", rows_per_chunk)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40 * rows_per_chunk)
    csv = write(frame, tmp_path / "rows.csv")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(csv.read_bytes()))
    write(frame, tmp_path / "rows.parquet")
    (tmp_path / "parts").mkdir()
    for part, start in enumerate(range(0, ROWS, 70)):
        write(frame[start : start + 70], tmp_path / "parts" / f"part-{part}.parquet")
    (tmp_path / "parts" / "_SUCCESS").touch()

    settings = {"standardise": True, "group": "item", "split": "grouped"}
    found = []
    for number, name in enumerate(["rows.csv", "rows.csv.gz", "rows.parquet", "parts"]):
        directory = tmp_path / "data" / str(number)
        manifest = table(directory, tmp_path / name, **settings).prepare()
        arrays = bytes_of(directory, "*.npy") | bytes_of(directory, "*.parquet")
        found.append((arrays, manifest.transforms, manifest.missing, manifest.positives))

    assert len(found[0][0]) == 8 + 3
    assert all(one == found[0] for one in found)


def test_preparing_twice_gives_equal_bytes_that_name_no_folder(tmp_path, frame):
    path = write(frame, tmp_path / "rows.csv")
    folders = [tmp_path / "data" / name for name in ("first", "second")]

    for folder in folders:
        table(folder, path, standardise=True).prepare()

    assert bytes_of(folders[0]) == bytes_of(folders[1])
    assert str(tmp_path) not in (folders[0] / "schema.json").read_text()
    parameters = json.loads((folders[0] / "schema.json").read_text())["parameters"]
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert parameters["train"] == [["rows.csv", path.stat().st_size, checksum]]


def test_kinds_are_inferred_and_printed(prepared, frame, capsys):
    few, many = np.arange(ROWS) % 100, np.arange(ROWS) % 101
    zeros = pd.Series(few).map("{:03d}".format)
    added = frame.assign(few=few, many=many, zip=zeros, user=few, day=few, left=few)

    manifest, _ = prepared(added, exclude=["left"], group="user", time="day")

    names = [field.name for field in manifest.schema.categorical]
    assert names == ["city", "shop", "open", "few", "many", "zip"]
    assert manifest.schema.numerical == ("row", "item", "price")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for name, expected in {
        "many": "categorical whole numbers; data.numerical for a measurement",
        "zip": "categorical text",
        "open": "categorical boolean",
        "price": "numerical numbers with a fraction",
        "user": "group data.group",
        "click": "label data.labels",
        "left": "left out data.exclude",
        "300": "rows to write, about",
    }.items():
        assert expected in " ".join(lines[name].split())


def test_given_kinds_are_not_inferred(prepared, frame):
    first, _ = prepared(frame, categorical=["item"])
    second, _ = prepared(frame, numerical=["shop"])
    third, _ = prepared(frame, categorical=["item"], numerical=["shop"])

    names = [[field.name for field in m.schema.categorical] for m in (first, second, third)]
    assert names == [["item", "city", "shop", "open"], ["city", "open"], ["item"]]
    assert first.schema.numerical == ("row", "price")
    assert second.schema.numerical == ("shop", "row", "item", "price")
    assert third.schema.numerical == ("shop",)


def test_vocabularies_hold_the_values_that_are_frequent_in_the_training_rows(
    prepared, directory, frame
):
    changes = {"categorical": ["shop", "item"], "numerical": ["row"]}
    manifest, arrays = prepared(frame, **changes, min_count=2, test_share=0.5)

    rows = frame.iloc[arrays["train"]["numerical"][:, 0].astype(int)]
    for field in manifest.schema.categorical:
        stored = pl.read_parquet(directory / "vocabulary" / f"{field.name}.parquet")
        counts = rows[field.name].value_counts()
        often = counts.index[counts >= 2]
        assert stored["value"].to_list() == sorted(f"{value:g}" for value in often)
        assert stored["index"].to_list() == list(range(1, len(often) + 1))
        assert field.vocabulary_size == len(often) + 1


def test_unseen_values_of_a_second_file_have_index_zero(prepared, tmp_path, frame):
    other = frame.assign(city="Oslo", shop=[3, 5] * (ROWS // 2))
    test = write(other.sample(frac=1, axis=1, random_state=0), tmp_path / "later.parquet")

    manifest, arrays = prepared(frame, test=test)

    assert manifest.rows == {"train": ROWS, "test": ROWS}
    city, shop, _ = arrays["test"]["categorical"].T
    assert not city.any()
    assert shop.astype(bool).tolist() == [True, False] * (ROWS // 2)
    np.testing.assert_array_equal(arrays["train"]["numerical"][:, 0], frame["row"])
    np.testing.assert_array_equal(arrays["test"]["numerical"][:, 0], frame["row"])


@pytest.mark.parametrize(("fill", "strategy"), [("mean", "mean"), (-2.5, "constant")])
@pytest.mark.parametrize("standardise", [False, True])
def test_numbers_are_filled_and_standardised_as_sklearn_does(
    prepared, frame, fill, strategy, standardise
):
    frame["constant"] = 0.1
    manifest, arrays = prepared(frame, fill=fill, standardise=standardise, exclude=["row"])
    # Read before the second preparation takes the folder; its rows are drawn alike.
    stored = {split: of["numerical"].copy() for split, of in arrays.items()}
    _, numbered = prepared(frame, numerical=["row"], categorical=[])
    rows = {split: of["numerical"][:, 0].astype(int) for split, of in numbered.items()}

    names = list(manifest.schema.numerical)
    assert names == ["item", "price", "constant"]
    steps = [SimpleImputer(strategy=strategy, fill_value=None if fill == "mean" else fill)]
    pipeline = make_pipeline(*steps, *([StandardScaler()] if standardise else []))
    values = frame[names].to_numpy(float)
    pipeline.fit(values[rows["train"]])
    for split, numbers in rows.items():
        expected = pipeline.transform(values[numbers])
        np.testing.assert_allclose(stored[split], expected, rtol=1e-5, atol=1e-6)
        assert manifest.missing[split]["price"] == np.isnan(values[numbers, 1]).sum()
    recorded = manifest.transforms["price"]
    assert recorded["fill"] == pytest.approx(pipeline[0].statistics_[1], rel=1e-12)
    if standardise:
        assert recorded["shift"] == pytest.approx(pipeline[1].mean_[1], rel=1e-12)
        assert recorded["scale"] == pytest.approx(pipeline[1].scale_[1], rel=1e-12)
    else:
        assert (recorded["shift"], recorded["scale"]) == (0, 1)


@pytest.mark.parametrize("value", [5.0, 0.1, -1 / 3, 1e30])
def test_a_constant_column_is_stored_and_scored_as_0(prepared, directory, frame, value):
    frame = pd.concat([frame] * 20, ignore_index=True)  # over several blocks of the moments
    frame["constant"] = np.where(frame.index % 7 == 0, np.nan, value)
    settings = {"exclude": ["row"], "numerical": ["constant"], "categorical": ["city"]}
    manifest, arrays = prepared(frame, standardise=True, **settings)

    for split in ("train", "test"):
        assert not arrays[split]["numerical"].any()
    rows = pl.DataFrame({"city": None, "constant": [value, None]}, schema_overrides={"city": str})
    vocabularies = {"city": pl.read_parquet(directory / "vocabulary" / "city.parquet")["value"]}
    encoder = Encoder(manifest.schema, vocabularies, manifest.transforms)
    assert encoder.encode(rows, str).numerical.tolist() == [[0], [0]]


def test_numbers_without_gaps_are_stored_as_they_are(prepared, frame):
    manifest, arrays = prepared(frame[["item", "click", "conversion"]], fill=None)

    stored = np.concatenate([arrays[split]["numerical"] for split in ("train", "test")])
    assert sorted(stored[:, 0]) == sorted(frame["item"])
    assert manifest.transforms == {}


def test_the_seed_chooses_the_random_test_rows(prepared, frame):
    rows = [
        prepared(frame, test_share=0.3, test_seed=seed)[1]["test"]["numerical"][:, 0].copy()
        for seed in (0, 0, 1)
    ]

    assert [len(one) for one in rows] == [90, 90, 90]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert set(rows[0]) != set(rows[2])
    # Hypergeometric: 45 of the 90 are from the first half on average.
    assert abs(np.count_nonzero(rows[0] < ROWS / 2) - 45) < 5 * np.sqrt(90 * 0.25 * 0.7)


@pytest.mark.parametrize("text", [False, True])
def test_complete_groups_test(prepared, frame, text):
    users = np.random.default_rng(1).integers(-20, 20, ROWS)
    frame["user"] = [f"u{user}" for user in users] if text else users

    _, arrays = prepared(frame, group="user", split="grouped", test_share=0.25)

    groups = {split: set(arrays[split]["group"].tolist()) for split in ("train", "test")}
    assert not groups["train"] & groups["test"]
    assert (len(groups["train"]), len(groups["test"])) == (30, 10)
    numbering = {name: i for i, name in enumerate(sorted(set(frame["user"])), start=1)}
    for split in ("train", "test"):
        raw = frame["user"].iloc[arrays[split]["numerical"][:, 0].astype(int)]
        expected = raw.map(numbering) if text else raw
        np.testing.assert_array_equal(arrays[split]["group"], expected)


@pytest.mark.parametrize("text", [False, True])
def test_the_group_is_a_feature_too_if_categorical_names_it(
    prepared, directory, frame, text, capsys
):
    users = np.random.default_rng(1).integers(0, 40, ROWS)
    frame["user"] = [f"u{user}" for user in users] if text else users
    without, _ = prepared(frame, group="user")

    manifest, arrays = prepared(frame, group="user", categorical=["user"])

    names = [field.name for field in manifest.schema.categorical]
    assert names == ["user", *(field.name for field in without.schema.categorical)]
    assert manifest.schema.numerical == without.schema.numerical
    assert re.search(r"user +categorical +given", capsys.readouterr().out)
    for split in ("train", "test"):
        raw = frame["user"].iloc[arrays[split]["numerical"][:, 0].astype(int)]
        values = np.array(values_of(directory, arrays[split], manifest)["user"])
        known = values != None  # noqa: E711 - a test user without training rows
        np.testing.assert_array_equal(values[known], raw.astype(str)[known])
        assert known.all() or split == "test"
        numbering = {name: i for i, name in enumerate(sorted(set(frame["user"])), start=1)}
        np.testing.assert_array_equal(arrays[split]["group"], raw.map(numbering) if text else raw)


@pytest.mark.parametrize("split", ["random", "time"])
def test_a_further_test_table_is_encoded_as_the_test_table_is(
    prepared, directory, tmp_path, frame, split
):
    frame["day"] = np.random.default_rng(2).permutation(ROWS)
    more = frame.sample(120, random_state=1).assign(shop=lambda rows: rows["shop"] + 37)
    more = write(more, tmp_path / "more.csv")
    keys = {"split": split, "time": "day"}
    _, expected = prepared(frame, test=more, **keys)
    _, alone = prepared(frame, **keys)

    manifest, arrays = prepared(frame, tests={"random": more}, **keys)

    assert list(arrays) == ["test", "test_random", "train"]
    assert manifest.rows["test_random"] == 120
    assert manifest.missing["test_random"].keys() >= {"city", "price"}
    for stem, array in alone["test"].items():
        np.testing.assert_array_equal(arrays["test"][stem], array)
    np.testing.assert_array_equal(arrays["test_random"]["labels"], expected["test"]["labels"])
    raw = pd.read_csv(more).sort_values("day", kind="stable")
    np.testing.assert_allclose(arrays["test_random"]["numerical"][:, 0], raw["row"])
    known = values_of(directory, arrays["train"], manifest)
    found = values_of(directory, arrays["test_random"], manifest)
    for name in ("city", "shop"):
        texts = as_texts(raw[name].astype("Int64") if name == "shop" else raw[name])
        assert found[name] == [text if text in set(known[name]) else None for text in texts]


def test_a_set_with_other_further_tests_is_refused(directory, tmp_path, frame):
    train, more = (write(frame, tmp_path / f"{name}.csv") for name in ("rows", "more"))
    table(directory, train, tests={"random": more}).prepare()

    table(directory, train, tests={"random": more}).prepare_data()
    for tests in (None, {"other": more}, {"random": write(frame[:90], tmp_path / "fewer.csv")}):
        with pytest.raises(InputError, match="tests: other files or content"):
            table(directory, train, tests=tests).prepare_data()


def test_groups_of_two_files_are_numbered_together(prepared, tmp_path, frame):
    test = write(frame.assign(user=["b", "c", "a"] * 100), tmp_path / "test.csv")

    _, arrays = prepared(frame.assign(user=["b", "d", "b"] * 100), test=test, group="user")

    assert arrays["train"]["group"][:3].tolist() == [2, 4, 2]
    assert arrays["test"]["group"][:3].tolist() == [2, 3, 1]


TIMES = {
    "integer": lambda order: order // 3,
    "number": lambda order: order // 3 / 7,
    "date": lambda order: pd.Timestamp("2020-01-01") + pd.to_timedelta(order // 3, "D"),
    "moment": lambda order: pd.Timestamp("2020-01-01") + pd.to_timedelta(order // 3, "s") / 3,
}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("kind", TIMES)
def test_the_latest_rows_test_and_rows_lie_in_order_of_time(
    directory, tmp_path, frame, kind, suffix
):
    frame["time"] = TIMES[kind](np.random.default_rng(1).permutation(ROWS))
    path = write(frame, tmp_path / f"rows.{suffix}")

    manifest = table(directory, path, time="time", split="time", test_share=0.25).prepare()

    _, arrays = open_prepared(directory)
    expected = frame.sort_values("time", kind="stable")["row"].to_numpy()
    stored = [arrays[split]["numerical"][:, 0] for split in ("train", "test")]
    assert [len(rows) for rows in stored] == [225, 75]
    np.testing.assert_array_equal(np.concatenate(stored), expected)
    assert "time" not in (
        *manifest.schema.numerical,
        *(f.name for f in manifest.schema.categorical),
    )
    labels = frame.set_index("row")[["click", "conversion"]].loc[expected]
    found = np.concatenate([arrays[split]["labels"] for split in ("train", "test")])
    np.testing.assert_array_equal(found, labels)


def test_rows_of_two_files_lie_in_order_of_time(prepared, tmp_path, frame):
    frame["time"] = np.random.default_rng(1).permutation(ROWS)
    test = write(frame, tmp_path / "test.csv")

    _, arrays = prepared(frame, test=test, time="time")

    expected = frame.sort_values("time")["row"]
    for split in ("train", "test"):
        np.testing.assert_array_equal(arrays[split]["numerical"][:, 0], expected)


def test_labels_may_be_true_and_false(prepared, frame):
    reference = bytes_of_arrays(prepared(frame)[1])

    for labels in (frame["click"] == 1, (frame["click"] == 1).map({True: "TRUE", False: "False"})):
        assert bytes_of_arrays(prepared(frame.assign(click=labels))[1]) == reference


def bytes_of_arrays(arrays):
    return {
        (split, stem): array.tobytes() for split, of in arrays.items() for stem, array in of.items()
    }


def test_labels_without_a_funnel_are_independent(prepared, frame):
    frame["conversion"] = 1 - frame["click"]

    manifest, _ = prepared(frame, funnel=False)

    assert [task.name for task in manifest.schema.tasks] == ["click", "conversion"]


HEADER = "city,price,click\n"
LINES = [f"{'ab'[i % 2]},{i / 2 + 0.5},{i % 2}" for i in range(20)]
ONE_LABEL = {"labels": ["click"], "funnel": False}


def text_with(line, row):
    """The small table with another line; the header is line 1."""
    lines = [*LINES]
    lines[line - 2] = row
    return HEADER + "\n".join(lines) + "\n"


def test_quoted_cells_hold_commas_quotes_and_line_breaks(prepared, directory):
    odd = ['"x, y"', '"say ""no"""', '"two\nlines"', '"plain"']
    lines = [f"{cell},1.5,{i % 2}" for i in range(4) for cell in odd]

    manifest, _ = prepared(HEADER + "\n".join(lines), **ONE_LABEL, numerical=["price"])

    stored = pl.read_parquet(directory / "vocabulary" / "city.parquet")["value"].to_list()
    assert stored == ["plain", 'say "no"', "two\nlines", "x, y"]
    assert sum(manifest.rows.values()) == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text[:-1],
        lambda text: "\ufeff" + text,
        lambda text: text.replace("a,", '"a",'),
        lambda text: text.replace("city", '"city"'),
    ],
)
def test_other_spellings_of_a_csv_file_are_the_same_table(prepared, change):
    text = HEADER + "\n".join(LINES) + "\n"

    found = [bytes_of_arrays(prepared(t, **ONE_LABEL)[1]) for t in (text, change(text))]

    assert found[0] == found[1]


BAD_ROWS = [
    ("a,1.5", r"line 9: expected 3 values \(the row is truncated or malformed\), got 2"),
    ("a,1.5,1,", r"line 9: expected 3 values \(the row is truncated or malformed\), got 4"),
    ("", r"line 9: expected 3 values \(the row is truncated or malformed\), got 0"),
    ("a,1.5,2", r"line 9, column 'click': a label must be 0 or 1 \(or false, .* got '2'"),
    (
        "a,1.5,yes",
        r"line 9, column 'click': a label must .*set data.positive=VALUE for others\), got 'yes'",
    ),
    ("a,1.5,", "line 9, column 'click': a label must be 0 or 1 .* got nothing"),
    ("a,many,1", "line 9, column 'price': expected a number, got 'many'"),
    ("a,1 5,1", "line 9, column 'price': expected a number, got '1 5'"),
    ("a,inf,1", "line 9, column 'price': a number must be finite in 32 bits, got 'inf'"),
    ("a,-1e39,1", "line 9, column 'price': a number must be finite in 32 bits, got '-1e39'"),
    (
        "a,,1",
        r"line 9, column 'price': a number must be given \(set data.fill=NUMBER .* got nothing",
    ),
    ("a,NaN,1", r"line 9, column 'price': a number must be given .* got 'NaN'"),
]


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_and_leaves_nothing(
    directory, tmp_path, monkeypatch, row, message, quoted
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    text = text_with(9, row).replace("b,", '"b",' if quoted else "b,")
    path = write(text, tmp_path / "rows.csv")

    with pytest.raises(InputError, match=f"{path}, {message}.*Set data.on_error=skip to skip"):
        table(directory, path, **ONE_LABEL, numerical=["price"], fill=None).prepare()

    assert list(directory.parent.iterdir()) == []


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize("source_key", ["train", "test"])
def test_bad_rows_are_skipped_and_counted_on_demand(
    directory, tmp_path, monkeypatch, caplog, quoted, source_key
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    good = (HEADER + "\n".join(LINES) + "\n").replace("b,", '"b",' if quoted else "b,")
    lines = good.splitlines()
    for position, (row, _) in enumerate(BAD_ROWS):
        lines.insert(1 + 2 * position, row)
    paths = {"train": write(good, tmp_path / "train.csv"), "test": write(good, tmp_path / "t.csv")}
    settings = {**ONE_LABEL, "numerical": ["price"], "fill": None}
    table(directory, paths["train"], test=paths["test"], **settings).prepare()
    expected = bytes_of(directory, "*.npy")
    write("\n".join(lines), paths[source_key])

    with caplog.at_level(logging.WARNING):
        one = table(directory, paths["train"], test=paths["test"], on_error="skip", **settings)
        manifest = one.prepare()

    assert bytes_of(directory, "*.npy") == expected
    counts = {"train_rows_skipped": 0, "test_rows_skipped": 0}
    assert manifest.report == counts | {f"{source_key}_rows_skipped": len(BAD_ROWS)}
    assert sum(int(re.search(r"skipped (\d+) rows", m)[1]) for m in caplog.messages) == len(
        BAD_ROWS
    )
    assert (
        f"{paths[source_key]}, line 2: expected 3 values (the row is truncated or malformed), got 2"
        in "\n".join(caplog.messages)
    )


def test_a_split_by_rows_keeps_its_share_where_rows_are_skipped(prepared):
    text = HEADER + "\n".join(["a,1.5,7", *LINES * 10])

    manifest, _ = prepared(text, **ONE_LABEL, on_error="skip")

    assert manifest.report == {"train_rows_skipped": 1}
    assert sum(manifest.rows.values()) == 200
    assert manifest.rows["test"] in (39, 40)


def test_a_conversion_without_a_click_is_refused_or_dropped(prepared, frame, directory):
    orphans = [5, 77, 290]
    frame.loc[orphans, ["click", "conversion"]] = [0, 1]

    message = (
        r"line 7, column 'conversion': a conversion needs a click, each label of a funnel the one "
        r"before it "
        r"\(set data.conversion_without_click=drop to drop and count it, or =clear to count it as "
        r"none\), got '1'"
    )
    with pytest.raises(InputError, match=message):
        prepared(frame)
    manifest, arrays = prepared(frame, conversion_without_click="drop")

    rows = np.concatenate([arrays[split]["numerical"][:, 0] for split in ("train", "test")])
    assert sorted(rows - 0.5) == sorted(set(range(ROWS)) - set(orphans))
    assert manifest.report == {"train_conversions_without_click": 3}


def test_a_conversion_without_a_click_counts_as_none_if_it_is_cleared(prepared, frame):
    stages = np.random.default_rng(3).integers(0, 2, (ROWS, 3))
    frame[["click", "conversion", "refund"]] = stages
    keys = {"labels": ["click", "conversion", "refund"], "conversion_without_click": "clear"}

    manifest, arrays = prepared(frame, **keys)

    changed = 0
    for split in ("train", "test"):
        raw = stages[arrays[split]["numerical"][:, 0].astype(int)]
        wanted = [[a, a and b, a and b and c] for a, b, c in raw.tolist()]
        assert arrays[split]["labels"].tolist() == wanted
        changed += sum(row != new for row, new in zip(raw.tolist(), wanted, strict=True))
    assert manifest.rows == {"train": 240, "test": 60}
    assert manifest.report == {"train_conversions_without_click": changed}


@pytest.mark.parametrize(
    ("key", "cell", "message"),
    [
        ("group", None, "column 'user': a group must be given.* got nothing"),
        ("time", None, "column 'user': expected an integer, got nothing"),
    ],
)
def test_a_row_without_group_or_time_is_refused(prepared, frame, key, cell, message):
    users = pd.array(range(ROWS), dtype="Int64")
    users[3] = cell

    with pytest.raises(InputError, match=f"line 5, {message}"):
        prepared(frame.assign(user=users), **{key: "user"})


def test_rows_of_parquet_are_named_by_file_and_row(directory, tmp_path, frame):
    (tmp_path / "parts").mkdir()
    frame["click"] = frame["click"].astype(float)
    frame.loc[123, "click"] = 0.5
    for part, start in enumerate(range(0, ROWS, 100)):
        write(frame[start : start + 100], tmp_path / "parts" / f"{part}.parquet")

    with pytest.raises(InputError, match=r"parts/1\.parquet, row 24, column 'click': .* got 0\.5"):
        table(directory, tmp_path / "parts").prepare()


WRONG = "city,price,click\na,1.5,1\nb,2.5,0\n"
BAD_TABLES = {
    "twice": ("city,city,click\na,b,1\n", {}, "rows.csv names the column 'city' twice. Rename one"),
    "no name": (",city,click\n0,a,1\n", {}, "rows.csv: column 1 has no name. Name or delete it"),
    "empty": ("", {}, "rows.csv is empty. Download it again, or regenerate"),
    "no rows": ("city,click\n", {}, "rows.csv has no rows"),
    "no label": (
        WRONG,
        {"labels": ["buy"]},
        "rows.csv lacks the column 'buy' of data.labels; it has 'city', 'price', 'click'",
    ),
    "no feature": (WRONG, {"categorical": ["town"]}, "lacks the column 'town' of data.categorical"),
    "no excluded": (WRONG, {"exclude": ["town"]}, "lacks the column 'town' of data.exclude"),
    "no group": (WRONG, {"group": "user"}, "lacks the column 'user' of data.group"),
    "nothing left": (
        WRONG,
        {"exclude": ["city", "price"]},
        "rows.csv must have at least one feature column, got none",
    ),
    "constant": (
        "city,click\n" + "a,1\n" * 9,
        {},
        "the label click is 1 in all 7 training rows, so there is nothing to learn",
    ),
    "blank column": (
        "city,price,click\na,,1\nb,,0\n",
        {},
        "the column 'price' must have a value in some row, got none. Set data.exclude",
    ),
    "dates": (
        "city,day,click\na,2020-01-01,1\nb,2020-01-02,0\n",
        {},
        "the kind of the column 'day' cannot be inferred, got dates. Set data.exclude .* data.time",
    ),
    "no times": (
        WRONG,
        {"time": "city", "split": "time"},
        "data.time must be a column of numbers or dates, got 'city'",
    ),
    "slash": ("a/b,click\nx,1\ny,0\n", {}, "the categorical column 'a/b' must be a valid name"),
    "dot": (".a,click\nx,1\ny,0\n", {}, "the categorical column '.a' must be .* Rename it"),
    "open quote": (
        'city,click\na,1\n"b,0\nc,1\n',
        {},
        r"rows.csv cannot be read \(line 3: unexpected end of data\): it is damaged",
    ),
    "encoding": (b"city,click\na,1\n\xe9,0\n", {}, "rows.csv, line 3: the text is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_and_leaves_nothing(directory, tmp_path, case):
    content, settings, message = BAD_TABLES[case]
    path = write(content, tmp_path / "rows.csv")

    with pytest.raises(InputError, match=message):
        table(directory, path, **ONE_LABEL | settings).prepare()

    assert not any(directory.parent.glob("**/*"))


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.parquet"])
def test_a_file_that_was_cut_is_refused_and_leaves_nothing(directory, tmp_path, frame, name):
    path = write(frame, tmp_path / "rows.parquet")
    if name.endswith("gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(write(frame, tmp_path / "rows.csv").read_bytes()))
    path.write_bytes(path.read_bytes()[:-1000])

    message = rf"{path} (is truncated or damaged|cannot be read) \(.*\)[.:] "
    with pytest.raises(InputError, match=message):
        table(directory, path).prepare()

    assert not any(directory.parent.glob("**/*"))


def test_a_column_of_structs_is_refused_unless_it_is_excluded(directory, tmp_path):
    tags = [{"a": 1}, {"a": 2}] * 10
    content = pl.DataFrame({"tags": tags, "x": range(20), "click": [0, 1] * 10})
    content.write_parquet(tmp_path / "rows.parquet")

    with pytest.raises(InputError, match=r"column 'tags' is of type Struct.*\. Leave it out"):
        table(directory, tmp_path / "rows.parquet", **ONE_LABEL).prepare()
    table(directory, tmp_path / "rows.parquet", **ONE_LABEL, exclude=["tags"]).prepare()


@pytest.mark.parametrize("key", ["train", "test"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.csv", "data.{}: .*nowhere.csv is missing"),
        ("notes.txt", "data.{} must be a .csv, .tsv or .parquet file, .* or a folder .*notes.txt"),
        ("no*.csv", "data.{}: the pattern .*no\\*.csv matches no file"),
        ("folder", "data.{}: the folder .*folder has no .parquet files directly in it"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused(directory, tmp_path, frame, key, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").touch()
    paths = {"train": write(frame, tmp_path / "rows.csv"), key: tmp_path / name}

    with pytest.raises(InputError, match=message.format(key)):
        table(directory, **paths).prepare()


def test_parts_and_files_with_other_columns_are_refused(directory, tmp_path, frame):
    parts = tmp_path / "parts"
    parts.mkdir()
    write(frame, parts / "0.parquet")
    write(frame.drop(columns="shop"), parts / "1.parquet")
    less = write(frame.drop(columns="price"), tmp_path / "less.csv")

    with pytest.raises(InputError, match=r"1\.parquet and 0\.parquet differ in the columns 'shop'"):
        table(directory, parts).prepare()
    with pytest.raises(InputError, match=r"less\.csv lacks the column 'price' of the features"):
        table(directory, parts / "0.parquet", test=less).prepare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": 1}, r"data.labels must name columns, `data.labels=\[COLUMN,COLUMN\]`"),
        ({"exclude": [True]}, r"data.exclude must name columns, .* got \[True\]"),
        ({"group": 1.5}, r"data.group must name columns, .* got \[1.5\]"),
        ({"labels": ["click"]}, "a funnel must have at least two labels"),
        ({"labels": [], "funnel": False}, "independent labels must be at least one"),
        ({"labels": ["a", "a"]}, "'a' must have one role, got data.labels and data.labels"),
        (
            {"numerical": ["click"]},
            "'click' must have one role, got data.labels and data.numerical",
        ),
        (
            {"numerical": ["u"], "group": "u"},
            "'u' must have one role, got data.numerical and data.group",
        ),
        ({"tests": ["a.csv"]}, r"data.tests must be a mapping of names to tables, got \['a.csv'\]"),
        (
            {"tests": {"Random": "a.csv"}},
            "data.tests must have names of lower-case .* got 'Random'",
        ),
        ({"tests": {"random": 3}}, "data.tests.random must be"),
        ({"split": "grouped"}, "data.split=grouped needs a column. Set data.group=COLUMN"),
        ({"split": "time"}, "data.split=time needs a column. Set data.time=COLUMN"),
        ({"split": "last"}, "data.split must be one of random, grouped, time; got 'last'"),
        ({"test_share": 0}, "data.test_share must be above 0, got 0"),
        ({"test_share": 1}, r"data.test_share must be a number in \[0, 1\), got 1"),
        ({"test_seed": -1}, "data.test_seed must be an integer >= 0, got -1"),
        ({"min_count": 0}, "data.min_count must be an integer >= 1, got 0"),
        ({"fill": "median"}, "data.fill must be a number in .*, got 'median'"),
        ({"fill": np.inf}, "data.fill must be a number in .*, got inf"),
        ({"standardise": 1}, "data.standardise must be true or false, got 1"),
        ({"funnel": "yes"}, "data.funnel must be true or false, got 'yes'"),
        ({"on_error": "drop"}, "data.on_error must be one of refuse, skip; got 'drop'"),
        ({"conversion_without_click": "keep"}, "must be one of refuse, drop, clear; got 'keep'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        table("nowhere", None, **changes)


def test_without_a_table_the_remedy_is_named(directory):
    with pytest.raises(InputError, match=r"data.train and data.labels must be given.*`data.train="):
        table(directory, None).prepare()
    with pytest.raises(NotPreparedError, match=r"prepare data=table data.name=table data.train="):
        table(directory, None).prepare_data()

    assert not directory.parent.exists()


def test_training_prepares_a_table_and_then_finds_it(directory, tmp_path, frame):
    path = write(frame, tmp_path / "rows.csv")

    table(directory, path).prepare_data()
    before = (directory / "schema.json").stat()
    table(directory, path).prepare_data()
    path.unlink()
    found = table(directory, None, labels=None)
    found.prepare_data()
    found.setup()

    assert (directory / "schema.json").stat() == before
    assert sum(found.split_rows.values()) == ROWS


def test_a_prepared_table_of_other_settings_or_files_is_refused(directory, tmp_path, frame):
    path = write(frame, tmp_path / "rows.csv")
    table(directory, path).prepare_data()

    message = (
        rf"{directory} holds a table data set with different settings \(min_count: 1 there, "
        r"2 here\)\. Choose another data\.dir"
    )
    with pytest.raises(InputError, match=message):
        table(directory, path, min_count=2).prepare_data()
    write(frame[:-1], path)
    with pytest.raises(InputError, match=r"different settings \(train: other files or content\)"):
        table(directory, path).prepare_data()


@pytest.mark.skipif(not RECHUB.is_dir(), reason="the real sample rows are not at hand")
def test_every_cell_of_the_real_sample_of_torch_rechub_is_read(prepare, tmp_path):
    paths = {split: RECHUB / f"ali_ccp_{split}_sample.csv" for split in ("train", "test")}
    frames = {split: pd.read_csv(path) for split, path in paths.items()}
    values = [name for name in frames["train"].columns if name.startswith("D")]
    ids = [name for name in frames["train"].columns[2:] if name not in values]

    prepare(
        "data=table",
        f"data.dir={tmp_path / 'rechub'}",
        *(f"data.{split}={path}" for split, path in paths.items()),
        "data.labels=[click,purchase]",
        "data.funnel=true",
        "data.standardise=false",
        f"data.numerical=[{','.join(values)}]",
        f"data.categorical=[{','.join(repr(name) for name in ids)}]",
    )

    manifest, arrays = open_prepared(tmp_path / "rechub")
    assert (len(ids), len(values)) == (23, 8)
    assert manifest.rows == {"train": 100, "test": 50}
    for split, frame in frames.items():
        assert arrays[split]["labels"].tolist() == frame[["click", "purchase"]].to_numpy().tolist()
        expected = frame[values].to_numpy(np.float32)
        np.testing.assert_array_equal(arrays[split]["numerical"], expected)
        for column, name in enumerate(ids):
            path = tmp_path / "rechub" / "vocabulary" / f"{name}.parquet"
            index = {str(value): number for value, number in pl.read_parquet(path).rows()}
            found = [index.get(str(value), 0) for value in frame[name]]
            assert arrays[split]["categorical"][:, column].tolist() == found


@pytest.mark.skipif(not HILLSTROM.is_file(), reason="the real table is not at hand")
@pytest.mark.slow
def test_hillstrom_is_prepared_and_trained_on(prepare, train, tmp_path):
    keys = ["data=table", "data.name=hillstrom", f"data.dir={tmp_path / 'hillstrom'}"]
    prepare(
        *keys,
        f"data.train={HILLSTROM}",
        "data.labels=[visit,conversion]",
        "data.funnel=true",
        "data.exclude=[spend]",
    )

    folder = train(*keys, "data.batch_size=8192", "trainer.max_epochs=1")

    manifest, arrays = open_prepared(tmp_path / "hillstrom")
    frame = pd.read_csv(HILLSTROM)
    assert sum(manifest.rows.values()) == len(frame) == 64_000
    labels = np.concatenate([arrays[split]["labels"] for split in ("train", "test")])
    assert labels.sum(axis=0).tolist() == frame[["visit", "conversion"]].sum().tolist()
    names = {field.name: field.vocabulary_size - 1 for field in manifest.schema.categorical}
    texts = ["recency", "history_segment", "mens", "womens", "zip_code", "newbie", "channel"]
    assert names == frame[[*texts, "segment"]].nunique().to_dict()
    record = json.loads((folder / "result.json").read_text())
    assert record["counts"]["test/ctr"]["rows"] == 12_800
    assert record["metrics"]["test/ctr_auc"] > 0.5
