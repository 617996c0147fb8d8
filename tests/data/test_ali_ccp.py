"""Ali-CCP: every field of every row against a slow, obviously correct reader."""

import collections
import io
import json
import re
import shutil
import tarfile

import numpy as np
import polars as pl
import pytest
from reference import ali_ccp_log

from mtnrec.checks import InputError
from mtnrec.data.ali_ccp import MULTI_VALUED, PRESETS
from mtnrec.data.preparation import ali_ccp as ali_ccp_join
from mtnrec.data.prepared import verify
from mtnrec.data.prepared import writer as writer_module
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_prepared
from mtnrec.data.raw import blocks

SPLITS = ("train", "test")


def read_slowly(folder, split):
    """Join and parse, a row at a time: (labels, user, {field: [(id, value), ...]})."""

    def parse(text):
        fields = collections.defaultdict(list)
        for triple in text.split("\x01") if text else []:
            field, rest = triple.split("\x02")
            feature, value = rest.split("\x03")
            fields[field].append((int(feature), float(value)))
        return fields

    common = {}
    for line in (folder / f"common_features_{split}.csv").read_text().splitlines():
        index, _, text = line.split(",")
        common[index] = parse(text)
    rows = []
    for line in (folder / f"sample_skeleton_{split}.csv").read_text().splitlines():
        _, click, conversion, index, _, text = line.split(",")
        if (click, conversion) != ("0", "1"):
            rows.append(((int(click), int(conversion)), index, {**common[index], **parse(text)}))
    return rows


def vocabulary_of(rows, field, min_count, choose):
    counts = collections.Counter()
    for _, _, fields in rows:
        counts.update(feature for feature, _ in choose(fields.get(field, [])))
    kept = sorted(feature for feature, count in counts.items() if count >= min_count)
    return {feature: index for index, feature in enumerate(kept, start=1)}


def last(triples):
    return triples[-1:]


def first(triples):
    return triples[:1]


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory):
    """400 rows a split, with every oddity of the real files that is no error."""
    folder = tmp_path_factory.mktemp("raw")
    ali_ccp_log.write_log(folder, 800, history=0.02, rows_per_common=20)
    for split in SPLITS:
        add_oddities(folder, split)
    return folder


def add_oddities(folder, split):
    skeleton = folder / f"sample_skeleton_{split}.csv"
    lines = skeleton.read_text().splitlines()
    index = [line.split(",")[3] for line in lines]
    odd = [
        f"901,0,1,{index[0]},1,205\x024190001\x031.0",  # a conversion without a click
        f"902,1,1,{index[0]},1,206\x028316001\x031.0",  # lacks 205
        f"903,1,0,{index[1]},0,",  # has no features of its own
        "904,1,1,00000000000000aa,2,301\x029351665\x031.0\x01205\x024190001\x031.0",
        "905,0,0,00000000000000ab,3,853\x029110001\x031.5\x01205\x024190001\x031.0\x01853\x029110002\x030.5",
    ]
    skeleton.write_text("\n".join([*odd[:3], *lines, *odd[3:]]) + "\n")
    common = folder / f"common_features_{split}.csv"
    common.write_text(
        common.read_text()
        + "00000000000000aa,1,101\x027\x031.0\n"  # short
        + "00000000000000ab,2,121\x023438658\x031.0\x01109_14\x02445001\x030.69315\n"  # lacks 101
        + "00000000000000ac,0,\n"  # short, and nothing uses it
    )


@pytest.fixture
def prepared(make_datamodule, tmp_path):
    """Prepare with overrides of the keys; return the folder, the manifest and the arrays."""

    def make(raw_dir, *overrides, name="set"):
        folder = tmp_path / name
        keys = [f"raw_dir={raw_dir}", f"dir={folder}", "min_count=2", *overrides]
        datamodule = make_datamodule("ali_ccp", *keys)
        manifest = datamodule.prepare()
        opened, arrays = open_prepared(folder)
        assert opened == manifest
        verify_prepared(folder, manifest)
        return folder, manifest, arrays

    return make


