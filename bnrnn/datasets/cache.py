"""Parsed data sets, kept on disk until their source or the format version changes."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pooch

from bnrnn.datasets.fetch import expand
from bnrnn.datasets.limits import read_file, reading
from bnrnn.datasets.staging import clean, publish, staging
from bnrnn.errors import DataError, OutputError

T = TypeVar("T")

SUMS = "sums.json"
CHUNK = 1 << 20  # bytes read at a time
ADVICE = "set BNRNN_CACHE_DIR to another folder"


def cached_folder(
    name: str, key: Callable[[], str], build: Callable[[Path], None], load: Callable[[Path], T]
) -> T:
    """Return `load(folder)` for a cached folder; `build(folder)` writes its files the first time.

    For arrays that are too large for memory or slow to parse. The cache is at $BNRNN_CACHE_DIR, or
    else in the user's cache folder. A folder with wrong checksums, or one that `load` cannot read,
    is rebuilt. Processes may share the cache.

    key: returns hexadecimal digits that identify the source and everything else `build` depends
        on. It is called again after `build`, because the source may change while it is read.

    Raises:
        DataError: the source cannot be read, or changed while it was read.
        OutputError: the cache cannot be written.
    """
    identity = key()
    cache = _folder()
    path = cache / f"{name}-{identity[:32]}"
    clean(cache)
    try:
        return _load(path, load)
    except Exception:
        pass  # Missing or damaged; NumPy and json raise many types of exception for that.
    try:
        with staging(path) as content:
            fresh, damaged = content / "fresh", content / "damaged"
            fresh.mkdir()
            build(fresh)
            if key() != identity:
                raise DataError(f"the source of {path.name} changed while it was read; start again")
            (fresh / SUMS).write_text(json.dumps(_sums(fresh)))
            try:
                publish(fresh, path)
            except OSError:
                # Another process published first, or the folder there is damaged.
                try:
                    return _load(path, load)
                except Exception:
                    os.rename(path, damaged)
                    publish(fresh, path)
            return _load(path, load)
    except OSError as error:
        raise OutputError(
            f"cannot write the cache {path}: {error.strerror or error}; free some space, or "
            f"{ADVICE}"
        ) from error


def _folder() -> Path:
    try:
        return expand(Path(os.environ.get("BNRNN_CACHE_DIR") or pooch.os_cache("bnrnn")))
    except RuntimeError as error:
        raise OutputError(f"there is no home folder for the cache; {ADVICE}") from error


def _load(path: Path, load: Callable[[Path], T]) -> T:
    expected = json.loads(read_file(path / SUMS, CHUNK, ADVICE))
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != SUMS}
    if sizes != {name: size for name, (size, _) in expected.items()} or expected != _sums(path):
        raise ValueError("damaged")
    return load(path)


def _sums(folder: Path) -> dict[str, list[int]]:
    """Return size and CRC-32 of each file."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name == SUMS:
            continue
        size = crc = 0
        with reading(path, ADVICE) as file:
            while chunk := file.read(CHUNK):
                size += len(chunk)
                crc = zlib.crc32(chunk, crc)
        sums[path.name] = [size, crc]
    return sums
