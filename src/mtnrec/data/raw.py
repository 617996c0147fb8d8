"""Raw files: finding them, plain or in archives, and reading them as blocks of whole lines.

Archives are read as streams; nothing is unpacked to the disk. What they claim of themselves is not
believed: lines, headers, members and the bytes that they inflate to are bounded.
"""

import gzip
import io
import logging
import lzma
import math
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar, cast

import numpy as np
from rich import get_console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from mtnrec.checks import InputError

BLOCK_BYTES = 1 << 23  # smaller ones cost more in calls than they save in fresh pages
_READ_BYTES = 1 << 20
_LONGEST_LINE = 1 << 26
_LONGEST_HEADERS = 1 << 20  # bytes between two members of a tar archive
_MOST_MEMBERS = 1000
_MOST_SKIPPED = 1_000_000  # to find a bad row takes up to 0.3 ms
_LARGEST_RATIO = 200  # of bytes to those that they are compressed to; a log has about 10
_DEEPEST = 3  # folders below raw_dir that are searched
_ZIP_RATIO = 4  # of text in a zip within a zip; only to estimate
_CACHED_BYTES = 1 << 16
_NEWLINE = ord("\n")
_IGNORED = ("__MACOSX",)  # the folder that archivers add

Item = TypeVar("Item")
Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """Whole lines of a raw file, each with its line end.

    Args:
        source: The file, for messages.
        first_line: Number of the first line, from 1.
        data: The lines.
    """

    source: str
    first_line: int
    data: bytes


def count_lines(data: bytes) -> int:
    """Count the line ends, several times faster than ``bytes.count`` does."""
    array = np.frombuffer(data, np.uint8)
    pieces = range(0, len(array), _CACHED_BYTES)
    return sum(int(np.count_nonzero(array[p : p + _CACHED_BYTES] == _NEWLINE)) for p in pieces)


def require_raw_dir(raw_dir: str | Path | None, origin: str) -> Path:
    """Return the folder of the raw files.

    Args:
        raw_dir: As the user gave it.
        origin: Where the files come from.

    Raises:
        InputError: If it is not given.
    """
    if raw_dir is None:
        raise InputError(
            "data.raw_dir is not given: name the folder of the raw files, "
            f"`data.raw_dir=DIR`. {origin}"
        )
    return Path(raw_dir)


def list_files(raw_dir: Path) -> dict[str, list[Path]]:
    """Return the files in a folder and three levels below it, by lower-case name.

    Raises:
        InputError: If there is no such folder.
    """
    if not raw_dir.is_dir():
        raise InputError(f"data.raw_dir must be a folder with the raw files, got {raw_dir}")
    files: dict[str, list[Path]] = {}
    for depth in range(_DEEPEST + 1):
        for path in sorted(raw_dir.glob("*/" * depth + "*")):
            if path.is_file():
                files.setdefault(path.name.lower(), []).append(path)
    return files


def find_one(files: dict[str, list[Path]], names: Sequence[str]) -> Path | None:
    """Return the one file that has one of these names, or None.

    Raises:
        InputError: If there are several.
    """
    found = [path for name in names for path in files.get(name, [])]
    if len(found) > 1:
        raise InputError(
            f"{found[0].parent} and below hold {' or '.join(names)} {len(found)} times: "
            f"{', '.join(map(str, found))}; leave one, or name its own folder in data.raw_dir"
        )
    return found[0] if found else None


class Meter:
    """A progress bar of the bytes that are read from raw files, with rows and the time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            DownloadColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[rows]:,} rows", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
        )
        self._task: TaskID | None = None
        self._rows = 0

    def __enter__(self) -> "Meter":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        """Open a file whose bytes count."""
        self._rows = 0
        self._task = self._progress.add_task(path.name, total=path.stat().st_size, rows=0)
        with _refuse_damage(str(path)):
            raw = path.open("rb", buffering=0)
        with raw as file:
            # Buffered here, since the bar moves at each read.
            metered = cast(io.RawIOBase, self._progress.wrap_file(file, task_id=self._task))
            yield io.BufferedReader(metered, _READ_BYTES)
        self._progress.update(self._task, completed=path.stat().st_size)

    def say(self, what: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(what, markup=False, highlight=False, soft_wrap=True)

    def advance(self, rows: int) -> None:
        """Count rows of the file that is open."""
        self._rows += rows
        if self._task is not None:
            self._progress.update(self._task, rows=self._rows)


@contextmanager
def _refuse_damage(source: str) -> Iterator[None]:
    """Say of a file or an archive that cannot be read that it is damaged."""
    try:
        yield
    except InputError:
        raise
    except RuntimeError as error:
        if "password" not in str(error):
            raise InputError(f"{source} is damaged ({error}): fetch or make it again") from error
        raise InputError(f"{source} is encrypted: unpack it yourself") from error
    # The modules for archives raise any of these on bytes that no archiver wrote.
    except (
        *(EOFError, ValueError, LookupError, OverflowError, struct.error, gzip.BadGzipFile),
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    ) as error:
        raise InputError(
            f"{source} is truncated or damaged ({error}): fetch or make it again"
        ) from error
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error}): fetch or make it again") from error


class Limited:
    """A stream that is refused beyond a number of bytes.

    Args:
        stream: What is read.
        left: How many bytes may still come; may be set anew.
        refusal: What is said of more.
    """

    def __init__(self, stream: IO[bytes], left: float, refusal: str) -> None:
        self._stream = stream
        self.left = left
        self._refusal = refusal

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes.

        Raises:
            InputError: If they are too many.
        """
        chunk = self._stream.read(size)
        self.left -= len(chunk)
        if self.left < 0:
            raise InputError(
                f"{self._refusal}: this archive is not what it should be; fetch it again"
            )
        return chunk


