"""Files and archives that are not what they should be: refused, in bounded memory and time."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtnrec.checks import InputError
from mtnrec.data.raw import bad_rows as bad_rows_module
from mtnrec.data.raw import blocks
from mtnrec.data.raw.archives import open_plain, open_zip, read_tar
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import read_blocks
from mtnrec.data.raw.files import list_files
from mtnrec.data.raw.progress import ReadProgress

LINES = b"1,2,3\n" * 50


def read_zip(data, members=("a.csv",)):
    with open_zip(io.BytesIO(data), "input.zip", members) as open_member:
        return [b"".join(b.data for b in read_blocks(open_member(m), m)) for m in members]


def read_archive(path, members=("a.csv",)):
    return [
        b"".join(block.data for block in read_blocks(stream, name))
        for name, stream in read_tar(path, members, ReadProgress())
    ]


def read_gz(path):
    with open_plain(path, ReadProgress()) as stream:
        return [block.data for block in read_blocks(stream, str(path))]


def zipped(content, **names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or {"a.csv": 0}:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def tar(tmp_path):
    """Write a .tar.gz of ``a.csv`` and another member before it."""

    def make(before=None, content=LINES):
        path = tmp_path / "log.tar.gz"
        with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
            if before is not None:
                archive.addfile(before)
            info = tarfile.TarInfo("a.csv")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return path

    return make


def member(name="b.csv", kind=tarfile.REGTYPE, link="", **headers):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, headers
    return info


def test_a_line_without_an_end_is_refused_before_it_is_complete(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40)
    monkeypatch.setattr(blocks, "_LONGEST_LINE", 100)
    stream = io.BytesIO(LINES + b"x" * 1000)

    with pytest.raises(InputError, match=r"log.csv, line 51: longer than 100 bytes, so this"):
        list(read_blocks(stream, "log.csv"))
    assert stream.tell() <= len(LINES) + 100 + 2 * 40


@pytest.mark.parametrize("kind", ["gz", "tar"])
def test_a_gzip_file_that_inflates_absurdly_is_refused(kind, tar, tmp_path):
    content = b"1,2,3\n" * 2_000_000
    if kind == "tar":
        path = tar(content=content)
    else:
        path = tmp_path / "log.csv.gz"
        path.write_bytes(gzip.compress(content))

    with pytest.raises(InputError, match=rf"{path} inflates to more than 200 times its size"):
        read_archive(path) if kind == "tar" else read_gz(path)


def test_a_zip_file_that_inflates_absurdly_is_refused_unread():
    with pytest.raises(InputError, match=r"input.zip is .*it inflates to more than 200 times its"):
        read_zip(zipped(b"1,2,3\n" * 2_000_000))


def test_a_nested_zip_file_that_inflates_absurdly_is_refused():
    inner = zipped(bytes(4_000_000))
    bomb = zipped(inner * 1000, **{"a.zip": 0})

    with pytest.raises(InputError, match=r"input.zip is .*it inflates to more than"):
        read_zip(bomb, ("a.zip",))


def test_members_that_share_their_bytes_are_refused():
    data = bytearray(zipped(LINES, **{"a.csv": 0, "b.csv": 0}))
    second = data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)  # where it begins: where the first does

    with pytest.raises(InputError, match=r"is truncated or damaged \(.*differ|Overlapped"):
        read_zip(bytes(data), ("a.csv", "b.csv"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_pipes_in_an_archive_are_refused(kind, tar):
    path = tar(member("a.csv", kind, "/etc/passwd"))

    with pytest.raises(InputError, match=r"holds a.csv, which is not a plain file"):
        read_archive(path)


def test_a_sparse_file_in_an_archive_is_refused(tar):
    path = tar(member("a.csv", **{"GNU.sparse.size": "999999999999", "GNU.sparse.map": "0,0"}))

    with pytest.raises(InputError, match=r"holds a.csv, which is not a plain file"):
        read_archive(path)


@pytest.mark.parametrize("name", ["../a.csv", "/a.csv", "x/../../a.csv", "..\\a.csv", "C:\\a.csv"])
def test_names_that_climb_out_are_refused(name, tar):
    with pytest.raises(InputError, match="whose path climbs out of the folder"):
        read_archive(tar(member(name)))
    with pytest.raises(InputError, match="whose path climbs out of the folder"):
        read_zip(zipped(LINES, **{name: 0}))


def test_an_absurdly_long_header_of_an_archive_is_refused(tar):
    path = tar(member(comment="x" * 3_000_000 + os.urandom(9000).hex()))

    with pytest.raises(InputError, match=r"log.tar.gz has absurdly long headers"):
        read_archive(path)


def test_an_archive_of_countless_members_is_refused(tmp_path):
    path = tmp_path / "log.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for number in range(1001):
            archive.addfile(member(f"{number}", tarfile.DIRTYPE))

    with pytest.raises(InputError, match=r"log.tar.gz holds more than 1000 files"):
        read_archive(path)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), at=st.integers(0, 400), kind=st.sampled_from("zt"))
@example(data=b"\xff" * 4, at=30, kind="z")
@example(data=b"", at=0, kind="t")
def test_any_bytes_in_an_archive_are_read_or_refused(data, at, kind, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.tar.gz"
    if kind == "z":
        whole = zipped(LINES)
    else:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = member("a.csv")
            info.size = len(LINES)
            archive.addfile(info, io.BytesIO(LINES))
        whole = file.getvalue()
    damaged = whole[:at] + data + whole[at + len(data) :]

    try:
        if kind == "z":
            read = read_zip(damaged)
        else:
            path.write_bytes(gzip.compress(damaged, 1))
            read = read_archive(path)
    except InputError:
        return
    assert [len(content) for content in read] == [len(LINES)] or kind == "t"


def test_too_many_bad_rows_end_the_skipping(monkeypatch):
    monkeypatch.setattr(bad_rows_module, "_MOST_SKIPPED", 3)
    bad_rows = BadRows("skip")

    for line in (1, 2, 3):
        bad_rows.add(f"log.csv, line {line}", "must be 0", "1")

    with pytest.raises(InputError, match=r"line 4: must be 0, got 1, after 3 skipped rows"):
        bad_rows.add("log.csv, line 4", "must be 0", "1")


def test_a_path_that_is_not_a_file_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "train.csv")  # to open it would wait for ever
    (tmp_path / "test.csv").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)

    assert list_files(tmp_path) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="a file that opens and cannot be read")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "train.csv"
    path.symlink_to("/proc/self/mem")

    with (
        pytest.raises(InputError, match=r"train.csv cannot be read \(.*Input/output error"),
        ReadProgress().open(path) as stream,
    ):
        list(read_blocks(stream, str(path)))


LIMITED = """
import gzip, resource, sys
from pathlib import Path
import mtnrec.data.ali_ccp, mtnrec.data.aliexpress, mtnrec.data.raw.tabular  # with their maps
from mtnrec.checks import InputError
from mtnrec.data.raw.archives import open_plain, read_tar
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import read_blocks
from mtnrec.data.raw.progress import ReadProgress
from mtnrec.data.raw.tabular import FileSource

