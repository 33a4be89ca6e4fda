"""Random access to the files of an archive, and the temporary files of what was unpacked."""

import gzip
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import IO

from bnrnn.datasets.limits import open_regular
from bnrnn.errors import DataError, OutputError

MOST_OPEN = 64  # files open at once
# gzip reduces alignments to 1/30 and features hardly at all. A higher ratio is a decompression
# bomb.
MOST_EXPANSION, SLACK = 100, 16 << 20
SPARED = 64 << 20  # bytes to leave free on the disk of temporary files
CHUNK = 1 << 20


def limit_of(packed: IO[bytes]) -> int:
    """Return how many bytes a gzipped file may contain."""
    return MOST_EXPANSION * os.fstat(packed.fileno()).st_size + SLACK


def temporary() -> int:
    """Return the descriptor of an unnamed file, which disappears with the process."""
    descriptor, path = tempfile.mkstemp(prefix="bnrnn-")
    os.unlink(path)
    return descriptor


def spool(stream: IO[bytes] | gzip.GzipFile, name: str, target: int, limit: int | None) -> None:
    """Append the whole of a stream to a temporary file.

    Args:
        target: the descriptor of that file.

    Raises:
        DataError: the stream has more than `limit` bytes.
        OutputError: there is no disk space.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free - SPARED
    full = OutputError(
        f"cannot unpack {name} to {tempfile.gettempdir()}: no space left; free some, or set TMPDIR "
        "to another folder"
    )
    total = 0
    while chunk := stream.read(CHUNK):
        total += len(chunk)
        if limit is not None and total > limit:
            raise DataError(
                f"{name} unpacks to more than {limit:,} bytes, more than speech does; unpack it "
                "yourself if it is what you expect"
            )
        if total > free:
            raise full
        try:
            while chunk:
                chunk = chunk[os.write(target, chunk) :]
        except OSError as error:
            raise full from error


class Files:
    """Random access to numbered files; at most `MOST_OPEN` of those with a path are open."""

    def __init__(self, advice: str) -> None:
        self.names: list[str] = []
        self._paths: list[Path | None] = []
        self._kept: dict[int, int] = {}  # number -> descriptor
        self._open: OrderedDict[int, int] = OrderedDict()  # likewise, most recently used last
        self._advice = advice
        weakref.finalize(self, _close, self._kept, self._open)

    def add(self, path: Path) -> int:
        """Open a file and return its number.

        Raises:
            DataError: it is missing or not a regular file.
        """
        self.names.append(str(path))
        self._paths.append(path)
        self.descriptor(len(self.names) - 1)
        return len(self.names) - 1

    def keep(self, name: str, descriptor: int) -> int:
        self.names.append(name)
        self._paths.append(None)
        self._kept[len(self.names) - 1] = descriptor
        return len(self.names) - 1

    def size(self, number: int) -> int:
        return os.fstat(self.descriptor(number)).st_size

    def read(self, number: int, offset: int, n: int) -> bytes:
        """Read n bytes, or fewer at the end of the file."""
        descriptor, parts = self.descriptor(number), []
        try:
            while n > 0 and (part := os.pread(descriptor, min(n, CHUNK), offset)):
                parts.append(part)
                offset, n = offset + len(part), n - len(part)
        except OSError as error:
            raise DataError(
                f"{self.names[number]} cannot be read: {error}; {self._advice}"
            ) from error
        return b"".join(parts)

    def descriptor(self, number: int) -> int:
        if number in self._kept:
            return self._kept[number]
        if number not in self._open:
            path = self._paths[number]
            assert path is not None
            with open_regular(path, self._advice) as file:
                self._open[number] = os.dup(file.fileno())
        self._open.move_to_end(number)
        while len(self._open) > MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return self._open[number]


def _close(*descriptors: dict[int, int]) -> None:
    for each in descriptors:
        while each:
            os.close(each.popitem()[1])
