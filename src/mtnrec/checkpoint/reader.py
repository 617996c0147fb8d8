"""Bounded reader of checkpoint files: no code in a file runs, and memory follows from its size.

A file is the zip archive that ``torch.save`` writes, with a SHA-256 of all its bytes as the
archive's comment. It is not read by ``torch.load``, whose readers of archives and pickles can
understand a crafted file differently from any check made before, and allocate what it asks for.
"""

import hashlib
import io
import pickle
import pickletools
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtnrec.data.prepared.manifest import warn_without_checksum

_MARK = b"mtnrec sha256 "
_COMMENT = re.compile(_MARK + rb"[0-9a-f]{64}")
_COMMENT_BYTES = len(_MARK) + 64
_END = b"PK\x05\x06"  # signature of the end record, the archive's last 22 bytes and the comment
_END_BYTES = 22

_CHUNK = 1 << 24
_LONGEST_PICKLE = 1 << 24  # bytes; an object can take 70 times the memory of its byte
_DEEPEST = 50
# Of protocol 2, in which torch writes; others can ask for memory with a number.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
_DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    "BoolStorage": torch.bool,
}


def seal(content: io.BytesIO) -> None:
    """Append a SHA-256 of an archive to it, as its comment."""
    with content.getbuffer() as buffer:
        buffer[-2:] = _COMMENT_BYTES.to_bytes(2, "little")
        checksum = hashlib.sha256(buffer).hexdigest()
    content.seek(0, io.SEEK_END)
    content.write(_MARK + checksum.encode())


def read_archive(path: Path) -> Any:
    """Return the content of a checkpoint file, its tensors on the CPU.

    A file without a checksum, of an earlier version, is read with a warning.

    Raises:
        Exception: Of any kind, if the file is damaged or not a checkpoint.
    """
    with path.open("rb") as file:
        if not _check_sum(file):
            warn_without_checksum(path)
        with zipfile.ZipFile(file) as archive:
            return _read(archive, path.stat().st_size)


def _check_sum(file: IO[bytes]) -> bool:
    """Compare a file with its checksum; return whether it has one."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _COMMENT_BYTES))
    end = file.read()
    if not _COMMENT.fullmatch(end):
        record = end[-_END_BYTES:]
        if not record.startswith(_END) or not record.endswith(b"\0\0"):
            raise zipfile.BadZipFile("its end is not that of a checkpoint")
        return False
    file.seek(0)
    sha256, left = hashlib.sha256(), size - _COMMENT_BYTES
    while left:
        part = file.read(min(left, _CHUNK))
        sha256.update(part)
        left -= len(part)
    if sha256.hexdigest().encode() != end.removeprefix(_MARK):
        raise zipfile.BadZipFile("its checksum differs")
    return True


def _read(archive: zipfile.ZipFile, size: int) -> Any:
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise zipfile.BadZipFile("its parts are compressed")
    if sum(info.file_size for info in infos) > size:
        raise zipfile.BadZipFile("its parts are larger than the file")
    parts = {info.filename.partition("/")[2]: info for info in infos}
    if len(parts) < len(infos):
        raise zipfile.BadZipFile("two of its parts have one name")
    if "byteorder" in parts and archive.read(parts["byteorder"]).decode() != sys.byteorder:
        raise ValueError(f"its byte order is not {sys.byteorder}")
    if parts["data.pkl"].file_size > _LONGEST_PICKLE:
        raise ValueError(f"its pickle has more than {_LONGEST_PICKLE:,} bytes")
    pickled = archive.read(parts["data.pkl"])
    _check_opcodes(pickled)
    content = _Unpickler(io.BytesIO(pickled)).load()
    return _Builder(archive, parts, most=4 * len(pickled)).build(content)


def _check_opcodes(pickled: bytes) -> None:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"torch does not write {opcode.name} in a pickle")
        # Python's unpickler allocates as many places as the largest one has.
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > number:
            raise pickle.UnpicklingError("a place in its memory is beyond its length")


class _Storage(NamedTuple):
    """A storage, not read: the archive's part and the type of its elements."""

    key: str
    dtype: torch.dtype


class _View(NamedTuple):
    """A tensor, not built: a storage, and where in it the elements lie."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any

    @staticmethod
    def of(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> "_View":
        return _View(storage, offset, shape, stride)


def _encoded(text: str, encoding: str) -> bytes:
    """Return bytes, which pickles of protocol 2 write as a text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"torch does not write bytes in {encoding}")
    return text.encode("latin1")


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("__builtin__", "set"): set,
    ("__builtin__", "bytes"): lambda: b"",  # only an empty one is written so
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): tuple,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): _View.of,
    ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", str(dtype).partition(".")[2]): dtype for dtype in _DTYPES.values()},
}


class _Unpickler(pickle.Unpickler):
    """Reads containers, numbers and texts; tensors stay unbuilt, and other objects are refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"a checkpoint must not hold {module}.{name}")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor has no storage")
        return _Storage(key, dtype)


class _Builder:
    """Builds the tensors of an unpickled content, in plain containers.

    Args:
        archive: The archive.
        parts: Its parts by name.
        most: Parts of containers that the content may have, counted as often as they occur.
    """

    def __init__(
        self, archive: zipfile.ZipFile, parts: dict[str, zipfile.ZipInfo], most: int
    ) -> None:
        self._archive = archive
        self._parts = parts
        self._most = most
        self._built = count()
        self._storages: dict[str, Tensor] = {}

    def build(self, value: Any, depth: int = 0) -> Any:
        """Return the content with its tensors.

        Raises:
            ValueError: If containers are nested too deeply or hold one another, or a tensor is
                incomplete.
        """
        if depth > _DEEPEST or next(self._built) > self._most:
            raise ValueError("its containers are nested too deeply, or repeat each other")
        if isinstance(value, _View):
            return self._tensor(value)
        # Unbound methods, since a pickle can give a dictionary attributes with their names.
        if isinstance(value, dict):
            built = type(value)()
            for key, item in dict.items(value):
                built[self.build(key, depth + 1)] = self.build(item, depth + 1)
            if (metadata := getattr(value, "__dict__", {}).get("_metadata")) is not None:
                built.__dict__["_metadata"] = self.build(metadata, depth + 1)  # of a state_dict
            return built
        if type(value) in (list, tuple, set):
            return type(value)(self.build(item, depth + 1) for item in value)
        if value is None or isinstance(value, _PLAIN):
            return value
        raise ValueError(f"a checkpoint must not hold a {type(value).__name__}")

    def _tensor(self, view: _View) -> Tensor:
        storage, offset, shape, stride = view
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor has no storage")
        elements = self._elements(storage)
        numbers = (offset, *shape, *stride)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a tensor has no shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        size = int(np.prod([*map(float, shape)]))
        if size > len(elements) or (size and last >= len(elements)):
            raise ValueError(f"a tensor {tuple(shape)} is incomplete")
        return elements.as_strided(shape, stride, offset)

    def _elements(self, storage: _Storage) -> Tensor:
        """Return a storage as a flat tensor; tensors can share one."""
        if storage.key not in self._storages:
            part = self._parts[f"data/{storage.key}"]
            found = torch.empty(part.file_size, dtype=torch.uint8)
            filled, flat = 0, found.numpy()
            with self._archive.open(part) as stream:  # checks the part's own checksum at its end
                while chunk := stream.read(_CHUNK):
                    flat[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
                    filled += len(chunk)
            self._storages[storage.key] = found
        return self._storages[storage.key].view(storage.dtype)


_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device)
