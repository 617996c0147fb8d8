"""The prepared format: a folder of memory-mapped arrays with a schema.

::

    schema.json                     format version, fields, labels, rows, positives, checksums
    <split>                         train, test, and any number of other test sets, test_*
    vocabulary/<field>.parquet      raw value -> index, from training rows
    <split>/categorical.npy         int32   (rows, F), row-major
    <split>/numerical.npy           float32 (rows, N)
    <split>/labels.npy              uint8   (rows, T)
    <split>/group.npy               int64   (rows,), where the data has a search or user id
    <split>/probabilities.npy       float64 (rows, T), true P(label = 1); synthetic data only
    <split>/bag.npy                 int32   (rows, M): index of the bag, per multi-valued field
    <split>/bags/<field>/offsets.npy int64  (bags + 1,): bag b holds the tokens [offsets[b],
    <split>/bags/<field>/tokens.npy int32   (tokens,)    offsets[b + 1])
    <split>/bags/<field>/weights.npy float32 (tokens,)

Rows of one user share the user's bags, so that a history is stored once.
"""

import math
import mmap
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnrec.checks import InputError
from mtnrec.data.prepared.layout import BAG_DTYPES, array_dtype, bag_stem, required_arrays
from mtnrec.data.prepared.manifest import (
    SCHEMA_FILE,
    Manifest,
    NotPreparedError,
    read_schema,
)
from mtnrec.schema import Schema
from mtnrec.system.resources import memory_bytes

_BYTES_PER_ROW = 8  # of memory in training: the row's number and its place in the order

Arrays = dict[str, npt.NDArray[Any]]


def open_prepared(directory: Path) -> tuple[Manifest, dict[str, Arrays]]:
    """Memory-map a prepared data set, reading only headers.

    The folder and its files may be links; the schema lists files by their path in the folder.

    Returns:
        The manifest, and for each split its arrays by name.

    Raises:
        NotPreparedError: If the folder or its schema does not exist.
        InputError: If a file is missing, truncated, or not the array that the schema describes, or
            there are too many rows to number in memory.
    """
    path = directory / SCHEMA_FILE
    if not path.is_file():
        raise NotPreparedError(f"there is no prepared data set in {directory}")
    manifest = Manifest.from_json(read_schema(path), path)
    _check_rows(path, max(manifest.rows.values()))
    arrays: dict[str, Arrays] = {split: {} for split in manifest.rows}
    for name in manifest.checksums:
        split, _, stem = name.removesuffix(".npy").partition("/")
        if name.endswith(".npy"):
            shape = _shape(stem, manifest.rows[split], manifest.schema)
            arrays[split][stem] = open_array(directory / name, array_dtype(stem), shape)
    for split, found in arrays.items():
        for stem in required_arrays(manifest.schema):
            if stem not in found:
                raise InputError(f"{path} lists no {split}/{stem}.npy. Prepare the data set again.")
        for field in manifest.schema.multivalued:
            _check_bags(directory / split / "bags" / field.name, found, field.name)
    return manifest, arrays


def _check_rows(path: Path, most: int) -> None:
    memory = memory_bytes()
    if _BYTES_PER_ROW * most > memory:
        raise InputError(
            f"{path} says {most:,} rows, which take {_BYTES_PER_ROW} bytes of memory each, but the "
            f"memory is {memory:,} bytes. Prepare fewer rows."
        )


def _check_bags(folder: Path, arrays: Arrays, field: str) -> None:
    offsets, tokens, weights = (arrays[bag_stem(field, part)] for part in BAG_DTYPES)
    if not len(offsets) or not len(tokens) == len(weights) == offsets[-1]:
        raise InputError(
            f"{folder}: offsets, tokens and weights differ in length. Prepare the data set again."
        )


def open_array(path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """Memory-map an array after checking its header and size; a length of None matches any."""
    remedy = "Prepare the data set again."
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path} is missing. {remedy}")
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            found_shape, by_column, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    # numpy evaluates the header as a Python literal, so a damaged one raises any of these.
    except (OSError, ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
        raise InputError(f"{path} is not an npy file ({error}). {remedy}") from error
    if len(shape) == len(found_shape):
        shape = tuple(
            found if length is None else length
            for length, found in zip(shape, found_shape, strict=True)
        )
    if (found_shape, found_dtype, by_column) != (shape, dtype, False):
        order = " by column" if by_column else ""
        raise InputError(
            f"{path} holds {found_dtype} {found_shape}{order}, but its schema says {dtype} "
            f"{shape}. {remedy}"
        )
    size, expected = path.stat().st_size, offset + math.prod(found_shape) * dtype.itemsize
    if size != expected:
        raise InputError(f"{path} has {size} bytes, but its header says {expected}. {remedy}")
    if 0 in found_shape:  # nothing to map, for example no numerical features
        return np.empty(found_shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=found_shape)


def expect_scattered_reads(arrays: Arrays) -> None:
    """Advise the system that rows of mapped arrays are read in random order.

    It then reads only the requested pages. Their neighbours would be evicted before use if the file
    exceeds the memory.
    """
    for array in arrays.values():
        base: Any = array.base  # numpy's stubs declare it an array
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
