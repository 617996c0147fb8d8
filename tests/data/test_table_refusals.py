"""What a table may not hold, and settings that a prepared set was not made with."""

import gzip
import logging
import os

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from mtnrec.checks import InputError
from mtnrec.data.prepared import verify
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.raw import tabular
from mtnrec.data.table import Table

ROWS = 240
SETTINGS = {"labels": ["click"], "standardise": False}


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "shop": rng.choice(list("abc"), ROWS),
            "price": rng.permutation(ROWS) + 0.25,
            "click": np.arange(ROWS) % 2,
        }
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "mine"


def prepare(train, folder, **settings):
    table = Table(train=train, dir=folder, **SETTINGS | settings)
    manifest = table.prepare()
    return manifest, open_prepared(folder)[1]


def prices(arrays):
    return np.concatenate([arrays[split]["numerical"][:, 0] for split in ("train", "test")])


# Kinds


@pytest.mark.parametrize("carrier", ["csv", "parquet", "frame"])
@pytest.mark.parametrize("name", ["id", "uuid"])
def test_a_row_id_is_refused_with_the_remedy(frame, folder, tmp_path, carrier, name):
    frame["id"] = np.arange(ROWS)
    frame["uuid"] = frame["id"].map("u{}".format)
    train = frame.drop(columns={"id", "uuid"} - {name})
    if carrier != "frame":
        path = tmp_path / f"rows.{carrier}"
        getattr(train, f"to_{carrier}")(path, index=False)
        train = path

    message = (
        rf"'{name}' must not have as many values as rows, .* got 240\. Set data.exclude=\[{name}\]"
    )
    with pytest.raises(InputError, match=message):
        prepare(train, folder)
    prepare(train, folder, exclude=[name])
    manifest, _ = prepare(train, folder, categorical=[name])

    assert [field.name for field in manifest.schema.categorical] == [name, "shop"]


@pytest.mark.parametrize(("dtype", "largest"), [("float64", 2**53), ("float32", 2**24)])
@pytest.mark.parametrize("role", ["inferred", "categorical", "group"])
def test_ids_in_floats_that_cannot_hold_them_are_refused(frame, folder, dtype, largest, role):
    settings = {} if role == "inferred" else {role: "user" if role == "group" else ["user"]}
    frame["user"] = (largest + np.arange(ROWS) // 2).astype(dtype)

    with pytest.raises(InputError, match=r"'user' must hold its ids as integers or texts, .*"):
        prepare(frame, folder, **settings)

    frame["user"] = (largest - 1 - np.arange(ROWS) // 2).astype(dtype)
    prepare(frame, folder, **settings)


def test_a_measurement_in_large_floats_is_accepted(frame, folder):
    frame["cents"] = 2.0**53 + 2 * np.arange(ROWS)

    manifest, _ = prepare(frame, folder, numerical=["cents", "price"])

    assert "cents" in manifest.schema.numerical


def test_integers_are_categories_whatever_stores_them_unless_said_otherwise(frame, folder):
    frame["user"] = np.arange(ROWS) // 2
    as_floats = frame.assign(user=frame["user"].where(frame.index > 3).astype(float))

    for train in (frame, as_floats, as_floats.astype({"user": "Int64"})):
        manifest, _ = prepare(train, folder)
        assert [field.name for field in manifest.schema.categorical] == ["shop", "user"]
    manifest, _ = prepare(frame, folder, numerical=["user"])

    assert manifest.schema.numerical == ("user", "price")


@pytest.mark.parametrize("word", ["NULL", r"\N", "5 ", "1_000"])
def test_a_word_in_a_column_of_numbers_is_refused_with_its_line(folder, tmp_path, word):
    path = tmp_path / "rows.csv"
    lines = [f"{word if row == 30 else row / 10},{row % 2}" for row in range(60)]
    path.write_text("price,click\n" + "\n".join(lines))

    message = r"rows.csv, line 32, column 'price': expected a number, as (59|60) of 60 cells seem"
    with pytest.raises(InputError, match=message):
        prepare(path, folder)
    manifest, _ = prepare(path, folder, categorical=["price"])

    assert manifest.schema.categorical[0].vocabulary_size > 40


def test_a_word_in_a_column_of_dates_is_refused_with_its_line(frame, folder):
    frame["day"] = ["2024-01-01"] * 100 + ["unknown"] + ["2024-01-02"] * 139

    for settings in ({}, {"time": "day"}):
        with pytest.raises(InputError, match="row 101, column 'day': expected a date, as 239 of"):
            prepare(frame, folder, **settings)


@pytest.mark.parametrize("bad", ["2024-01-01 25:00", "01/02/2024"])
def test_a_date_that_is_not_read_names_the_forms(frame, folder, bad):
    frame["day"] = ["2024-01-01"] * 239 + [bad]

    with pytest.raises(InputError, match="expected a date"):
        prepare(frame, folder, time="day")


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Rome"])
def test_times_with_a_zone_are_read_as_moments(frame, folder, tmp_path, zone):
    # Over the change of the clocks, so that the order of the texts is not that of time.
    moments = pd.date_range("2024-10-26 20:00", periods=ROWS, freq="20min", tz="UTC")
    frame["t"] = moments.tz_convert(zone)[np.random.default_rng(1).permutation(ROWS)]
    frame.to_csv(tmp_path / "rows.csv", index=False)

    _, arrays = prepare(tmp_path / "rows.csv", folder, time="t", split="time")

    np.testing.assert_array_equal(prices(arrays), frame.sort_values("t")["price"])


# Labels


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (["0.0", "1.0"], None),
        (["False", "TRUE"], None),
        (["no", "yes"], "yes"),
        (["No", "YES"], "yes"),
        (["-1", "1"], 1),
        (["2", "4.0"], [4, 5]),
    ],
)
def test_labels_have_the_value_that_is_positive(frame, folder, tmp_path, labels, positive):
    expected = prepare(frame, folder)[1]["train"]["labels"].copy()
    frame["click"] = [labels[value] for value in frame["click"]]
    frame.to_csv(tmp_path / "rows.csv", index=False)

    for train in (frame, tmp_path / "rows.csv"):
        _, arrays = prepare(train, folder, positive=positive)
        np.testing.assert_array_equal(arrays["train"]["labels"], expected)


