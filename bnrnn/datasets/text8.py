"""text8: the first 100 million characters of a cleaned English Wikipedia."""

import hashlib
import logging
import os
import string
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from bnrnn.datasets.characters import CharacterCorpus, split_corpus
from bnrnn.datasets.fetch import RemoteFile, expand, fetch
from bnrnn.datasets.limits import gunzip, read_file, reading
from bnrnn.errors import DataError, printable

log = logging.getLogger(__name__)

SYMBOLS = " " + string.ascii_lowercase
LENGTH = 100_000_000
SHA1 = "0dc3edebc970dcc96137e7deda4d9995af9d93de"
ZIP = RemoteFile(
    "text8.zip",
    ("http://mattmahoney.net/dc/text8.zip",),
    "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    LENGTH,
)
GZIP = RemoteFile(
    "text8.gz",
    ("https://github.com/piskvorky/gensim-data/releases/download/text8/text8.gz",),
    "md5:68799af40b6bda07dfa47a32612e5364",
    LENGTH,
)
NAMES = ("text8.zip", "text8", "text8.gz", "text8.prefix")
ADVICE = "delete it to have text8 fetched, or set data_dir"
MAX_LIST = 1 << 17  # bytes of the zip file's list of members; it has one member


def load_text8(data_dir: Path) -> CharacterCorpus:
    """Load text8 from the first of `NAMES` in `data_dir/text8`; download it if there is none.

    The split is 90 / 5 / 5 million characters; there are 27 symbols. A file that contains only the
    beginning is split in the same proportions, with a warning.

    Raises:
        DataError: the file is damaged, is not text8, or cannot be fetched.
    """
    folder = expand(data_dir / "text8")
    there = [folder / name for name in NAMES if os.path.lexists(folder / name)]
    path = there[0] if there else fetch(ZIP, folder, GZIP)
    text = _parse(path)
    corpus = split_corpus(str(path), SYMBOLS, text)
    if len(text) == LENGTH:
        return replace(corpus, name="text8")
    log.warning(
        "%s holds only the first %s of text8's %s characters, split 90/5/5 %%: results cannot be "
        "compared with those on the whole text", printable(path), f"{len(text):,}", f"{LENGTH:,}",
    )  # fmt: skip
    return replace(corpus, name=f"text8 (first {len(text):,} characters)", whole=False)


def _parse(path: Path) -> np.ndarray:
    """Return the indices of the characters, uint8."""
    content = _unpack(path)
    if len(content) > LENGTH or (
        len(content) == LENGTH and hashlib.sha1(content, usedforsecurity=False).hexdigest() != SHA1
    ):
        raise DataError(f"{path} is not text8: its length or sha1 differs; {ADVICE}")
    foreign = 255
    table = np.full(256, foreign, np.uint8)
    table[list(SYMBOLS.encode())] = range(len(SYMBOLS))
    indices = table[np.frombuffer(content, np.uint8)]
    if foreign in indices:
        position = int((indices == foreign).argmax())
        byte = content[position : position + 1]
        raise DataError(
            f"{path} is not text8: byte {position} is {byte}, not a-z or space; {ADVICE}"
        )
    return indices


def _unpack(path: Path) -> bytes:
    """Return the text, at most `LENGTH` + 1 bytes of it."""
    if path.suffix == ".zip":
        return _unzip(path)
    if path.suffix == ".gz":
        return gunzip(path, LENGTH, ADVICE)
    return read_file(path, LENGTH, ADVICE)


def _unzip(path: Path) -> bytes:
    with reading(path, ADVICE, LENGTH + MAX_LIST) as file:
        try:
            with zipfile.ZipFile(cast(Any, _InPieces(file))) as archive:
                member = archive.getinfo("text8")
                if member.file_size > LENGTH:
                    raise zipfile.BadZipFile(f"{member.file_size:,} bytes, not {LENGTH:,}")
                # The other methods decompress in chunks of unbounded size.
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile("neither stored nor deflated")
                with archive.open(member) as unpacked:
                    return unpacked.read(LENGTH + 1)
        except Exception as error:  # zipfile raises no common type for damaged files
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise DataError(f"{path} cannot be read or unpacked ({reason}); {ADVICE}") from error


class _InPieces:
    """A file that is never read in large chunks.

    zipfile reads the list of members at once, and takes its size from the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size if 0 <= size <= MAX_LIST else MAX_LIST)
