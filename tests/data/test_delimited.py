"""Strict reading against Python's own parsing of each cell."""

import numpy as np
import polars as pl
import pytest

from mtnrec.checks import InputError
from mtnrec.data import delimited
from mtnrec.data.delimited import read_delimited, refuse_rows

TYPES = {"shop": pl.Int32, "price": pl.Float64, "click": pl.Int64}
HEADER = "shop,price,click\n"
GOOD = "".join(f"{row},0.{row},{row % 2}\n" for row in range(10))


@pytest.fixture(autouse=True)
def _chunks_of_four_rows(monkeypatch):
    monkeypatch.setattr(delimited, "_ROWS_PER_CHUNK", 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.csv"


def read(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    chunks = list(read_delimited(path, TYPES))
    return [line for line, _ in chunks], [row for _, frame in chunks for row in frame.rows()]


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


def test_chunks_know_their_first_line(path):
    lines, rows = read(path, HEADER + GOOD)

    assert len(lines) > 1
    assert [rows[line - 2][0] for line in lines] == [line - 2 for line in lines]
    assert len(rows) == 10


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


@pytest.mark.parametrize("name", ["part[1].csv", "train*.csv", "what?.csv"])
def test_no_sign_of_a_path_is_a_pattern(tmp_path, name):
    (tmp_path / "train1.csv").write_text(HEADER + "0,0,0\n")

    _, rows = read(tmp_path / name, HEADER + GOOD)

    assert len(rows) == 10


def test_a_missing_file_is_refused(path):
    with pytest.raises(InputError, match=f"{path} is missing"):
        list(read_delimited(path, TYPES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or starts with an empty line: a header is expected"),
        ("\n" + HEADER + GOOD, "is empty or starts with an empty line"),
        (HEADER, "has a header and no rows: the file is not whole"),
        (HEADER[:-1], "has a header and no rows: the file is not whole"),
        (GOOD, "lacks the column 'shop', 'price', 'click'; its header has '0', '0.0'"),
        ("shop,click\n1,0\n", "lacks the column 'price'; its header has 'shop', 'click'"),
        ("shop,price,click,size\n1,2,0,1\n", "has an unknown column 'size': remove it"),
        ("shop,price,click,\n1,2,0,1\n", "has an unknown column '': remove it"),
        ("shop,price,click,shop\n1,2,0,1\n", "names the column 'shop' twice"),
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

    message = f"{path}, line 12, column '{column}': expected an? {kind}, got {cell!r}$"
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

    message = f"{path}, line {2 + before}: expected 3 values, got {values}; the row is cut"
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

    with pytest.raises(InputError, match="line 4, column 'shop': expected an integer, got 'x'"):
        read(path, text)


def test_a_block_of_zero_bytes_is_refused(path):
    # What an interrupted download may leave; longer than the csv module takes a cell to be.
    with pytest.raises(InputError, match="line 12: expected 3 values, got 1"):
        read(path, (HEADER + GOOD).encode() + bytes(200_000))


def test_a_long_bad_cell_is_shortened(path):
    with pytest.raises(InputError, match=r"column 'price': expected a number, got 'x{40}'$"):
        read(path, HEADER + f"1,{'x' * 1000},1\n")


def test_text_of_another_encoding_is_refused(path):
    with pytest.raises(InputError, match="line 12, column 'shop': expected an integer"):
        read(path, (HEADER + GOOD).encode() + b"\xe9,0.5,1\n")


def test_the_first_row_that_breaks_a_rule_is_named(path):
    bad = np.array([False, False, True, True])

    with pytest.raises(InputError, match=f"{path}, line 102: clicks must be 0 or 1, got 7$"):
        refuse_rows(path, 100, bad, "clicks must be 0 or 1", np.array([0, 1, 7, 8]))


def test_rows_that_keep_a_rule_pass(path):
    refuse_rows(path, 100, np.zeros(3, bool), "clicks must be 0 or 1", np.zeros(3))
