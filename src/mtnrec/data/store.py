"""The prepared format: a folder of memory-mapped arrays with a schema.

::

    schema.json                     format version, fields, labels, rows, positives, checksums
    vocabulary/<field>.parquet      raw value -> index, from training rows
    <split>/categorical.npy         int32   (rows, F), row-major
    <split>/numerical.npy           float32 (rows, N)
    <split>/labels.npy              uint8   (rows, T)
    <split>/group.npy               int64   (rows,), where the data has a search or user id
    <split>/probabilities.npy       float64 (rows, T), true P(label = 1); synthetic data only

A folder is written under a temporary name and renamed when it is whole.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from mtnrec.checks import InputError
from mtnrec.schema import CategoricalField, Schema

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "categorical": np.dtype(np.int32),
    "numerical": np.dtype(np.float32),
    "labels": np.dtype(np.uint8),
    "group": np.dtype(np.int64),
    "probabilities": np.dtype(np.float64),
}
_REQUIRED = ("categorical", "numerical", "labels")

Arrays = dict[str, npt.NDArray[Any]]


class NotPreparedError(InputError):
    """There is no prepared data set in a folder."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``schema.json``.

    Args:
        source: Name of the data set, ``aliexpress_nl`` say.
        parameters: The settings that it was prepared with; equal settings, equal bytes.
        schema: Fields and labels.
        rows: Rows of each split.
        positives: Rows with label 1, for each split and label.
        report: What the preparation counted, dropped rows say.
        checksums: SHA-256 of each file, by its path in the folder.
    """

    source: str
    parameters: dict[str, Any]
    schema: Schema
    rows: dict[str, int]
    positives: dict[str, dict[str, int]]
    report: dict[str, int]
    checksums: dict[str, str]

    def to_json(self) -> str:
        """Serialise; equal manifests give equal text."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: bytes, path: Path) -> "Manifest":
        """Parse and check ``text``, the content of ``path``.

        Raises:
            InputError: If it is no JSON, of another format version, or lacks an entry.
        """
        remedy = "prepare the data set again with `python -m mtnrec.prepare`"
        try:
            content = json.loads(text)
            version = content.pop("format_version")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no schema of a prepared data set: {remedy}") from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version!r}, this version of mtnrec reads "
                f"{FORMAT_VERSION}: {remedy}"
            )
        try:
            schema = content.pop("schema")
            fields = tuple(CategoricalField(**field) for field in schema.pop("categorical"))
            numerical, labels = tuple(schema.pop("numerical")), tuple(schema.pop("labels"))
            return Manifest(schema=Schema(fields, numerical, labels, **schema), **content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): {remedy}") from error

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest and, through the checksums in it, of the whole data set."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def open_prepared(directory: Path) -> tuple[Manifest, dict[str, Arrays]]:
    """Memory-map a prepared data set; touches headers only, whatever the number of rows.

    Returns:
        The manifest, and for each split its arrays by name.

    Raises:
        NotPreparedError: If the folder or its schema does not exist.
        InputError: If a file is missing, truncated, or not the array that the schema describes.
    """
    path = directory / SCHEMA_FILE
    if not path.is_file():
        raise NotPreparedError(f"there is no prepared data set in {directory}")
    manifest = Manifest.from_json(path.read_bytes(), path)
    arrays: dict[str, Arrays] = {split: {} for split in manifest.rows}
    for name in manifest.checksums:
        split, _, stem = name.removesuffix(".npy").partition("/")
        if split in arrays and stem in DTYPES:
            shape = (manifest.rows[split], *_row_shape(stem, manifest.schema))
            arrays[split][stem] = _open_array(directory / name, DTYPES[stem], shape)
    for split, found in arrays.items():
        for stem in _REQUIRED:
            if stem not in found:
                raise InputError(f"{path} lists no {split}/{stem}.npy: prepare the data set again")
    return manifest, arrays


def _open_array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], mode: Literal["r", "r+"] = "r"
) -> npt.NDArray[Any]:
    remedy = "prepare the data set again"
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            found_shape, by_column, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: {remedy}") from error
    # numpy evaluates the header as a Python literal, so a damaged one raises any of these.
    except (ValueError, TypeError, SyntaxError, TokenError) as error:
        raise InputError(f"{path} is no npy file ({error}): {remedy}") from error
    if (found_shape, found_dtype, by_column) != (shape, dtype, False):
        order = " by column" if by_column else ""
        raise InputError(
            f"{path} holds {found_dtype} {found_shape}{order}, its schema says {dtype} {shape}: "
            f"{remedy}"
        )
    size, expected = path.stat().st_size, offset + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise InputError(f"{path} has {size} bytes, its header says {expected}: {remedy}")
    if 0 in shape:  # nothing can be mapped there: no numerical features, say
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode=mode, offset=offset, shape=shape)


def _row_shape(stem: str, schema: Schema) -> tuple[int, ...]:
    return {
        "categorical": (len(schema.categorical),),
        "numerical": (len(schema.numerical),),
        "labels": (len(schema.labels),),
        "group": (),
        "probabilities": (len(schema.labels),),
    }[stem]


