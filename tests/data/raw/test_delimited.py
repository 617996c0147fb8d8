"""Strict reading against Python's own parsing of each cell."""

import gzip
import zlib

import numpy as np
import polars as pl
import pytest

from mtnrec.checks import InputError
from mtnrec.data.raw import blocks
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import read_blocks
from mtnrec.data.raw.delimited import Rows, read_delimited

TYPES = {"shop": pl.Int32, "price": pl.Float64, "click": pl.Int64}
HEADER = "shop,price,click\n"
GOOD = "".join(f"{row},0.{row},{row % 2}\n" for row in range(10))


@pytest.fixture(autouse=True)
def _blocks_of_a_few_rows(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.csv"


def read(path, text, *, on_error="refuse", has_header=True):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with path.open("rb") as stream:
        blocks = read_blocks(stream, str(path))
        bad_rows = BadRows(on_error)
        parts = list(read_delimited(blocks, TYPES, bad_rows, has_header=has_header))
    lines = [line for part in parts for line in part.lines.tolist()]
    return lines, [row for part in parts for row in part.frame.rows()]


def test_cells_equal_pythons_own_parsing(path):
    rng = np.random.default_rng(0)
    cells = [
        (str(shop), repr(float(price)), str(click))
        for shop, price, click in zip(
            [*rng.integers(-(2**31), 2**31, 50), 2**31 - 1, -(2**31)],
            [*rng.random(50) * 10.0 ** rng.integers(-30, 30, 50), 5e-324, 1.7976931348623157e308],
            [*rng.integers(-(2**63), 2**63 - 1, 50), 2**63 - 1, -(2**63)],
            strict=True,
        )
    ]

    _, rows = read(path, HEADER + "".join(",".join(row) + "\n" for row in cells))

    assert rows == [(int(shop), float(price), int(click)) for shop, price, click in cells]


def test_columns_come_in_the_order_of_the_types(path):
    _, rows = read(path, "click,shop,price\n1,7,0.5\n0,8,0.25\n")

    assert rows == [(7, 0.5, 1), (8, 0.25, 0)]


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_rows_know_their_line(path, monkeypatch, block_bytes):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)

    lines, rows = read(path, HEADER + GOOD)

    assert lines == list(range(2, 12))
    assert [shop for shop, _, _ in rows] == list(range(10))


def test_without_a_header_the_columns_are_those_of_the_types(path):
    lines, rows = read(path, GOOD, has_header=False)

    assert lines == list(range(1, 11))
    assert (lines, rows) == (
        [line - 1 for line in read(path, HEADER + GOOD)[0]],
        read(path, HEADER + GOOD)[1],
    )


@pytest.mark.parametrize("has_header", [True, False])
def test_bad_rows_are_skipped_and_the_others_keep_their_lines(path, has_header):
    text = GOOD.replace("3,0.3,1", "x,0.3,1").replace("7,0.7,1", "7,0.7").replace("9,0.9,1", "")

    lines, rows = read(path, HEADER * has_header + text, on_error="skip", has_header=has_header)

    kept = [0, 1, 2, 4, 5, 6, 8]
    assert [shop for shop, _, _ in rows] == kept
    assert lines == [shop + 1 + has_header for shop in kept]


def test_a_file_whose_rows_are_all_bad_gives_no_rows_on_demand(path):
    assert read(path, HEADER + "x,y,z\n" * 9, on_error="skip") == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r\n")[:-2],
    ],
)
def test_line_ends_of_other_systems_and_a_missing_last_one_are_read(path, change):
    assert read(path, change(HEADER + GOOD)) == read(path, HEADER + GOOD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty\. Download it again, or regenerate"),
        ("\n" + HEADER + GOOD, "must start with a header, got an empty line"),
        (HEADER, r"has a header but no rows\. Download it again, or regenerate"),
        (HEADER[:-1], r"has a header but no rows\. Download it again, or regenerate"),
        (GOOD, "lacks the column 'shop', 'price', 'click'; its header has '0', '0.0'"),
        ("shop,click\n1,0\n", "lacks the column 'price'; its header has 'shop', 'click'"),
        ("shop,price,click,size\n1,2,0,1\n", r"has an unknown column 'size'\. Delete it"),
        ("shop,price,click,\n1,2,0,1\n", r"has an unknown column ''\. Delete it"),
        ("shop,price,click,shop\n1,2,0,1\n", r"names the column 'shop' twice\. Delete one"),
        ("\ufeff" + HEADER + GOOD, r"lacks the column 'shop'; its header has '\\ufeffshop'"),
        (HEADER.replace(",", ";") + GOOD, "lacks the column .*; its header has 'shop;price;click'"),
    ],
)
def test_a_wrong_header_is_refused(path, text, message):
    with pytest.raises(InputError, match=f"{path} {message}"):
        read(path, text)


def test_a_long_header_is_shortened(path):
    header = ",".join(f"x{column}" for column in range(99))

    with pytest.raises(InputError, match=r"its header has 'x0', .*'x4', … \(99 in all\)$"):
        read(path, header + "\n")


