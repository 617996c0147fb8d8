"""Preparing AliExpress against a slow reading of the same files, cell by cell."""

import gzip
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from mtnrec.checks import InputError
from mtnrec.data.aliexpress import AliExpress
from mtnrec.data.preparation.aliexpress import CATEGORICAL, LABELS, NUMERICAL
from mtnrec.data.prepared import verify
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_prepared
from mtnrec.data.raw import blocks

COLUMNS = ["search_id", *CATEGORICAL, *NUMERICAL, *LABELS]
SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "aliexpress_sample_fuxictr"


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "data" / "nl"


@pytest.fixture
def raw_dir(tmp_path, write_aliexpress):
    return write_aliexpress(tmp_path / "raw")


def make(directory, raw_dir, **changes):
    loading = {
        "batch_size": 8,
        "validation_share": 0.2,
        "validation_split": "random",
        "split_seed": 0,
        "seed": 0,
        "verify": True,
    }
    own = {
        "name": "aliexpress_nl",
        "country": "nl",
        "dir": directory,
        "conversion_without_click": "refuse",
        "on_error": "refuse",
    }
    return AliExpress(raw_dir=raw_dir, **loading | own | changes)


def edit(path, line, **cells):
    """Put other text into cells of a line; the header is line 1."""
    lines = path.read_text().split("\n")
    row = lines[line - 1].split(",")
    for name, text in cells.items():
        row[COLUMNS.index(name)] = text
    lines[line - 1] = ",".join(row)
    path.write_text("\n".join(lines))


def read_slowly(path):
    """Every cell by Python's own parsing."""
    table = pd.read_csv(path, dtype=str)
    return {
        "categorical": np.array([[int(x) for x in table[name]] for name in CATEGORICAL]).T,
        "numerical": np.array([[float(x) for x in table[name]] for name in NUMERICAL], "f4").T,
        "labels": np.array([[int(x) for x in table[name]] for name in LABELS], "u1").T,
        "group": np.array([int(x) for x in table["search_id"]]),
    }


def assert_prepared_from(directory, raw_dir):
    """Compare the prepared set with the files; raw categorical values come back by their tables."""
    manifest, arrays = open_prepared(directory)
    verify_prepared(directory, manifest)
    raw = {split: read_slowly(raw_dir / f"{split}.csv") for split in ("train", "test")}
    for split, expected in raw.items():
        for stem in ("numerical", "labels", "group"):
            np.testing.assert_array_equal(arrays[split][stem], expected[stem], strict=True)
        for column, field in enumerate(manifest.schema.categorical):
            table = pl.read_parquet(directory / "vocabulary" / f"{field.name}.parquet")
            values = dict(zip(table["index"], table["value"], strict=True))
            seen = set(raw["train"]["categorical"][:, column].tolist())
            assert list(values.values()) == sorted(seen)
            assert field.vocabulary_size == len(seen) + 1
            decoded = [values.get(i) for i in arrays[split]["categorical"][:, column].tolist()]
            cells = expected["categorical"][:, column].tolist()
            assert decoded == [cell if cell in seen else None for cell in cells]
    return manifest


def test_a_raw_file_whose_content_changed_is_noticed_without_reading_it_each_time(
    directory, raw_dir, monkeypatch, caplog
):
    monkeypatch.setattr(verify, "_SETTLED_SECONDS", 0.0)  # the files are new
    make(directory, raw_dir).prepare()
    read = []
    sha256 = verify.sha256
    monkeypatch.setattr(verify, "sha256", lambda path: read.append(path.name) or sha256(path))
    for given in (raw_dir, None):
        make(directory, given, verify=False).prepare_data()
    assert (read, caplog.messages) == ([], [])

    size = (raw_dir / "test.csv").stat().st_size
    edit(raw_dir / "test.csv", 2, numerical_30="0.123456")
    assert (raw_dir / "test.csv").stat().st_size == size

    with pytest.raises(InputError, match=r"\(raw: other files or content\).* overwrite=true"):
        make(directory, raw_dir, verify=False).prepare_data()
    with pytest.raises(InputError, match=r"raw: other files .* Set overwrite=true"):
        make(directory, raw_dir).check_replaceable()
    for _ in range(2):
        make(directory, None, verify=False).prepare_data()
    assert read == ["test.csv"]
    assert [m.startswith(f"{raw_dir}/test.csv has changed since") for m in caplog.messages] == [
        True,
        True,
    ]
    make(directory, raw_dir).prepare()
    caplog.clear()
    for given in (raw_dir, None):
        make(directory, given, verify=False).prepare_data()
    shutil.rmtree(raw_dir)
    for given in (raw_dir, None):
        make(directory, given, verify=False).prepare_data()
    assert caplog.messages == []


