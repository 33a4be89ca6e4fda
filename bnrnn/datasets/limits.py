"""Files that anybody may have made, read through limits.

Only regular files are opened: a named pipe or a device can block or never end. Nothing is read or
unpacked beyond what the caller expects, so that memory is bounded regardless of the file.
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
    """The regular file at `path`, opened; errors in the block mean that its content is damaged.

    advice: what a person can do, the end of each message. limit: of its size, in bytes.

    Raises:
        DataError: it does not exist, is not a regular file, is larger than `limit`, or cannot be
            read or unpacked.
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
    """The content of the file, but at most `limit` + 1 bytes: then it is longer than `limit`.

    Raises:
        DataError: see `reading`.
    """
    with reading(path, advice) as file:
        return file.read(limit + 1)


def gunzip(path: Path | str, limit: int, advice: str) -> bytes:
    """The content of the gzipped file, but at most `limit` + 1 bytes: then it is longer.

    Raises:
        DataError: see `reading`.
    """
    # Incompressible content grows by less than a thousandth.
    most = limit + limit // 1000 + 1000
    with reading(path, advice, most) as file, gzip.GzipFile(fileobj=file) as unpacked:
        return unpacked.read(limit + 1)


def open_regular(path: Path | str, advice: str) -> BufferedReader:
    """The regular file at `path`, opened, for a caller that keeps it open.

    Raises:
        DataError: it does not exist, is not a regular file, or cannot be read.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            # Without blocking: the path may lead to a pipe by now, which would wait for a writer.
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
