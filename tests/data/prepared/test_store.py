"""The prepared format: what is written is read again, and what is damaged is refused."""

import copy
import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnrec.checks import InputError
from mtnrec.data.prepared import verify
from mtnrec.data.prepared import writer as writer_module
from mtnrec.data.prepared.manifest import Manifest, NotPreparedError
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_once, verify_prepared
from mtnrec.data.prepared.vocabulary import Vocabulary
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.schema import CategoricalField, Schema

SCHEMA = Schema(
    (CategoricalField("shop", 4), CategoricalField("brand", 9), CategoricalField("age", 3)),
    ("price", "width"),
    ("click", "conversion"),
    funnel=True,
)


MANIFEST = Manifest(
    source="tiny",
    parameters={"seed": 0},
    schema=SCHEMA,
    rows={"train": 11, "test": 5},
    positives={"train": {"click": 3}},
    missing={"train": {}, "test": {"price": 1}},
    transforms={"price": {"fill": 0.0, "shift": 1.0, "scale": 2.0}},
    report={"dropped": 3},
    checksums={"train/labels.npy": "00"},
)


def draw(rows, *, schema=SCHEMA, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [field.vocabulary_size for field in schema.categorical]
    return {
        "categorical": rng.integers(0, sizes, (rows, len(sizes)), dtype=np.int32),
        "numerical": rng.random((rows, len(schema.numerical)), dtype=np.float32),
        "labels": rng.integers(0, 2, (rows, len(schema.labels)), dtype=np.uint8),
        "group": rng.integers(0, 9, rows),
        "probabilities": rng.random((rows, len(schema.labels))),
    }


def write(directory, splits, *, schema=SCHEMA, chunk=4):
    with write_prepared(directory, tuple(splits)) as writer:
        for split, arrays in splits.items():
            for start in range(0, max(len(arrays["labels"]), 1), chunk):
                part = {stem: array[start : start + chunk] for stem, array in arrays.items()}
                writer.append(split, part)
        Vocabulary(np.array([3], np.int32)).write(writer.directory, "shop")
        return writer.finish(
            source="tiny", parameters={"seed": 0}, schema=schema, report={"dropped": 3}
        )


def write_default(directory, *, seed=0):
    return write(directory, {"train": draw(11, seed=seed), "test": draw(5, seed=seed + 1)})


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def rewrite_schema(directory, change):
    path = directory / "schema.json"
    entries = json.loads(path.read_text())
    del entries["checksum"]  # which would differ
    change(entries)
    path.write_text(json.dumps(entries))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The only entry of its parent."""
    return tmp_path / "sets" / "tiny"


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_written_set_is_read_back(directory, chunk):
    splits = {"train": draw(11), "test": draw(5, seed=1)}

    written = write(directory, splits, chunk=chunk)
    manifest, arrays = open_prepared(directory)

    assert manifest == written
    assert manifest.schema == SCHEMA
    assert manifest.rows == {"train": 11, "test": 5}
    for split, expected in splits.items():
        assert arrays[split].keys() == expected.keys()
        for stem, array in expected.items():
            np.testing.assert_array_equal(arrays[split][stem], array, strict=True)
        click, conversion = (int(column.sum()) for column in expected["labels"].T)
        assert manifest.positives[split] == {"click": click, "conversion": conversion}
    assert manifest.report == {"dropped": 3}


def test_numpy_reads_the_files(directory):
    splits = {"train": draw(11), "test": draw(5, seed=1)}

    write(directory, splits)

    for stem, array in splits["train"].items():
        loaded = np.load(directory / "train" / f"{stem}.npy", allow_pickle=False)
        np.testing.assert_array_equal(loaded, array, strict=True)


@pytest.mark.parametrize(("features", "rows"), [((), 11), (("price", "width"), 0), ((), 0)])
def test_no_numerical_features_and_no_rows_are_arrays_too(directory, features, rows):
    schema = Schema(SCHEMA.categorical, features, SCHEMA.labels, funnel=True)
    splits = {"train": draw(11, schema=schema), "test": draw(rows, schema=schema)}

    write(directory, splits, schema=schema)
    manifest, arrays = open_prepared(directory)
    verify_prepared(directory, manifest)

    assert arrays["test"]["numerical"].shape == (rows, len(features))
    np.testing.assert_array_equal(arrays["test"]["group"], splits["test"]["group"])


def test_arrays_are_mapped_and_cannot_be_changed(directory):
    write_default(directory)

    _, arrays = open_prepared(directory)

    for split in arrays.values():
        assert all(isinstance(array, np.memmap) for array in split.values())
    with pytest.raises(ValueError, match="read-only"):
        arrays["train"]["labels"][0] = 1


def test_groups_and_probabilities_are_optional(directory):
    splits = {split: draw(6) for split in ("train", "test")}
    for arrays in splits.values():
        del arrays["group"], arrays["probabilities"]

    write(directory, splits)

    assert open_prepared(directory)[1]["train"].keys() == {"categorical", "numerical", "labels"}


def test_equal_preparations_give_equal_bytes(tmp_path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))

    manifests = [write_default(first), write_default(second), write_default(other, seed=5)]

    assert files(first) == files(second)
    assert manifests[0].checksum == manifests[1].checksum != manifests[2].checksum


def test_the_order_of_the_settings_does_not_change_the_checksum(directory):
    manifest = write_default(directory)

    one, other = (
        dataclasses.replace(manifest, parameters=settings)
        for settings in ({"rows": 3, "seed": 0}, {"seed": 0, "rows": 3})
    )

    assert one.checksum == other.checksum


def test_the_checksum_covers_every_file_and_setting(directory):
    manifest = write_default(directory)
    text = manifest.to_json()

    assert set(manifest.checksums) == set(files(directory)) - {"schema.json"}
    for entry in [*manifest.checksums.values(), "seed", "brand", "tiny", "dropped"]:
        changed = Manifest.from_json(text.replace(entry, entry[::-1]).encode(), directory)
        assert changed.checksum != manifest.checksum


@pytest.mark.parametrize("exists", [False, True])
def test_an_absent_set_is_named(directory, exists):
    if exists:
        directory.mkdir(parents=True)

    with pytest.raises(NotPreparedError, match=f"there is no prepared data set in {directory}"):
        open_prepared(directory)


DAMAGES = {
    "missing": (lambda path, array: path.unlink(), "is missing"),
    "truncated": (
        lambda path, array: path.write_bytes(path.read_bytes()[:-1]),
        "has 259 bytes, but its header says 260",
    ),
    "longer": (
        lambda path, array: path.write_bytes(path.read_bytes() + b"x"),
        "has 261 bytes, but its header says 260",
    ),
    "cut in its header": (
        lambda path, array: path.write_bytes(path.read_bytes()[:60]),
        "is not an npy file",
    ),
    "empty": (lambda path, array: path.write_bytes(b""), "is not an npy file"),
    "text": (lambda path, array: path.write_text("1,2,3\n" * 50), "is not an npy file"),
    "of another type": (
        lambda path, array: np.save(path, array.astype(np.int64)),
        r"holds int64 \(11, 3\), but its schema says int32 \(11, 3\)",
    ),
    "of another byte order": (
        lambda path, array: np.save(path, array.astype(">i4")),
        r"holds >i4 \(11, 3\), but its schema says int32 \(11, 3\)",
    ),
    "short of rows": (
        lambda path, array: np.save(path, array[:10]),
        r"holds int32 \(10, 3\), but its schema says int32 \(11, 3\)",
    ),
    "short of columns": (
        lambda path, array: np.save(path, array[:, :2]),
        r"holds int32 \(11, 2\), but its schema says int32 \(11, 3\)",
    ),
    "flat": (
        lambda path, array: np.save(path, array.ravel()),
        r"holds int32 \(33,\), but its schema says int32 \(11, 3\)",
    ),
    "by column": (
        lambda path, array: np.save(path, np.asfortranarray(array)),
        r"holds int32 \(11, 3\) by column, but its schema says int32 \(11, 3\)",
    ),
    "a pickle": (
        lambda path, array: np.save(path, array.astype(object), allow_pickle=True),
        r"holds object \(11, 3\), but its schema says int32 \(11, 3\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_refused(directory, damage):
    write_default(directory)
    path = directory / "train" / "categorical.npy"
    change, message = DAMAGES[damage]

    change(path, np.load(path))

    with pytest.raises(InputError, match=rf"{path} {message}.*\. Prepare the data set again"):
        open_prepared(directory)


def test_no_byte_of_a_header_leads_to_another_error_or_to_other_rows(directory):
    write_default(directory)
    path = directory / "train" / "categorical.npy"
    whole, expected = path.read_bytes(), np.load(path)

    for position in range(128):
        for byte in {*b"('"} - {whole[position]}:
            path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            try:
                _, arrays = open_prepared(directory)
            except InputError:
                continue
            np.testing.assert_array_equal(arrays["train"]["categorical"], expected)


@pytest.mark.parametrize("name", ["train/labels.npy", "test/group.npy", "vocabulary/shop.parquet"])
def test_a_flipped_byte_is_found_by_its_checksum(directory, name):
    manifest = write_default(directory)
    path = directory / name
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1

    verify_prepared(directory, manifest)
    path.write_bytes(damaged)

    with pytest.raises(InputError, match=f"{path} has SHA-256 .* was changed or damaged"):
        verify_prepared(directory, manifest)


def test_a_missing_vocabulary_is_found(directory):
    manifest = write_default(directory)
    path = directory / "vocabulary" / "shop.parquet"

    path.unlink()

    with pytest.raises(InputError, match=rf"{path} is missing\. Prepare the data set again"):
        verify_prepared(directory, manifest)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"7", b'"text"', b"{}", b"\xff{}", b'{"rows": {}}']
)
def test_a_file_that_is_not_a_schema_is_refused(directory, text):
    write_default(directory)
    path = directory / "schema.json"

    path.write_bytes(text)

    with pytest.raises(InputError, match=f"{path} is not the schema of a prepared.*mtnrec.prepare"):
        open_prepared(directory)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_refused(directory, version):
    write_default(directory)

    rewrite_schema(directory, lambda entries: entries.update(format_version=version))

    message = rf"format version {version!r}, but this version of mtnrec reads 2\. Prepare the data"
    with pytest.raises(InputError, match=message):
        open_prepared(directory)


@pytest.mark.parametrize(
    "entry",
    [
        *("source", "parameters", "schema", "rows", "positives", "report", "checksums"),
        *("missing", "transforms", "schema/multivalued"),
        *("schema/categorical", "schema/numerical", "schema/labels", "schema/funnel"),
        *("schema/categorical/1/name", "schema/categorical/1/vocabulary_size"),
    ],
)
def test_a_schema_that_lacks_an_entry_is_refused(directory, entry):
    write_default(directory)
    *parents, last = entry.split("/")

    def remove(entries):
        for name in parents:
            entries = entries[int(name) if name.isdigit() else name]
        del entries[last]

    rewrite_schema(directory, remove)

    with pytest.raises(InputError, match=f"schema.json is damaged .*{last}.*mtnrec.prepare"):
        open_prepared(directory)


def test_each_flipped_bit_of_a_schema_is_found_or_changes_nothing(directory):
    expected = write_default(directory)
    path = directory / "schema.json"
    text = path.read_bytes()
    for place in range(len(text)):
        damaged = bytearray(text)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)

        try:
            found, _ = open_prepared(directory)
        except InputError:
            continue
        assert found == expected  # for example a space that became another


def test_a_changed_scale_is_named_by_the_checksum(directory):
    write_default(directory)
    path = directory / "schema.json"
    path.write_text(path.read_text().replace('"dropped": 3', '"dropped": 4'))

    with pytest.raises(
        InputError, match=r"schema.json is damaged or was changed: its checksum differs .*Prepare"
    ):
        open_prepared(directory)


def test_a_schema_without_a_checksum_is_read_with_one_warning(directory, caplog, monkeypatch):
    expected = write_default(directory)
    rewrite_schema(directory, lambda entries: None)
    monkeypatch.chdir(directory.parent)

    for folder in (directory, directory, Path(directory.name)):
        assert open_prepared(folder)[0] == expected

    (warning,) = caplog.messages
    assert warning.startswith(f"{directory / 'schema.json'} has no checksum, since an earlier")


def test_an_unknown_entry_is_refused(directory):
    write_default(directory)

    rewrite_schema(directory, lambda entries: entries.update(colour="red"))

    with pytest.raises(InputError, match=r"schema\.json is damaged .*colour"):
        open_prepared(directory)


def test_a_schema_that_lists_no_labels_is_refused(directory):
    write_default(directory)

    rewrite_schema(directory, lambda entries: entries["checksums"].pop("train/labels.npy"))

    with pytest.raises(InputError, match=r"lists no train/labels\.npy\. Prepare"):
        open_prepared(directory)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format_version": 2, "format_version": 2}',
        b'{"format_version": 2, "source": NaN}',
        b'{"format_version": 2, "source": 1e400}',
        b'{"format_version": 2, "source": "\\udc80"}',
        b'{"format_version": 2, "rows": ' + b"9" * 5000 + b"}",
    ],
)
def test_json_that_no_preparation_writes_is_refused(directory, text):
    write_default(directory)
    (directory / "schema.json").write_bytes(text)

    with pytest.raises(InputError, match=r"is not the schema of a prepared data set\. Prepare"):
        open_prepared(directory)


SIZES = [10**18, 10**12, -1, 1.5, 11.0, "11", True, None, [11]]
ABSURD = {
    **{f"rows {size!r}": ("rows", lambda e, n=size: e["rows"].update(train=n)) for size in SIZES},
    **{
        f"vocabulary {size!r}": (
            "vocabulary size of 'brand' must be an integer from 1 to 2147483648",
            lambda e, n=size: e["schema"]["categorical"][1].update(vocabulary_size=n),
        )
        for size in [*SIZES, 0]
    },
    "no training rows": ("rows", lambda e: e["rows"].pop("train")),
    "a list of rows": ("has no attribute 'keys'", lambda e: e.update(rows=[11, 5])),
    "a number as source": ("source", lambda e: e.update(source=3)),
    "positives": ("positives", lambda e: e["positives"]["train"].update(click=-3)),
    "missing": ("missing", lambda e: e.update(missing={})),
    "report": ("report", lambda e: e["report"].update(dropped=0.5)),
    "a scale of 0": (
        "transforms",
        lambda e: e.update(transforms={"price": {"shift": 0, "scale": 0}}),
    ),
    "a huge shift": (
        "transforms",
        lambda e: e.update(transforms={"price": {"shift": 10**400, "scale": 1}}),
    ),
    "a path upwards": ("checksums", lambda e: e["checksums"].update({"../labels.npy": "0"})),
    "a split upwards": (
        "checksums",
        lambda e: (e["rows"].update({"..": 11}), e["checksums"].update({"../x.npy": "0"})),
    ),
    "an absolute path": ("checksums", lambda e: e["checksums"].update({"/etc/passwd": "0"})),
    "a field upwards": (
        "must be a valid name for its vocabulary file",
        lambda e: e["schema"]["categorical"][0].update(name="../shop"),
    ),
    "a field twice": (
        "must have unique names",
        lambda e: e["schema"]["categorical"][0].update(name="brand"),
    ),
    "a number as label": (
        "must have unique names",
        lambda e: e["schema"].update(labels=[1, "click"]),
    ),
    "countless labels": (
        "must be at most 10,000 each, got 20,000",
        lambda e: e["schema"].update(labels=[str(n) for n in range(20_000)], funnel=False),
    ),
    "funnel": ("funnel must be true or false", lambda e: e["schema"].update(funnel=2)),
}


@pytest.mark.parametrize("case", ABSURD)
def test_a_schema_with_an_absurd_entry_is_refused(directory, case):
    message, change = ABSURD[case]
    write_default(directory)

    rewrite_schema(directory, change)

    if case in ("rows 1000000000000", "rows 1000000000000000000"):
        message = r"says 1,000,.*,000 rows, which take 8 bytes of memory each"
    with pytest.raises(InputError, match=rf"schema.json .*{message}.*\. Prepare"):
        open_prepared(directory)


def test_a_schema_of_a_gigabyte_is_refused_unread(directory):
    write_default(directory)
    with (directory / "schema.json").open("r+b") as file:
        file.truncate(1 << 30)

    with pytest.raises(InputError, match="has more than 16,777,216 bytes, so it is not a schema"):
        open_prepared(directory)


ENTRIES = st.sampled_from(
    [None, True, -1, 0, 2, 1.5, 10**12, 10**30, "", "x", "../x", "a\0b", [], {}, [[]], {"": 1}]
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(path=st.lists(st.integers(0, 8), max_size=4), entry=ENTRIES, name=st.none() | st.text())
def test_no_entry_of_a_schema_leads_to_another_error(path, entry, name):
    entries = json.loads(MANIFEST.to_json())
    place = entries
    for step in path:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = keys[step % len(keys)]
        if isinstance(place[key], dict | list) and step:
            place = place[key]
        elif name is None or isinstance(place, list):
            place[key] = copy.deepcopy(entry)
        else:
            place[name] = place.pop(key)
    text = json.dumps(entries).encode()

    try:
        manifest = Manifest.from_json(text, Path("schema.json"))
    except InputError:
        return
    assert Manifest.from_json(manifest.to_json().encode(), Path("schema.json")) == manifest


@pytest.mark.parametrize(
    ("stem", "row", "value", "message"),
    [
        ("categorical", (3, 1), 9, "column 2 that is not from 0 to 8"),
        ("categorical", (3, 2), -1, "column 3 that is not from 0 to 2"),
        ("labels", (10, 0), 2, "column 1 that is not from 0 to 1"),
        ("bag", (4, 1), 5, "column 2 that is not from 0 to 4"),
        ("bags/shops/tokens", 0, 30, "column 1 that is not from 0 to 29"),
        ("bags/brands/offsets", 1, 99, "offsets do not ascend from 0"),
        ("bags/brands/offsets", 0, 1, "offsets do not ascend from 0"),
    ],
)
def test_a_value_out_of_its_range_is_found_though_the_checksums_are_right(
    directory, write_tiny, stem, row, value, message
):
    manifest = write_tiny(directory, multivalued=True)
    if stem == "categorical":
        manifest = write_default(directory)
    name = f"train/{stem}.npy"
    array = np.load(directory / name)

    array[row] = value
    np.save(directory / name, array)
    manifest.checksums[name] = verify.sha256(directory / name)

    with pytest.raises(InputError, match=rf"{message}\. Prepare the data set again"):
        verify_prepared(directory, manifest)


def open_and_verify(directory, manifest):
    open_prepared(directory)
    verify_prepared(directory, manifest)


@pytest.mark.parametrize("name", ["schema.json", "train/labels.npy", "vocabulary/shop.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_a_path_that_is_not_a_file_counts_as_missing(directory, name, kind):
    manifest = write_default(directory)
    path = directory / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)

    with pytest.raises(InputError, match=r"is missing|there is no prepared"):
        open_and_verify(directory, manifest)


@pytest.mark.skipif(sys.platform != "linux", reason="a file that opens and cannot be read")
@pytest.mark.parametrize("name", ["schema.json", "train/labels.npy", "vocabulary/shop.parquet"])
def test_a_file_that_cannot_be_read_is_named(directory, name):
    manifest = write_default(directory)
    (directory / name).unlink()
    (directory / name).symlink_to("/proc/self/mem")

    with pytest.raises(InputError, match=rf"{name} .*Input/output error"):
        open_and_verify(directory, manifest)


def test_a_set_and_its_files_may_be_links(directory, tmp_path):
    write_default(directory)
    elsewhere = tmp_path / "elsewhere.npy"
    (directory / "train" / "labels.npy").rename(elsewhere)
    (directory / "train" / "labels.npy").symlink_to(elsewhere)
    link = tmp_path / "link"
    link.symlink_to(directory)

    manifest, arrays = open_prepared(link)
    verify_prepared(link, manifest)

    assert arrays["train"]["labels"].shape == (11, 2)


def write_until(directory, progress, error):
    with write_prepared(directory, ("train",)) as writer:
        if progress != "nothing":
            writer.append("train", draw(1000))
        if progress == "everything":
            writer.finish(source="tiny", parameters={}, schema=SCHEMA, report={})
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("progress", ["nothing", "arrays", "everything"])
def test_an_exception_leaves_nothing(directory, progress, error):
    with pytest.raises(error):
        write_until(directory, progress, error)

    assert list(directory.parent.iterdir()) == []


def test_a_full_disk_leaves_nothing(directory):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(InputError, match=r"the disk of .* is full .*choose another data\.dir"):
            write(directory, {"train": draw(20_000)}, chunk=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(directory.parent.iterdir()) == []


@pytest.mark.parametrize("progress", ["nothing", "arrays", "everything"])
def test_a_failed_rewrite_keeps_the_earlier_set(directory, progress):
    write_default(directory)
    before = files(directory)

    with pytest.raises(RuntimeError):
        write_until(directory, progress, RuntimeError)

    assert files(directory) == before
    assert list(directory.parent.iterdir()) == [directory]


def test_a_new_set_replaces_an_earlier_one(directory):
    write_default(directory)
    manifest = write_default(directory, seed=5)

    assert open_prepared(directory)[0] == manifest
    verify_prepared(directory, manifest)
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.parametrize("name", ["schema.json", "train/labels.npy", "vocabulary/shop.parquet"])
def test_preparing_again_repairs(directory, name):
    write_default(directory)
    before = files(directory)

    (directory / name).write_bytes(b"{}")
    write_default(directory)

    assert files(directory) == before


def test_the_same_set_of_another_process_is_kept(directory):
    splits = {"train": draw(11), "test": draw(5, seed=1)}

    with write_prepared(directory, tuple(splits)) as writer:
        for split, arrays in splits.items():
            writer.append(split, arrays)
        writer.finish(source="tiny", parameters={}, schema=SCHEMA, report={})
        with write_prepared(directory, tuple(splits)) as faster:
            for split, arrays in splits.items():
                faster.append(split, arrays)
            faster.finish(source="tiny", parameters={}, schema=SCHEMA, report={})
        earlier = (directory / "schema.json").stat().st_ino

    assert (directory / "schema.json").stat().st_ino == earlier
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.parametrize("name", ["notes.txt", "train/notes.txt", "train/labels.npy"])
def test_a_folder_of_something_else_is_refused_and_untouched(directory, name):
    path = directory / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")

    with pytest.raises(InputError, match=f"{directory} exists but is not a prepared data set"):
        write_default(directory)

    assert files(directory) == {name: b"mine"}
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.parametrize("name", ["notes.txt", "train/weights.npy", ".git/config", "more/a/b.npy"])
def test_a_set_with_something_else_in_its_folder_is_refused_and_untouched(directory, name):
    write_default(directory)
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = files(directory)

    with pytest.raises(InputError, match=f"holds {path.name}, which is not part of a prepared"):
        write_default(directory)

    assert files(directory) == before
    assert list(directory.parent.iterdir()) == [directory]


def test_a_file_in_place_of_the_folder_is_refused_and_untouched(directory):
    directory.parent.mkdir()
    directory.write_text("mine")

    with pytest.raises(InputError, match=r"is not a prepared data set\. Choose another"):
        write_default(directory)

    assert directory.read_text() == "mine"


def test_an_empty_folder_is_used(directory):
    directory.mkdir(parents=True)

    manifest = write_default(directory)

    assert open_prepared(directory)[0] == manifest


def test_a_link_to_another_disk_stays_a_link(directory, tmp_path):
    (tmp_path / "disk").mkdir()
    directory.parent.mkdir()
    directory.symlink_to(tmp_path / "disk" / "tiny")

    for seed in (0, 5):
        manifest = write_default(directory, seed=seed)

        assert directory.is_symlink()
        assert open_prepared(directory)[0] == manifest
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["tiny"]


def test_others_may_read_the_folder(directory):
    write_default(directory)

    assert directory.stat().st_mode & 0o777 == 0o755


def test_equal_bags_are_stored_once_and_read_back(directory, write_tiny):
    manifest = write_tiny(directory, multivalued=True)

    _, arrays = open_prepared(directory)
    verify_prepared(directory, manifest)

    assert [field.name for field in manifest.schema.multivalued] == ["brands", "shops"]
    for split in ("train", "test"):
        for field in ("brands", "shops"):
            offsets = arrays[split][f"bags/{field}/offsets"]
            assert offsets[:2].tolist() == [0, 0]
            assert len(offsets) == 6
            assert offsets[-1] == len(arrays[split][f"bags/{field}/tokens"])


@pytest.mark.parametrize("part", ["offsets", "tokens", "weights"])
def test_bags_of_another_length_are_refused(directory, write_tiny, part):
    write_tiny(directory, multivalued=True)
    path = directory / "train" / "bags" / "shops" / f"{part}.npy"

    np.save(path, np.load(path)[:-1])

    with pytest.raises(
        InputError, match="bags/shops: offsets, tokens and weights differ in length"
    ):
        open_prepared(directory)


def test_a_set_that_lacks_an_array_of_its_bags_is_refused(directory, write_tiny):
    write_tiny(directory, multivalued=True)

    rewrite_schema(directory, lambda entries: entries["checksums"].pop("test/bag.npy"))

    with pytest.raises(InputError, match=r"lists no test/bag\.npy\. Prepare"):
        open_prepared(directory)


@pytest.mark.parametrize("bytes_per_chunk", [1, 40, 1 << 20])
def test_rows_are_put_into_another_order(directory, monkeypatch, bytes_per_chunk):
    monkeypatch.setattr(writer_module, "_BYTES_PER_CHUNK", bytes_per_chunk)
    splits = {"train": draw(11), "test": draw(0)}
    order = np.random.default_rng(0).permutation(11)

    with write_prepared(directory, tuple(splits)) as writer:
        for split, arrays in splits.items():
            writer.append(split, arrays)
        writer.close_arrays()
        writer.permute("train", order)
        writer.permute("test", np.arange(0))
        writer.finish(source="tiny", parameters={}, schema=SCHEMA, report={})

    _, arrays = open_prepared(directory)
    for stem, array in splits["train"].items():
        np.testing.assert_array_equal(arrays["train"][stem], array[order], strict=True)


def test_a_finished_array_is_read_in_chunks(directory, monkeypatch):
    monkeypatch.setattr(writer_module, "_BYTES_PER_CHUNK", 50)
    expected = draw(11)

    with write_prepared(directory, ("train",)) as writer:
        writer.append("train", expected)
        writer.close_arrays()
        starts, chunks = zip(*writer.chunks("train", "categorical"), strict=True)
        writer.finish(source="tiny", parameters={}, schema=SCHEMA, report={})

    assert starts == (0, 4, 8)
    np.testing.assert_array_equal(np.concatenate(chunks), expected["categorical"])


NO_LOCKS = """
import errno, fcntl
def flock(fd, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.mark.parametrize("locks", ["", NO_LOCKS])
def test_leftovers_of_a_killed_preparation_are_removed_by_the_next(directory, locks, monkeypatch):
    code = f"""{locks}
import os, pathlib
from mtnrec.data.prepared.writer import write_prepared
with write_prepared(pathlib.Path({str(directory)!r}), ("train",)) as writer:
    (writer.directory / "train").mkdir()
    (writer.directory / "train" / "labels.npy").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert [path.name.startswith(".tiny-") for path in directory.parent.iterdir()] == [True]

    if locks:
        monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "")))
    write_default(directory)

    assert list(directory.parent.iterdir()) == [directory]
    assert not list(directory.rglob(".lock*"))
    open_prepared(directory)


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", [0, 1])
def test_a_label_that_is_constant_in_train_is_refused(directory, column, value):
    splits = {"train": draw(11), "test": draw(5)}
    splits["train"]["labels"][:, column] = value

    label = SCHEMA.labels[column]
    with pytest.raises(InputError, match=f"the label {label} is {value} in all 11 training rows"):
        write(directory, splits)

    assert list(directory.parent.iterdir()) == []


def date_note(directory, *, seconds):
    """Set how long after the files' last change they were verified."""
    then = time.time() + seconds
    os.utime(directory.with_name(f".{directory.name}.verified"), (then, then))


@pytest.fixture
def verified(directory, write_tiny):
    """A prepared set that was verified and that the next call finds unchanged."""
    manifest = write_tiny(directory)
    verify_once(directory, manifest)
    date_note(directory, seconds=10)
    return manifest


def test_files_that_have_not_changed_are_read_once(directory, verified, monkeypatch):
    monkeypatch.setattr(verify, "sha256", None)

    verify_once(directory, verified)


@pytest.mark.parametrize(("seconds", "checks"), [(-10, 1), (1, 1), (3, 0)])
def test_files_are_read_again_if_the_note_is_not_two_seconds_younger(
    directory, verified, monkeypatch, seconds, checks
):
    verify_prepared = mock.Mock()
    monkeypatch.setattr(verify, "verify_prepared", verify_prepared)
    date_note(directory, seconds=seconds)

    verify_once(directory, verified)

    assert verify_prepared.call_count == checks


@pytest.mark.parametrize("kind", ["bytes", "pipe"])
def test_an_invalid_note_is_replaced(directory, verified, kind):
    note = directory.with_name(f".{directory.name}.verified")
    text = note.read_bytes()
    note.unlink()
    note.write_bytes(b"\xff\xfe") if kind == "bytes" else os.mkfifo(note)

    verify_once(directory, verified)

    assert note.read_bytes() == text


@pytest.mark.parametrize("keeps_the_time", [False, True])
def test_a_file_that_changes_is_read_again(directory, verified, keeps_the_time):
    path = directory / "train" / "numerical.npy"
    before = path.stat()
    with path.open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    if keeps_the_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(InputError, match=r"numerical\.npy has SHA-256"):
        verify_once(directory, verified)


def test_a_missing_or_replaced_file_is_read_again(directory, verified):
    path = directory / "train" / "numerical.npy"
    path.rename(directory / "numerical.npy")
    with pytest.raises(InputError, match=r"numerical\.npy is missing"):
        verify_once(directory, verified)

    path.write_bytes((directory / "numerical.npy").read_bytes()[:-1] + b"\x07")
    with pytest.raises(InputError, match=r"numerical\.npy has SHA-256"):
        verify_once(directory, verified)


def test_another_schema_is_verified_again(directory, verified):
    path = directory / "train" / "numerical.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    changed = dataclasses.replace(verified, source="another")
    with pytest.raises(InputError, match=r"numerical\.npy has SHA-256"):
        verify_once(directory, changed)


def test_a_folder_that_only_others_may_write_to_is_verified_every_time(directory, write_tiny):
    manifest = write_tiny(directory)
    (directory.parent / f".{directory.name}.verified").mkdir()  # cannot be written, even by root

    verify_once(directory, manifest)

    path = directory / "train" / "numerical.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(InputError, match=r"numerical\.npy has SHA-256"):
        verify_once(directory, manifest)


READER = """
import sys
from pathlib import Path
from mtnrec.data.prepared.store import open_prepared

arrays = open_prepared(Path(sys.argv[1]))[1]["train"]
sums = [array.sum() for array in arrays.values()]  # reads every page
print("read", flush=True)
sys.stdin.read()
"""


def memory_of_mappings(process, folder):
    """Add up the lines of a process's mapped files in a folder, in KiB: Rss, Pss, Private_Clean…"""
    totals = Counter()
    counts = False
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            counts = str(folder) in line
        elif counts and values[-1] == "kB":
            totals[name.removesuffix(":")] += int(values[0])
    return totals


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it in /proc")
def test_processes_share_the_memory_of_one_prepared_data_set(tmp_path):
    write(tmp_path / "set", {"train": draw(200_000), "test": draw(3)}, chunk=200_000)
    size = sum(path.stat().st_size for path in (tmp_path / "set" / "train").iterdir())
    command = [sys.executable, "-c", READER, tmp_path / "set"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        assert [process.stdout.readline() for process in (first, second)] == [b"read\n"] * 2
        found = [memory_of_mappings(process, tmp_path / "set") for process in (first, second)]
        for process in (first, second):
            process.stdin.close()

    for of_process in found:
        assert of_process["Rss"] * 1024 >= size
        assert of_process["Pss"] == pytest.approx(of_process["Rss"] / 2, rel=0.01)
        assert of_process["Private_Clean"] + of_process["Private_Dirty"] == 0