resource.setrlimit(resource.RLIMIT_DATA, (1 << 31, 1 << 31))
path = Path(sys.argv[1])
try:
    if path.name.endswith(".tar.gz"):
        for name, stream in read_tar(path, ["a.csv"], ReadProgress()):
            for _ in read_blocks(stream, name):
                pass
    elif sys.argv[2] == "table":
        for _ in FileSource("data.train", path).chunks(["click"], BadRows("skip")):
            pass
    else:
        with open_plain(path, ReadProgress()) as stream:
            for _ in read_blocks(stream, str(path)):
                pass
except InputError as error:
    print("refused:", error)
"""


def run_limited(path, reader="blocks"):
    """Read a file in a process that may have 2 GiB of data."""
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, path, reader], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["blocks", "table"])
@pytest.mark.parametrize("start", [b"", b"click\n1\n", b'click\n"'])
def test_a_line_of_a_gigabyte_is_refused_in_bounded_memory(reader, start, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("wb") as file:
        file.write(start)
        for _ in range(1000):
            file.write(b"x" * 1_000_000)

    assert "longer than 67.1 MB" in run_limited(path, reader)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv.gz", "table", "tar.gz", "headers"])
def test_a_bomb_of_twenty_gigabytes_is_refused_in_bounded_memory(kind, tmp_path):
    piece = b"1\n" * (1 << 24)
    packed = gzip.compress(b"click\n") + gzip.compress(piece) * 600
    if kind in ("tar.gz", "headers"):
        info = member("a.csv" if kind == "tar.gz" else "x" * 20, tarfile.GNUTYPE_LONGNAME)
        info.type = tarfile.REGTYPE if kind == "tar.gz" else tarfile.GNUTYPE_LONGNAME
        info.size = 600 * len(piece)
        packed = gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + gzip.compress(piece) * 600
    path = tmp_path / ("rows.tar.gz" if kind in ("tar.gz", "headers") else "rows.csv.gz")
    path.write_bytes(packed)

    message = "absurdly long headers" if kind == "headers" else "inflates to more than 200 times"
    assert message in run_limited(path, "table" if kind == "table" else "blocks")
