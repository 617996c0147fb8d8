"""Limits on what raw files claim of themselves, and the messages for damaged ones."""

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
LARGEST_RATIO = 200  # of bytes to those that they are compressed to; a log has about 10


@contextmanager
def refuse_damage(source: str) -> Iterator[None]:
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


class BoundedStream:
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


def inflated(file: IO[bytes], path: Path) -> BoundedStream:
    """Return the content of a gzip file, which may be ``LARGEST_RATIO`` times as long."""
    most = max(READ_BYTES, LARGEST_RATIO * path.stat().st_size)
    stream = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    return BoundedStream(
        stream, most, f"{path} inflates to more than {LARGEST_RATIO} times its size"
    )