@pytest.mark.parametrize("tokens", ["last", "first"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_id_equals_that_of_the_slow_reader(preset, tokens, raw_dir, prepared):
    folder, manifest, arrays = prepared(raw_dir, f"preset={preset}", f"tokens={tokens}")

    choose = {"last": last, "first": first}[tokens]
    rows = {split: read_slowly(raw_dir, split) for split in SPLITS}
    fields = PRESETS[preset].fields
    assert [field.name for field in manifest.schema.categorical] == list(fields)
    for column, field in enumerate(fields):
        index = vocabulary_of(rows["train"], field, 2, choose)
        assert manifest.schema.categorical[column].vocabulary_size == len(index) + 1
        table = pl.read_parquet(folder / "vocabulary" / f"{field}.parquet")
        assert dict(table.rows()) == index
        for split in SPLITS:
            chosen = [choose(row.get(field, [])) for _, _, row in rows[split]]
            expected = [index.get(t[0][0], 0) if t else 0 for t in chosen]
            assert arrays[split]["categorical"][:, column].tolist() == expected
            assert manifest.missing[split].get(field, 0) == chosen.count([])
    for split in SPLITS:
        labels = [labels for labels, _, _ in rows[split]]
        assert arrays[split]["labels"].tolist() == [list(row) for row in labels]
        assert manifest.report[f"{split}_conversions_without_click"] >= 1
        assert manifest.report[f"{split}_common_rows_without_impression"] >= 1


@pytest.mark.parametrize("bytes_per_chunk", [64, 1 << 25])
def test_all_tokens_equal_those_of_the_slow_reader(raw_dir, prepared, monkeypatch, bytes_per_chunk):
    monkeypatch.setattr(writer_module, "_BYTES_PER_CHUNK", bytes_per_chunk)
    _, manifest, arrays = prepared(raw_dir, "preset=rechub", "tokens=all")

    rows = {split: read_slowly(raw_dir, split) for split in SPLITS}
    names = [field.name for field in manifest.schema.multivalued]
    assert sorted(names) == sorted(MULTI_VALUED)
    for column, field in enumerate(names):
        index = vocabulary_of(rows["train"], field, 2, list)
        for split in SPLITS:
            parts = [arrays[split][f"bags/{field}/{p}"] for p in ("offsets", "tokens", "weights")]
            offsets, tokens, weights = parts
            for row, (_, _, fields) in enumerate(rows[split]):
                bag = arrays[split]["bag"][row, column]
                bag = slice(offsets[bag], offsets[bag + 1])
                triples = fields.get(field, [])
                assert tokens[bag].tolist() == [index.get(feature, 0) for feature, _ in triples]
                assert weights[bag].tolist() == [np.float32(value) for _, value in triples]
            empty = sum(not fields.get(field) for _, _, fields in rows[split])
            assert manifest.missing[split].get(field, 0) == empty
    assert len(arrays["train"]["bags/110_14/offsets"]) - 1 == manifest.report["train_common_rows"]


def test_values_are_scaled_by_the_training_rows_alone(raw_dir, prepared):
    _, manifest, arrays = prepared(raw_dir, "preset=rechub")

    rows = {split: read_slowly(raw_dir, split) for split in SPLITS}
    for column, field in enumerate(PRESETS["rechub"].values):
        values = {
            split: [
                last(fields.get(field, []))[0][1] if field in fields else 0.0
                for _, _, fields in rows[split]
            ]
            for split in SPLITS
        }
        low, high = min(values["train"]), max(values["train"])
        transform = manifest.transforms[f"D{field}"]
        assert (transform["shift"], transform["fill"]) == (low, 0.0)
        assert transform["scale"] == pytest.approx(high - low, rel=1e-7)
        for split in SPLITS:
            expected = (np.array(values[split]) - low) / (high - low)
            found = arrays[split]["numerical"][:, column]
            np.testing.assert_allclose(found, expected, rtol=2e-7)
    assert arrays["train"]["numerical"].min() == 0
    assert arrays["train"]["numerical"].max() == 1
    assert manifest.schema.numerical[0] == "D109_14"


def test_the_user_is_the_group_and_a_row_without_one_is_grouped_by_its_common_row(
    raw_dir, prepared
):
    _, _, arrays = prepared(raw_dir)

    for split in SPLITS:
        group = arrays[split]["group"]
        of_index = {}
        for row, (_, index, fields) in enumerate(read_slowly(raw_dir, split)):
            if "101" in fields:
                assert group[row] == last(fields["101"])[0][0]
            else:
                assert group[row] < 0
                assert of_index.setdefault(index, group[row]) == group[row]
        assert len(set(of_index.values())) == len(of_index) >= 1


def test_a_free_choice_of_fields_cut_offs_and_tokens(raw_dir, prepared):
    _, manifest, arrays = prepared(
        raw_dir,
        "preset=null",
        "fields=[206,109_14,210,853]",
        "values=[150_14]",
        "min_count={206:5}",
        "tokens={109_14:all,210:first}",
    )

    rows = read_slowly(raw_dir, "train")
    assert [field.name for field in manifest.schema.categorical] == ["206", "210", "853"]
    assert [field.name for field in manifest.schema.multivalued] == ["109_14"]
    for column, (field, count, choose) in enumerate(
        [("206", 5, last), ("210", 1, first), ("853", 1, last)]
    ):
        index = vocabulary_of(rows, field, count, choose)
        expected = [
            index.get(choose(fields[field])[0][0], 0) if field in fields else 0
            for _, _, fields in rows
        ]
        assert arrays["train"]["categorical"][:, column].tolist() == expected
    raw = [fields["150_14"][-1][1] if "150_14" in fields else 0.0 for _, _, fields in rows]
    assert arrays["train"]["numerical"][:, 0].tolist() == [np.float32(value) for value in raw]
    assert manifest.transforms == {}


def checksums(folder):
    return json.loads((folder / "schema.json").read_text())["checksums"]


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_raw_file_whose_content_changed_is_noticed(
    raw_dir, prepared, make_datamodule, tmp_path, monkeypatch, caplog, is_packed
):
    monkeypatch.setattr(verify, "_SETTLED_SECONDS", 0.0)  # the files are new
    own = tmp_path / "own"
    (ali_ccp_log.pack if is_packed else shutil.copytree)(raw_dir, own)
    folder, _, _ = prepared(own)
    keys = [f"dir={folder}", "min_count=2"]
    for given in (keys, [*keys, f"raw_dir={own}"]):
        make_datamodule("ali_ccp", *given).prepare_data()
    assert caplog.messages == []

    path = own / ("sample_test.tar.gz" if is_packed else "sample_skeleton_test.csv")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"\(raw: other files or content\).* overwrite=true"):
        make_datamodule("ali_ccp", *keys, f"raw_dir={own}").prepare_data()
    make_datamodule("ali_ccp", *keys).prepare_data()
    (warning,) = caplog.messages
    assert warning.startswith(f"{path} has changed since {folder} was prepared from it")


def test_archives_and_files_and_any_threads_and_blocks_give_the_same_bytes(
    raw_dir, prepared, tmp_path, monkeypatch
):
    keys = ["preset=rechub", "tokens=all"]
    expected = checksums(prepared(raw_dir, *keys, "threads=1", name="plain")[0])

    for common_first in (False, True):
        archives = tmp_path / f"archives_{common_first}"
        ali_ccp_log.pack(raw_dir, archives, common_first=common_first)
        assert checksums(prepared(archives, *keys, name="archived")[0]) == expected
    for block_bytes, threads in ((700, 3), (100_000, 2)):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        assert checksums(prepared(raw_dir, *keys, f"threads={threads}")[0]) == expected


def copy_with(raw_dir, folder, name, change):
    """Copy the raw files and change the lines of one."""
    folder.mkdir()
    for path in raw_dir.iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        (folder / path.name).write_bytes(b"".join(change(lines) if path.name == name else lines))
    return folder


def replace(line, old, new):
    """Replace the first match of a pattern in the given line of a file."""
    number = line - 1

    def change(lines):
        changed = re.sub(old, new, lines[number], count=1)
        assert changed != lines[number]
        return [*lines[:number], changed, *lines[number + 1 :]]

    return change


SKELETON, COMMON = "sample_skeleton_train.csv", "common_features_train.csv"
DEFECTS = {
    "sample_id": (SKELETON, replace(9, rb"^\d+", b"x7"), 9, "sample_id must be .*got 'x7'"),
    "label": (SKELETON, replace(9, rb",[01],", b",2,"), 9, "must be 0 or 1, got '2'"),
    "long label": (SKELETON, replace(9, rb",[01],", b",10,"), 9, "must be 0 or 1, got '10'"),
    "index": (SKELETON, replace(9, rb",[0-9a-f]{16},", b",00A0000000000000,"), 9, "16 lower-case"),
    "short index": (SKELETON, replace(9, rb",[0-9a-f]{16},", b",00a0,"), 9, "got '00a0'"),
    "unknown index": (
        SKELETON,
        replace(9, rb",[0-9a-f]{16},", b",00000000000000ff,"),
        9,
        "must be in common_features_train.csv, got 00000000000000ff",
    ),
    "feature_num": (
        SKELETON,
        replace(9, rb"(?<=[0-9a-f]{16},)\d+", b"99"),
        9,
        "feature_num must be the number of triples, got '99' and .* triples",
    ),
    "feature_num text": (SKELETON, replace(9, rb"(?<=[0-9a-f]{16},)\d+", b"a"), 9, "got 'a'"),
    "columns": (SKELETON, replace(9, rb",\d+\x02?[^,]*$", b"\n"), 9, "expected sample_id,click"),
    "more columns": (SKELETON, replace(9, rb"\n", b",7\n"), 9, "got"),
    "id": (SKELETON, replace(9, rb"\x02\d+\x03", b"\x02x\x03"), 9, "id must be .*got 'x'"),
    "large id": (
        SKELETON,
        replace(9, rb"\x02\d+\x03", b"\x022147483648\x03"),
        9,
        "an integer up to 2147483647, got '2147483648'",
    ),
    "value": (SKELETON, replace(9, rb"\x03[\d.]+", b"\x03nan"), 9, "decimal number .*got 'nan'"),
    "no value": (SKELETON, replace(9, rb"\x03[\d.]+", b"\x03"), 9, "decimal number .*got ''"),
    "infinite": (SKELETON, replace(9, rb"\x03[\d.]+", b"\x03inf"), 9, "got 'inf'"),
    "triple": (SKELETON, replace(9, rb"\x03[\d.]+", b""), 9, "a triple must be"),
    "separator": (SKELETON, replace(9, rb"\x01", b"\x01\x01"), 9, "a triple must be"),
    "empty line": (SKELETON, replace(9, rb".*\n", b"\n"), 9, "expected sample_id,click"),
    "cut": (SKELETON, lambda lines: [*lines[:-1], lines[-1][:-9]], 405, "got"),
    "common id": (COMMON, replace(3, rb"\x02\d+\x03", b"\x02-1\x03"), 3, "id must be .*got '-1'"),
    "common columns": (COMMON, replace(3, rb",[^,]*$", b"\n"), 3, "expected common_index"),
    "common feature_num": (COMMON, replace(3, rb",\d+,", b",1,"), 3, "number of triples, got '1'"),
    "duplicate": (
        COMMON,
        lambda lines: [*lines, lines[2]],
        None,
        r"occur once \(line 3 has it too\), got",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_bad_line_is_refused_with_its_number_or_skipped(defect, raw_dir, prepared, tmp_path):
    name, change, line, message = DEFECTS[defect]
    folder = copy_with(raw_dir, tmp_path / "raw", name, change)
    line = len((folder / name).read_bytes().splitlines()) if line is None else line

    with pytest.raises(InputError, match=f"{folder / name}, line {line}: .*{message}"):
        prepared(folder)
    assert not (tmp_path / "set").exists()

    _, manifest, arrays = prepared(folder, "on_error=skip")
    skipped = manifest.report["train_rows_skipped"]
    if name == SKELETON:
        assert (skipped, len(arrays["train"]["labels"])) == (1, 403)
    elif defect == "duplicate":
        assert (skipped, len(arrays["train"]["labels"])) == (1, 404)
    else:  # the rows of a common line that is skipped have none
        index = (raw_dir / COMMON).read_text().splitlines()[2].split(",")[0]
        lost = (raw_dir / SKELETON).read_text().count(f",{index},")
        assert lost > 1
        assert skipped == 1 + lost


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:-1], lines[-1].rstrip()],
        lambda lines: [line.replace(b"\n", b"\r\n") for line in lines],
    ],
    ids=["no last line end", "windows line ends"],
)
def test_line_ends_do_not_matter(change, raw_dir, prepared, tmp_path):
    folder = copy_with(raw_dir, tmp_path / "raw", SKELETON, change)

    expected, found = (checksums(prepared(f, name=f"of_{f.name}")[0]) for f in (raw_dir, folder))

    assert found == expected


