"""Parsed arrays, kept on disk until their source files or the format version change."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pooch

from bnrnn.errors import DataError

Arrays = dict[str, np.ndarray]


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


def _folder() -> Path:
    chosen = os.environ.get("BNRNN_CACHE_DIR")
    return Path(os.path.expanduser(chosen)) if chosen else Path(pooch.os_cache("bnrnn"))


def _key(name: str, sources: Sequence[Path], version: int) -> str:
    key = hashlib.sha256(f"{name}\n{version}\n".encode())
    for source in sources:
        try:
            with open(source, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(
                f"cannot read {source}: {error.strerror}; check the file or set another path"
            ) from error
    return key.hexdigest()


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
