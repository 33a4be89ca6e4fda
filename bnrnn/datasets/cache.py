"""What was parsed once is read back as arrays, while its source and the parser are the same."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pooch

Arrays = dict[str, np.ndarray]


def cached_arrays(
    name: str, sources: Sequence[Path], version: int, parse: Callable[[], Arrays]
) -> Arrays:
    """The arrays of `parse`, from the cache if it holds them for these very sources.

    The key is the content of the source files and the format version, so nothing stale is ever
    read. Kept in `$BNRNN_CACHE_DIR`, else in the user's cache folder; a damaged file is made
    afresh, and a folder that cannot be written to only costs the time.
    """
    digest = hashlib.sha256(f"{name}:{version}".encode())
    for source in sources:
        with open(source, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    folder = Path(os.environ.get("BNRNN_CACHE_DIR") or pooch.os_cache("bnrnn"))
    path = folder / f"{name}-{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        arrays = parse()
        _write(path, arrays)
        return arrays


def _write(path: Path, arrays: Arrays) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may be at it: each writes a file of its own, the last one stays.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.stem}-", suffix=".npz", delete=False
        ) as file:
            temporary = Path(file.name)
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError:
        pass
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
