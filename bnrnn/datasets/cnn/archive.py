"""Read the files of an untrusted gzipped tar archive, one at a time.

tarfile reads extended headers of any size into memory, follows them to any depth, and keeps every
header. Here it only decodes header blocks; everything else is read within limits.
"""

import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bnrnn.datasets.limits import reading
from bnrnn.errors import DataError

MAX_MEMBERS = 1_000_000  # the whole corpus has 387,420 questions
MAX_UNPACKED = 8 << 30  # bytes: 20 kB per question; 2000 tokens take 12 kB
MAX_HEADER = 1 << 16  # bytes of an extended header, which contains for example a long name
CHUNK = 1 << 16  # bytes skipped at a time

FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Headers that describe the next member. Only its name and size matter here.
EXTENDED = (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def read_archive(
    path: Path, wanted: Callable[[str], bool], limit: int, advice: str
) -> Iterator[tuple[str, bytes | None]]:
    """Yield the name and content of each file whose name is wanted, in the archive's order.

    The content is None if it is longer than `limit` bytes. advice: the end of each message.

    Raises:
        DataError: the archive cannot be read, is damaged or truncated, exceeds a limit above, or
            has a member that is neither a file nor a folder, or whose path leaves the archive.
    """
    with reading(path, advice, MAX_UNPACKED) as file, gzip.GzipFile(fileobj=file) as unpacked:
        stream = _Stream(unpacked)
        name, size = None, None  # of the next member, from extended headers
        for _ in range(MAX_MEMBERS):
            header = stream.header()
            if header is None:
                return
            if header.type in EXTENDED:
                if header.size > MAX_HEADER:
                    raise OSError(f"an extended header of {header.size:,} bytes")
                content = stream.data(header.size)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = _text(content.partition(b"\0")[0])
                elif header.type in PAX:
                    records = _records(content)
                    name = records.get("path", name)
                    size = int(records["size"]) if "size" in records else size
                continue
            name, size = name or header.name, header.size if size is None else size
            if refusal := _refusal(name, header.type):
                raise DataError(f"{path} is refused: its member {name[:200]!r} {refusal}; {advice}")
            if header.type in FILES:
                if not wanted(name):
                    stream.skip(size)
                elif size > limit:
                    stream.skip(size)
                    yield name, None
                else:
                    yield name, stream.data(size)
            name, size = None, None
        raise OSError(f"more than {MAX_MEMBERS:,} members")


class _Stream:
    """The decompressed archive, read in order. Errors are OSError or EOFError."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._left = MAX_UNPACKED

    def header(self) -> tarfile.TarInfo | None:
        """Return the next header; None at the end of the archive, which only zeros may follow."""
        block = self._take(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise OSError(error) from error
            if header.size < 0:
                raise OSError("a negative size")
            return header
        while rest := self._file.read(CHUNK):
            self._count(len(rest))
            if rest.strip(b"\0"):
                raise OSError("something follows the end of the archive")
        return None

    def data(self, size: int) -> bytes:
        """Return a member's content; skip the rest of its last block."""
        content = self._take(size)
        self._take(-size % tarfile.BLOCKSIZE)
        return content

    def skip(self, size: int) -> None:
        size += -size % tarfile.BLOCKSIZE
        if size > self._left:
            self._count(size)
        while size:
            size -= len(self._take(min(size, CHUNK)))

    def _take(self, size: int) -> bytes:
        self._count(size)
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError("it is cut off")
        return content

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise OSError(f"more than {MAX_UNPACKED:,} bytes when unpacked")


def _records(content: bytes) -> dict[str, str]:
    """Parse the records of a pax header, each "LENGTH KEY=VALUE\\n".

    Raises:
        OSError: the records are damaged, or describe a sparse file.
    """
    records, start = {}, 0
    while start < len(content):
        digits, space, _ = content[start : start + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[start : start + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not (equals and record.endswith(b"\n") and len(record) == length):
            raise OSError("a damaged pax header")
        if key.startswith(b"GNU.sparse."):
            raise OSError("a sparse file")
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            raise OSError("a size that is not a number")
        records[_text(key)] = _text(value)
        start += length
    return records


def _refusal(name: str, kind: bytes) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):
        return "is outside the archive"
    if kind in LINKS:
        return "is a link"
    if kind not in FILES and kind != tarfile.DIRTYPE:
        return "is neither a file nor a folder"
    return None


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