@pytest.mark.parametrize("block_bytes", [5000, 1 << 23])
def test_every_cell_equals_that_of_the_files(directory, raw_dir, monkeypatch, block_bytes):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)

    written = make(directory, raw_dir).prepare()

    assert assert_prepared_from(directory, raw_dir) == written
    assert written.rows == {"train": 60, "test": 60}
    assert written.positives["train"] == {"click": 20, "conversion": 10}
    assert written.schema.numerical == NUMERICAL
    assert written.schema.labels == LABELS
    assert written.schema.funnel


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the real sample rows are not at hand")
def test_every_cell_of_the_real_sample_is_read(directory):
    make(directory, SAMPLE).prepare()

    manifest = assert_prepared_from(directory, SAMPLE)
    assert manifest.rows == {"train": 100, "test": 100}
    assert manifest.positives["train"]["click"] + manifest.positives["test"]["click"] == 9
    assert manifest.schema.categorical[0].vocabulary_size == 2  # constant within a country


def test_values_of_test_rows_alone_are_unseen(directory, raw_dir):
    edit(raw_dir / "test.csv", 4, categorical_7="777", categorical_8="-2147483648")

    make(directory, raw_dir).prepare()

    _, arrays = open_prepared(directory)
    assert arrays["test"]["categorical"][2, 6] == arrays["test"]["categorical"][2, 7] == 0
    assert_prepared_from(directory, raw_dir)


def test_an_odd_spelling_gives_the_same_number(directory, raw_dir):
    cells = {"numerical_1": "2.5e-1", "numerical_2": ".1", "numerical_3": "0.30000001192092896"}
    edit(raw_dir / "train.csv", 2, **cells, categorical_1="008", click="+1")

    make(directory, raw_dir).prepare()

    assert_prepared_from(directory, raw_dir)


