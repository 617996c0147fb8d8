"""Raw files: finding them, and estimating their prepared size."""

import gzip
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich import get_console
from rich.filesize import decimal

from mtnrec.checks import InputError
from mtnrec.data.raw.limits import READ_BYTES, refuse_damage

_DEEPEST = 3  # levels of folders searched below raw_dir
_ZIP_RATIO = 4  # assumed for a zip within a zip


def require_raw_dir(raw_dir: str | Path | None, origin: str) -> Path:
    """Return the folder of the raw files.

    Args:
        raw_dir: Value of ``data.raw_dir``.
        origin: Where to download the files, for the message.

    Raises:
        InputError: If ``raw_dir`` is None.
    """
    if raw_dir is None:
        raise InputError(
            "data.raw_dir is not given. Set it to the folder of the raw files, "
            f"`data.raw_dir=DIR`. {origin}"
        )
    return Path(raw_dir)


def list_files(raw_dir: Path) -> dict[str, list[Path]]:
    """Return the files in a folder and three levels below it, by lower-case name.

    Raises:
        InputError: If the folder does not exist.
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
        InputError: If several files do.
    """
    found = [path for name in names for path in files.get(name, [])]
    if len(found) > 1:
        raise InputError(
            f"{found[0].parent} and below hold {' or '.join(names)} {len(found)} times: "
            f"{', '.join(map(str, found))}. Delete all but one, or set data.raw_dir to its folder."
        )
    return found[0] if found else None


def identities(files: Sequence[Path], checksum: Callable[[Path], str]) -> list[list[str | int]]:
    """Return name, size and SHA-256 of each file, as stored in the manifest."""
    return [[file.name, file.stat().st_size, checksum(file)] for file in files]


def raw_identity(
    raw_dir: str | Path | None,
    find: Callable[[Path], Sequence[Path]],
    checksum: Callable[[Path], str],
) -> dict[str, list[list[str | int]]]:
    """Return the entry ``raw`` of the parameters; empty without ``raw_dir`` or its files.

    Preparing reports missing files; training needs none.

    Args:
        raw_dir: Folder of the raw files.
        find: Finds them in the folder.
        checksum: Returns the SHA-256 of a file.
    """
    found: Sequence[Path] = []
    if raw_dir is not None:
        with suppress(InputError):
            found = find(Path(raw_dir))
    return {"raw": identities(found, checksum)} if found else {}


def text_bytes(path: Path) -> int:
    """Estimate the bytes of text in a raw file; of gzip, from its first mebibyte of text."""
    size = path.stat().st_size
    with refuse_damage(str(path)):
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                return sum(
                    info.file_size * (_ZIP_RATIO if info.filename.lower().endswith(".zip") else 1)
                    for info in archive.infolist()
                )
        if path.suffix.lower() == ".gz":
            with path.open("rb") as file:
                plain = gzip.GzipFile(fileobj=file)
                text = len(plain.read(READ_BYTES))
                return size * text // max(1, file.tell())
    return size


def check_disk_space(sources: Sequence[Path], directory: Path, prepared_share: float) -> None:
    """Print the raw and estimated prepared size, and check the disk, before hours of work.

    Args:
        sources: The raw files.
        directory: Folder of the prepared data set.
        prepared_share: Prepared bytes per byte of text.

    Raises:
        InputError: If the disk of ``directory`` has less free space.
    """
    existing = next(path for path in directory.resolve().parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    size = decimal(sum(path.stat().st_size for path in sources))
    needed = int(prepared_share * sum(map(text_bytes, sources)))
    summary = f"about {decimal(needed)} in {directory} ({decimal(free)} are free there)"
    if needed > free:
        raise InputError(
            f"{size} of raw files become {summary}. Free some space, or choose another data.dir."
        )
    get_console().print(
        f"{size} of raw files become {summary}", markup=False, highlight=False, soft_wrap=True
    )
