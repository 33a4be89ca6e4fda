"""The objects of an archive, binary and text: read their headers, check them, decode them."""

import io
import math
import re
import struct
from typing import Literal, NamedTuple

import numpy as np
from kaldiio.matio import read_kaldi

from bnrnn.datasets.kaldi.files import CHUNK, Files

Kind = Literal["matrix", "integers"]

MOST_BYTES = 64 << 20  # of one matrix: 400,000 frames of 40 features
MOST_TEXT = 16 << 20  # of one text object
MAGIC = b"\x1f\x8b"  # of gzip
HEAD = 32  # bytes; longer than any matrix header

_FLOATS = {b"FM": 4, b"DM": 8}
_COMPRESSED = {b"CM": (1, 8), b"CM2": (2, 0), b"CM3": (1, 0)}  # bytes per element and per column
RANGE = re.compile(r"\[(\d{0,9}):(\d{0,9})(?:,(\d{0,9}):(\d{0,9}))?\]$")
_NUMBERS = re.compile(rb"[\d\s.+\-eEnaifNAIFty]*")


class DamagedError(Exception):
    """An object is damaged; the archive adds the utterance and the file to the message."""


class Header(NamedTuple):
    kind: Kind
    rows: int
    columns: int  # 1 for a vector
    size: int  # of the whole object, in bytes
    text: bool = False


def header_at(files: Files, number: int, offset: int, kind: Kind) -> Header:
    """Read and check the header of the object at `offset`; a text object is read whole.

    Raises:
        DamagedError: it is not an object of this kind, or the file ends before the object.
    """
    size = files.size(number)
    if not 0 <= offset < size:
        raise DamagedError(f"the file has {size} bytes")
    head = files.read(number, offset, HEAD)
    if head[:2] == b"\0B":
        header = _binary_header(head)
        if header.size > MOST_BYTES:
            raise DamagedError(f"it claims {header.size:,} bytes, more than {MOST_BYTES:,}")
        if offset + header.size > size:
            raise DamagedError("the file ends too early")
    elif head[:2] == MAGIC:
        raise DamagedError("it is gzipped; unpack it, or name the archive instead of a table")
    else:
        content = _text_at(files, number, offset)
        numbers = _parse_text(content, kind)
        columns = 1 if numbers.ndim == 1 else numbers.shape[1]
        header = Header(kind, len(numbers), columns, len(content), text=True)
    if header.kind != kind:
        wanted = {"matrix": "a matrix of features", "integers": "a vector of integers"}
        raise DamagedError(f"it is {wanted[header.kind]}, not {wanted[kind]}")
    return header


def _binary_header(head: bytes) -> Header:
    try:
        if head[2:3] == b"\4":
            (length,) = struct.unpack_from("<i", head, 3)
            _not_negative(length)
            return Header("integers", length, 1, 7 + 5 * length)
        token = head[2:7].partition(b" ")[0]
        start = 3 + len(token)
        if token in _FLOATS:
            four, rows, also_four, columns = struct.unpack_from("<BiBi", head, start)
            if (four, also_four) != (4, 4):
                raise DamagedError("its header is damaged")
            _not_negative(rows, columns)
            return Header("matrix", rows, columns, start + 10 + rows * columns * _FLOATS[token])
        if token in _COMPRESSED:
            least, span, rows, columns = struct.unpack_from("<ffii", head, start)
            _not_negative(rows, columns)
            if not (math.isfinite(least) and math.isfinite(span)):
                raise DamagedError("its range is not finite")
            element, column = _COMPRESSED[token]
            size = start + 16 + column * columns + rows * columns * element
            return Header("matrix", rows, columns, size)
    except struct.error as error:
        raise DamagedError("the file ends in its header") from error
    raise DamagedError(f"it is a Kaldi object of type {token!r}, not a matrix or integers")


def _not_negative(*sizes: int) -> None:
    if min(sizes) < 0:
        raise DamagedError("its header has a negative size")


