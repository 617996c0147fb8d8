"""The prepared format: a folder of memory-mapped arrays with a schema.

::

    schema.json                     format version, fields, labels, rows, positives, checksums
    vocabulary/<field>.parquet      raw value -> index, from training rows
    <split>/categorical.npy         int32   (rows, F), row-major
    <split>/numerical.npy           float32 (rows, N)
    <split>/labels.npy              uint8   (rows, T)
    <split>/group.npy               int64   (rows,), where the data has a search or user id
    <split>/probabilities.npy       float64 (rows, T), true P(label = 1); synthetic data only
    <split>/bag.npy                 int32   (rows, M): which bag of each multi-valued field
    <split>/bags/<field>/offsets.npy int64  (bags + 1,): bag b holds the tokens [offsets[b],
    <split>/bags/<field>/tokens.npy int32   (tokens,)    offsets[b + 1])
    <split>/bags/<field>/weights.npy float32 (tokens,)

The rows that share a user share that user's bags, so that a history is stored once.
"""

import hashlib
import json
import math
import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnrec.checks import InputError
from mtnrec.data.memory import memory_bytes
from mtnrec.schema import CategoricalField, Schema

FORMAT_VERSION = 2
LARGEST_NUMBER = float(np.finfo(np.float32).max)  # of a numerical feature
SCHEMA_FILE = "schema.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "categorical": np.dtype(np.int32),
    "numerical": np.dtype(np.float32),
    "labels": np.dtype(np.uint8),
    "group": np.dtype(np.int64),
    "probabilities": np.dtype(np.float64),
    "bag": np.dtype(np.int32),
}
BAG_DTYPES: dict[str, np.dtype[Any]] = {
    "offsets": np.dtype(np.int64),
    "tokens": np.dtype(np.int32),
    "weights": np.dtype(np.float32),
}
_CLOCK_TICK = 2_000_000_000  # ns; that of the coarsest file systems
_LONGEST_SCHEMA = 1 << 24  # bytes
_BYTES_PER_ROW = 8  # of memory that a training takes: its number and its place in the order
_ROWS_PER_CHECK = 1 << 16
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
        missing: Rows without a value, for each split and feature that lacks some.
        transforms: What was done to a numerical feature: a missing value became ``fill``, then
            ``(value - shift) / scale`` was stored; features that are stored as they are have none.
        report: What the preparation counted, dropped rows say.
        checksums: SHA-256 of each file, by its path in the folder.
    """

    source: str
    parameters: dict[str, Any]
    schema: Schema
    rows: dict[str, int]
    positives: dict[str, dict[str, int]]
    missing: dict[str, dict[str, int]]
    transforms: dict[str, dict[str, float]]
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
            InputError: If it is no JSON, of another format version, lacks an entry, or one is not
                what it should be: a size that is no count, a file outside of the folder.
        """
        remedy = "prepare the data set again with `python -m mtnrec.prepare`"
        try:
            content = json.loads(text, object_pairs_hook=_without_twins)
            json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
            version = content.pop("format_version")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is no schema of a prepared data set: {remedy}") from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version!r}, this version of mtnrec reads "
                f"{FORMAT_VERSION}: {remedy}"
            )
        try:
            schema = content.pop("schema")
            fields, multivalued = (
                tuple(CategoricalField(**field) for field in schema.pop(kind))
                for kind in ("categorical", "multivalued")
            )
            numerical, labels = tuple(schema.pop("numerical")), tuple(schema.pop("labels"))
            manifest = Manifest(
                schema=Schema(fields, numerical, labels, **schema, multivalued=multivalued),
                **content,
            )
            manifest._check()
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{path} is damaged ({error}): {remedy}") from error
        return manifest

    def _check(self) -> None:
        holds = {
            "source": isinstance(self.source, str),
            "parameters": isinstance(self.parameters, dict),
            "rows": _is_table(self.rows, _is_count) and "train" in self.rows,
            "positives": _is_table(self.positives, _counts),
            "missing": _is_table(self.missing, _counts) and self.missing.keys() >= self.rows.keys(),
            "transforms": _is_table(self.transforms, _is_transform),
            "report": _is_table(self.report, _is_count),
            "checksums": _is_table(self.checksums, lambda value: isinstance(value, str))
            and self.checksums.keys() <= self._files(),
        }
        if wrong := [name for name, right in holds.items() if not right]:
            raise InputError(f"{', '.join(wrong)} cannot be what a preparation wrote")

    def _files(self) -> set[str]:
        """The files that a folder may hold beside the schema."""
        schema = self.schema
        fields = (*schema.categorical, *schema.multivalued)
        bags = [bag_stem(field.name, part) for field in schema.multivalued for part in BAG_DTYPES]
        arrays = {f"{split}/{stem}.npy" for split in self.rows for stem in (*DTYPES, *bags)}
        return arrays | {f"vocabulary/{field.name}.parquet" for field in fields}

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest and, through the checksums in it, of the whole data set."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _is_table(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counts(value: Any) -> bool:
    return _is_table(value, _is_count)


