"""Raw files: finding them, and estimating what they become."""

import gzip
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rich import get_console
from rich.filesize import decimal

from mtnrec.checks import InputError
from mtnrec.data.raw.limits import READ_BYTES, refuse_damage

_DEEPEST = 3  # folders below raw_dir that are searched
_ZIP_RATIO = 4  # of text in a zip within a zip; only to estimate


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


def text_bytes(path: Path) -> int:
    """Estimate how much text a raw file holds: what its first mebibyte of text is compressed to."""
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
