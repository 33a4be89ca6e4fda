"""Kaldi archives: matrices and vectors of integers by utterance, read one at a time.

An archive is named as in Kaldi: `ark:FILE`, `scp:FILE`, or FILE alone. FILE alone is an scp table
if its name ends in .scp or .scp.gz. Supported: binary and text objects, compressed matrices,
gzipped files, several files by a glob pattern (`pdf.*.gz`), and ranges (`feats.ark:11[0:99]`).

Archives are untrusted, but `kaldiio` trusts them. It executes names that begin or end in `|`, even
before an offset or a range (`cmd |:7`, `cmd |[0:5]`), unpickles content that begins with PKL, and
passes content that begins with NPY, AUDIO, fLaC or RIFF to other readers. This module therefore
passes it neither names nor files, only the bytes of one binary matrix whose header was checked.
Commands run only if `pipes` is true, once each. Their output is kept in an unnamed temporary file,
as is the content of a gzipped archive, because neither can be read at random positions.
"""

import glob
import gzip
import io
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from kaldiio.matio import read_kaldi

from bnrnn.datasets.fetch import expand
from bnrnn.datasets.limits import open_regular
from bnrnn.errors import ConfigError, DataError, OutputError

Kind = Literal["matrix", "integers"]

MOST_BYTES = 64 << 20  # of one matrix: 400,000 frames of 40 features
MOST_TEXT = 16 << 20  # of one text object
MOST_TOKEN = 4096  # bytes of an utterance's name
MOST_LINE = 1 << 16  # bytes of a line in an scp table
MOST_TABLE = 1 << 30  # bytes of an scp table, decompressed
MOST_OPEN = 64  # files open at once
# gzip reduces alignments to 1/30 and features hardly at all. A higher ratio is a decompression
# bomb.
MOST_EXPANSION, SLACK = 100, 16 << 20
SPARED = 64 << 20  # bytes to leave free on the disk of temporary files
CHUNK = 1 << 20
MAGIC = b"\x1f\x8b"  # of gzip
HEAD = 32  # bytes; longer than any matrix header

_FLOATS = {b"FM": 4, b"DM": 8}
_COMPRESSED = {b"CM": (1, 8), b"CM2": (2, 0), b"CM3": (1, 0)}  # bytes per element and per column
_RANGE = re.compile(r"\[(\d{0,9}):(\d{0,9})(?:,(\d{0,9}):(\d{0,9}))?\]$")
_SPECIFIER = re.compile(r"(ark|scp)((?:,\w+)*):(.*)", re.DOTALL)
_NUMBERS = re.compile(rb"[\d\s.+\-eEnaifNAIFty]*")


class _DamagedError(Exception):
    """An object is damaged; the archive adds the utterance and the file to the message."""


class _Header(NamedTuple):
    kind: Kind
    rows: int
    columns: int  # 1 for a vector
    size: int  # of the whole object, in bytes
    text: bool = False


class _Place(NamedTuple):
    file: int  # number of the file
    offset: int
    range: str = ""


