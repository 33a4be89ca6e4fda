"""Read untrusted files within limits.

Only regular files are opened: a named pipe or a device can block or never end. Nothing beyond the
expected size is read or decompressed, so memory is bounded regardless of the file.
"""

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from bnrnn.errors import DataError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def reading(path: Path | str, advice: str, limit: int | None = None) -> Iterator[BufferedReader]:
    """Open the regular file at `path`; a read error in the `with` block becomes a DataError.

    advice: the end of each message: what the user can do. limit: the largest allowed size in bytes.

    Raises:
        DataError: the file does not exist, is not a regular file, is larger than `limit`, or cannot
            be read or decompressed.
    """
    with open_regular(path, advice) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise DataError(f"{path} has {size:,} bytes, more than {limit:,}; {advice}")
        try:
            yield file
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read or unpacked ({error}); {advice}") from error


def read_file(path: Path | str, limit: int, advice: str) -> bytes:
    """Read at most `limit` + 1 bytes; a result that long means the file exceeds `limit`.

    Raises:
        DataError: see `reading`.
    """
    with reading(path, advice) as file:
        return file.read(limit + 1)


def gunzip(path: Path | str, limit: int, advice: str) -> bytes:
    """Decompress at most `limit` + 1 bytes; a result that long means the content exceeds `limit`.

    Raises:
        DataError: see `reading`.
    """
    # gzip enlarges incompressible content by less than 0.1 %.
    most = limit + limit // 1000 + 1000
    with reading(path, advice, most) as file, gzip.GzipFile(fileobj=file) as unpacked:
        return unpacked.read(limit + 1)


def open_regular(path: Path | str, advice: str) -> BufferedReader:
    """Open the regular file at `path`, for a caller that keeps it open.

    Raises:
        DataError: the file does not exist, is not a regular file, or cannot be read.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            # Non-blocking: by now the path may be a pipe, and opening it would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind == stat.S_IFREG:
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}; {advice}") from error
    raise DataError(
        f"cannot read {path}: it is not a file but {KINDS.get(kind, 'something else')}; {advice}"
    )
