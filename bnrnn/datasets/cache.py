"""Parsed data sets, kept on disk until their source files or the format version change."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pooch

from bnrnn.errors import DataError, OutputError

T = TypeVar("T")


def cached_folder(
    name: str,
    sources: Sequence[Path],
    version: int,
    build: Callable[[Path], None],
    load: Callable[[Path], T],
) -> T:
    """`load(folder)` of a folder that `build(folder)` once filled from `sources`.

    For arrays that are too large for memory or take long to parse. The key is the content of the
    sources, `name` and `version`: raise `version` when `build` changes. For a source that is a
    folder only the names, sizes and times of its files count. The cache is at $BNRNN_CACHE_DIR,
    else in the user's cache folder. A folder that `load` fails on is built afresh. Processes may
    share it.

    Raises:
        DataError: a source cannot be read, or changed while it was.
        OutputError: the cache cannot be written.
    """
    key = _key(name, sources, version)
    path = _folder() / f"{name}-{key[:32]}"
    try:
        return load(path)
    except Exception:
        pass  # Not there, or damaged.
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        fresh, damaged = temporary / "fresh", temporary / "damaged"
        fresh.mkdir()
        build(fresh)
        if _key(name, sources, version) != key:
            raise DataError(
                f"{', '.join(map(str, sources))} changed while it was read; start again"
            )
        for file in fresh.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        try:
            os.rename(fresh, path)
        except OSError:
            # Another process was faster, or what lies there is damaged.
            try:
                return load(path)
            except Exception:
                os.rename(path, damaged)
                os.rename(fresh, path)
        return load(path)
    except OSError as error:
        raise OutputError(
            f"cannot write the cache {path}: {error.strerror or error}; free some space or set "
            "BNRNN_CACHE_DIR to another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _folder() -> Path:
    chosen = os.environ.get("BNRNN_CACHE_DIR")
    return Path(os.path.expanduser(chosen)) if chosen else Path(pooch.os_cache("bnrnn"))


def _key(name: str, sources: Sequence[Path], version: int) -> str:
    key = hashlib.sha256(f"{name}\n{version}\n".encode())
    for source in sources:
        try:
            if os.path.isdir(source):
                _add_folder(key, source)
                continue
            with open(source, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(
                f"cannot read {source}: {error.strerror}; check the file or set another path"
            ) from error
    return key.hexdigest()


def _add_folder(key: "hashlib._Hash", folder: Path) -> None:
    # To read 400,000 small files takes about as long as to parse them.
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            key.update(entry.name.encode("utf-8", "surrogateescape") + b"\0")
            if entry.is_dir():
                _add_folder(key, Path(entry.path))
                key.update(b"/\0")
            else:
                found = entry.stat()
                key.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
