"""Texts that need no download: the Python manual, and any text file of the user."""

import codecs
import io
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bnrnn.datasets.characters import CharacterCorpus, encode, index_type, split_corpus
from bnrnn.datasets.fetch import expand
from bnrnn.datasets.limits import reading
from bnrnn.errors import DataError, printable

MAX_BYTES = 1 << 30  # of a text; it is kept in memory, at one to four bytes per character
CHUNK = 1 << 20  # bytes decoded at a time
ADVICE = "set task.path to a UTF-8 text file"


def load_pydocs() -> CharacterCorpus:
    """Load the Python language reference that ships with CPython: 465,000 characters, split 90/5/5.

    The text differs slightly between Python versions.

    Raises:
        DataError: this Python lacks it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without pydoc_data: install its whole standard library, or choose "
            "another task"
        ) from error
    text = "\n".join(topics[topic] for topic in sorted(topics))
    symbols = "".join(sorted(set(text)))
    name = f"pydocs (Python {platform.python_version()})"
    return split_corpus(name, symbols, encode(text, symbols))


def load_text(path: Path) -> CharacterCorpus:
    """Load a UTF-8 text file, split 90/5/5 in order; all line endings become newlines.

    The file is read twice in chunks; only the indices are kept in memory.

    Raises:
        DataError: `path` is not a file, cannot be read, is larger than `MAX_BYTES`, is not UTF-8,
            contains NUL characters, or is too short to split.
    """
    path = expand(path)
    if not os.path.lexists(path):
        raise DataError(f"{path} does not exist; {ADVICE}")
    with reading(path, ADVICE, MAX_BYTES) as file:
        found: set[str] = set()
        length = 0
        for piece in _pieces(path, file):
            found.update(piece)
            length += len(piece)
        if length == 0:
            raise DataError(f"{path} is empty; {ADVICE} with content")
        symbols = "".join(sorted(found))
        text = np.empty(length, index_type(symbols))
        file.seek(0)
        filled = 0
        for piece in _pieces(path, file):
            if filled + len(piece) > length or not found.issuperset(piece):
                break
            text[filled : filled + len(piece)] = encode(piece, symbols)
            filled += len(piece)
        else:
            if filled == length:
                return split_corpus(printable(path), symbols, text)
    raise DataError(f"{path} changed while it was read; start again")


def _pieces(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the text in chunks, without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    position = characters = 0
    while True:
        chunk = file.read(CHUNK)
        position += len(chunk)
        if position > MAX_BYTES:  # the file has grown, or reports no size, as in /proc
            raise DataError(f"{path} has more than {MAX_BYTES:,} bytes; {ADVICE}")
        try:
            piece = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # The decoder prepends the undecoded end of the previous chunk.
            byte = position - len(error.object) + error.start
            raise DataError(
                f"{path} is not UTF-8: byte {byte} cannot be decoded; convert it, or {ADVICE}"
            ) from error
        if characters == 0:
            piece = piece.removeprefix("\ufeff")
        if "\0" in piece:
            raise DataError(
                f"{path} is not a text: its character {characters + piece.index(chr(0))} is NUL; "
                f"{ADVICE}"
            )
        characters += len(piece)
        yield piece
        if not chunk:
            return