@pytest.mark.parametrize("kind", ["constant", "none"])
def test_a_label_that_is_constant_in_train_is_refused(raw_dir, prepared, tmp_path, kind):
    new = b",0,0," if kind == "none" else b",1,1,"
    folder = copy_with(
        raw_dir,
        tmp_path / "raw",
        SKELETON,
        lambda lines: [re.sub(rb",[01],[01],", new, line, count=1) for line in lines],
    )

    with pytest.raises(InputError, match=r"the label click is . in all .* training rows"):
        prepared(folder)

    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ([COMMON], "holds neither sample_train.tar.gz nor common_features_train.csv"),
        (
            [COMMON, SKELETON],
            "nor common_features_train.csv and sample_skeleton_train.csv. Download",
        ),
        (["sample_skeleton_test.csv"], "holds neither sample_test.tar.gz nor sample_skeleton_test"),
    ],
)
def test_a_missing_file_is_named(raw_dir, prepared, tmp_path, remove, message):
    folder = copy_with(raw_dir, tmp_path / "raw", "", None)
    for name in remove:
        (folder / name).unlink()

    with pytest.raises(InputError, match=message):
        prepared(folder)


def test_files_are_found_in_folders_below(raw_dir, prepared, tmp_path):
    folder = copy_with(raw_dir, tmp_path / "raw", "", None)
    for split in SPLITS:
        (folder / f"sample_{split}").mkdir()
        for path in list(folder.glob(f"*_{split}.csv")):
            path.rename(folder / f"sample_{split}" / path.name)

    assert checksums(prepared(folder)[0]) == checksums(prepared(raw_dir, name="other")[0])