BAD_CELLS = [
    ("shop", "integer", ["", "x", "1.0", "1e3", "1_0", '"1"', "1 ", "NA", "null", "-", "true"]),
    ("shop", "integer", ["2147483648", "-2147483649"]),
    ("price", "number", ["", "x", "1_0.5", '"1"', "0.5 ", "1;5", "NA", "null", "0x1", "true"]),
    ("click", "integer", ["", "0.0", "9223372036854775808"]),
]


@pytest.mark.parametrize(
    ("column", "kind", "cell"),
    [(column, kind, cell) for column, kind, cells in BAD_CELLS for cell in cells],
)
def test_a_bad_cell_beyond_the_first_chunk_is_named(path, column, kind, cell):
    row = {"shop": "1", "price": "0.5", "click": "1"} | {column: cell}
    text = HEADER + GOOD + ",".join(row.values()) + "\n" + GOOD

    message = rf"{path}, line 12: column '{column}': expected an? {kind}, got {cell!r}\. Set"
    with pytest.raises(InputError, match=message):
        read(path, text)


@pytest.mark.parametrize(
    ("row", "values"),
    [("", 0), ("1", 1), ("1,0.5", 2), ("1,0.5,1,", 4), ("1,0.5,1,7", 4), ("1,0.5,1\r2,0.5,1", 5)],
)
@pytest.mark.parametrize("before", [0, 10])
@pytest.mark.parametrize("after", [0, 10])
def test_a_row_of_another_length_is_named(path, row, values, before, after):
    text = HEADER + "1,0.5,1\n" * before + row + "\n" + "1,0.5,1\n" * after

    message = (
        f"{path}, line {2 + before}: expected 3 values .the row is truncated or malformed., "
        rf"got {values}\. Set data.on_error=skip"
    )
    with pytest.raises(InputError, match=message):
        read(path, text)


@pytest.mark.parametrize("cut", range(1, len("12,0.5,")))
def test_a_file_that_ends_inside_a_row_is_refused(path, cut):
    text = HEADER + GOOD + "12,0.5,1"[: cut + 1]

    with pytest.raises(InputError, match=f"{path}, line 12.*"):
        read(path, text)


def test_the_bad_cell_is_named_although_others_before_it_look_odd(path):
    # The reader takes leading blanks, signs and exponents for numbers.
    text = HEADER + " 1,+.5,1\n1, 5e-1,+0\n" + "x,0.5,1\n"

    with pytest.raises(InputError, match="line 4: column 'shop': expected an integer, got 'x'"):
        read(path, text)


def test_a_block_of_zero_bytes_is_refused(path):
    # What an interrupted download may leave; longer than the csv module takes a cell to be.
    with pytest.raises(InputError, match=r"line 12: expected 3 values .*, got 1\."):
        read(path, (HEADER + GOOD).encode() + bytes(200_000))


def test_a_long_bad_cell_is_shortened(path):
    with pytest.raises(InputError, match=r"column 'price': expected a number, got 'x{40}'\."):
        read(path, HEADER + f"1,{'x' * 1000},1\n")


def test_text_of_another_encoding_is_refused(path):
    with pytest.raises(InputError, match="line 12: column 'shop': expected an integer"):
        read(path, (HEADER + GOOD).encode() + b"\xe9,0.5,1\n")


@pytest.mark.parametrize("packed", [zlib.compress, gzip.compress, lambda text: b"x\x01" + text])
def test_a_block_that_begins_as_a_compressed_stream_is_not_inflated(path, packed, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 20)

    with pytest.raises(InputError, match=r"line 1: (expected 3 values|column 'shop': expected)"):
        read(path, packed(GOOD.encode() * 1000) + b"\n", has_header=False)


def test_the_first_row_that_breaks_a_rule_is_named():
    rows = Rows("train.csv", np.array([100, 101, 103, 104]), pl.DataFrame())
    bad, values = np.array([False, False, True, True]), np.array([0, 1, 7, 8])

    with pytest.raises(InputError, match=r"^train\.csv, line 103: clicks must be 0 or 1, got 7\."):
        rows.refuse(bad, "clicks must be 0 or 1", values, BadRows("refuse"))


def test_rows_that_break_a_rule_are_counted_on_demand_and_the_first_is_shown(caplog):
    rows = Rows("train.csv", np.array([100, 101, 103, 104]), pl.DataFrame())
    bad_rows = BadRows("skip")

    rows.refuse(np.array([0, 0, 1, 1], bool), "must be 0 or 1", np.array([0, 1, 7, 8]), bad_rows)
    rows.refuse(np.zeros(4, bool), "must be 0 or 1", np.zeros(4), bad_rows)

    assert bad_rows.count == 2
    assert caplog.messages == []
    bad_rows.warn()
    assert caplog.messages == [
        "skipped 2 rows; the first: train.csv, line 103: must be 0 or 1, got 7"
    ]