class Archive:
    """The matrices or integer vectors of one rspecifier.

    Attributes:
        rows: utterance -> number of frames, in the order of the archive.
        columns: utterance -> number of features; 1 for a vector.
    """

    def __init__(
        self, specifier: str, kind: Kind, setting: str = "data.features", pipes: bool = False
    ) -> None:
        """Read the headers of all objects, but no data.

        Args:
            specifier: a Kaldi rspecifier or a file, see the module's docstring.
            kind: the type that every object must have.
            setting: the setting that gave the specifier, for messages.
            pipes: run commands, as Kaldi does.

        Raises:
            ConfigError: the specifier is a command, and `pipes` is false.
            DataError: a file is missing, damaged, not an archive, or contains a command while
                `pipes` is false.
            OutputError: there is no disk space to decompress the archive.
        """
        self.kind: Kind = kind
        self._setting, self._pipes = setting, pipes
        self._advice = f"set {setting} to a Kaldi archive or its .scp"
        self._files = _Files(self._advice)
        self._printed: int | None = None  # number of the file with the commands' output
        self._numbers: dict[str, int] = {}  # file name in a table -> file number
        self._places: dict[str, _Place] = {}
        self.rows: dict[str, int] = {}
        self.columns: dict[str, int] = {}
        table, name = _parse_specifier(specifier)
        if is_command(name):
            if not pipes:
                raise ConfigError(
                    f"{setting} is a command, {name.strip()!r}: it is run only if "
                    "the same command line sets data.pipes=true"
                )
            place = self._run(_command(name))
            if table:
                with open(os.dup(self._files.descriptor(place.file)), "rb") as printed:
                    printed.seek(0)
                    lines = io.BytesIO(printed.read(MOST_TABLE))
                self._read_table(lines, _command(name), Path(), MOST_TABLE)
            else:
                self._scan(place.file)
        else:
            for path in _matching(name, self._advice):
                self._read_table_at(path) if table else self._scan_at(path)
        if not self._places:
            raise DataError(f"{name} has no utterances; {self._advice}")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, utterance: str) -> bool:
        return utterance in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, utterance: str) -> np.ndarray:
        """Read an utterance's matrix, (T, D) float32, or vector, (T,) int32; it is not cached.

        Raises:
            DataError: the object is damaged, or has changed since the archive was opened.
        """
        place = self._places[utterance]
        try:
            header, found = _read(self._files, place.file, place.offset, self.kind)
            first, last, left, right = _bounds(place.range, header)
            found = found[first:last] if found.ndim == 1 else found[first:last, left:right]
            if found.shape[0] != self.rows[utterance] or (
                found.ndim == 2 and found.shape[1] != self.columns[utterance]
            ):
                raise _DamagedError("has changed since it was first read")
        except _DamagedError as error:
            raise self._damaged(utterance, place, error) from error
        return found

    def _scan_at(self, path: Path) -> None:
        with open_regular(path, self._advice) as file:
            packed = file.read(2) == MAGIC
        self._scan(self._unpacked(path) if packed else self._files.add(path))

    def _read_table_at(self, path: Path) -> None:
        with open_regular(path, self._advice) as file:
            packed = file.peek(2)[:2] == MAGIC
            if packed:
                stream, most = gzip.GzipFile(fileobj=file), min(MOST_TABLE, _limit(file))
                self._read_table(stream, str(path), path.parent, most)
            else:
                self._read_table(file, str(path), path.parent, MOST_TABLE)

    def _scan(self, number: int) -> None:
        """Admit all objects of a file; each follows its utterance's name."""
        name_of_file, position = self._files.names[number], 0
        while True:
            head = self._files.read(number, position, MOST_TOKEN + HEAD)
            start = len(head) - len(head.lstrip(b"\n")) if position else 0
            name, space, _ = head[start : start + MOST_TOKEN].partition(b" ")
            if not name:
                if head and not head.isspace():
                    raise DataError(f"{name_of_file} is not a Kaldi archive; {self._advice}")
                return
            try:
                utterance = _utterance(name)
                if not space:
                    raise ValueError
            except ValueError as error:
                where = f"at byte {position + start} there is no utterance's name"
                raise DataError(
                    f"{name_of_file} is not a Kaldi archive, or damaged: {where}; {self._advice}"
                ) from error
            position += start + len(name) + 1
            header = self._admit(utterance, _Place(number, position))
            position += header.size

    def _read_table(
        self, stream: IO[bytes] | gzip.GzipFile, name: str, folder: Path, most: int
    ) -> None:
        """Admit the objects listed in an scp file by lines `utterance place`."""
        total = number = 0
        while True:
            number += 1
            try:
                line = stream.readline(MOST_LINE + 1)
                total += len(line)
                if not line:
                    return
                if len(line) > MOST_LINE or total > most:
                    raise ValueError("is longer than a table of utterances can be")
                text = line.decode("utf-8").strip()
                if not text:
                    continue
                utterance, *rest = text.split(None, 1)
                _utterance(utterance.encode())
                if not rest:
                    raise ValueError("has no location after the utterance's name")
            except UnicodeDecodeError as error:
                raise DataError(f"{name}: line {number} is not UTF-8; {self._advice}") from error
            except (OSError, EOFError, zlib.error) as error:
                raise _not_unpacked(name, error, self._advice) from error
            except ValueError as error:
                raise DataError(f"{name}: line {number} {error}; {self._advice}") from error
            self._admit(utterance, self._place(rest[0], name, number, folder))

    def _place(self, text: str, table: str, line: int, folder: Path) -> _Place:
        """Parse a place such as `feats.ark:11[0:99]`.

        A relative name refers to a file beside the table, or else, as in Kaldi, to one in the
        current folder.
        """
        where = f"{table}: line {line}"
        found = _RANGE.search(text)
        range_, rest = (found[0], text[: found.start()]) if found else ("", text)
        path, colon, offset = rest.rpartition(":")
        if not (colon and re.fullmatch(r"-?\d{1,19}", offset.strip())):
            path, offset = rest, "0"
        if is_command(path) or is_command(rest) or is_command(text):
            if not self._pipes:
                raise DataError(
                    f"{where} is a command, {path.strip()!r}: it is run only if "
                    f"the same command line sets data.pipes=true; {self._advice}"
                )
            place = self._run(_command(path))
            return place._replace(offset=place.offset + int(offset), range=range_)
        if path.strip() == "-":
            raise DataError(f"{where} names the standard input; {self._advice}")
        if path not in self._numbers:
            beside = folder / path
            found = beside if os.path.lexists(beside) else expand(Path(path))
            self._numbers[path] = self._files.add(found)
        return _Place(self._numbers[path], int(offset), range_)

    def _admit(self, utterance: str, place: _Place) -> _Header:
        if utterance in self._places:
            raise DataError(
                f"{self._files.names[place.file]}: utterance {utterance} occurs twice; "
                f"{self._advice}"
            )
        try:
            header = _header_at(self._files, place.file, place.offset, self.kind)
            first, last, left, right = _bounds(place.range, header)
        except _DamagedError as error:
            raise self._damaged(utterance, place, error) from error
        self._places[utterance] = place
        self.rows[utterance], self.columns[utterance] = last - first, right - left
        return header

    def _damaged(self, utterance: str, place: _Place, error: Exception) -> DataError:
        name = self._files.names[place.file]
        return DataError(
            f"{name}, utterance {utterance} at byte {place.offset}: {error}; {self._advice}"
        )

    def _unpacked(self, path: Path) -> int:
        """Decompress a gzipped file to a temporary file; return its number."""
        number = self._files.keep(str(path), _temporary())
        with open_regular(path, self._advice) as packed:
            stream, target = gzip.GzipFile(fileobj=packed), self._files.descriptor(number)
            try:
                _spool(stream, str(path), target, _limit(packed))
            except (OSError, EOFError, zlib.error) as error:
                raise _not_unpacked(path, error, self._advice) from error
        return number

    def _run(self, command: str) -> _Place:
        """Run a command; return where its output begins in the commands' temporary file."""
        if self._printed is None:
            self._printed = self._files.keep("the output of a command", _temporary())
        target = self._files.descriptor(self._printed)
        begin = self._files.size(self._printed)
        with subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            try:
                _spool(process.stdout, command, target, None)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise DataError(
                f"{command!r} failed with exit code {process.returncode}; {self._advice}"
            )
        return _Place(self._printed, begin)


