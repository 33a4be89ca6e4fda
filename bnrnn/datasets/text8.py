"""text8: the first 100 million characters of a cleaned English Wikipedia."""

import gzip
import hashlib
import logging
import os
import string
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

from bnrnn.datasets.characters import CharacterCorpus, build_corpus, split
from bnrnn.datasets.fetch import RemoteFile, expand, fetch
from bnrnn.errors import DataError

log = logging.getLogger(__name__)

SYMBOLS = " " + string.ascii_lowercase
LENGTH = 100_000_000
SHA1 = "0dc3edebc970dcc96137e7deda4d9995af9d93de"
ZIP = RemoteFile(
    "text8.zip",
    ("http://mattmahoney.net/dc/text8.zip",),
    "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
)
GZIP = RemoteFile(
    "text8.gz",
    ("https://github.com/piskvorky/gensim-data/releases/download/text8/text8.gz",),
    "md5:68799af40b6bda07dfa47a32612e5364",
)
NAMES = ("text8.zip", "text8", "text8.gz", "text8.prefix")


def load_text8(data_dir: Path) -> CharacterCorpus:
    """text8 from the first of `NAMES` in `data_dir/text8`, downloaded if there is none.

    Split 90 / 5 / 5 million characters; 27 symbols. A file that holds only the beginning is split
    in the same proportion, with a warning.

    Raises:
        DataError: the file is damaged, is not text8, or cannot be fetched.
    """
    folder = expand(data_dir / "text8")
    there = [folder / name for name in NAMES if os.path.exists(folder / name)]
    path = there[0] if there else fetch(ZIP, folder, GZIP)
    corpus = _parse(path)
    length = sum(map(len, (corpus.train, corpus.valid, corpus.test)))
    if length == LENGTH:
        return replace(corpus, name="text8")
    log.warning(
        "%s holds only the first %s of text8's %s characters, split 90/5/5 %%: results do not "
        "compare with those on the whole text", path, f"{length:,}", f"{LENGTH:,}",
    )  # fmt: skip
    return replace(corpus, name=f"text8 (first {length:,} characters)", whole=False)


def _parse(path: Path) -> CharacterCorpus:
    advice = "delete it to have text8 fetched, or set data_dir"
    try:
        content = _unpack(path)
    except (OSError, EOFError, KeyError, NotImplementedError, RuntimeError, zlib.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise DataError(f"{path} cannot be read or unpacked ({error}); {advice}") from error
    if len(content) > LENGTH or (
        len(content) == LENGTH and hashlib.sha1(content, usedforsecurity=False).hexdigest() != SHA1
    ):
        raise DataError(f"{path} is not text8: its length or sha1 differs; {advice}")
    if foreign := content.translate(None, SYMBOLS.encode()):
        position = content.index(foreign[0])
        raise DataError(
            f"{path} is not text8: byte {position} is {foreign[:1]}, not a-z or space; {advice}"
        )
    return build_corpus(str(path), split(content.decode("ascii")), SYMBOLS)


def _unpack(path: Path) -> bytes:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read("text8")
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    return path.read_bytes()
