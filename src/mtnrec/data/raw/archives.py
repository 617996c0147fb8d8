"""Archives read as streams, without unpacking them to disk."""

import math
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from mtnrec.checks import InputError
from mtnrec.data.raw.limits import LARGEST_RATIO, READ_BYTES, BoundedStream, inflated, refuse_damage
from mtnrec.data.raw.progress import ReadProgress

_LONGEST_HEADERS = 1 << 20  # bytes between two members of a tar archive
_MOST_MEMBERS = 1000
_IGNORED = ("__MACOSX",)  # a folder that macOS adds


@contextmanager
def open_plain(path: Path, meter: ReadProgress) -> Iterator[IO[bytes] | BoundedStream]:
    """Open a file, and decompress it if its name ends in ``.gz``."""
    with meter.open(path) as file:
        yield inflated(file, path) if path.suffix.lower() == ".gz" else file


@contextmanager
def open_zip(
    file: IO[bytes], source: str, members: Sequence[str]
) -> Iterator[Callable[[str], IO[bytes]]]:
    """Open a zip archive that must hold exactly these members, in any folder.

    Yields:
        A function that opens a member by its name.

    Raises:
        InputError: If it is damaged, has other members, or inflates to an absurd size.
    """
    with refuse_damage(source):
        archive = zipfile.ZipFile(file)
        infos = [info for info in archive.infolist() if not info.is_dir()]
        # A truncated archive of archives ends with the directory of an inner one.
        if infos and min(info.header_offset for info in archive.infolist()) > 0:
            raise zipfile.BadZipFile("it does not begin with a member")
        found = _check_members(source, [info.filename for info in infos], members)
        # An archive in an archive does not compress; its directory is held in memory.
        ratio = 2 if members[0].endswith(".zip") else LARGEST_RATIO
        if sum(info.file_size for info in infos) > max(READ_BYTES, ratio * archive.start_dir):
            raise zipfile.BadZipFile(f"it inflates to more than {ratio} times its size")

    def open_member(name: str) -> IO[bytes]:
        with refuse_damage(source):
            return archive.open(infos[found[name]])

    with archive:
        yield open_member


def read_tar(
    path: Path, members: Sequence[str], meter: ReadProgress
) -> Iterator[tuple[str, IO[bytes]]]:
    """Read the members of a ``.tar.gz`` as streams, in the requested order.

    A tar archive can only be read from start to end; if its order differs, it is read again.

    Raises:
        InputError: If it is damaged, has other members (for example links), or inflates to an
            absurd size.
    """
    waiting = list(members)
    while waiting:
        names = []
        with meter.open(path) as file, refuse_damage(str(path)):
            plain = inflated(file, path)
            # tarfile holds the bytes between members in memory.
            refusal = f"{path} has absurdly long headers"
            headers = BoundedStream(cast(IO[bytes], plain), _LONGEST_HEADERS, refusal)
            with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r|") as archive:
                for info in _plain_members(path, archive, headers):
                    names.append(info.name)
                    stream = cast(IO[bytes], archive.extractfile(info))
                    if waiting and PurePosixPath(info.name).name == waiting[0]:
                        yield waiting.pop(0), stream
                    while stream.read(READ_BYTES):
                        pass
            while plain.read(READ_BYTES):  # the checksum is at the end
                pass
        _check_members(str(path), names, members)


def _plain_members(
    path: Path, archive: tarfile.TarFile, headers: BoundedStream
) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive except folders; refuse links, pipes and the like."""
    for _ in range(_MOST_MEMBERS):
        headers.left = _LONGEST_HEADERS
        if (info := archive.next()) is None:
            return
        headers.left = math.inf
        _check_path(str(path), info.name)
        if not info.isdir():
            if not info.isreg() or info.issparse():
                raise InputError(
                    f"{path} holds {info.name}, which is not a plain file. Download it again."
                )
            yield info
    raise InputError(f"{path} holds more than {_MOST_MEMBERS} files. Download it again.")


def _check_path(source: str, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name.partition("/")[0]:
        raise InputError(
            f"{source} holds {name!r}, whose path climbs out of the folder: the archive is "
            "corrupt or malicious. Download it again."
        )


def _check_members(source: str, names: list[str], expected: Sequence[str]) -> dict[str, int]:
    """Return the position of each expected member; refuse missing and extra ones."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        _check_path(source, name)
        path = PurePosixPath(name)
        if path.parts[:1] == _IGNORED:
            continue
        member = path.name.lower()
        if member not in expected or member in places:
            times = " twice" if member in places else ""
            raise InputError(
                f"{source} must hold {', '.join(expected)} once each, got {name!r}{times}. "
                "Download it again."
            )
        places[member] = place
    if missing := [name for name in expected if name not in places]:
        raise InputError(f"{source} lacks {', '.join(missing)}. Download it again.")
    return places