def _limit(packed: IO[bytes]) -> int:
    """Return how many bytes a gzipped file may contain."""
    return MOST_EXPANSION * os.fstat(packed.fileno()).st_size + SLACK


def _not_unpacked(name: object, error: Exception, advice: str) -> DataError:
    return DataError(f"{name} cannot be unpacked ({error}); {advice}")


def is_command(name: str) -> bool:
    """Return whether Kaldi would execute this name instead of opening a file."""
    return name.strip().startswith("|") or name.strip().endswith("|")


def _command(name: str) -> str:
    return name.strip().strip("|").strip()


def _parse_specifier(specifier: str) -> tuple[bool, str]:
    """Return whether the specifier is an scp table, and its file or command."""
    if found := _SPECIFIER.fullmatch(specifier.strip()):
        return found[1] == "scp", found[3].strip()
    return specifier.strip().endswith((".scp", ".scp.gz")), specifier.strip()


def _matching(name: str, advice: str) -> Sequence[Path]:
    """Return the file of this name, or all that match the pattern, in numeric order."""
    if name == "-":
        raise DataError(f"the standard input cannot be read more than once; {advice}")
    path = expand(Path(name))
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return [path]
    found = glob.glob(str(path))
    if not found:
        raise DataError(f"no file matches {name}; {advice}")
    return [Path(p) for p in sorted(found, key=lambda p: (re.sub(r"\d+", _padded, p), p))]


def _padded(number: re.Match[str]) -> str:
    return number[0].zfill(20)


def _utterance(name: bytes) -> str:
    """Decode an utterance's name.

    Raises:
        ValueError: it is not a valid name.
    """
    text = name.decode("utf-8")
    if not text.isprintable() or text.split() != [text]:
        raise ValueError("does not begin with an utterance's name")
    return text


def _temporary() -> int:
    """Return the descriptor of an unnamed file, which disappears with the process."""
    descriptor, path = tempfile.mkstemp(prefix="bnrnn-")
    os.unlink(path)
    return descriptor


def _spool(stream: IO[bytes] | gzip.GzipFile, name: str, target: int, limit: int | None) -> None:
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


class _Files:
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


def _header_at(files: _Files, number: int, offset: int, kind: Kind) -> _Header:
    """Read and check the header of the object at `offset`; a text object is read whole.

    Raises:
        _DamagedError: it is not an object of this kind, or the file ends before the object.
    """
    size = files.size(number)
    if not 0 <= offset < size:
        raise _DamagedError(f"the file has {size} bytes")
    head = files.read(number, offset, HEAD)
    if head[:2] == b"\0B":
        header = _binary_header(head)
        if header.size > MOST_BYTES:
            raise _DamagedError(f"it claims {header.size:,} bytes, more than {MOST_BYTES:,}")
        if offset + header.size > size:
            raise _DamagedError("the file ends too early")
    elif head[:2] == MAGIC:
        raise _DamagedError("it is gzipped; unpack it, or name the archive instead of a table")
    else:
        content = _text_at(files, number, offset)
        numbers = _parse_text(content, kind)
        columns = 1 if numbers.ndim == 1 else numbers.shape[1]
        header = _Header(kind, len(numbers), columns, len(content), text=True)
    if header.kind != kind:
        wanted = {"matrix": "a matrix of features", "integers": "a vector of integers"}
        raise _DamagedError(f"it is {wanted[header.kind]}, not {wanted[kind]}")
    return header


