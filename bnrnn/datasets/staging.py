"""Write files in a staging folder, then rename them; clean up after killed processes."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bnrnn.disk import sync
from bnrnn.errors import DataError
from bnrnn.runs.files import is_only_read

SUFFIX = ".partial"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `target`; remove it afterwards. `publish` its files.

    The folder is locked while it is in use. The system releases the lock when the process dies, and
    `clean` then removes the folder. `clean` never removes the folder of a running process.

    Raises:
        OSError: the folder cannot be created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        holder = Path(tempfile.mkdtemp(SUFFIX, f".{target.name}.", target.parent))
        lock = None
        try:
            # If the file system has no locks, `clean` cannot lock either and removes nothing.
            with contextlib.suppress(OSError):
                lock = _lock(holder)
                if lock is None:
                    continue  # `clean` removed it before it was locked
            content = holder / "content"
            content.mkdir()  # mkdtemp ignores the umask
            yield content
            return
        finally:
            _remove(holder, lock)


def publish(path: Path, target: Path) -> None:
    """Flush a file or a folder of files to disk, then rename it to `target`.

    Raises:
        OSError: it cannot be written, or `target` is a folder that is not empty.
    """
    for file in path.iterdir() if path.is_dir() else [path]:
        sync(file)
    os.replace(path, target)
    sync(target.parent)


def check_may_write(path: Path) -> None:
    """Check that the user, and not the settings of a run, chose the folder of `path`.

    Raises:
        DataError: the settings of a run chose it.
    """
    if is_only_read(path):
        raise DataError(
            f"cannot write {path}: the run's config.yaml names this data_dir, so it is only read; "
            "add data_dir=DIR"
        )


def clean(folder: Path, name: str = "*") -> None:
    """Remove the staging folders that killed processes left in `folder` for `name`, a glob."""
    holders = []
    if is_only_read(folder):
        return
    with contextlib.suppress(OSError):
        holders = list(folder.glob(f".{name}.*{SUFFIX}"))
    for holder in holders:
        with contextlib.suppress(OSError):
            lock = None if holder.is_symlink() else _lock(holder)
            if lock is not None:
                _remove(holder, lock)


def _remove(holder: Path, lock: int | None) -> None:
    """Remove a folder and release its lock."""
    shutil.rmtree(holder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
        # A network file system keeps the folder as long as the lock, a file in it, is open.
        shutil.rmtree(holder, ignore_errors=True)


def _lock(holder: Path) -> int | None:
    """Lock a folder and return the descriptor of the lock.

    None if another process holds the lock or removed the folder.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        descriptor = os.open(holder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # the folder was removed in the meantime
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
    return None