def test_a_third_value_of_a_label_is_refused_unless_positives_are_a_list(frame, folder):
    frame["click"] = np.where(frame["click"] == 1, "yes", "no")
    frame.loc[7, "click"] = "y"

    with pytest.raises(InputError, match=r"'click' must have one value besides .*got 'no', 'y'"):
        prepare(frame, folder, positive="yes")
    manifest, _ = prepare(frame, folder, positive=["yes"])
    frame.loc[9, "click"] = None
    with pytest.raises(InputError, match="row 10, column 'click': a label must be given, got noth"):
        prepare(frame, folder, positive=["yes"])

    assert sum(counts["click"] for counts in manifest.positives.values()) == ROWS / 2 - 1


# Forms of files


def in_form(frame, path, separator, decimal):
    frame.to_csv(path, index=False, sep=separator, decimal=decimal)
    return path


@pytest.mark.parametrize(
    ("name", "separator", "decimal"),
    [
        ("rows.csv", ";", ","),
        ("rows.csv", ";", "."),
        ("rows.csv", "\t", "."),
        ("rows.csv", "|", "."),
        ("rows.tsv", "\t", ","),
    ],
)
def test_separator_and_decimal_sign_are_inferred_and_printed(
    frame, folder, tmp_path, capsys, name, separator, decimal
):
    expected = prices(prepare(frame, folder)[1]).copy()
    path = in_form(frame, tmp_path / name, separator, decimal)

    _, inferred = prepare(path, folder)
    assert f"{name}: separator {separator!r}, decimal sign {decimal!r}" in capsys.readouterr().out
    np.testing.assert_array_equal(prices(inferred), expected)
    _, given = prepare(path, folder, separator=separator, decimal=decimal)

    np.testing.assert_array_equal(prices(given), expected)


@pytest.mark.parametrize(
    ("cells", "decimal"),
    [
        (["0,125", "0,250"], ","),
        (["1234,567", "2345,678"], ","),
        (["1,5", "1,250"], ","),
        (["1,250", "12,500"], "."),  # may be thousands
    ],
)
def test_three_digits_after_a_comma_are_a_fraction_unless_they_may_be_thousands(
    tmp_path, cells, decimal
):
    path = tmp_path / "rows.csv"
    path.write_text("price;click\n" + "".join(f"{cell};1\n" for cell in cells))

    assert tabular.FileSource("table", path).dialect == (";", decimal)


