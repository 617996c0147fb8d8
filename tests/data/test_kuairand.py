"""KuaiRand's csv files against a reader that joins them row by row."""

import csv
import gzip
import math
from datetime import date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from mtnrec.checks import InputError
from mtnrec.data.kuairand import KuaiRand
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_prepared

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,"
    "is_rand,tab\n"
)
ONE_HOT = [f"onehot_feat{number}" for number in range(18)]
USERS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range," + ",".join(ONE_HOT) + "\n"
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag\n"
)
OF_USER = [
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range"),
    *("register_days_range", *ONE_HOT),
]
OF_VIDEO = ["author_id", "video_type", "upload_type", "music_type"]
TAGS = ["39", '"12,65"', ""]
FIRST, SECOND, LAST = date(2022, 4, 8), date(2022, 4, 22), date(2022, 5, 8)
STANDARD = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
RANDOM = "log_random_4_22_to_5_08"


def log_rows(rng, rows, first, last, *, is_rand):
    """Lines of a log, not in the order of time; some long views have no click."""
    lines = []
    for _ in range(rows):
        day = first + timedelta(days=int(rng.integers(0, (last - first).days + 1)))
        hour, minute = int(rng.integers(0, 24)), int(rng.integers(0, 60))
        moment = datetime(day.year, day.month, day.day, hour, minute)
        ms = round(moment.timestamp() * 1000) + int(rng.integers(0, 60_000))
        click, like, view = (int(rng.random() < share) for share in (0.5, 0.2, 0.4))
        lines.append(
            f"{rng.integers(0, 12)},{rng.integers(0, 22)},{day:%Y%m%d},{hour * 100 + minute},{ms},"
            f"{click},{like},0,0,0,0,{view},{rng.integers(0, 90000)},60000,0,0,0,{is_rand},"
            f"{rng.integers(0, 4)}\n"
        )
    return lines