def inflated(file: IO[bytes], path: Path) -> Limited:
    """Return the content of a gzip file, which may be ``_LARGEST_RATIO`` times as long."""
    most = max(_READ_BYTES, _LARGEST_RATIO * path.stat().st_size)
    stream = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    return Limited(stream, most, f"{path} inflates to more than {_LARGEST_RATIO} times its size")


def read_blocks(stream: IO[bytes] | Limited, source: str) -> Iterator[Block]:
    """Cut a stream into blocks of whole lines, of about ``BLOCK_BYTES`` each.

    Raises:
        InputError: If the stream is empty, its archive is damaged, or a line is absurdly long.
    """
    rest, line = b"", 1
    with _refuse_damage(source):
        while chunk := stream.read(BLOCK_BYTES):
            cut = chunk.rfind(b"\n") + 1
            if cut:
                block = Block(source, line, b"".join([rest, memoryview(chunk)[:cut]]))
                yield block
                line += count_lines(block.data)
                rest = chunk[cut:]
            else:
                rest += chunk
            if len(rest) > _LONGEST_LINE:
                raise InputError(
                    f"{source}, line {line}: longer than {decimal(_LONGEST_LINE)}; this is no text "
                    "file of lines"
                )
    if rest:
        yield Block(source, line, rest + b"\n")
    elif line == 1:
        raise InputError(f"{source} is empty: fetch or make it again")


@contextmanager
def open_plain(path: Path, meter: Meter) -> Iterator[IO[bytes] | Limited]:
    """Open a file that may be compressed by gzip (its name says so)."""
    with meter.open(path) as file:
        yield inflated(file, path) if path.suffix.lower() == ".gz" else file


@contextmanager
def open_zip(
    file: IO[bytes], source: str, members: Sequence[str]
) -> Iterator[Callable[[str], IO[bytes]]]:
    """Open a zip archive that holds these members, in any folder, and no others.

    Yields:
        A function that opens a member by its name.

    Raises:
        InputError: If it is damaged, has other members, or inflates absurdly.
    """
    with _refuse_damage(source):
        archive = zipfile.ZipFile(file)
        infos = [info for info in archive.infolist() if not info.is_dir()]
        # A truncated archive of archives ends with the directory of one of them.
        if infos and min(info.header_offset for info in archive.infolist()) > 0:
            raise zipfile.BadZipFile("it does not begin with a member")
        found = _check_members(source, [info.filename for info in infos], members)
        # An archive in an archive does not get smaller; its directory is held in memory.
        ratio = 2 if members[0].endswith(".zip") else _LARGEST_RATIO
        if sum(info.file_size for info in infos) > max(_READ_BYTES, ratio * archive.start_dir):
            raise zipfile.BadZipFile(f"it inflates to more than {ratio} times its size")

    def open_member(name: str) -> IO[bytes]:
        with _refuse_damage(source):
            return archive.open(infos[found[name]])

    with archive:
        yield open_member


def read_tar(path: Path, members: Sequence[str], meter: Meter) -> Iterator[tuple[str, IO[bytes]]]:
    """Read the members of a ``.tar.gz`` in the order asked for, as streams.

    An archive can only be read from its start to its end: where it holds them in another order, it
    is read once more.

    Raises:
        InputError: If it is damaged, has other members, links say, or inflates absurdly.
    """
    waiting = list(members)
    while waiting:
        names = []
        with meter.open(path) as file, _refuse_damage(str(path)):
            plain = inflated(file, path)
            # What stands between members is held in memory.
            refusal = f"{path} has absurdly long headers"
            headers = Limited(cast(IO[bytes], plain), _LONGEST_HEADERS, refusal)
            with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r|") as archive:
                for info in _plain_members(path, archive, headers):
                    names.append(info.name)
                    stream = cast(IO[bytes], archive.extractfile(info))
                    if waiting and PurePosixPath(info.name).name == waiting[0]:
                        yield waiting.pop(0), stream
                    while stream.read(_READ_BYTES):
                        pass
            while plain.read(_READ_BYTES):  # to the end, where the checksum is
                pass
        _check_members(str(path), names, members)