def test_the_same_file_twice_is_refused(raw_dir, prepared, tmp_path):
    folder = copy_with(raw_dir, tmp_path / "raw", "", None)
    (folder / "copy").mkdir()
    (folder / "copy" / COMMON).write_bytes(b"")

    with pytest.raises(InputError, match=f"hold {COMMON} 2 times: .*copy.*. Delete all but one"):
        prepared(folder)


def test_an_archive_next_to_its_files_is_refused(raw_dir, prepared, tmp_path):
    folder = copy_with(raw_dir, tmp_path / "raw", "", None)
    (folder / "sample_train.tar.gz").write_bytes(b"")

    with pytest.raises(InputError, match=r"both sample_train\.tar\.gz and files from it"):
        prepared(folder)


def damaged_archive(raw_dir, folder, damage):
    ali_ccp_log.pack(raw_dir, folder)
    path = folder / "sample_train.tar.gz"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-5000])
    elif damage == "without its checksum":
        path.write_bytes(data[:-4])
    elif damage == "no archive":
        path.write_bytes(b"no archive" * 999)
    elif damage == "another checksum":
        path.write_bytes(data[:-8] + b"\0\0\0\0" + data[-4:])
    else:
        members = {"lacks": {}, "extra": {"notes.txt": b""}, "climbs": {"../evil.csv": b""}}[damage]
        with tarfile.open(path, "w:gz") as archive:
            for split_name in (SKELETON, COMMON)[: 1 if damage == "lacks" else 2]:
                archive.add(raw_dir / split_name, split_name)
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "is truncated or damaged .*Download"),
        ("without its checksum", "is truncated or damaged"),
        ("another checksum", "is truncated or damaged .*CRC"),
        ("no archive", "is truncated or damaged"),
        ("lacks", "lacks common_features_train.csv. Download"),
        ("extra", "must hold common_features_train.csv, .* once each, got 'notes.txt'. Download"),
        ("climbs", "holds '../evil.csv', whose path climbs out of the folder"),
    ],
)
def test_a_bad_archive_is_refused(raw_dir, prepared, tmp_path, damage, message):
    damaged_archive(raw_dir, tmp_path / "raw", damage)

    with pytest.raises(InputError, match=rf"sample_train\.tar\.gz.* {message}"):
        prepared(tmp_path / "raw")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=atim"], "data.preset must be one of aitm, rechub; got 'atim'"),
        (["fields=[204]"], "data.fields must be fields of Ali-CCP .*, got '204'"),
        (["fields=101"], "data.fields must be a list of fields, got 101"),
        (["fields=[101,101]"], "data.fields must name each field once, got 101, 101"),
        (["values=[x]"], "data.values must be fields of Ali-CCP .*, got 'x'"),
        (["min_count=0"], "data.min_count must be an integer >= 1, got 0"),
        (["min_count={205:0}"], "data.min_count must be an integer >= 1, got 0"),
        (["min_count={210:3}"], "data.min_count must name fields of data.fields, got 210"),
        (["tokens=some"], "data.tokens must be one of last, first, all; got 'some'"),
        (["tokens={205:all}"], "data.tokens must be last or first for field 205, .*, got all"),
        (["scaling=log"], "data.scaling must be one of minmax, none; got 'log'"),
        (["on_error=ignore"], "data.on_error must be one of refuse, skip; got 'ignore'"),
        (["threads=0"], "data.threads must be an integer from 1 to 1024, got 0"),
    ],
)
def test_a_bad_key_is_refused(overrides, message, make_datamodule):
    with pytest.raises(Exception, match=re.escape(message).replace(r"\.\*", ".*")):
        make_datamodule("ali_ccp", *overrides)