def _is_transform(value: Any) -> bool:
    return (
        _is_table(value, lambda number: isinstance(number, int | float))
        and {"shift", "scale"} <= value.keys() <= {"fill", "shift", "scale"}
        and value["scale"] != 0
        and all(abs(number) <= LARGEST_NUMBER for number in value.values())
    )


def open_prepared(directory: Path) -> tuple[Manifest, dict[str, Arrays]]:
    """Memory-map a prepared data set; touches headers only, whatever the number of rows.

    The folder and its files may be links; what the schema lists lies under it by name.

    Returns:
        The manifest, and for each split its arrays by name.

    Raises:
        NotPreparedError: If the folder or its schema does not exist.
        InputError: If a file is missing, truncated, or not the array that the schema describes, or
            if there are more rows than the memory can number.
    """
    path = directory / SCHEMA_FILE
    if not path.is_file():
        raise NotPreparedError(f"there is no prepared data set in {directory}")
    manifest = Manifest.from_json(_read_schema(path), path)
    _check_rows(path, max(manifest.rows.values()))
    arrays: dict[str, Arrays] = {split: {} for split in manifest.rows}
    for name in manifest.checksums:
        split, _, stem = name.removesuffix(".npy").partition("/")
        if name.endswith(".npy"):
            shape = _shape(stem, manifest.rows[split], manifest.schema)
            arrays[split][stem] = open_array(directory / name, dtype_of(stem), shape)
    for split, found in arrays.items():
        for stem in _required(manifest.schema):
            if stem not in found:
                raise InputError(f"{path} lists no {split}/{stem}.npy: prepare the data set again")
        for field in manifest.schema.multivalued:
            _check_bags(directory / split / "bags" / field.name, found, field.name)
    return manifest, arrays


def _check_rows(path: Path, most: int) -> None:
    memory = memory_bytes()
    if _BYTES_PER_ROW * most > memory:
        raise InputError(
            f"{path} says {most:,} rows, which take {_BYTES_PER_ROW} bytes of memory each, and it "
            f"is {memory:,} bytes: prepare fewer rows"
        )