def write_layout(folder, preset="pure", *, parts=1):
    """Write the published files: user 11 and videos 20 and 21 have no features."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for stem, *days in ((STANDARD[0], FIRST, date(2022, 4, 21)), (STANDARD[1], SECOND, LAST)):
        lines = log_rows(rng, 240, *days, is_rand=0)
        size = -(-len(lines) // parts)
        for part in range(parts):
            end = f"_part{part + 1}" if parts > 1 else ""
            text = LOG + "".join(lines[part * size : (part + 1) * size])
            (folder / f"{stem}_{preset}{end}.csv").write_text(text)
    text = LOG + "".join(log_rows(rng, 200, SECOND, LAST, is_rand=1))
    (folder / f"{RANDOM}_{preset}.csv").write_text(text)
    (folder / f"user_features_{preset}.csv").write_text(
        USERS
        + "".join(
            f"{user},{rng.choice(['full_active', 'UNKNOWN'])},0,{rng.integers(0, 2)},1,5,"
            f'"(0,10]",312,"[100,1k)",0,0,3624,730+,'
            + ",".join("" if rng.random() < 0.1 else str(v) for v in rng.integers(0, 3, 18))
            + "\n"
            for user in rng.permutation(11)
        )
    )
    (folder / f"video_features_basic_{preset}.csv").write_text(
        VIDEOS
        + "".join(
            f"{video},{rng.integers(0, 9)},{rng.choice(['NORMAL', 'AD'])},"
            f"{rng.choice(['2022-04-07', '2020-07-08', '2022-05-30', ''])},ShortImport,0.0,"
            f"{rng.choice(['17200.0', '9233.0', ''])},720.0,1280.0,9155697141,"
            f"{rng.choice(['9.0', '4.0', ''])},{rng.choice(TAGS)}\n"
            for video in rng.permutation(20)
        )
    )
    return folder


def read_slowly(folder, first, last, stems, preset="pure", label="long_view"):
    """Join the rows of some days by dictionaries, in the order of time."""
    with (folder / f"user_features_{preset}.csv").open(newline="") as file:
        users = {row["user_id"]: row for row in csv.DictReader(file)}
    with (folder / f"video_features_basic_{preset}.csv").open(newline="") as file:
        videos = {row["video_id"]: row for row in csv.DictReader(file)}
    rows = []
    for path in [path for stem in stems for path in sorted(folder.glob(f"{stem}_{preset}*"))]:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        rows += list(csv.DictReader(text.splitlines()))
    found = []
    for row in sorted(rows, key=lambda row: int(row["time_ms"])):
        day = datetime.strptime(row["date"], "%Y%m%d").date()
        if not first <= day <= last:
            continue
        user, video = users.get(row["user_id"], {}), videos.get(row["video_id"], {})
        made = {name: row[name] for name in ("user_id", "video_id", "tab")}
        made |= {"hour": str(int(row["hourmin"]) // 100), "weekday": str(day.isoweekday())}
        made |= {name: user.get(name) or None for name in OF_USER}
        made |= {name: video.get(name) or None for name in OF_VIDEO}
        if made["music_type"]:
            made["music_type"] = made["music_type"].removesuffix(".0")
        made["tag"] = video["tag"].split(",") if video.get("tag") else []
        numbers = [math.nan, math.nan]
        if video.get("video_duration"):
            numbers[0] = math.log1p(float(video["video_duration"]) / 1000)
        if video.get("upload_dt"):
            age = (day - date.fromisoformat(video["upload_dt"])).days
            numbers[1] = math.log1p(max(age, 0))
        click, other = int(row["is_click"]), int(row[label])
        found.append((made, numbers, (click, click * other), int(row["user_id"]), other > click))
    return found


@pytest.fixture
def raw(tmp_path):
    return write_layout(tmp_path / "raw" / "KuaiRand-Pure" / "data")


def prepare(raw_dir, directory, **keys):
    made = KuaiRand(raw_dir=raw_dir, dir=directory, **keys)
    manifest = made.prepare()
    found, arrays = open_prepared(directory)
    assert found == manifest
    verify_prepared(directory, manifest)
    return manifest, arrays


def assert_equals(directory, manifest, arrays, expected, train):
    """Compare a split with the slow reader's rows; vocabularies and scales are of ``train``."""
    assert arrays["labels"].tolist() == [list(labels) for _, _, labels, _, _ in expected]
    assert arrays["group"].tolist() == [user for *_, user, _ in expected]
    for column, name in enumerate(field.name for field in manifest.schema.categorical):
        stored = pl.read_parquet(directory / "vocabulary" / f"{name}.parquet")
        indices = dict(zip(stored["value"], stored["index"], strict=True))
        assert set(indices) == {row[name] for row, *_ in train} - {None}
        wanted = [indices.get(row[name], 0) for row, *_ in expected]
        assert arrays["categorical"][:, column].tolist() == wanted
    stored = pl.read_parquet(directory / "vocabulary" / "tag.parquet")
    indices = dict(zip(stored["value"], stored["index"], strict=True))
    offsets, tokens = (arrays[f"bags/tag/{part}"] for part in ("offsets", "tokens"))
    bags = [tokens[offsets[bag] : offsets[bag + 1]].tolist() for bag in arrays["bag"][:, 0]]
    assert bags == [[indices[tag] for tag in row["tag"]] for row, *_ in expected]
    numbers = np.array([row for _, row, *_ in train])
    means = np.nanmean(numbers, axis=0)
    scales = np.where(np.isnan(numbers), means, numbers).std(axis=0)
    wanted = np.array([row for _, row, *_ in expected])
    wanted = (np.where(np.isnan(wanted), means, wanted) - means) / scales
    np.testing.assert_allclose(arrays["numerical"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "parts", "packed"), [("pure", 1, True), ("1k", 1, False), ("27k", 2, False)]
)
def test_equals_a_join_row_by_row(tmp_path, preset, parts, packed):
    raw = write_layout(tmp_path / "raw", preset, parts=parts)
    if packed:
        path = raw / f"{RANDOM}_{preset}.csv"
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    directory = tmp_path / "prepared"

    manifest, arrays = prepare(raw, directory, preset=preset)

    test = date(2022, 5, 2)
    days = {
        "train": (FIRST, date(2022, 5, 1), STANDARD),
        "test": (test, LAST, STANDARD),
        "test_random": (test, LAST, [RANDOM]),
    }
    expected = {split: read_slowly(raw, *of, preset) for split, of in days.items()}
    assert manifest.rows.keys() == expected.keys()
    for split, rows in expected.items():
        assert len(rows) == manifest.rows[split] > 20
        assert_equals(directory, manifest, arrays[split], rows, expected["train"])
        cleared = sum(clears for *_, clears in rows)
        assert manifest.report[f"{split}_conversions_without_click"] == cleared > 0
    names = [*("user_id", "video_id", "tab", "hour", "weekday"), *OF_USER, *OF_VIDEO]
    assert [field.name for field in manifest.schema.categorical] == names
    assert [field.name for field in manifest.schema.multivalued] == ["tag"]
    assert manifest.schema.numerical == ("log_duration", "log_age")


