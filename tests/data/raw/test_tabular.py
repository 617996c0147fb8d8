"""Tables whose files are odd: read, or refused with what is wrong."""

import gzip
import os
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnrec.checks import InputError
from mtnrec.data.raw import blocks, tabular
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.tabular import FileSource


def read(path, *, on_error="refuse"):
    table = FileSource("data.train", path)
    chunks = list(table.chunks(table.columns, BadRows(on_error)))
    return pl.concat([chunk.frame for chunk in chunks]).rows()


@pytest.fixture
def csv(tmp_path):
    def write(content):
        path = tmp_path / "rows.csv"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"\xef\xbb\xbfshop,click\na,1\n", [("a", "1")]),
        (b"shop,click\r\na,1\r\n", [("a", "1")]),
        (b"shop,click\na\0b,1\n", [("a\0b", "1")]),
        (b"x^2,click\na,1\n", [("a", "1")]),  # as a zlib stream begins
        ("shop,click\nzoë \u2028,1\n".encode(), [("zoë \u2028", "1")]),
        (b'shop,click\n"a,""\nb",1', [('a,"\nb', "1")]),
    ],
)
def test_odd_bytes_are_cells(content, rows, csv):
    assert read(csv(content)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty\. Download it again, or regenerate"),
        (b"\n", "must start with a header, got an empty line"),
        (b"shop,click\na,1\n\xff,1\n", "line 3: the text is not UTF-8"),
        (b'shop,click\n"a,1\n', "cannot be read .line 2: unexpected end of data"),
        (b'shop,click\n"' + b"a" * 200_000 + b'",1\n', "cannot be read .line 2: field larger"),
        (b"a" + b",a" * 20_000 + b"\n", r"has more than 10,000 columns\. Leave some out"),
        (b"click" + b",click" * 9_999 + b"\n", "names the column 'click' twice"),
        (b"\x1f\x8b" + bytes(90), "line 1: the text is not UTF-8"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused_with_its_position(content, message, csv):
    with pytest.raises(InputError, match=rf"rows.csv(:|,)? {message}"):
        read(csv(content))


def test_a_zipped_table_that_inflates_absurdly_is_refused(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"click\n" + b"1\n" * 6_000_000))

    with pytest.raises(InputError, match=r"rows.csv.gz inflates to more than 200 times its size"):
        read(path)


def test_quoted_rows_are_read_in_parts_of_bounded_size(csv, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    path = csv(b'shop,click\n"a",1\n' + b"b" * 60 + b",1\n" + b"," * 90 + b"\n" + b"b,1\n" * 90)

    table = FileSource("data.train", path)
    frames = [chunk.frame for chunk in table.chunks(["click"], BadRows("skip"))]

    assert sum(frame.height for frame in frames) == 92
    assert max(frame.height for frame in frames) <= 25  # of 4 bytes


CELLS = st.text(st.characters(exclude_characters='"'), max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5),
    extra=st.binary(max_size=5).filter(lambda extra: b'"' not in extra),
    at=st.integers(0, 40),
)
def test_bytes_without_quotes_are_the_cells_between_commas_or_refused(
    cells, extra, at, tmp_path_factory
):
    text = "a,b\n" + "".join(",".join(row) + "\n" for row in cells)
    content = text.encode(errors="replace")
    path = tmp_path_factory.getbasetemp() / "any.csv"
    content = content[:at] + extra + content[at:]
    path.write_bytes(content)

    try:
        rows = read(path, on_error="skip")
    except InputError:
        return
    lines = content.decode().removesuffix("\n").split("\n")[1:]
    split = [line.split(",") for line in (line.removesuffix("\r") for line in lines) if line]
    width = len(rows[0])
    assert rows == [tuple(cell or None for cell in row) for row in split if len(row) == width]


def test_a_row_group_that_exceeds_the_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"click": np.zeros(1_000_000, np.int8)}), path)  # some 600 bytes
    monkeypatch.setattr(tabular, "memory_bytes", lambda: 20_000_000)

    with pytest.raises(InputError, match=r"row group of 1,000,000 values, about 16.0 MB, but the"):
        read(path)
    pq.write_table(pa.table({"click": np.zeros(1_000_000, np.int8)}), path, row_group_size=100_000)
    assert len(read(path)) == 1_000_000


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_part_that_is_not_a_file_is_refused(kind, tmp_path):
    path = tmp_path / "part.parquet"
    path.mkdir() if kind == "folder" else os.mkfifo(path)  # to open it would wait for ever

    with pytest.raises(InputError, match=r"holds 'part.parquet', which are not files"):
        read(tmp_path)
    if kind == "pipe":
        with pytest.raises(InputError, match=r"part.parquet is missing"):
            read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="a file that opens and cannot be read")
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.parquet"])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    (tmp_path / name).symlink_to("/proc/self/mem")

    with pytest.raises(InputError, match=rf"{name} (cannot be read|is truncated)"):
        read(tmp_path / name)
