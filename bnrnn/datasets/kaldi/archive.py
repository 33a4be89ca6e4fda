"""`Archive`: the objects that an rspecifier names, in one file, in a table or from a command."""

import glob
import gzip
import io
import os
import re
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from bnrnn.datasets.fetch import expand
from bnrnn.datasets.kaldi.files import Files, limit_of, spool, temporary
from bnrnn.datasets.kaldi.objects import (
    HEAD,
    MAGIC,
    RANGE,
    DamagedError,
    Header,
    Kind,
    bounds,
    header_at,
    read,
)
from bnrnn.datasets.limits import open_regular
from bnrnn.errors import ConfigError, DataError

MOST_TOKEN = 4096  # bytes of an utterance's name
MOST_LINE = 1 << 16  # bytes of a line in an scp table
MOST_TABLE = 1 << 30  # bytes of an scp table, decompressed

_SPECIFIER = re.compile(r"(ark|scp)((?:,\w+)*):(.*)", re.DOTALL)


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
        self._files = Files(self._advice)
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
            header, found = read(self._files, place.file, place.offset, self.kind)
            first, last, left, right = bounds(place.range, header)
            found = found[first:last] if found.ndim == 1 else found[first:last, left:right]
            if found.shape[0] != self.rows[utterance] or (
                found.ndim == 2 and found.shape[1] != self.columns[utterance]
            ):
                raise DamagedError("has changed since it was first read")
        except DamagedError as error:
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
                stream, most = gzip.GzipFile(fileobj=file), min(MOST_TABLE, limit_of(file))
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
        found = RANGE.search(text)
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

    def _admit(self, utterance: str, place: _Place) -> Header:
        if utterance in self._places:
            raise DataError(
                f"{self._files.names[place.file]}: utterance {utterance} occurs twice; "
                f"{self._advice}"
            )
        try:
            header = header_at(self._files, place.file, place.offset, self.kind)
            first, last, left, right = bounds(place.range, header)
        except DamagedError as error:
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
        number = self._files.keep(str(path), temporary())
        with open_regular(path, self._advice) as packed:
            stream, target = gzip.GzipFile(fileobj=packed), self._files.descriptor(number)
            try:
                spool(stream, str(path), target, limit_of(packed))
            except (OSError, EOFError, zlib.error) as error:
                raise _not_unpacked(path, error, self._advice) from error
        return number

    def _run(self, command: str) -> _Place:
        """Run a command; return where its output begins in the commands' temporary file."""
        if self._printed is None:
            self._printed = self._files.keep("the output of a command", temporary())
        target = self._files.descriptor(self._printed)
        begin = self._files.size(self._printed)
        with subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            try:
                spool(process.stdout, command, target, None)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise DataError(
                f"{command!r} failed with exit code {process.returncode}; {self._advice}"
            )
        return _Place(self._printed, begin)


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