def test_columns_may_come_in_any_order(directory, raw_dir, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    order = np.random.default_rng(0).permutation(len(COLUMNS))
    for path in raw_dir.iterdir():
        rows = [line.split(",") for line in path.read_text().splitlines()]
        lines = [",".join(row[column] for column in order) for row in rows]
        (mixed / path.name).write_text("\n".join(lines) + "\n")

    manifests = [make(directory, folder).prepare() for folder in (raw_dir, mixed)]

    assert manifests[0].checksums == manifests[1].checksums


def test_equal_files_give_equal_bytes(tmp_path, raw_dir):
    folders = [tmp_path / "data" / name for name in ("first", "second")]

    manifests = [make(folder, raw_dir).prepare() for folder in folders]

    assert manifests[0].checksum == manifests[1].checksum


def test_the_folder_does_not_name_the_machine(directory, raw_dir, tmp_path):
    make(directory, raw_dir).prepare()

    assert str(tmp_path) not in (directory / "schema.json").read_text()


def test_the_prepared_rows_feed_the_training(directory, raw_dir):
    datamodule = make(directory, raw_dir)
    datamodule.prepare()

    datamodule.prepare_data()
    datamodule.setup()

    batch = next(iter(datamodule.test_dataloader()))
    expected = read_slowly(raw_dir / "test.csv")
    np.testing.assert_array_equal(batch.numerical, expected["numerical"][:8])
    np.testing.assert_array_equal(batch.group, expected["group"][:8])


CHANGES = {
    "a column is missing": (
        lambda text: text.replace(",conversion", "", 1),
        r"train\.csv lacks the column 'conversion'",
    ),
    "a column is unknown": (
        lambda text: text.replace("conversion", "conversion,weight", 1),
        r"train\.csv has an unknown column 'weight'\. Delete it",
    ),
    "a column comes twice": (
        lambda text: text.replace("conversion", "conversion,click", 1),
        r"train\.csv names the column 'click' twice",
    ),
    "the file is empty": (lambda text: "", r"train\.csv is empty\. Download"),
    "there is only a header": (
        lambda text: text[: text.index("\n") + 1],
        r"train\.csv has a header but no rows",
    ),
    "a line is blank": (
        lambda text: text.replace("\n", "\n\n", 2).replace("\n\n", "\n", 1),
        r"train\.csv, line 3: expected 82 values .*, got 0",
    ),
    "the last line is blank": (
        lambda text: text + "\n",
        r"train\.csv, line 62: expected 82 values .*, got 0",
    ),
    "the file ends inside a row": (
        lambda text: text[:-6],
        r"train\.csv, line 61: expected 82 values .*, got 80",
    ),
    "the file ends before the last label": (
        lambda text: text[:-2],
        r"train\.csv, line 61: column 'conversion': expected an integer, got ''",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_file_is_refused_and_leaves_nothing(directory, raw_dir, change):
    edit_text, message = CHANGES[change]
    path = raw_dir / "train.csv"
    path.write_text(edit_text(path.read_text()))

    with pytest.raises(InputError, match=message):
        make(directory, raw_dir).prepare()

    assert list(directory.parent.iterdir()) == []


BAD_CELLS = [
    ("search_id", "abc", "column 'search_id': expected an integer, got 'abc'"),
    ("search_id", "", "column 'search_id': expected an integer, got ''"),
    ("categorical_3", "1.5", "column 'categorical_3': expected an integer, got '1.5'"),
    ("categorical_3", "2147483648", "column 'categorical_3': expected an integer, got '2147483648"),
    ("numerical_63", "zero", "column 'numerical_63': expected a number, got 'zero'"),
    ("numerical_9", "nan", "numerical_9 must be finite, got nan"),
    ("numerical_9", "inf", "numerical_9 must be finite, got inf"),
    ("numerical_9", "-inf", "numerical_9 must be finite, got -inf"),
    ("numerical_9", "1e400", "numerical_9 must be finite, got inf"),
    ("numerical_9", "1e39", r"numerical_9 must be finite, got 1e\+39"),
    ("click", "2", r"labels must be 0 or 1, got \[2 "),
    ("click", "-1", r"labels must be 0 or 1, got \[-1 "),
    ("click", "1.0", "column 'click': expected an integer, got '1.0'"),
    ("conversion", "3", r"labels must be 0 or 1, got \[\d 3\]"),
]


@pytest.mark.parametrize(("column", "text", "message"), BAD_CELLS)
def test_a_bad_cell_is_refused_and_leaves_nothing(directory, raw_dir, column, text, message):
    edit(raw_dir / "train.csv", 31, **{column: text})

    with pytest.raises(InputError, match=rf"{raw_dir}/train\.csv, line 31: {message}"):
        make(directory, raw_dir).prepare()

    assert list(directory.parent.iterdir()) == []


@pytest.mark.parametrize(("column", "text"), [("numerical_5", "zero"), ("click", "2")])
@pytest.mark.parametrize(("split", "line"), [("train", 2), ("train", 30), ("test", 61)])
def test_the_line_is_right_in_every_chunk(
    directory, raw_dir, monkeypatch, split, line, column, text
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    edit(raw_dir / f"{split}.csv", line, **{column: text})

    with pytest.raises(InputError, match=rf"{raw_dir}/{split}\.csv, line {line}:"):
        make(directory, raw_dir).prepare()

    assert list(directory.parent.iterdir()) == []


@pytest.mark.parametrize("line", [3, 40])
def test_a_conversion_without_a_click_is_refused(directory, raw_dir, monkeypatch, line):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    edit(raw_dir / "train.csv", line, click="0", conversion="1")

    message = (
        rf"train\.csv, line {line}: a conversion needs a click "
        r"\(set data\.conversion_without_click=drop to drop .* got \[0 1\]"
    )
    with pytest.raises(InputError, match=message):
        make(directory, raw_dir).prepare()

    assert list(directory.parent.iterdir()) == []


def test_conversions_without_a_click_are_dropped_and_counted_on_demand(
    directory, raw_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    orphans = {"train": [2, 30, 31], "test": [61]}
    kept = tmp_path / "kept"
    kept.mkdir()
    for split, lines in orphans.items():
        for line in lines:
            edit(
                raw_dir / f"{split}.csv",
                line,
                click="0",
                conversion="1",
                categorical_7=f"{500 + line}",
            )
        text = (raw_dir / f"{split}.csv").read_text().splitlines()
        rest = [row for line, row in enumerate(text, start=1) if line not in lines]
        (kept / f"{split}.csv").write_text("\n".join(rest) + "\n")

    make(directory, raw_dir, conversion_without_click="drop").prepare()

    # A dropped row teaches the vocabulary nothing, either.
    manifest = assert_prepared_from(directory, kept)
    assert manifest.rows == {"train": 57, "test": 59}
    assert manifest.report == {
        "train_conversions_without_click": 3,
        "test_conversions_without_click": 1,
        "train_rows_skipped": 0,
        "test_rows_skipped": 0,
    }


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_missing_file_is_refused_and_leaves_nothing(directory, raw_dir, name):
    (raw_dir / name).unlink()

    with pytest.raises(InputError, match=rf"{raw_dir} lacks {name} or \.csv\.gz"):
        make(directory, raw_dir).prepare()

    assert not directory.parent.exists()


def test_a_folder_that_does_not_exist_is_refused(directory, tmp_path):
    with pytest.raises(
        InputError, match=f"must be a folder with the raw files, got {tmp_path}/nowhere"
    ):
        make(directory, tmp_path / "nowhere").prepare()


def test_without_raw_dir_the_remedy_is_named(directory):
    message = r"data\.raw_dir is not given\. .*`data\.raw_dir=DIR`.*tianchi\.aliyun\.com"
    with pytest.raises(InputError, match=message):
        make(directory, None).prepare()

    assert not directory.parent.exists()


def test_a_failed_preparation_keeps_the_earlier_one(directory, raw_dir):
    make(directory, raw_dir).prepare()
    edit(raw_dir / "test.csv", 61, click="2")

    with pytest.raises(InputError, match="labels must be 0 or 1"):
        make(directory, raw_dir).prepare()

    manifest, _ = open_prepared(directory)
    verify_prepared(directory, manifest)


def test_the_raw_folder_cannot_hold_the_prepared_set(raw_dir):
    before = sorted(raw_dir.iterdir())

    with pytest.raises(InputError, match="exists but is not a prepared data set"):
        make(raw_dir, raw_dir).prepare()

    assert sorted(raw_dir.iterdir()) == before


def test_an_unknown_rule_for_conversions_is_refused(directory):
    message = r"data\.conversion_without_click must be one of refuse, drop; got 'keep'"
    with pytest.raises(InputError, match=message):
        make(directory, None, conversion_without_click="keep")


def test_the_country_files_of_the_configuration_fit_the_reader(make_datamodule, raw_dir):
    datamodule = make_datamodule("aliexpress_nl", f"raw_dir={raw_dir}")

    manifest = datamodule.prepare()

    assert manifest.source == "aliexpress_nl"
    assert assert_prepared_from(datamodule.dir, raw_dir) == manifest


RAW_STEMS = [f"nl_{table}_{split}" for split in ("train", "test") for table in ("user", "item")]
ITEM_CATEGORICAL = (19, 34, 35, 36, 40, 41, 42)  # columns of the item file, from 1


def draw_users(rng, ids):
    """Lines of a user file: id, 7 categorical, 23 numerical, 2 categorical."""
    lines = []
    for search in ids:
        categorical = [str(value) for value in rng.integers(0, 9, 9)]
        numerical = [f"{value:.6f}" for value in rng.random(23)]
        lines.append([str(search), *categorical[:7], *numerical, *categorical[7:]])
    return lines


def draw_items(rng, ids):
    """Lines of an item file: id, 47 features, label."""
    lines = []
    for number, search in enumerate(ids):
        features = [
            str(rng.integers(0, 9)) if column in ITEM_CATEGORICAL else f"{rng.random():.6f}"
            for column in range(2, 49)
        ]
        lines.append([str(search), *features, str(number % 3)])
    return lines


def join_slowly(users, items):
    """The joined rows, a pair at a time, with the columns of MTReclib."""
    rows = []
    for user in users:
        for item in items:
            if user[0] == item[0]:
                item_cells = dict(enumerate(item, start=1))
                categorical = [*user[1:8], *user[31:33]]
                categorical += [item_cells[column] for column in ITEM_CATEGORICAL]
                numerical = [*user[8:31]]
                numerical += [
                    item_cells[column] for column in range(2, 49) if column not in ITEM_CATEGORICAL
                ]
                label = int(item[-1])
                cells = [user[0], *categorical, *numerical, int(label >= 1), int(label == 2)]
                rows.append([str(cell) for cell in cells])
    return rows


@pytest.fixture
def forms(tmp_path):
    """The same log in every form: a folder for each."""
    folders = {name: tmp_path / name for name in ("csv", "zips", "outer", "mtreclib", "gzip")}
    for folder in folders.values():
        folder.mkdir()
    for number, split in enumerate(("train", "test")):
        rng = np.random.default_rng(number)
        # Ids restart in each split; some have no item, some items no search, one search is twice.
        searches = [*rng.permutation(30)[:20], 7, 900]
        users = draw_users(rng, searches)
        items = draw_items(rng, np.sort(rng.integers(0, 30, 90)))
        if split == "test":
            items = [items[place] for place in rng.permutation(len(items))]
        for table, lines in (("user", users), ("item", items)):
            text = "".join(",".join(line) + "\n" for line in lines)
            (folders["csv"] / f"nl_{table}_{split}.csv").write_text(text)
        rows = [COLUMNS, *join_slowly(users, items)]
        text = "".join(",".join(row) + "\n" for row in rows)
        (folders["mtreclib"] / f"{split}.csv").write_text(text)
        with gzip.open(folders["gzip"] / f"{split}.csv.gz", "wt") as file:
            file.write(text)
    pack_raw(folders["csv"], folders["zips"], folders["outer"])
    return folders


def pack_raw(csv, zips, outer):
    for stem in RAW_STEMS:
        with zipfile.ZipFile(zips / f"{stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(csv / f"{stem}.csv", f"{stem}.csv")
    with zipfile.ZipFile(
        outer / "AliExpress_NL_datasets.zip", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        for stem in RAW_STEMS:
            archive.write(zips / f"{stem}.zip", f"aliexpress_NL_datasets/{stem}.zip")


@pytest.mark.parametrize("block_bytes", [2000, 1 << 23])
def test_every_form_of_the_same_log_gives_the_same_bytes(forms, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)

    manifests = {
        name: make(tmp_path / "data" / name, folder).prepare() for name, folder in forms.items()
    }

    expected = assert_prepared_from(tmp_path / "data" / "mtreclib", forms["mtreclib"])
    assert expected.rows["train"] > 40
    for manifest in manifests.values():
        assert manifest.checksums == expected.checksums
    assert manifests["csv"].report == manifests["outer"].report
    assert manifests["csv"].report["train_items_without_search"] > 0
    assert manifests["csv"].report["train_searches_without_item"] > 0


def test_the_real_rows_in_their_raw_form_would_give_the_same_bytes(forms, directory, tmp_path):
    """Upper-case folders and names are found, three folders down."""
    deep = tmp_path / "deep" / "a" / "NL"
    deep.mkdir(parents=True)
    for stem in RAW_STEMS:
        (forms["csv"] / f"{stem}.csv").rename(deep / f"{stem.upper()}.CSV")

    manifest = make(directory, tmp_path / "deep").prepare()

    assert manifest.checksums == make(tmp_path / "other", forms["zips"]).prepare().checksums


RAW_DEFECTS = [
    ("nl_user_train", 5, 3, "x", "column 'categorical_3': expected an integer, got 'x'"),
    ("nl_user_train", 5, 8, "nan", "numerical_1 must be finite, got nan"),
    ("nl_user_test", 5, 0, "1.5", "column 'search_id': expected an integer, got '1.5'"),
    ("nl_item_train", 9, 48, "3", r"the label must be 0 \(impression\), 1 .*, got 3"),
    ("nl_item_train", 9, 48, "-1", r"the label must be .*, got -1"),
    ("nl_item_train", 9, 1, "inf", "numerical_24 must be finite, got inf"),
    ("nl_item_train", 9, 18, "0.5", "column 'categorical_10': expected an integer, got '0.5'"),
    ("nl_item_test", 9, 48, "1,0", r"expected 49 values \(the row is truncated .*\), got 50"),
]


@pytest.mark.parametrize(("stem", "line", "column", "cell", "message"), RAW_DEFECTS)
def test_a_bad_raw_row_is_refused_with_its_line_or_skipped(
    forms, directory, stem, line, column, cell, message
):
    path = forms["csv"] / f"{stem}.csv"
    rows = [text.split(",") for text in path.read_text().splitlines()]
    rows[line - 1][column] = cell
    path.write_text("".join(",".join(row) + "\n" for row in rows))

    with pytest.raises(
        InputError, match=rf"{path}, line {line}: {message}\. Set data.on_error=skip"
    ):
        make(directory, forms["csv"]).prepare()
    assert list(directory.parent.iterdir()) == []

    manifest = make(directory, forms["csv"], on_error="skip").prepare()
    split = stem.rpartition("_")[2]
    assert manifest.report[f"{split}_rows_skipped"] == 1
    del rows[line - 1]
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    assert (
        make(directory.with_name("without"), forms["csv"]).prepare().checksums == manifest.checksums
    )


@pytest.mark.parametrize("form", ["zips", "outer"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "is truncated or damaged"),
        ("corrupt", "is truncated or damaged"),
        ("extra", "once each, got 'notes.txt'"),
        ("climbs", "whose path climbs out of the folder"),
        ("lacks", "lacks nl_"),
    ],
)
def test_a_bad_zip_is_refused_and_leaves_nothing(forms, directory, form, damage, message):
    path = sorted(forms[form].iterdir())[0]
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "corrupt":
        path.write_bytes(data[:200] + bytes(byte ^ 0x55 for byte in data[200:260]) + data[260:])
    elif damage == "lacks":
        with zipfile.ZipFile(path, "w"):
            pass
    else:
        name = {"extra": "notes.txt", "climbs": "../../nl_item_train.csv"}[damage]
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "x")

    with pytest.raises(InputError, match=f"{path}.*{message}"):
        make(directory, forms[form]).prepare()

    assert not directory.exists()
    assert not directory.parent.exists() or list(directory.parent.iterdir()) == []


def test_a_log_in_two_forms_is_refused(forms, directory):
    (forms["csv"] / "aliexpress_nl_datasets.zip").write_bytes(b"")

    message = r"several forms \(aliexpress_nl_datasets\.zip, nl_user_train\.csv\)\. Delete all"
    with pytest.raises(InputError, match=message):
        make(directory, forms["csv"]).prepare()


def test_a_file_in_two_forms_is_refused(forms, directory):
    (forms["csv"] / "nl_user_train.zip").write_bytes(b"")

    with pytest.raises(InputError, match=r"hold nl_user_train\.csv or nl_user_train\.zip 2 times"):
        make(directory, forms["csv"]).prepare()


@pytest.mark.parametrize("stem", RAW_STEMS)
def test_a_missing_raw_file_is_named(forms, directory, stem):
    (forms["zips"] / f"{stem}.zip").unlink()

    with pytest.raises(InputError, match=rf"lacks {stem}\.zip or \.csv"):
        make(directory, forms["zips"]).prepare()


def test_files_of_another_country_are_not_taken(forms, directory):
    with pytest.raises(InputError, match=r"holds none of aliexpress_es_datasets\.zip"):
        make(directory, forms["zips"], country="es").prepare()


def test_an_encrypted_zip_is_refused(forms, directory):
    path = forms["zips"] / "nl_user_train.zip"
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[6] |= 1  # the flag of the local header, and of the directory
    data[central + 8] |= 1
    path.write_bytes(data)

    with pytest.raises(InputError, match=r"is encrypted\. Unpack it yourself"):
        make(directory, forms["zips"]).prepare()


def test_a_row_that_breaks_two_rules_is_skipped_and_counted_once(forms, directory, raw_dir):
    path = forms["csv"] / "nl_item_train.csv"
    rows = [text.split(",") for text in path.read_text().splitlines()]
    rows[8][48], rows[8][1] = "7", "inf"
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    edit(raw_dir / "train.csv", 5, click="0", conversion="1", numerical_3="nan")

    raw = make(directory, forms["csv"], on_error="skip").prepare()
    joined = make(directory.with_name("joined"), raw_dir, on_error="skip").prepare()

    assert raw.report["train_rows_skipped"] == joined.report["train_rows_skipped"] == 1
    assert joined.rows["train"] == 59


@pytest.mark.parametrize("kept", [-8, 400])
def test_a_truncated_gzip_file_is_refused_and_leaves_nothing(forms, directory, kept):
    path = forms["gzip"] / "test.csv.gz"
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(InputError, match=f"{path} is truncated or damaged"):
        make(directory, forms["gzip"]).prepare()

    assert not directory.parent.exists()
