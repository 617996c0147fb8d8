"""One value has one text, whatever carries it."""

import datetime as dt
import string
import zoneinfo
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.column import Profile, to_numbers, to_text
from mtnrec.data.raw.tabular import open_source
from mtnrec.data.table import Table
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.serving.encoder import Encoder
from mtnrec.serving.scorer import Scorer

EXACT = 2**53  # the largest integers that a float holds, as pandas' columns with gaps do
WORDS = st.text(string.ascii_letters, min_size=1, max_size=3).map("w".__add__)
MOMENTS = st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))
ROME = zoneinfo.ZoneInfo("Europe/Rome")


def with_gaps(values):
    return st.lists(values | st.none(), min_size=2, max_size=8).filter(
        lambda cells: any(cell is not None for cell in cells)
    )


def without_gaps(values):
    return st.lists(values, min_size=2, max_size=8)


# How pandas holds a column of each type.
COLUMNS = {
    "integer by gaps a float": with_gaps(st.integers(-EXACT, EXACT)).map(
        lambda cells: pd.Series(cells, dtype="float64")
    ),
    "nullable integer": with_gaps(st.integers(-EXACT, EXACT)).map(
        lambda cells: pd.Series(cells, dtype="Int64")
    ),
    "unsigned": without_gaps(st.integers(0, 2**64 - 1)).map(
        lambda cells: pd.Series([*cells, 2**64 - 1], dtype="uint64")
    ),
    "small integer": without_gaps(st.integers(-128, 127)).map(
        lambda cells: pd.Series(cells, dtype="int8")
    ),
    "float": with_gaps(st.integers(-(10**7), 10**7)).map(
        lambda cells: pd.Series([None if x is None else x / 1000 for x in cells], dtype="float64")
    ),
    "large float": with_gaps(st.integers(-99, 99)).map(
        lambda cells: pd.Series([None if x is None else x * 1e17 for x in cells], dtype="float64")
    ),
    "float32": with_gaps(st.integers(-9999, 9999)).map(
        lambda cells: pd.Series([None if x is None else x / 100 for x in cells], dtype="float32")
    ),
    "float16": without_gaps(st.integers(-99, 99)).map(
        lambda cells: pd.Series([x / 4 for x in cells], dtype="float16")
    ),
    "decimal": with_gaps(st.decimals(-9999, 9999, places=2)).map(
        lambda cells: pd.Series([*cells, Decimal("1.10")], dtype="object")
    ),
    "boolean": without_gaps(st.booleans()).map(lambda cells: pd.Series(cells, dtype="bool")),
    "boolean by gaps an object": with_gaps(st.booleans()).map(
        lambda cells: pd.Series(cells, dtype="object")
    ),
    "nullable boolean": with_gaps(st.booleans()).map(
        lambda cells: pd.Series(cells, dtype="boolean")
    ),
    "date": without_gaps(st.dates(dt.date(1700, 1, 1), dt.date(2200, 1, 1))).map(
        lambda cells: pd.Series(cells, dtype="object")
    ),
    "midnights": with_gaps(st.dates(dt.date(1700, 1, 1), dt.date(2200, 1, 1))).map(
        lambda cells: pd.Series(pd.to_datetime(pd.Series(cells))).astype("datetime64[ns]")
    ),
    "moment": with_gaps(MOMENTS).map(lambda cells: pd.Series(cells, dtype="datetime64[us]")),
    "moment with a zone": with_gaps(MOMENTS).map(
        lambda cells: pd.Series(cells, dtype="datetime64[us]").dt.tz_localize("UTC")
    ),
    # Before 1900 its offset had seconds, which polars does not write.
    "moment in Rome": with_gaps(st.datetimes(dt.datetime(1950, 1, 1), dt.datetime(2200, 1, 1))).map(
        lambda cells: (
            pd.Series(cells, dtype="datetime64[ms]").dt.tz_localize("UTC").dt.tz_convert(ROME)
        )
    ),
    "text": with_gaps(WORDS).map(lambda cells: pd.Series(cells, dtype="object")),
    "nullable text": with_gaps(WORDS).map(lambda cells: pd.Series(cells, dtype="string")),
    "category": with_gaps(WORDS).map(lambda cells: pd.Series(cells, dtype="category")),
    "category of integers": with_gaps(st.integers(0, 9)).map(
        lambda cells: pd.Series(cells, dtype="Int64").astype("category")
    ),
}


