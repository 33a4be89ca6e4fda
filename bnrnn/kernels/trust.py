"""Check that only this user or root can have written a library before it is loaded.

A library is code, and its name in the cache is predictable. Other users must therefore be unable to
write to any folder on its path, and the file must belong to this user or to root.
"""

import contextlib
import os
import stat
from pathlib import Path

_CURE = "set TORCH_EXTENSIONS_DIR to a folder of your own"


class UntrustedError(Exception):
    """Another user may have written this file; the message says in one line what to do."""


def trusted_folder(folder: Path) -> Path:
    """Resolve all links of a folder, and create it if necessary.

    Raises:
        UntrustedError: other users can write to the folder, or replace it or one of its parents.
        OSError: the folder cannot be created.
    """
    given = folder.absolute()
    for place in reversed([given, *given.parents]):
        if not os.path.lexists(place):
            with contextlib.suppress(FileExistsError):  # another process has created it
                os.mkdir(place, 0o755)
        _check(place, os.lstat(place), within=place != given)
    resolved = Path(os.path.realpath(given))
    for place in reversed([resolved, *resolved.parents]):
        _check(place, os.lstat(place), within=place != resolved)
    if not resolved.is_dir():
        raise UntrustedError(f"{resolved} is not a folder: delete it, or {_CURE}")
    return resolved


def read_trusted(path: Path) -> bytes:
    """Read a file in a trusted folder.

    Raises:
        UntrustedError: the file belongs to another user, other users can write to it, or it is not
            a regular file.
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise UntrustedError(f"{path} is not a regular file: delete it")
    # The file may have been replaced since: follow no link, and do not block on a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        _check(path, os.fstat(descriptor), within=False)
        return file.read()


def _check(place: Path, status: os.stat_result, within: bool) -> None:
    """
    Args:
        within: whether `place` is only a parent folder. Then a sticky folder such as /tmp is
            acceptable: users cannot rename or delete each other's files there.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise UntrustedError(f"{place} belongs to another user (uid {status.st_uid}): {_CURE}")
    if stat.S_ISLNK(status.st_mode):  # a link's mode means nothing; its target is checked too
        return
    if within and stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedError(f"others can write to {place}: chmod go-w it, or {_CURE}")
