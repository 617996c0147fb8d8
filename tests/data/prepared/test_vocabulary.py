"""Vocabularies against pandas and a dictionary."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from mtnrec.data.prepared import vocabulary as vocabulary_module
from mtnrec.data.prepared import writer as writer_module
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.vocabulary import ValueCounts, encode_in_place
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.schema import CategoricalField, Schema

INT32 = np.iinfo(np.int32)


def vocabulary_of(*chunks, **limits):
    counts = ValueCounts()
    for chunk in chunks:
        counts.update(np.array(chunk, np.int32))
    return counts.vocabulary(**limits)


@pytest.fixture(params=[0, 1 << 26], ids=["searched", "tabulated"])
def _largest_table(request, monkeypatch):
    """Both ways to look a value up."""
    monkeypatch.setattr(vocabulary_module, "_LARGEST_TABLE", request.param)


pytestmark = pytest.mark.usefixtures("_largest_table")


def test_values_are_numbered_from_one_in_ascending_order():
    column = np.random.default_rng(0).integers(-50, 50, 300).astype(np.int32)

    indices = vocabulary_of(column).encode(column)

    np.testing.assert_array_equal(indices, pd.Categorical(column).codes + 1)
    assert indices.dtype == np.int32


def test_unseen_values_have_index_zero():
    vocabulary = vocabulary_of([30, 10, 30])

    # Below, between and above what was seen.
    indices = vocabulary.encode(np.array([9, 10, 11, 30, 31, 0], np.int32))

    assert indices.tolist() == [0, 1, 0, 2, 0, 0]


def test_the_extremes_of_int32_are_values():
    column = np.array([INT32.max, -1, INT32.min, 0], np.int32)

    assert vocabulary_of(column).encode(column).tolist() == [4, 2, 1, 3]
    assert vocabulary_of([0]).encode(column).tolist() == [0, 0, 0, 1]


def test_chunks_and_their_order_do_not_matter():
    column = np.random.default_rng(0).integers(0, 40, 200).astype(np.int32)

    chunks = np.array_split(column, 7)

    expected = np.unique(column)
    for vocabulary in (vocabulary_of(*chunks), vocabulary_of(*chunks[::-1]), vocabulary_of(column)):
        np.testing.assert_array_equal(vocabulary.values, expected, strict=True)


@pytest.mark.parametrize("merge_from", [1, 1 << 20])
def test_values_below_the_cut_off_have_no_index(monkeypatch, merge_from):
    monkeypatch.setattr(vocabulary_module, "_SMALLEST_MERGE", merge_from)
    column = np.random.default_rng(0).integers(-1, 30, 300).astype(np.int32)

    vocabulary = vocabulary_of(*np.array_split(column, 9), min_count=10, missing=-1)

    counts = pd.Series(column).value_counts()
    expected = sorted(value for value in counts.index[counts >= 10] if value != -1)
    assert vocabulary.values.tolist() == expected
    assert vocabulary.size == len(expected) + 1


def test_a_value_may_count_for_many_rows():
    counts = ValueCounts()
    values, rows = np.array([5, 7, 5, 9], np.int32), np.array([2, 3, 2, 0])

    counts.update(values, rows)
    counts.update(np.array([], np.int32), np.array([], np.int64))

    assert counts.vocabulary(min_count=4).values.tolist() == [5]
    assert counts.vocabulary(min_count=3).values.tolist() == [5, 7]


@pytest.mark.parametrize("rows", [0, 5])
def test_without_training_rows_every_value_is_unseen(rows):
    assert vocabulary_of([]).encode(np.arange(rows, dtype=np.int32)).tolist() == [0] * rows


def test_the_table_leads_from_index_to_value(tmp_path):
    column = np.array([7, INT32.min, 7, 3], np.int32)
    vocabulary = vocabulary_of(column)

    field = vocabulary.write(tmp_path, "brand")

    assert field == CategoricalField("brand", 4)
    table = pl.read_parquet(tmp_path / "vocabulary" / "brand.parquet")
    assert table.rows() == [(INT32.min, 1), (3, 2), (7, 3)]
    assert table.columns == ["value", "index"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bytes_per_chunk", [1, 24, 1000])
def test_encoding_in_place_replaces_every_raw_value(
    tmp_path, monkeypatch, bytes_per_chunk, threads
):
    monkeypatch.setattr(writer_module, "_BYTES_PER_CHUNK", bytes_per_chunk)
    rng = np.random.default_rng(0)
    raw = {split: rng.integers(-3, 9, (20, 2)).astype(np.int32) for split in ("train", "test")}
    vocabularies = [vocabulary_of(column) for column in raw["train"].T]

    with write_prepared(tmp_path / "set", ("train", "test")) as writer:
        for split, categorical in raw.items():
            writer.append(split, {"categorical": categorical})
            writer.append(
                split, {"numerical": np.empty((20, 0)), "labels": np.arange(20)[:, None] % 2}
            )
        names = ("shop", "brand")
        fields = encode_in_place(writer, ("train", "test"), names, vocabularies, threads=threads)
        schema = Schema(fields, (), ("click",), funnel=False)
        writer.finish(source="tiny", parameters={}, schema=schema, report={})

    _, arrays = open_prepared(tmp_path / "set")
    for column, name in enumerate(("shop", "brand")):
        seen = sorted(set(raw["train"][:, column].tolist()))
        index = {value: position for position, value in enumerate(seen, start=1)}
        assert fields[column] == CategoricalField(name, len(seen) + 1)
        assert (tmp_path / "set" / "vocabulary" / f"{name}.parquet").is_file()
        for split in raw:
            expected = [index.get(value, 0) for value in raw[split][:, column].tolist()]
            assert arrays[split]["categorical"][:, column].tolist() == expected