def _read_schema(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_SCHEMA + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the data set again") from error
    if len(text) > _LONGEST_SCHEMA:
        raise InputError(f"{path} has more than {_LONGEST_SCHEMA:,} bytes and is no schema")
    return text


def _check_bags(folder: Path, arrays: Arrays, field: str) -> None:
    offsets, tokens, weights = (arrays[bag_stem(field, part)] for part in BAG_DTYPES)
    if not len(offsets) or not len(tokens) == len(weights) == offsets[-1]:
        raise InputError(
            f"{folder}: offsets, tokens and weights differ in length: prepare the data set again"
        )


def _required(schema: Schema) -> list[str]:
    bags = [bag_stem(field.name, part) for field in schema.multivalued for part in BAG_DTYPES]
    return [*_REQUIRED, *(["bag"] if bags else []), *bags]


def bag_stem(field: str, part: str) -> str:
    """Return the name of an array of a multi-valued field; ``part`` is a key of ``BAG_DTYPES``.

    >>> bag_stem("210", "tokens")
    'bags/210/tokens'
    """
    return f"bags/{field}/{part}"


def dtype_of(stem: str) -> np.dtype[Any]:
    """Return the type of the numbers in ``<split>/<stem>.npy``."""
    return BAG_DTYPES[stem.rpartition("/")[2]] if stem.startswith("bags/") else DTYPES[stem]


def open_array(path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """Map an array after a check of its header and its size; a length that is None may be any."""
    remedy = "prepare the data set again"
    if not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path} is missing: {remedy}")
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            found_shape, by_column, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    # numpy evaluates the header as a Python literal, so a damaged one raises any of these.
    except (OSError, ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
        raise InputError(f"{path} is no npy file ({error}): {remedy}") from error
    if len(shape) == len(found_shape):
        shape = tuple(
            found if length is None else length
            for length, found in zip(shape, found_shape, strict=True)
        )
    if (found_shape, found_dtype, by_column) != (shape, dtype, False):
        order = " by column" if by_column else ""
        raise InputError(
            f"{path} holds {found_dtype} {found_shape}{order}, its schema says {dtype} {shape}: "
            f"{remedy}"
        )
    size, expected = path.stat().st_size, offset + math.prod(found_shape) * dtype.itemsize
    if size != expected:
        raise InputError(f"{path} has {size} bytes, its header says {expected}: {remedy}")
    if 0 in found_shape:  # nothing can be mapped there: no numerical features, say
        return np.empty(found_shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=found_shape)


def expect_scattered_reads(arrays: Arrays) -> None:
    """Tell the system that rows of mapped arrays are read here and there.

    It then reads the pages that are asked for, and not also their neighbours, which would be gone
    again before they serve where the memory does not hold the file.
    """
    for array in arrays.values():
        base: Any = array.base  # numpy's stubs say that it is an array
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_RANDOM)


def _shape(stem: str, rows: int, schema: Schema) -> tuple[int | None, ...]:
    if stem.startswith("bags/"):
        return (None,)
    columns: dict[str, tuple[int, ...]] = {
        "categorical": (len(schema.categorical),),
        "numerical": (len(schema.numerical),),
        "labels": (len(schema.labels),),
        "group": (),
        "probabilities": (len(schema.labels),),
        "bag": (len(schema.multivalued),),
    }
    return (rows, *columns[stem])


def verify_prepared(directory: Path, manifest: Manifest) -> None:
    """Read every file once: its SHA-256 is the manifest's, its values are those of the schema.

    Raises:
        InputError: If a file differs or is missing, or a value is out of its range.
    """
    for name, expected in manifest.checksums.items():
        path = directory / name
        if not path.is_file():
            raise InputError(f"{path} is missing: prepare the data set again")
        if (found := sha256(path)) != expected:
            raise InputError(
                f"{path} has SHA-256 {found[:12]}…, its schema says {expected[:12]}…: it was "
                "changed or damaged after it was prepared; prepare the data set again"
            )
    for split, arrays in open_prepared(directory)[1].items():
        for stem, most in _largest_values(arrays, manifest.schema).items():
            _check_range(directory / split / f"{stem}.npy", arrays[stem], np.array(most))
        for field in manifest.schema.multivalued:
            _check_order(directory / split / "bags" / field.name, arrays, field.name)


def _largest_values(arrays: Arrays, schema: Schema) -> dict[str, Sequence[int]]:
    """Return the largest value of each column of the arrays that hold indices or labels."""
    largest: dict[str, Sequence[int]] = {
        "categorical": [field.vocabulary_size - 1 for field in schema.categorical],
        "labels": [1] * len(schema.labels),
    }
    for field in schema.multivalued:
        largest[bag_stem(field.name, "tokens")] = [field.vocabulary_size - 1]
    if schema.multivalued:
        stems = [bag_stem(field.name, "offsets") for field in schema.multivalued]
        largest["bag"] = [len(arrays[stem]) - 2 for stem in stems]
    return largest


def _check_range(path: Path, array: npt.NDArray[Any], most: npt.NDArray[np.int64]) -> None:
    unsigned = np.dtype(f"u{array.dtype.itemsize}")  # in which a negative value is a large one
    columns = array.reshape(-1, len(most)) if len(most) else array
    for start in range(0, len(columns), _ROWS_PER_CHECK):
        chunk = np.asarray(columns[start : start + _ROWS_PER_CHECK]).view(unsigned)
        if (beyond := chunk.max(axis=0) > most).any():
            column = int(beyond.argmax())
            raise InputError(
                f"{path} has a value in column {column + 1} that is not from 0 to {most[column]}: "
                "prepare the data set again"
            )


def _check_order(folder: Path, arrays: Arrays, field: str) -> None:
    offsets = arrays[bag_stem(field, "offsets")]
    for start in range(0, len(offsets), _ROWS_PER_CHECK):
        chunk = np.asarray(offsets[start : start + _ROWS_PER_CHECK + 1])
        if (np.diff(chunk, prepend=0 if start == 0 else chunk[0]) < 0).any() or offsets[0] != 0:
            raise InputError(f"{folder}: offsets do not ascend from 0: prepare the data set again")


def verify_once(directory: Path, manifest: Manifest) -> None:
    """Do what :func:`verify_prepared` does, unless the files are those that passed it before.

    ``.<folder>.verified``, beside the folder, is a hash of what the system says of the files: their
    sizes, inodes and times of change, which every write moves.
    """
    directory = directory.resolve()
    note = directory.with_name(f".{directory.name}.verified")
    started = time.time_ns()
    state, last_change = _state(directory, manifest)
    with suppress(OSError):
        if note.is_file() and note.read_bytes() == state.encode():
            return
    verify_prepared(directory, manifest)
    # A file that changes twice within a tick of the clock shows it once.
    if last_change < started - _CLOCK_TICK:
        with suppress(OSError):  # a folder that only others may write to: verified every time
            note.unlink(missing_ok=True)  # a pipe would wait for ever
            note.write_text(state, encoding="utf-8")


def _state(directory: Path, manifest: Manifest) -> tuple[str, int]:
    """Return a hash of what the system says of the files, and the last change of one, in ns."""
    found, last_change = {}, 0
    for name in manifest.checksums:
        with suppress(OSError):  # verify_prepared says what is missing
            file = (directory / name).stat()
            found[name] = (file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns)
            last_change = max(last_change, file.st_ctime_ns)
    text = json.dumps([manifest.checksum, found])
    return hashlib.sha256(text.encode()).hexdigest(), last_change


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the data set again") from error
