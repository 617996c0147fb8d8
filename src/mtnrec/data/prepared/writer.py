"""Atomic writing of a prepared data set, chunk by chunk."""

import errno
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mtnrec.arrays import Float32Array, Int32Array, Int64Array
from mtnrec.checks import InputError
from mtnrec.data.prepared.layout import BAG_DTYPES, DTYPES, array_dtype, bag_stem
from mtnrec.data.prepared.manifest import SCHEMA_FILE, Manifest
from mtnrec.data.prepared.store import Arrays, open_array, open_prepared
from mtnrec.data.prepared.verify import sha256, verify_prepared
from mtnrec.schema import Schema
from mtnrec.system.files import acquire_lock

_LOCK_FILE = ".lock"
_BYTES_PER_CHUNK = 1 << 20  # stays in the CPU cache while its columns are processed one by one
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writer:
    """Writer of a prepared data set, chunk by chunk; created by :func:`write_prepared`.

    It uses plain files rather than memory maps: mapped pages count as memory of the process, and a
    full disk would kill it without an error.
    """

    def __init__(self, directory: Path, splits: tuple[str, ...]) -> None:
        self.directory = directory
        self._splits = splits
        self._files: dict[str, IO[bytes]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, int] = {}  # offset of the first row, in bytes
        self._positives: dict[str, Any] = {}
        self.missing: dict[str, Counter[str]] = {split: Counter() for split in splits}

    def append(self, split: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append rows to a split: arrays of equal length, by stem as in ``store``."""
        for stem, array in arrays.items():
            self._append(f"{split}/{stem}.npy", array, array_dtype(stem))
        if "labels" in arrays:
            counts = np.count_nonzero(arrays["labels"], axis=0)
            self._positives[split] = self._positives.get(split, 0) + counts

    def append_bags(
        self,
        split: str,
        field: str,
        lengths: Int64Array,
        tokens: Int32Array,
        weights: Float32Array,
    ) -> None:
        """Append bags of a multi-valued field: the length of each, and all their tokens."""
        stems = {part: bag_stem(field, part) for part in BAG_DTYPES}
        name = f"{split}/{stems['tokens']}.npy"
        start = self._shapes[name][0] if name in self._shapes else 0
        offsets = start + np.cumsum(lengths, dtype=np.int64)
        if name not in self._shapes:
            offsets = np.concatenate([[0], offsets])
        parts: Arrays = {"offsets": offsets, "tokens": tokens, "weights": weights}
        self.append(split, {stems[part]: array for part, array in parts.items()})

    def _append(self, name: str, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
        chunk = _checked(name, array, dtype)
        if name not in self._files:
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("wb+")
            self._shapes[name] = (0, *chunk.shape[1:])
            self._write_header(name, dtype)
            self._starts[name] = self._files[name].tell()
        self._files[name].write(chunk.data if chunk.size else b"")
        self._shapes[name] = (self._shapes[name][0] + len(chunk), *chunk.shape[1:])

    def _write_header(self, name: str, dtype: np.dtype[Any]) -> None:
        # numpy pads a header so that the first axis can grow in place.
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": self._shapes[name],
        }
        np.lib.format.write_array_header_1_0(self._files[name], header)

    def close_arrays(self) -> None:
        """Finish the arrays, so that they can be rewritten."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name, array_dtype(name.removesuffix(".npy").partition("/")[2]))
            file.close()
        self._files.clear()

    def abandon_arrays(self) -> None:
        """Close unfinished arrays as they are."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk cannot take the buffered rest
                file.close()

    def has(self, split: str, stem: str) -> bool:
        """Return whether an array was written."""
        return f"{split}/{stem}.npy" in self._shapes

    def rows(self, split: str) -> int:
        """Return the number of rows of a split so far."""
        return self._shapes.get(f"{split}/labels.npy", (0,))[0]

    def chunks(self, split: str, stem: str) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Read a finished array in bounded memory: first row number and rows of each chunk."""
        shape = self._shapes[f"{split}/{stem}.npy"]
        for start, stop in _windows(shape, array_dtype(stem)):
            yield start, self._read(split, stem, start, stop)

    def rewrite(
        self,
        split: str,
        stem: str,
        change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
        *,
        threads: int = 1,
    ) -> None:
        """Apply ``change`` to the rows of a finished array, chunk by chunk."""
        dtype, name = array_dtype(stem), f"{split}/{stem}.npy"

        def rewrite(window: tuple[int, int]) -> None:
            start, stop = window
            rows = _checked(name, change(self._read(split, stem, start, stop)), dtype)
            with (self.directory / name).open("rb+", buffering=0) as file:
                file.seek(self._starts[name] + start * (rows.nbytes // max(len(rows), 1)))
                file.write(rows.data if rows.size else b"")

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rewrite, _windows(self._shapes[name], dtype)))

    def permute(self, split: str, order: Int64Array) -> None:
        """Reorder the rows of a split's finished arrays by ``order``, ``(rows,)``."""
        for stem in DTYPES:
            if not self.has(split, stem):
                continue
            name = f"{split}/{stem}.npy"
            path, shape = self.directory / name, self._shapes[name]
            permuted = path.with_suffix(".permuted")
            with path.open("rb") as source, permuted.open("wb") as file:
                file.write(source.read(self._starts[name]))
                for start, stop in _windows(shape, array_dtype(stem)):
                    # A new map for each chunk, so that its pages are released.
                    rows = open_array(path, array_dtype(stem), shape)
                    file.write(rows[order[start:stop]].data)
            permuted.replace(path)

    def _read(self, split: str, stem: str, start: int, stop: int) -> npt.NDArray[Any]:
        name, dtype = f"{split}/{stem}.npy", array_dtype(stem)
        columns = self._shapes[name][1:]
        width = math.prod(columns)
        offset = self._starts[name] + start * width * dtype.itemsize
        flat = np.fromfile(self.directory / name, dtype, (stop - start) * width, offset=offset)
        return flat.reshape(stop - start, *columns)

    def finish(
        self,
        *,
        source: str,
        parameters: dict[str, Any],
        schema: Schema,
        report: dict[str, int],
        transforms: dict[str, dict[str, float]] | None = None,
    ) -> Manifest:
        """Write the schema, with rows, positives and checksums of the written arrays.

        Raises:
            InputError: If a label is constant in the training rows.
        """
        self.close_arrays()
        rows, positives = {}, {}
        for split in self._splits:
            rows[split] = self._shapes[f"{split}/labels.npy"][0]
            counts = map(int, self._positives[split])
            positives[split] = dict(zip(schema.labels, counts, strict=True))
        for label, count in positives["train"].items():
            if count in (0, rows["train"]):
                raise InputError(
                    f"the label {label} is {int(count > 0)} in all {rows['train']} training rows, "
                    "so there is nothing to learn. Check the label, or choose more rows."
                )
        files = sorted(
            path
            for path in self.directory.rglob("*")
            if path.is_file() and not path.name.startswith(_LOCK_FILE)
        )
        checksums = {path.relative_to(self.directory).as_posix(): sha256(path) for path in files}
        missing = {
            split: {name: int(n) for name, n in counts.items() if n}
            for split, counts in self.missing.items()
        }
        manifest = Manifest(
            source,
            parameters,
            schema,
            rows,
            positives,
            missing,
            {} if transforms is None else transforms,
            report,
            checksums,
        )
        (self.directory / SCHEMA_FILE).write_text(manifest.to_file(), encoding="utf-8")
        return manifest


def _checked(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Convert rows to the type of their array, and refuse numbers that are not finite in it."""
    with np.errstate(over="ignore"):  # refused below
        rows = np.ascontiguousarray(array, dtype)
    if dtype.kind == "f" and not np.isfinite(rows).all():
        raise InputError(
            f"{name} must hold numbers that are finite in {8 * dtype.itemsize} bits, got one that "
            "is missing or too large, perhaps after scaling. Correct the raw files."
        )
    return rows


def _windows(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[tuple[int, int]]:
    """Split the rows of an array into windows of bounded size."""
    step = max(1, _BYTES_PER_CHUNK // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@contextmanager
def write_prepared(directory: Path, splits: tuple[str, ...]) -> Iterator[Writer]:
    """Write a prepared data set atomically.

    The files are written to a hidden folder next to ``directory``, which replaces it at the end. An
    earlier prepared data set in ``directory`` stays until then; anything else there is refused.
    Hidden folders of killed preparations are removed.

    Raises:
        InputError: If ``directory`` holds anything but a prepared data set, or the disk is full.
    """
    directory = directory.resolve()  # a link stays, and its target is replaced
    if directory.exists() and not (directory / SCHEMA_FILE).is_file():
        if not directory.is_dir() or any(directory.iterdir()):
            raise InputError(
                f"{directory} exists but is not a prepared data set. Choose another data.dir."
            )
        directory.rmdir()
    if foreign := _foreign_files(directory):
        raise InputError(
            f"{directory} holds {foreign[0].name}, which is not part of a prepared data set and "
            "would be lost. Choose another data.dir."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_remains(directory)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    writer = Writer(temporary, splits)
    try:
        with acquire_lock(temporary / _LOCK_FILE):  # it ends with the process
            yield writer
            for path in temporary.glob(f"{_LOCK_FILE}*"):
                path.unlink()
            _put_in_place(temporary, directory)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise InputError(
            f"the disk of {directory} is full ({error.strerror}), and nothing was kept. Free some "
            "space, or choose another data.dir."
        ) from error
    finally:
        writer.abandon_arrays()
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_remains(directory: Path) -> None:
    """Remove the hidden folders of preparations that were killed."""
    for lock in directory.parent.glob(f".{directory.name}-*/{_LOCK_FILE}"):
        with suppress(OSError), acquire_lock(lock, wait=False):  # fails while its preparation runs
            shutil.rmtree(lock.parent)


def _foreign_files(directory: Path) -> list[Path]:
    patterns = [
        SCHEMA_FILE,
        "vocabulary/*.parquet",
        *(f"*/{stem}.npy" for stem in DTYPES),
        *(f"*/{bag_stem('*', part)}.npy" for part in BAG_DTYPES),
    ]
    own = {path for pattern in patterns for path in directory.glob(pattern)}
    return sorted(path for path in directory.rglob("*") if not path.is_dir() and path not in own)


def _put_in_place(temporary: Path, directory: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp lets only the owner read it
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    else:
        return
    new, old = ((path / SCHEMA_FILE).read_bytes() for path in (temporary, directory))
    if new == old and _is_intact(directory):  # another process prepared the same data set meanwhile
        return
    retired = temporary.with_name(f"{temporary.name}-old")
    directory.rename(retired)
    temporary.rename(directory)
    shutil.rmtree(retired)


def _is_intact(directory: Path) -> bool:
    try:
        manifest, _ = open_prepared(directory)
        verify_prepared(directory, manifest)
    except InputError:
        return False
    return True