@pytest.mark.parametrize(
    ("overrides", "features"),
    [
        (["fields=[109_14]", "tokens=all"], (0, 1, 0)),
        (["fields=[]", "values=[508,150_14]"], (0, 0, 2)),
        (["fields=[101]"], (1, 0, 0)),
    ],
)
def test_each_kind_of_feature_works_alone(overrides, features, raw_dir, prepared):
    _, manifest, arrays = prepared(raw_dir, "preset=null", *overrides)

    schema = manifest.schema
    assert tuple(map(len, (schema.categorical, schema.multivalued, schema.numerical))) == features
    assert len(arrays["test"]["labels"]) == 404


def test_no_row_remains_if_every_common_line_is_skipped(raw_dir, prepared, tmp_path):
    folder = copy_with(raw_dir, tmp_path / "raw", COMMON, lambda lines: [b"x\n"] * len(lines))

    with pytest.raises(InputError, match="the label click is 0 in all 0 training rows"):
        prepared(folder, "on_error=skip")


@pytest.mark.parametrize("overrides", [["preset=null"], ["fields=[]"]])
def test_preparing_needs_a_field(overrides, raw_dir, prepared):
    message = r"data\.preset must be one of aitm, rechub unless data\.fields or data\.values names"
    with pytest.raises(InputError, match=message):
        prepared(raw_dir, *overrides)