def _text_at(files: Files, number: int, offset: int) -> bytes:
    """Read a text object including its end: one line, or everything up to the newline after `]`."""
    content = b""
    while len(content) <= MOST_TEXT:
        part = files.read(number, offset + len(content), CHUNK if content else 1 << 14)
        content += part
        brackets = content.lstrip()[:1] == b"["
        end = content.find(b"]" if brackets else b"\n")
        if end >= 0 and brackets:
            end = content.find(b"\n", end)
        if end >= 0:
            return content[: end + 1]
        if not _NUMBERS.fullmatch(part.replace(b"[", b" ", 1).replace(b"]", b" ", 1)):
            break
        if not part:
            if brackets and b"]" not in content:
                raise DamagedError("the file ends too early")
            return content
    raise DamagedError("it is neither a binary nor a text object of Kaldi")


def _parse_text(content: bytes, kind: Kind) -> np.ndarray:
    """Parse a text object.

    kaldiio is not used here: it reads a matrix as integers if its first number has no decimal
    point.
    """
    inner = content.strip()
    brackets = inner[:1] == b"["
    if brackets:
        inner = inner[1:].removesuffix(b"]")
    if not _NUMBERS.fullmatch(inner):
        raise DamagedError("it is neither a binary nor a text object of Kaldi")
    if kind == "matrix" and not brackets:
        raise DamagedError("it is a vector, not a matrix of features")
    try:
        if kind == "integers":
            wide = np.array(inner.split(), dtype=np.int64)
            found = wide.astype(np.int32)
            if (found != wide).any():  # NumPy 1 reads a larger number as another one
                raise OverflowError("integers must fit into 32 bits")
            return found
        rows = [row.split() for row in inner.split(b"\n") if row.strip()]
        with np.errstate(all="ignore"):
            found = np.array(rows, dtype=np.float64).astype(np.float32)
        return found if found.ndim == 2 else found.reshape(0, 0)
    except (ValueError, OverflowError) as error:
        raise DamagedError(
            "its numbers cannot be read, or its rows are of different length"
        ) from error


def read(files: Files, number: int, offset: int, kind: Kind) -> tuple[Header, np.ndarray]:
    header = header_at(files, number, offset, kind)
    content = files.read(number, offset, header.size)
    if len(content) < header.size:
        raise DamagedError("the file ends too early")
    if header.text:
        return header, _parse_text(content, kind)
    if kind == "integers":
        # Like kaldiio.read_int32vector, without a loop: each integer follows its width, 4.
        pairs = np.frombuffer(content, np.dtype([("width", "u1"), ("value", "<i4")]), offset=7)
        if (pairs["width"] != 4).any():
            raise DamagedError("its integers are damaged")
        return header, pairs["value"].astype(np.int32)
    if _binary_header(content[:HEAD]) != header:  # the file changed between the two reads
        raise DamagedError("has changed while it was read")
    try:
        with np.errstate(all="ignore"):  # the caller checks for values that are not finite
            found = np.ascontiguousarray(read_kaldi(io.BytesIO(content)), dtype=np.float32)
    except (ValueError, AssertionError, struct.error, IndexError, OverflowError) as error:
        raise DamagedError(f"it cannot be decoded ({error})") from error
    return header, found


def bounds(text: str, header: Header) -> tuple[int, int, int, int]:
    """Convert a range `[first:last,left:right]`, which includes its ends, to Python's half-open."""
    rows, columns = header.rows, header.columns
    if not text:
        return 0, rows, 0, columns
    found = RANGE.fullmatch(text)
    assert found is not None
    first, last = _bound(found[1], found[2], rows)
    left, right = _bound(found[3], found[4], columns)
    return first, last, left, right


def _bound(first: str | None, last: str | None, n: int) -> tuple[int, int]:
    begin = int(first) if first else 0
    end = int(last) + 1 if last else n
    # Kaldi tolerates three frames beyond the end, because segment times are rounded.
    if begin >= end or end > n + 3 or begin >= n:
        raise DamagedError(f"it has no [{first or ''}:{last or ''}]: its size is {n}")
    return begin, min(end, n)
