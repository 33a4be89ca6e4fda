"""Files that are whole or absent, and files that are read within limits."""

import os
import secrets
import stat
from pathlib import Path

from bnrnn.errors import OutputError

_TEMPORARY = ".tmp-"


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; after a crash at any moment it is the old file or the new.

    Raises:
        OutputError: it cannot be written; the old file, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(4)}")
    try:
        try:
            # The mode is the user's umask; O_EXCL never follows a link somebody put there.
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


def remove_temporaries(folder: Path) -> None:
    """Delete what `write_atomic` left in `folder` in a process that was killed.

    Only for a folder that this process has locked: nobody else is writing there.
    """
    for path in folder.glob(f".*{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file, at most `most` of them.

    Raises:
        OSError: it cannot be read, is no regular file (opening a FIFO would block), or is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} is larger than {most:,} bytes")
    return content


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a rename must survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