@pytest.mark.parametrize("spelling", ["${}", "{} €", "{}%", "1 {}00.5", "{}\u00a0000"])
def test_numbers_that_only_people_read_are_refused_with_their_line(folder, tmp_path, spelling):
    cells = [spelling.format(number) for number in range(1, 10)]
    text = "price,click\n" + "".join(f"{cell},{i % 2}\n" for i, cell in enumerate(cells))
    (tmp_path / "rows.csv").write_text(text)

    with pytest.raises(InputError, match=r"line 2, column 'price': expected a number, as 9 of 9 "):
        prepare(tmp_path / "rows.csv", folder)


def test_an_infinite_time_is_refused_with_its_row(folder):
    times = [1.5, 2.5, float("inf"), 3.5] * 20
    rows = pd.DataFrame({"t": times, "price": np.arange(80) / 2, "click": [0, 1] * 40})

    with pytest.raises(InputError, match="row 3, column 't': expected a number, got inf"):
        prepare(rows, folder, time="t")


@pytest.mark.parametrize("name", ["__index_level_0__", "Unnamed: 0", "Unnamed: 0.1"])
def test_a_column_named_as_pandas_names_its_index_is_left_out(folder, tmp_path, name):
    rows = pd.DataFrame({name: range(80), "price": np.arange(80) / 2, "click": [0, 1] * 40})
    rows.to_csv(tmp_path / "rows.csv", index=False)

    manifest, _ = prepare(tmp_path / "rows.csv", folder)

    assert manifest.schema.numerical == ("price",)
    assert manifest.schema.categorical == ()


def test_quoted_numbers_with_a_decimal_comma_are_refused_with_the_remedy(frame, folder, tmp_path):
    path = in_form(frame, tmp_path / "rows.csv", ",", ",")

    with pytest.raises(InputError, match=r"line 2, column 'price': expected .* set data.decimal"):
        prepare(path, folder)
    _, arrays = prepare(path, folder, decimal=",")

    assert sorted(prices(arrays)) == sorted(frame["price"])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.zst", ".tsv.zst"])
def test_several_files_of_a_pattern_are_one_table(frame, folder, tmp_path, suffix):
    for part in range(3):
        rows = frame[part * 80 : (part + 1) * 80]
        text = rows.to_csv(index=False, sep="\t" if "tsv" in suffix else ",").encode()
        if suffix.endswith(".gz"):
            text = gzip.compress(text)
        if suffix.endswith(".zst"):
            text = pa.compress(text, "zstd", asbytes=True)
        (tmp_path / f"part-{part}{suffix}").write_bytes(text)

    _, arrays = prepare(str(tmp_path / f"part-*{suffix}"), folder)

    assert sorted(prices(arrays)) == sorted(frame["price"])


def test_a_cut_zst_file_is_refused(frame, folder, tmp_path):
    path = tmp_path / "rows.csv.zst"
    path.write_bytes(pa.compress(frame.to_csv(index=False).encode(), "zstd", asbytes=True)[:-20])

    with pytest.raises(InputError, match=r"rows\.csv\.zst (is truncated|cannot be read)"):
        prepare(path, folder)


