"""Folders in which files are made before they get their name, and what killed processes left."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bnrnn.runs.files import sync

SUFFIX = ".partial"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new, empty folder beside `target`, removed afterwards; `publish` what is made in it.

    A lock is held on it while it is in use. The system drops the lock when the process dies, and
    `clean` then removes the folder; `clean` never removes one of a living process.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        holder = Path(tempfile.mkdtemp(SUFFIX, f".{target.name}.", target.parent))
        lock = None
        try:
            # Where nothing can be locked, `clean` cannot lock either and removes nothing.
            with contextlib.suppress(OSError):
                lock = _lock(holder)
                if lock is None:
                    continue  # `clean` took it for left behind before it was locked
            content = holder / "content"
            content.mkdir()  # mkdtemp ignores the umask
            yield content
            return
        finally:
            shutil.rmtree(holder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def publish(path: Path, target: Path) -> None:
    """Give a file, or a folder of files, its final name once all of it is on disk.

    Raises:
        OSError: it cannot be written, or `target` is a folder with content.
    """
    for file in path.iterdir() if path.is_dir() else [path]:
        sync(file)
    os.replace(path, target)
    sync(target.parent)


def clean(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left in `folder` while they made `name`, a glob pattern."""
    holders = []
    with contextlib.suppress(OSError):
        holders = list(folder.glob(f".{name}.*{SUFFIX}"))
    for holder in holders:
        with contextlib.suppress(OSError):
            lock = None if holder.is_symlink() else _lock(holder)
            if lock is not None:
                shutil.rmtree(holder, ignore_errors=True)
                os.close(lock)


def _lock(holder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None: another process has it, or removed it.

    Raises:
        OSError: there are no locks here.
    """
    try:
        descriptor = os.open(holder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # of a folder that was removed since
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
    return None
