"""Parsed arrays, kept on disk until their source files or the format version change."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pooch

from bnrnn.errors import DataError, OutputError

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


def cached_arrays(
    name: str, sources: Sequence[Path], version: int, parse: Callable[[], Arrays]
) -> Arrays:
    """What `parse()` made of `sources`, from the cache if it was parsed before.

    The key is the content of the sources, `name` and `version`: raise `version` when `parse`
    changes. The cache lies in $BNRNN_CACHE_DIR, else in the user's cache folder; if it cannot be
    written, `parse` runs each time. Processes may share it without locks.

    Raises:
        DataError: a source cannot be read.
    """
    key = _key(name, sources, version)
    path = _folder() / f"{name}-{key[:32]}.npz"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:
        pass  # Not there, or damaged: numpy and zipfile have a dozen exceptions for that.
    arrays = parse()
    # A source that changed while it was parsed must not be kept under its old key.
    if _key(name, sources, version) == key:
        _write(path, arrays)
    return arrays


def cached_folder(
    name: str,
    sources: Sequence[Path],
    version: int,
    build: Callable[[Path], None],
    load: Callable[[Path], T],
) -> T:
    """`load(folder)` of a folder that `build(folder)` once filled from `sources`.

    For arrays that are too large for memory, which an .npz file cannot map. The key is as for
    `cached_arrays`, but of a source that is a folder only the names, sizes and times of its files
    count. A folder that `load` fails on is built afresh. Processes may share it without locks.

    Raises:
        DataError: a source cannot be read, or changed while it was.
        OutputError: the cache cannot be written.
    """
    key = _key(name, sources, version, folders=True)
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
        if _key(name, sources, version, folders=True) != key:
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


def _key(name: str, sources: Sequence[Path], version: int, folders: bool = False) -> str:
    key = hashlib.sha256(f"{name}\n{version}\n".encode())
    for source in sources:
        try:
            if folders and os.path.isdir(source):
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


def _write(path: Path, arrays: Arrays) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(temporary, path)
    except OSError:
        pass  # The cache only saves time.
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