def carriers(frame, folder):
    """The same rows in files and frames, by the tools that write and read them."""
    rows = pl.from_pandas(frame, nan_to_null=True)
    pandas_csv, polars_csv = folder / "pandas.csv", folder / "polars.csv"
    frame.to_csv(pandas_csv, index=False)
    rows.write_csv(polars_csv)
    frame.to_parquet(folder / "pandas.parquet", index=False)
    rows.write_parquet(folder / "polars.parquet")
    return {
        "csv": pandas_csv,
        "csv of polars": polars_csv,
        "Parquet": folder / "pandas.parquet",
        "Parquet of polars": folder / "polars.parquet",
        "pandas": frame,
        "polars": rows,
        "pyarrow": rows.to_arrow(),
        "pandas.read_csv": pd.read_csv(pandas_csv),
        "texts": pd.read_csv(pandas_csv, dtype=str),
        "pandas.read_parquet": pd.read_parquet(folder / "pandas.parquet"),
    }


def read(table):
    source = open_source("table", table)
    return pl.concat([chunk.frame for chunk in source.chunks(["x"], BadRows("refuse"))])["x"]


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_value_has_the_same_text_and_number_from_any_carrier(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carriers")

    @settings(max_examples=6, deadline=None, database=None, phases=[Phase.generate])
    @given(COLUMNS[kind])
    def check(column):
        # A second column, since pandas leaves out a line whose only cell is missing.
        frame = pd.DataFrame({"x": column, "y": "y"})
        columns = {name: read(table) for name, table in carriers(frame, folder).items()}
        texts = {name: to_text(column).to_list() for name, column in columns.items()}
        numbers = {name: to_numbers(column).to_list() for name, column in columns.items()}

        assert texts == dict.fromkeys(texts, texts["Parquet"])
        assert numbers == dict.fromkeys(numbers, numbers["Parquet"])
        assert texts["csv"].count(None) == column.isna().sum()

    check()


@pytest.fixture
def every_kind():
    """A column of each kind, 40 rows."""
    rng = np.random.default_rng(0)
    columns = {
        "integer by gaps a float": pd.Series(rng.choice([3, 40, np.nan], 40)),
        "nullable integer": pd.Series(pd.array(rng.choice([7, 8, None], 40), dtype="Int64")),
        "unsigned": pd.Series(rng.choice(np.array([2**64 - 1, 2**64 - 2], "uint64"), 40)),
        "boolean": pd.Series(rng.random(40) < 0.5),
        "boolean by gaps an object": pd.Series(rng.choice([True, False, None], 40)),
        "moment": pd.Series(rng.choice(pd.date_range("2024-01-01", periods=3, freq="7h"), 40)),
        "midnight": pd.Series(rng.choice(pd.date_range("2024-01-01", periods=3), 40)),
        "zone": pd.Series(rng.choice(pd.date_range("2024-01-01", periods=3), 40)).dt.tz_localize(
            "Europe/Rome"
        ),
        "category": pd.Series(rng.choice(["a", "b"], 40), dtype="category"),
        "level": pd.Series(rng.choice([Decimal("2.50"), Decimal("3.00")], 40)),
        "price": pd.Series(rng.choice([Decimal("2.51"), Decimal("3.10"), None], 40)),
        "rate": pd.Series(rng.random(40).round(3).astype(np.float32)),
    }
    return pd.DataFrame(columns | {"click": [0, 1] * 20})


def test_the_prepared_set_and_the_scores_are_the_same_bits_from_any_carrier(every_kind, tmp_path):
    features = [name for name in every_kind if name != "click"]
    categorical, numerical = features[:-2], features[-2:]
    prepared, scores, scorer = {}, {}, None
    for name, train in carriers(every_kind, tmp_path).items():
        folder = tmp_path / name
        keys = {"labels": ["click"], "categorical": categorical, "numerical": numerical}
        manifest = Table(train=train, **keys, fill="mean", dir=folder).prepare()
        prepared[name] = manifest.schema, manifest.transforms, manifest.checksums
        if scorer is None:
            vocabularies = {
                field: pl.read_parquet(folder / "vocabulary" / f"{field}.parquet")["value"]
                for field in categorical
            }
            encoder = Encoder(manifest.schema, vocabularies, manifest.transforms)
            network = SharedBottom(
                manifest.schema, embedding_dim=4, bottom_widths=[8], tower_widths=[4]
            )
            scorer = Scorer(network.eval(), manifest, encoder, torch.device("cpu"))
        chunks = open_source("table", train).chunks(features, BadRows("refuse"))
        rows = pl.concat([chunk.frame for chunk in chunks])
        scores[name] = scorer.score_raw(rows, str, 64).tobytes()
        if hasattr(train, "__arrow_c_stream__"):
            assert scorer.score(train).to_numpy().tobytes() == scores[name]

    assert prepared == dict.fromkeys(prepared, prepared["csv"])
    assert scores == dict.fromkeys(scores, scores["csv"])
    assert np.unique(np.frombuffer(scores["csv"], np.float32)).size > 30


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["3", "3.0", "3.", "3.00"], ["3"] * 4),
        (["2.5", "2.50", "25e-1"], ["2.5", "2.5", "25e-1"]),
        (["-0.0", "0.0", "-0"], ["0", "0", "-0"]),
        (["1e16", "1e+16", "1.0E16"], ["1" + "0" * 16] * 3),
        (["9007199254740993.0", "18446744073709551615"], ["9007199254740993", str(2**64 - 1)]),
        (["True", "TRUE", "true", "tRUE"], ["true", "true", "true", "tRUE"]),
        (["NaN", "nan", "NA"], [None, "nan", "NA"]),
        # Codes are not numbers.
        (["007", "07", "+1", " 1", "1 "], ["007", "07", "+1", " 1", "1 "]),
        (["1e5", "0e12", "1E9", "12e4", "1.2.3"], ["1e5", "0e12", "1E9", "12e4", "1.2.3"]),
        (["2024-03-01", "2024-03-01 00:00", "2024-03-01T00:00:00.000Z"], ["2024-03-01"] * 3),
        (
            ["2024-03-01 10:00:00+00:00", "2024-03-01T11:00:00.0+0100", "2024-03-01 10:00 UTC"],
            ["2024-03-01 10:00:00"] * 3,
        ),
        (["2024-03-01 00:30:00.250+01:00", "2024-99-01 10:00"], ["2024-02-29 23:30:00.25", None]),
    ],
)
def test_texts_are_canonical(cells, expected):
    expected = [cell if text is None and cell != "NaN" else text
                for cell, text in zip(cells, expected, strict=True)]  # fmt: skip

    assert to_text(pl.Series(cells)).to_list() == expected
    assert to_text(pl.Series(expected)).to_list() == expected


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_the_unit_of_a_moment_does_not_matter(unit):
    moments = pl.Series([dt.datetime(2024, 3, 1), dt.datetime(2024, 3, 1, 10, 0, 0, 250_000)])

    texts = to_text(moments.cast(pl.Datetime(unit)))

    assert texts.to_list() == ["2024-03-01", "2024-03-01 10:00:00.25"]