def _plain_members(
    path: Path, archive: tarfile.TarFile, headers: Limited
) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive that are no folders; refuse links, pipes and the like."""
    for _ in range(_MOST_MEMBERS):
        headers.left = _LONGEST_HEADERS
        if (info := archive.next()) is None:
            return
        headers.left = math.inf
        _check_path(str(path), info.name)
        if not info.isdir():
            if not info.isreg() or info.issparse():
                raise InputError(f"{path} holds {info.name}, which is no plain file")
            yield info
    raise InputError(f"{path} holds more than {_MOST_MEMBERS} files: fetch it again")


def _check_path(source: str, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name.partition("/")[0]:
        raise InputError(
            f"{source} holds {name!r}, whose path climbs out of the folder: this archive is not "
            "what it should be; fetch it again"
        )


def _check_members(source: str, names: list[str], expected: Sequence[str]) -> dict[str, int]:
    """Return the place of each expected member; refuse missing and extra ones."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        _check_path(source, name)
        path = PurePosixPath(name)
        if path.parts[:1] == _IGNORED:
            continue
        member = path.name.lower()
        if member not in expected or member in places:
            times = "twice" if member in places else "which is not expected"
            raise InputError(
                f"{source} holds {name!r}, {times}: expected {', '.join(expected)} once each"
            )
        places[member] = place
    if missing := [name for name in expected if name not in places]:
        raise InputError(f"{source} lacks {', '.join(missing)}: fetch it again")
    return places


def map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Apply ``function`` in other threads, at most ``ahead`` items in advance; order is kept.

    A thread of its own makes the items, so that reading waits for nothing.
    """
    running: deque[tuple[Item, Future[Result]]] = deque()
    with closing(_made_in_advance(iter(items))) as made:
        try:
            for item in made:
                running.append((item, pool.submit(function, item)))
                if len(running) > ahead:
                    first, future = running.popleft()
                    yield first, future.result()
            while running:
                first, future = running.popleft()
                yield first, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _made_in_advance(items: Iterator[Item]) -> Generator[Item, None, None]:
    end = object()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, items, end)
            yield cast(Item, item)


class BadRows:
    """What becomes of rows that break the format: the first is refused, or all are counted.

    Args:
        on_error: ``refuse`` or ``skip``.
    """

    CHOICES = ("refuse", "skip")

    def __init__(self, on_error: str) -> None:
        self._skip = on_error == "skip"
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Rows that were skipped."""
        return self._counts.total()

    def add(self, where: str, rule: str, found: str) -> None:
        """Refuse a row, or count it.

        Raises:
            InputError: Unless such rows are skipped; if there are too many for a log with defects.
        """
        message = f"{where}: {rule}, got {found}"
        if not self._skip:
            raise InputError(f"{message} (data.on_error=skip skips and counts such rows)")
        if self.count == _MOST_SKIPPED:
            raise InputError(
                f"{message}; {_MOST_SKIPPED:,} rows were skipped before: fetch the file again"
            )
        self._counts[rule] += 1
        self._first.setdefault(rule, message)

    def warn(self) -> None:
        """Log how many rows broke each rule, and the first of them."""
        for rule, count in self._counts.items():
            _logger.warning("skipped %d rows; the first: %s", count, self._first[rule])


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def text_bytes(path: Path) -> int:
    """Estimate how much text a raw file holds: what its first mebibyte of text is compressed to."""
    size = path.stat().st_size
    with _refuse_damage(str(path)):
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                return sum(
                    info.file_size * (_ZIP_RATIO if info.filename.lower().endswith(".zip") else 1)
                    for info in archive.infolist()
                )
        if path.suffix.lower() == ".gz":
            with path.open("rb") as file:
                plain = gzip.GzipFile(fileobj=file)
                text = len(plain.read(_READ_BYTES))
                return size * text // max(1, file.tell())
    return size


def state_disk_need(sources: Sequence[Path], directory: Path, prepared_share: float) -> None:
    """Say what is read and about how much is written, before hours of work.

    Args:
        sources: The raw files.
        directory: The prepared data set.
        prepared_share: Prepared bytes for each byte of text.

    Raises:
        InputError: If the disk of ``directory`` has less room than that.
    """
    existing = next(path for path in directory.resolve().parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    size = decimal(sum(path.stat().st_size for path in sources))
    needed = int(prepared_share * sum(map(text_bytes, sources)))
    summary = f"about {decimal(needed)} in {directory} ({decimal(free)} are free there)"
    if needed > free:
        raise InputError(
            f"{size} of raw files become {summary}: free some space, or choose another data.dir"
        )
    get_console().print(
        f"{size} of raw files become {summary}", markup=False, highlight=False, soft_wrap=True
    )