def test_test_days_random_days_labels_and_exclude_choose(raw, tmp_path):
    directory = tmp_path / "prepared"
    keys = {"labels": ["is_click", "is_like"], "test_days": 2, "random_days": "all"}
    excluded = ["user_id", "onehot_feat3", "log_age", "tag"]

    manifest, arrays = prepare(raw, directory, **keys, exclude=excluded)

    slow = {"label": "is_like"}
    expected = {
        "train": read_slowly(raw, FIRST, date(2022, 5, 6), STANDARD, **slow),
        "test": read_slowly(raw, date(2022, 5, 7), LAST, STANDARD, **slow),
        "test_random": read_slowly(raw, SECOND, LAST, [RANDOM], **slow),
    }
    for split, rows in expected.items():
        assert arrays[split]["labels"].tolist() == [list(labels) for _, _, labels, _, _ in rows]
        assert arrays[split]["group"].tolist() == [user for *_, user, _ in rows]
    fields = {field.name for field in manifest.schema.categorical}
    assert not fields & set(excluded)
    assert manifest.schema.multivalued == ()
    assert manifest.schema.numerical == ("log_duration",)
    assert manifest.schema.labels == ("is_click", "is_like")


def test_independent_signals_stay_as_they_are(raw, tmp_path):
    _, arrays = prepare(raw, tmp_path / "prepared", funnel=False, labels=["long_view", "is_like"])

    with (raw / f"{STANDARD[1]}_pure.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["date"]) >= 20220502]
    rows.sort(key=lambda row: int(row["time_ms"]))
    wanted = [[int(row["long_view"]), int(row["is_like"])] for row in rows]
    assert arrays["test"]["labels"].tolist() == wanted


def test_what_is_known_only_after_the_exposure_is_no_feature(raw, tmp_path):
    manifest, _ = prepare(raw, tmp_path / "prepared")

    after = {"play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_rand"}
    after |= {"is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter"}
    after |= {"is_click", "long_view", "visible_status", "show_cnt", "counts"}
    schema = manifest.schema
    fields = {field.name for field in (*schema.categorical, *schema.multivalued)}
    assert not after & (fields | set(schema.numerical))


def test_the_latest_training_rows_validate_and_the_user_is_group_and_feature(raw, tmp_path):
    made = KuaiRand(raw_dir=raw, dir=tmp_path / "prepared")
    made.prepare()
    made.prepare_data()
    made.setup()

    rows = made.row_numbers
    assert rows["val"].min() == rows["train"].max() + 1
    assert made.test_splits == ["test", "test_random"]
    stored = pl.read_parquet(made.folder / "vocabulary" / "user_id.parquet")
    users = dict(zip(stored["index"], stored["value"].cast(pl.Int64), strict=True))
    fields = [field.name for field in made.schema.categorical]
    features = made.column("val", "categorical")[:, fields.index("user_id")]
    assert [users[index] for index in features] == made.column("val", "group").tolist()


def test_missing_files_are_named_with_the_address(raw, tmp_path):
    (raw / "user_features_pure.csv").unlink()
    (raw / f"{RANDOM}_pure.csv").unlink()
    message = (
        r"raw lacks log_random_4_22_to_5_08_pure\.csv, user_features_pure\.csv of KuaiRand-Pure\. "
        r"Download and unpack .* https://zenodo\.org/records/10439422"
    )

    with pytest.raises(InputError, match=message):
        KuaiRand(raw_dir=tmp_path / "raw", dir=tmp_path / "prepared").prepare()
    with pytest.raises(InputError, match=r"zenodo\.org/records/10439422"):
        KuaiRand(dir=tmp_path / "prepared").prepare_data()
    with pytest.raises(InputError, match=r"data\.raw_dir is not given.*zenodo"):
        KuaiRand(dir=tmp_path / "prepared").prepare()


def test_other_settings_than_those_of_the_set_are_refused(raw, tmp_path):
    prepare(raw, tmp_path / "prepared")

    with pytest.raises(InputError, match="test_days: 7 there, 3 here"):
        KuaiRand(dir=tmp_path / "prepared", test_days=3).prepare_data()
    (raw / f"{RANDOM}_pure.csv").write_text(LOG)
    with pytest.raises(InputError, match="raw: other files or content"):
        KuaiRand(raw_dir=raw, dir=tmp_path / "prepared").prepare_data()


BROKEN = {
    "id": ("a,1,20220410,100,1,1,0,0,0,0,0,1,1,1,0,0,0,0,1\n", "'user_id': an id must be"),
    "date": ("1,1,20220431,100,1,1,0,0,0,0,0,1,1,1,0,0,0,0,1\n", "'date': a date must be"),
    "hour": ("1,1,20220410,2460,1,1,0,0,0,0,0,1,1,1,0,0,0,0,1\n", "'hourmin': an hour must be"),
    "cells": ("1,1,20220410,100\n", "expected 19 values"),
    "label": ("1,1,20220410,100,1,2,0,0,0,0,0,1,1,1,0,0,0,0,1\n", "a label must be 0 or 1"),
}


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_refused_with_its_line_or_skipped_and_counted(raw, tmp_path, line, message):
    path = raw / f"{STANDARD[0]}_pure.csv"
    path.write_text(path.read_text() + line)

    with pytest.raises(InputError, match=rf"{path.name}, line 242.*{message}"):
        prepare(raw, tmp_path / "prepared")
    manifest, _ = prepare(raw, tmp_path / "prepared", on_error="skip")

    assert manifest.report["train_rows_skipped"] == 1
    texts = [(raw / f"{stem}_pure.csv").read_text().splitlines(keepends=True) for stem in STANDARD]
    lines = [row for text in texts for row in text if row != line]
    days = [row.split(",")[2] for row in lines if row != LOG]
    assert manifest.rows["train"] == sum(day < "20220502" for day in days)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("user_features", lambda text: text + text.splitlines()[1] + "\n", "must have one row"),
        ("user_features", lambda text: text + "x" + text.splitlines()[1] + "\n", "an id must be"),
        (
            "video_features_basic",
            lambda text: text.replace("tag", "tags"),
            "lacks the column 'tag'",
        ),
        (RANDOM, lambda text: text.replace("tab\n", "tob\n", 1), "lacks the column 'tab'"),
        (
            RANDOM,
            lambda text: LOG + text.splitlines()[1].replace(",2022", ",2021") + "\n",
            "got none",
        ),
    ],
)
def test_a_damaged_file_is_refused(raw, tmp_path, name, change, message):
    path = raw / f"{name}_pure.csv"
    path.write_text(change(path.read_text()))

    with pytest.raises(InputError, match=message):
        prepare(raw, tmp_path / "prepared")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preset": "2k"}, "data.preset must be one of pure, 1k, 27k; got '2k'"),
        ({"test_days": 18}, "data.test_days must be an integer from 1 to 17, got 18"),
        ({"random_days": "none"}, "data.random_days must be one of test, all"),
        ({"labels": ["is_click", "play_time_ms"]}, "data.labels must be one of is_click"),
        ({"labels": ["is_click"]}, "a funnel must have at least two labels"),
        ({"exclude": ["play_time_ms"]}, "data.exclude must be one of user_id"),
        ({"min_count": 0}, "data.min_count must be an integer >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(raw, tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        prepare(raw, tmp_path / "prepared", **keys)