def test_training_uses_the_prepared_set_whatever_was_chosen(raw_dir, prepared, make_datamodule):
    folder, manifest, _ = prepared(raw_dir, "preset=null", "fields=[205,210]", "tokens=all")

    datamodule = make_datamodule("ali_ccp", f"dir={folder}", "preset=null")
    datamodule.prepare_data()
    datamodule.setup()

    assert datamodule.schema == manifest.schema
    assert next(iter(datamodule.test_dataloader())).bags[0].tokens.numel()


def test_the_raw_folder_must_be_given_and_exist(make_datamodule, tmp_path):
    with pytest.raises(InputError, match=r"data.raw_dir is not given.*Tianchi data set 408"):
        make_datamodule("ali_ccp").prepare()
    with pytest.raises(InputError, match=r"data\.raw_dir must be a folder with the raw"):
        make_datamodule("ali_ccp", f"raw_dir={tmp_path / 'absent'}").prepare()


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    raw_dir, prepared, monkeypatch, tmp_path
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    with pytest.raises(InputError, match=r"become about .*\(1\.0 kB are free there\)\. Free some"):
        prepared(raw_dir)


@pytest.mark.parametrize("preset", PRESETS)
def test_preparing_shows_what_it_reads_and_writes(preset, raw_dir, prepare, capsys):
    prepare("data=ali_ccp", f"data.raw_dir={raw_dir}", f"data.preset={preset}")

    shown = capsys.readouterr().out
    assert ("scaled by the range of the training rows alone" in shown) == (preset == "rechub")
    assert re.search(r"of raw files become about .* are free there", shown)
    assert "404 rows" in shown
    assert "train conversions without click: " in shown


def test_an_interrupted_preparation_leaves_nothing_and_runs_again(
    raw_dir, prepared, tmp_path, monkeypatch
):
    def interrupt(log):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ali_ccp_join.Log, "finish", interrupt)  # all rows are on the disk by then
        with pytest.raises(KeyboardInterrupt):
            prepared(raw_dir)
    assert {path.name for path in tmp_path.iterdir()} <= {".set.raw"}  # checksums of the raw files

    prepared(raw_dir)
    assert {path.name for path in tmp_path.iterdir()} <= {".set.raw", "set"}