def _binary_header(head: bytes) -> _Header:
    try:
        if head[2:3] == b"\4":
            (length,) = struct.unpack_from("<i", head, 3)
            _not_negative(length)
            return _Header("integers", length, 1, 7 + 5 * length)
        token = head[2:7].partition(b" ")[0]
        start = 3 + len(token)
        if token in _FLOATS:
            four, rows, also_four, columns = struct.unpack_from("<BiBi", head, start)
            if (four, also_four) != (4, 4):
                raise _DamagedError("its header is damaged")
            _not_negative(rows, columns)
            return _Header("matrix", rows, columns, start + 10 + rows * columns * _FLOATS[token])
        if token in _COMPRESSED:
            least, span, rows, columns = struct.unpack_from("<ffii", head, start)
            _not_negative(rows, columns)
            if not (math.isfinite(least) and math.isfinite(span)):
                raise _DamagedError("its range is not finite")
            element, column = _COMPRESSED[token]
            size = start + 16 + column * columns + rows * columns * element
            return _Header("matrix", rows, columns, size)
    except struct.error as error:
        raise _DamagedError("the file ends in its header") from error
    raise _DamagedError(f"it is a Kaldi object of type {token!r}, not a matrix or integers")


def _not_negative(*sizes: int) -> None:
    if min(sizes) < 0:
        raise _DamagedError("its header has a negative size")


def _text_at(files: _Files, number: int, offset: int) -> bytes:
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
                raise _DamagedError("the file ends too early")
            return content
    raise _DamagedError("it is neither a binary nor a text object of Kaldi")


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
        raise _DamagedError("it is neither a binary nor a text object of Kaldi")
    if kind == "matrix" and not brackets:
        raise _DamagedError("it is a vector, not a matrix of features")
    try:
        if kind == "integers":
            return np.array(inner.split(), dtype=np.int32)
        rows = [row.split() for row in inner.split(b"\n") if row.strip()]
        with np.errstate(all="ignore"):
            found = np.array(rows, dtype=np.float64).astype(np.float32)
        return found if found.ndim == 2 else found.reshape(0, 0)
    except (ValueError, OverflowError) as error:
        raise _DamagedError(
            "its numbers cannot be read, or its rows are of different length"
        ) from error


def _read(files: _Files, number: int, offset: int, kind: Kind) -> tuple[_Header, np.ndarray]:
    header = _header_at(files, number, offset, kind)
    content = files.read(number, offset, header.size)
    if len(content) < header.size:
        raise _DamagedError("the file ends too early")
    if header.text:
        return header, _parse_text(content, kind)
    if kind == "integers":
        # Like kaldiio.read_int32vector, without a loop: each integer follows its width, 4.
        pairs = np.frombuffer(content, np.dtype([("width", "u1"), ("value", "<i4")]), offset=7)
        if (pairs["width"] != 4).any():
            raise _DamagedError("its integers are damaged")
        return header, pairs["value"].astype(np.int32)
    if _binary_header(content[:HEAD]) != header:  # the file changed between the two reads
        raise _DamagedError("has changed while it was read")
    try:
        with np.errstate(all="ignore"):  # the caller checks for values that are not finite
            found = np.ascontiguousarray(read_kaldi(io.BytesIO(content)), dtype=np.float32)
    except (ValueError, AssertionError, struct.error, IndexError, OverflowError) as error:
        raise _DamagedError(f"it cannot be decoded ({error})") from error
    return header, found


def _bounds(text: str, header: _Header) -> tuple[int, int, int, int]:
    """Convert a range `[first:last,left:right]`, which includes its ends, to Python's half-open."""
    rows, columns = header.rows, header.columns
    if not text:
        return 0, rows, 0, columns
    found = _RANGE.fullmatch(text)
    assert found is not None
    first, last = _bound(found[1], found[2], rows)
    left, right = _bound(found[3], found[4], columns)
    return first, last, left, right


def _bound(first: str | None, last: str | None, n: int) -> tuple[int, int]:
    begin = int(first) if first else 0
    end = int(last) + 1 if last else n
    # Kaldi tolerates three frames beyond the end, because segment times are rounded.
    if begin >= end or end > n + 3 or begin >= n:
        raise _DamagedError(f"it has no [{first or ''}:{last or ''}]: its size is {n}")
    return begin, min(end, n)
