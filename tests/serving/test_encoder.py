"""Vocabularies that are not those of their fields are refused."""

import io

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnrec.checks import InputError
from mtnrec.data.raw import tabular as source
from mtnrec.schema import CategoricalField, Schema
from mtnrec.serving.encoder import Encoder, read_vocabularies

SCHEMA = Schema((CategoricalField("shop", 4),), (), ("click",), funnel=False)
WHOLE = {"value": pl.Series([3, 5, 9], dtype=pl.Int32), "index": [1, 2, 3]}


def file_of(columns):
    file = io.BytesIO()
    pl.DataFrame(columns).write_parquet(file)
    file.seek(0)
    return file


def make(file):
    return Encoder(SCHEMA, read_vocabularies({"shop": file}), {})


BAGS = Schema((), (), ("click",), funnel=False, multivalued=(CategoricalField("tags", 4),))


def encode_bags(**columns):
    encoder = Encoder(BAGS, {"tags": pl.Series(["1", "2", "3"])}, {})
    (bags,) = encoder.encode(pl.DataFrame(columns), "row {}".format).bags
    return bags


def test_the_items_of_a_list_have_one_text_whatever_stores_them():
    lists = pl.Series([[1, 3], None, [2]])
    for dtype in (pl.Int64, pl.UInt8, pl.Float32, pl.Decimal(9, 2), pl.String):
        assert encode_bags(tags=lists.cast(pl.List(dtype))).tokens.tolist() == [1, 3, 2]
    categories = lists.cast(pl.List(pl.String)).cast(pl.List(pl.Categorical))
    assert encode_bags(tags=categories).tokens.tolist() == [1, 3, 2]
    assert encode_bags(tags=pl.Series([None, None])).offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tags": ["1", "2"]}, "column 'tags' must hold lists, .* got String"),
        ({"tags": [["1"], ["2", None]]}, "row 1, column 'tags': a list must not hold missing"),
        (
            {"tags": [["1"], ["2", "3"]], "tags_weights": [[1.0], [0.5, None]]},
            "row 1, column 'tags_weights': a number must be finite in 32 bits, got None",
        ),
        (
            {"tags": [["1"], ["2", "3"]], "tags_weights": [[1.0], [float("nan"), 1.0]]},
            "row 1, column 'tags_weights': a number must be finite in 32 bits, got nan",
        ),
        (
            {"tags": [["1"], ["2", "3"]], "tags_weights": [[1.0], [0.5, 1e39]]},
            "row 1, column 'tags_weights': a number must be finite in 32 bits, got 1e",
        ),
        (
            {"tags": [["1"], ["2", "3"]], "tags_weights": [[1.0], [0.5]]},
            "row 1: the lists 'tags' and 'tags_weights' differ in length",
        ),
    ],
)
def test_lists_that_cannot_be_encoded_are_named(columns, message):
    with pytest.raises(InputError, match=message):
        encode_bags(**columns)


@pytest.mark.parametrize(
    "value",
    [
        pl.Series([3, 5], dtype=pl.Int32),
        pl.Series([3, 5, 9, 11], dtype=pl.Int32),
        pl.Series([3, 9, 5], dtype=pl.Int32),
        pl.Series([3, 3, 9], dtype=pl.Int32),
        pl.Series([None, 5, 9], dtype=pl.Int32),
        pl.Series([3, 5, 9], dtype=pl.Int64),
        pl.Series([0.5, 1, 2]),
        pl.Series([[1], [2], [3]]),
        pl.Series([{"a": 1}] * 3),
        pl.Series([b"a", b"b", b"c"]),
    ],
)
def test_values_that_are_not_those_of_the_field_are_refused(value):
    index = pl.Series(range(1, len(value) + 1))

    with pytest.raises(InputError, match=r"the vocabulary of 'shop' is damaged: it must hold 3"):
        make(file_of({"value": value, "index": index}))


@pytest.mark.parametrize("columns", [{"value": [1]}, {"index": [1]}, {"index": [], "value": []}])
def test_a_table_without_its_columns_or_values_is_refused(columns):
    with pytest.raises(InputError, match=r"the vocabulary of 'shop' (cannot be read|is damaged)"):
        make(file_of(columns))


def test_a_vocabulary_that_exceeds_the_memory_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(source, "memory_bytes", lambda: 100)

    with pytest.raises(InputError, match="the vocabulary of 'shop' has a row group of 6 values"):
        make(file_of(WHOLE))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 900), put=st.binary(min_size=1, max_size=6), end=st.none() | st.just(300))
def test_no_bytes_lead_to_another_error(at, put, end):
    whole = file_of(WHOLE).getvalue()
    damaged = (whole[:at] + put + whole[at + len(put) :])[:end]

    try:
        encoder = make(io.BytesIO(damaged))
    except InputError:
        return
    batch = encoder.encode(pl.DataFrame({"shop": [3, 4]}), str)
    assert all(0 <= index < 4 for index in batch.categorical[:, 0].tolist())
