"""Limits on the sizes that raw files claim, and error messages for damaged files."""

import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from mtnrec.checks import InputError

READ_BYTES = 1 << 20
LARGEST_RATIO = 200  # of uncompressed to compressed bytes; a log has about 10


@contextmanager
def refuse_damage(source: str) -> Iterator[None]:
    """Turn an error from reading a damaged file or archive into one that names it."""
    remedy = "Download it again, or regenerate it."
    try:
        yield
    except InputError:
        raise
    except RuntimeError as error:
        if "password" not in str(error):
            raise InputError(f"{source} is damaged ({error}). {remedy}") from error
        raise InputError(f"{source} is encrypted. Unpack it yourself.") from error
    # The archive modules raise any of these on malformed bytes.
    except (
        *(EOFError, ValueError, LookupError, OverflowError, struct.error, gzip.BadGzipFile),
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    ) as error:
        raise InputError(f"{source} is truncated or damaged ({error}). {remedy}") from error
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error}). {remedy}") from error


class BoundedStream:
    """A stream that raises an error beyond a number of bytes.

    Args:
        stream: The stream to read.
        left: Bytes that may still be read; may be reset.
        refusal: First part of the error message.
    """

    def __init__(self, stream: IO[bytes], left: float, refusal: str) -> None:
        self._stream = stream
        self.left = left
        self._refusal = refusal

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes.

        Raises:
            InputError: If the stream exceeds its limit.
        """
        chunk = self._stream.read(size)
        self.left -= len(chunk)
        if self.left < 0:
            raise InputError(f"{self._refusal}: it is corrupt or malicious. Download it again.")
        return chunk


def inflated(file: IO[bytes], path: Path) -> BoundedStream:
    """Decompress a gzip or zst file as a stream of at most ``LARGEST_RATIO`` times its size."""
    most = max(READ_BYTES, LARGEST_RATIO * path.stat().st_size)
    if path.suffix == ".zst":
        import pyarrow as pa  # type: ignore[import-untyped]  # slow, and seldom needed

        stream = cast(IO[bytes], pa.CompressedInputStream(file, "zstd"))
    else:
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    return BoundedStream(
        stream, most, f"{path} inflates to more than {LARGEST_RATIO} times its size"
    )