def test_blank_lines_at_the_end_are_ignored(frame, folder, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    for end in ("", "\n", "\r\n\r\n\n"):
        path.write_text(frame.to_csv(index=False) + end, newline="")
        assert len(prices(prepare(path, folder)[1])) == ROWS
    path.write_text(frame.to_csv(index=False) + "\n\na,1.5,1\n")

    with pytest.raises(InputError, match="line 242: expected 3 values"):
        prepare(path, folder)


# pandas' index


@pytest.mark.parametrize("name", [None, "user"])
def test_the_index_of_pandas_is_not_a_feature(frame, folder, tmp_path, name):
    shuffled = frame.sample(frac=1, random_state=0).rename_axis(name)
    shuffled.to_parquet(tmp_path / "rows.parquet")
    shuffled.rename_axis(None).to_csv(tmp_path / "first.csv")
    pd.read_csv(tmp_path / "first.csv").to_csv(tmp_path / "rows.csv", index=False)
    stored = pl.read_parquet(tmp_path / "rows.parquet")
    tables = [tmp_path / "rows.parquet", tmp_path / "rows.csv", shuffled]
    tables += [pa.Table.from_pandas(shuffled), *([stored] if name is None else [])]

    for train in tables:
        manifest, _ = prepare(train, folder)
        assert [field.name for field in manifest.schema.categorical] == ["shop"]
        assert manifest.schema.numerical == ("price",)


def test_a_named_index_can_be_the_group(frame, folder, tmp_path):
    frame.set_index(pd.Index(np.arange(ROWS) // 4, name="user")).to_parquet(tmp_path / "r.parquet")

    _, arrays = prepare(tmp_path / "r.parquet", folder, group="user")

    assert set(arrays["train"]["group"]) <= set(range(ROWS // 4))


# Numbers


def test_numbers_are_standardised_by_default(frame, folder):
    Table(train=frame, labels=["click"], dir=folder).prepare()

    assert abs(open_prepared(folder)[1]["train"]["numerical"].mean()) < 1e-6


@pytest.mark.filterwarnings("error")
def test_a_test_value_that_overflows_after_the_transform_is_refused_with_its_line(
    folder, tmp_path, frame
):
    later = frame.copy()
    frame["price"] /= 1000
    later.loc[5, "price"] = 3.4028234663852886e38
    later.to_csv(tmp_path / "test.csv", index=False)
    settings = {"test": tmp_path / "test.csv", "standardise": True}

    message = r"test\.csv, line 7, column 'price': a number must be finite in 32 bits, also after"
    with pytest.raises(InputError, match=message):
        prepare(frame, folder, **settings)
    manifest, _ = prepare(frame, folder, **settings, on_error="skip")

    assert manifest.report["test_rows_skipped"] == 1
    assert manifest.rows["test"] == ROWS - 1


def test_a_column_of_which_no_test_value_is_known_is_reported(frame, folder, caplog):
    with caplog.at_level(logging.WARNING):
        prepare(frame, folder, test=frame.assign(shop="new"))

    assert "no test value of the column 'shop' occurs in the training rows" in caplog.messages


# Lists


@pytest.mark.parametrize("weighted", [False, True])
def test_lists_are_multi_valued_fields(frame, folder, tmp_path, weighted):
    tags = [[], [3, 7], [7.0], None, [3, 3, 9]] * (ROWS // 5)
    weights = [[], [0.5, 2.0], [1.0], None, [1.0, 2.0, 4.0]] * (ROWS // 5)
    columns = {"tags": tags} | ({"tags_weights": weights} if weighted else {})
    rows = pl.from_pandas(frame).with_columns(**{k: pl.Series(v) for k, v in columns.items()})
    rows.write_parquet(tmp_path / "rows.parquet")

    for train in (tmp_path / "rows.parquet", rows):
        manifest, arrays = prepare(train, folder, time="price")

        assert [(f.name, f.vocabulary_size) for f in manifest.schema.multivalued] == [("tags", 4)]
        assert manifest.missing["train"]["tags"] + manifest.missing["test"]["tags"] == ROWS * 2 / 5
        for of in arrays.values():
            offsets, tokens = of["bags/tags/offsets"], of["bags/tags/tokens"]
            for bag in of["bag"][:, 0]:
                found = tokens[offsets[bag] : offsets[bag + 1]].tolist()
                assert found in ([], [1, 2], [2], [1, 1, 3])
                if weighted and len(found) == 3:
                    weight = of["bags/tags/weights"][offsets[bag] : offsets[bag + 1]]
                    assert weight.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": [[1, None]]}, "column 'tags': a list must not hold missing values"),
        ({"tags": [["a", ""]]}, "column 'tags': a list must not hold missing values"),
        ({"tags_weights": [[1.0]]}, "column 'tags_weights': expected as many weights as tags"),
        ({"tags_weights": [[1.0, float("inf")]]}, "a weight must be finite in 32 bits"),
    ],
)
def test_a_bad_list_is_refused_with_its_row_or_skipped(frame, folder, change, message):
    cells = {"tags": [["a", "b"]] * ROWS, "tags_weights": [[1.0, 2.0]] * ROWS}
    rows = pl.from_pandas(frame).with_columns(**{k: pl.Series(v) for k, v in cells.items()})
    bad = {name: [*cells[name][:9], *change.get(name, [cells[name][9]]), *cells[name][10:]]
           for name in cells}  # fmt: skip
    if change.get("tags") == [[1, None]]:
        bad["tags"][9] = ["a", None]
    rows = rows.with_columns(**{name: pl.Series(values) for name, values in bad.items()})

    with pytest.raises(InputError, match=f"row 10, .*{message}"):
        prepare(rows, folder)
    manifest, arrays = prepare(rows, folder, on_error="skip")

    assert sum(manifest.rows.values()) == ROWS - 1
    assert set(arrays["train"]["bags/tags/weights"]) == {1, 2}


# Names that YAML reads as numbers


def test_names_that_are_read_as_numbers_are_found_or_the_remedy_is_named(frame, folder):
    frame["109_14"] = np.arange(ROWS)

    manifest, _ = prepare(frame, folder, exclude=[10914])
    assert "109_14" in frame
    assert len(manifest.schema.categorical) == 1
    for name in (1000.0, True):
        with pytest.raises(InputError, match=r"data.exclude must name .* Quote a name .*\['1e3'\]"):
            Table(train=frame, labels=["click"], exclude=[name])


# Settings and content


def test_a_given_setting_that_differs_from_the_prepared_set_is_refused(frame, folder):
    prepare(frame, folder, min_count=2)

    Table(dir=folder).prepare_data()
    Table(dir=folder, **SETTINGS, min_count=2).prepare_data()
    for settings in (
        {"standardise": True},  # the default, but given
        {"labels": ["click", "buy"]},
        {"min_count": 1},
        {"positive": "yes"},
        {"group": "shop"},
    ):
        (key,) = settings
        with pytest.raises(InputError, match=rf"different settings \({key}: .* there, .* here\)"):
            Table(dir=folder, **settings).prepare_data()
    with pytest.raises(InputError, match=r"data.test must come with data.train"):
        Table(dir=folder, test=frame)


def test_the_settings_used_are_those_of_the_prepared_set(frame, folder):
    prepare(frame, folder, min_count=2)

    used = Table(dir=folder).settings_used()

    assert (used["labels"], used["min_count"], used["standardise"]) == (["click"], 2, False)
    assert "train" not in used


@pytest.mark.slow
def test_a_command_records_the_settings_of_the_set_and_refuses_others(
    frame, tmp_path, prepare_command, train, monkeypatch
):
    frame.to_csv(tmp_path / "rows.csv", index=False)
    keys = ["data=table", "data.name=mine", f"data_root={tmp_path}/data"]
    prepare_command(*keys, f"data.train={tmp_path}/rows.csv", "data.labels=[click]",
                    "data.standardise=false")  # fmt: skip
    rest = ["model=shared_bottom", "monitor=val/click_auc", "trainer.max_epochs=1"]

    folder = train(*keys, *rest, model="shared_bottom")
    record = pd.read_json(folder / "result.json", typ="series")
    assert record["config"]["data"]["standardise"] is False
    assert record["config"]["data"]["labels"] == ["click"]
    with pytest.raises(SystemExit, match=r"standardise: False there, True here"):
        train(*keys, *rest, "data.standardise=true", model="shared_bottom")
    with pytest.raises(SystemExit, match=r"\(standardise: .*\)\. Set overwrite=true to replace it"):
        prepare_command(*keys, f"data.train={tmp_path}/rows.csv", "data.labels=[click]")
    prepare_command(*keys, f"data.train={tmp_path}/rows.csv", "data.labels=[click]",
                    "overwrite=true")  # fmt: skip


@pytest.fixture
def prepare_command(prepare):
    return prepare


def test_a_raw_file_with_other_content_of_the_same_size_is_noticed(
    frame, folder, tmp_path, monkeypatch
):
    path = tmp_path / "rows.csv"
    frame.to_csv(path, index=False)
    hashed = []
    original = verify.sha256
    monkeypatch.setattr(verify, "sha256", lambda file: hashed.append(file) or original(file))
    old = path.stat().st_mtime - 10
    os.utime(path, (old, old))
    monkeypatch.setattr(verify, "_SETTLED_SECONDS", 0.0)

    Table(train=path, dir=folder, **SETTINGS).prepare_data()
    Table(train=path, dir=folder, **SETTINGS).prepare_data()
    before = hashed.count(path)
    Table(train=path, dir=folder, **SETTINGS).prepare_data()
    assert hashed.count(path) == before  # unchanged: from the note
    frame["click"] = 1 - frame["click"]
    frame.to_csv(path, index=False)
    os.utime(path, (old, old))

    with pytest.raises(InputError, match=r"\(train: other files or content\)"):
        Table(train=path, dir=folder, **SETTINGS).prepare_data()


def test_an_absurd_number_of_blank_lines_is_refused(tmp_path, folder, frame, monkeypatch):
    monkeypatch.setattr(tabular, "_MOST_BLANKS", 100)
    path = tmp_path / "rows.csv"
    path.write_text(frame.to_csv(index=False) + "\n" * 200)

    with pytest.raises(InputError, match="line 242: expected 3 values"):
        prepare(path, folder)
