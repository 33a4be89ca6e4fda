"""text8: the first hundred million characters of a cleaned English Wikipedia, 27 symbols."""

import gzip
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np

from bnrnn.datasets.cache import Arrays, cached_arrays
from bnrnn.datasets.corpus import CharacterCorpus, corpus_from_arrays, split_in_order
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.errors import DataError

log = logging.getLogger(__name__)

LENGTH = 100_000_000
_ZIP = RemoteFile(
    "text8.zip",
    ("http://mattmahoney.net/dc/text8.zip",),
    "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
)
_SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
_FORMAT_VERSION = 1


def load_text8(data_dir: Path) -> CharacterCorpus:
    """From `data_dir/text8`: `text8.zip` (fetched if nothing is there), `text8.gz`, `text8`, or a
    prefix of it as `text8.prefix`.

    Split 90M / 5M / 5M; a shorter text in the same proportion, with a warning.

    Raises:
        DataError: it cannot be fetched, is damaged, or has other characters than a-z and space.
    """
    folder = data_dir / "text8"
    names = ("text8", "text8.zip", "text8.gz", "text8.prefix")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None or path.name == _ZIP.name:
        path = fetch(_ZIP, folder)

    def parse() -> Arrays:
        text = _read(path)
        unknown = sorted(set(text) - set(_SYMBOLS))
        if unknown:
            raise DataError(f"{path} is no text8: it has the character {unknown[0]!r}")
        points = {
            split: np.frombuffer(part.encode("ascii"), np.uint8)
            for split, part in split_in_order(str(path), text).items()
        }
        symbols = np.frombuffer(_SYMBOLS.encode(), np.uint8)
        indices = {s: np.searchsorted(symbols, p).astype(np.uint8) for s, p in points.items()}
        return {**indices, "symbols": symbols}

    corpus = corpus_from_arrays("text8", cached_arrays("text8", [path], _FORMAT_VERSION, parse))
    length = sum(len(part) for part in (corpus.train, corpus.valid, corpus.test))
    if length != LENGTH:
        log.warning(
            "%s has %s of text8's %s characters: split 90/5/5 in the same proportion, so results "
            "do not compare with those on the whole text", path, f"{length:,}", f"{LENGTH:,}",
        )  # fmt: skip
    return corpus


def _read(path: Path) -> str:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = archive.read("text8")
        elif path.suffix == ".gz":
            with gzip.open(path) as file:
                content = file.read()
        else:
            content = path.read_bytes()
        return content.decode("ascii")
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or cut short ({error}): delete it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text8: byte {error.start} is not ASCII") from error
