"""Kept scores, read back by a reader that knows the file's format alone."""

import hashlib

import numpy as np
import polars
import pytest

from mtnrec.checks import InputError
from mtnrec.run import scores as module
from mtnrec.run.scores import Scores, read_scores, scores_file, write_scores

ROWS = 1000


@pytest.fixture
def kept():
    rng = np.random.default_rng(0)
    click = rng.random(ROWS) < 0.3
    buy = click & (rng.random(ROWS) < 0.4)
    scores = {task: rng.normal(size=ROWS).astype(np.float32) for task in ("ctr", "cvr")}
    scores["cvr"][~click] = np.nan
    return Scores(scores, {"ctr": click, "cvr": buy}, np.sort(rng.integers(-(2**62), 2**62, ROWS)))


def assert_same(found, expected):
    assert list(found.scores) == list(expected.scores)
    for task, scores in expected.scores.items():
        np.testing.assert_array_equal(found.scores[task], scores, strict=True)
        np.testing.assert_array_equal(found.labels[task], expected.labels[task], strict=True)


def test_what_is_read_has_the_bits_of_what_was_written(kept, tmp_path):
    found = read_scores(tmp_path, "test", write_scores(tmp_path, "test", kept))

    assert_same(found, kept)
    np.testing.assert_array_equal(found.groups, kept.groups, strict=True)
    assert [path.name for path in scores_file(tmp_path, "test").parent.iterdir()] == [
        "test.parquet"
    ]


def test_another_parquet_reader_finds_the_rows_in_order_and_nulls_where_nothing_is_measured(
    kept, tmp_path
):
    write_scores(tmp_path, "july", kept)

    frame = polars.read_parquet(tmp_path / "scores" / "july.parquet")

    measured = frame["score/cvr"].is_not_null().to_numpy()
    np.testing.assert_array_equal(measured, kept.labels["ctr"])
    assert frame["label/cvr"].to_list() == [
        bool(bought) if clicked else None
        for clicked, bought in zip(kept.labels["ctr"], kept.labels["cvr"], strict=True)
    ]
    np.testing.assert_array_equal(frame["score/ctr"], kept.scores["ctr"])
    np.testing.assert_array_equal(frame["group"], kept.groups)


def test_data_without_groups_have_none(kept, tmp_path):
    sha256 = write_scores(tmp_path, "test", Scores(kept.scores, kept.labels, None))

    assert read_scores(tmp_path, "test", sha256).groups is None


@pytest.mark.parametrize("place", [0, 300, -1])
def test_a_file_with_another_byte_is_refused(place, kept, tmp_path):
    sha256 = write_scores(tmp_path, "test", kept)
    path = scores_file(tmp_path, "test")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    with pytest.raises(InputError, match="its bytes are not those that the run wrote"):
        read_scores(tmp_path, "test", sha256)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PAR1", "is not the file of scores that the run wrote"), (b"", "is not the file")],
)
def test_a_file_that_is_not_parquet_is_refused(content, message, tmp_path):
    path = scores_file(tmp_path, "test")
    path.parent.mkdir()
    path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_scores(tmp_path, "test", hashlib.sha256(content).hexdigest())


def write_frame(folder, columns):
    path = scores_file(folder, "test")
    path.parent.mkdir()
    polars.DataFrame(columns).write_parquet(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


SCORE, LABEL = polars.Series([0.5], dtype=polars.Float32), polars.Series([True])


@pytest.mark.parametrize(
    "columns",
    [
        {"group": [1]},
        {"score/ctr": SCORE},
        {"score/ctr": SCORE, "label/ctr": [1]},
        {"score/ctr": ["0.5"], "label/ctr": LABEL},
        {"score/ctr": SCORE, "label/ctr": LABEL, "group": ["ann"]},
        {"score/ctr": SCORE, "label/ctr": LABEL, "other": [1]},
    ],
)
def test_a_file_with_other_columns_is_refused(columns, tmp_path):
    sha256 = write_frame(tmp_path, columns)

    with pytest.raises(InputError, match=r"its columns are .*resume=false, or report with"):
        read_scores(tmp_path, "test", sha256)


def test_a_row_without_a_group_is_refused(tmp_path):
    group = polars.Series([None], dtype=polars.Int64)
    sha256 = write_frame(tmp_path, {"score/ctr": SCORE, "label/ctr": LABEL, "group": group})

    with pytest.raises(InputError, match="the column group has nulls"):
        read_scores(tmp_path, "test", sha256)


def test_a_small_file_of_many_rows_is_refused_before_it_is_read(tmp_path, monkeypatch):
    rows = 10**6
    columns = {
        "score/ctr": SCORE.new_from_index(0, rows),
        "label/ctr": LABEL.new_from_index(0, rows),
    }
    sha256 = write_frame(tmp_path, columns)
    assert scores_file(tmp_path, "test").stat().st_size < 10**5
    monkeypatch.setattr(module, "memory_bytes", lambda: 10**7)

    with pytest.raises(InputError, match=r"must fit in memory, got 1,000,000 rows.*resamples=0"):
        read_scores(tmp_path, "test", sha256)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"test\.parquet is not the file.*No such file"):
        read_scores(tmp_path, "test", "abc")
