"""Atomic writes, reads within limits, and a folder that is only read."""

import os
import secrets
import stat
from pathlib import Path

from bnrnn.disk import sync
from bnrnn.errors import OutputError

_TEMPORARY = ".tmp-"
_only_read: Path | None = None


def only_read(folder: Path | None) -> None:
    """Record the `data_dir` of a run's config.yaml, perhaps a stranger's: no data go there."""
    global _only_read
    _only_read = folder


def is_only_read(path: Path) -> bool:
    return _only_read is not None and path.is_relative_to(_only_read)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` atomically; after a crash at any moment it is either the old or the new file.

    Raises:
        OutputError: it cannot be written; the old file, if any, is unchanged.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(4)}")
    try:
        try:
            # The user's umask sets the mode; O_EXCL never follows a link.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror or error}; free some space or choose another place "
        "with outputs=DIR"
    )


def not_writable(place: Path | str, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to {place}: {error.strerror}; choose another place with outputs=DIR"
    )


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files that `write_atomic` left in `folder` when its process was killed.

    Call it only for a folder that this process has locked, so that no other process writes there.
    """
    for path in folder.glob(f".*{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read, is larger, or is not a regular file (opening a FIFO would
            block).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} is larger than {most:,} bytes")
    return content