def profile(cells):
    found = Profile()
    for first in range(0, len(cells), 7):
        found.update(pl.Series(cells[first : first + 7]), lambda row, first=first: str(first + row))
    return found


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, 2, None], "integer"),
        ([1.0, 2.0, None], "integer"),
        (["1.0", "2.0", None], "integer"),
        ([Decimal("1.00"), Decimal("2.00")], "integer"),
        ([1.0, 2.5], "number"),
        (["1", "2.5"], "number"),
        (["1", "007"], "text"),
        (["True", "FALSE"], "boolean"),
        ([True, None], "boolean"),
        (["2024-01-01", "2024-01-01 10:00:00+00:00"], "date"),
        ([None, None], "empty"),
        ([[1, 2], [3]], "list"),
        (["a", "1"], "text"),
    ],
)
def test_the_kind_is_that_of_the_values_not_of_their_type(cells, kind):
    assert profile(cells).kind == kind


@pytest.mark.parametrize("word", ["NULL", "NA", r"\N", "None", "n/a", "-", "1_000", "5 ", "1,0"])
def test_a_word_among_numbers_is_found_with_its_place(word):
    cells = [str(row / 10) for row in range(60)]
    cells[30] = word

    found = profile(cells).word

    assert found.value == word
    assert (found.place, found.kind) == ("30", "number")


@pytest.mark.parametrize(
    "cells", [["a", "b", "1"], ["007", "12", "x"], ["1", "2"], ["1.2.3", "1.2"]]
)
def test_texts_with_some_numbers_have_no_word(cells):
    assert profile(cells).word is None


def test_distinct_values_of_many_rows_are_unique_until_one_repeats():
    cells = [f"u{row}" for row in range(200)]

    assert profile(cells).is_unique
    assert not profile([*cells, "u3"]).is_unique
    assert not profile(cells[:90]).is_unique  # too few to tell


@settings(max_examples=100, deadline=None, database=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_and_its_spellings_are_one_value(value):
    typed = to_text(pl.Series([value])).to_list()

    spellings = [repr(value), pl.Series([value]).cast(pl.String)[0], f"{np.float64(value)}"]

    assert to_text(pl.Series(spellings)).to_list() == 3 * typed
    assert float(typed[0]) == value