def verify_prepared(directory: Path, manifest: Manifest) -> None:
    """Read every file once and compare its SHA-256 with the manifest's.

    Raises:
        InputError: If a file differs or is missing.
    """
    for name, expected in manifest.checksums.items():
        path = directory / name
        if not path.is_file():
            raise InputError(f"{path} is missing: prepare the data set again")
        if (found := _sha256(path)) != expected:
            raise InputError(
                f"{path} has SHA-256 {found[:12]}…, its schema says {expected[:12]}…: it was "
                "changed or damaged after it was prepared; prepare the data set again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer:
    """Writes a prepared data set chunk by chunk; made by :func:`write_prepared`."""

    def __init__(self, directory: Path, splits: tuple[str, ...]) -> None:
        self.directory = directory
        self._splits = splits
        self._files: dict[str, IO[bytes]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def append(self, split: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append rows to a split: arrays of equal length, named as in the module's table."""
        for stem, array in arrays.items():
            name = f"{split}/{stem}.npy"
            chunk = np.ascontiguousarray(array, dtype=DTYPES[stem])
            if name not in self._files:
                (self.directory / split).mkdir(exist_ok=True)
                self._files[name] = (self.directory / name).open("wb+")
                self._shapes[name] = (0, *chunk.shape[1:])
                self._write_header(name)
            self._files[name].write(chunk.data if chunk.size else b"")
            self._shapes[name] = (self._shapes[name][0] + len(chunk), *chunk.shape[1:])

    def _write_header(self, name: str) -> None:
        # numpy pads a header so that the first axis can grow in place.
        header = {
            "descr": np.lib.format.dtype_to_descr(DTYPES[Path(name).stem]),
            "fortran_order": False,
            "shape": self._shapes[name],
        }
        np.lib.format.write_array_header_1_0(self._files[name], header)

    def close_arrays(self) -> None:
        """Finish the arrays; they can be opened from now on."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)
            file.close()
        self._files.clear()

    def abandon_arrays(self) -> None:
        """Close the arrays that are not finished, as they are."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk does not take what is still buffered
                file.close()

    def rewrite(self, split: str, stem: str) -> npt.NDArray[Any]:
        """Open a finished array for changes in place."""
        path = self.directory / split / f"{stem}.npy"
        shape = self._shapes[f"{split}/{stem}.npy"]
        return _open_array(path, DTYPES[stem], shape, mode="r+")

    def finish(
        self, *, source: str, parameters: dict[str, Any], schema: Schema, report: dict[str, int]
    ) -> Manifest:
        """Write the schema: rows, positives and checksums of what was written."""
        self.close_arrays()
        rows, positives = {}, {}
        for split in self._splits:
            labels = np.load(self.directory / split / "labels.npy", allow_pickle=False)
            rows[split] = len(labels)
            counts = np.count_nonzero(labels, axis=0)
            positives[split] = dict(zip(schema.labels, map(int, counts), strict=True))
        files = sorted(path for path in self.directory.rglob("*") if path.is_file())
        checksums = {path.relative_to(self.directory).as_posix(): _sha256(path) for path in files}
        manifest = Manifest(source, parameters, schema, rows, positives, report, checksums)
        (self.directory / SCHEMA_FILE).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


@contextmanager
def write_prepared(directory: Path, splits: tuple[str, ...]) -> Iterator[Writer]:
    """Write a prepared data set, whole or not at all.

    The files grow in a hidden folder beside ``directory`` that takes its place at the end. An
    earlier prepared data set in ``directory`` stays until then; whatever else is there is refused.

    Raises:
        InputError: If ``directory`` holds something that is no prepared data set.
    """
    directory = directory.resolve()  # a link stays: what it points to is replaced
    if directory.exists() and not (directory / SCHEMA_FILE).is_file():
        if not directory.is_dir() or any(directory.iterdir()):
            raise InputError(
                f"{directory} exists and is no prepared data set: choose another data.dir"
            )
        directory.rmdir()
    if foreign := _foreign_files(directory):
        raise InputError(
            f"{directory} holds {foreign[0].name}, which is no part of a prepared data set and "
            "would be lost: choose another data.dir"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    writer = Writer(temporary, splits)
    try:
        yield writer
        _put_in_place(temporary, directory)
    finally:
        writer.abandon_arrays()
        shutil.rmtree(temporary, ignore_errors=True)


def _foreign_files(directory: Path) -> list[Path]:
    patterns = [SCHEMA_FILE, "vocabulary/*.parquet", *(f"*/{stem}.npy" for stem in DTYPES)]
    own = {path for pattern in patterns for path in directory.glob(pattern)}
    return sorted(path for path in directory.rglob("*") if not path.is_dir() and path not in own)


def _put_in_place(temporary: Path, directory: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    else:
        return
    new, old = ((path / SCHEMA_FILE).read_bytes() for path in (temporary, directory))
    if new == old and _is_whole(directory):  # a second process prepared the same meanwhile
        return
    retired = temporary.with_name(f"{temporary.name}-old")
    directory.rename(retired)
    temporary.rename(directory)
    shutil.rmtree(retired)


def _is_whole(directory: Path) -> bool:
    try:
        manifest, _ = open_prepared(directory)
        verify_prepared(directory, manifest)
    except InputError:
        return False
    return True
