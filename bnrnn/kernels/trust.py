"""What may be run: only what nobody else could have put there.

A library is code, and its name in the cache can be foretold. So every folder on the way to it must
be out of the reach of other users, and the file itself ours. "Ours" is of this user or of root.
"""

import contextlib
import os
import stat
from pathlib import Path

_CURE = "set TORCH_EXTENSIONS_DIR to a folder of your own"


class UntrustedError(Exception):
    """Somebody else may have put this there; the message says what to do, in one line."""


def trusted_folder(folder: Path) -> Path:
    """The folder with all links resolved, created if need be.

    Raises:
        UntrustedError: others can write to it, or exchange it or a folder above it.
        OSError: it cannot be created.
    """
    given = folder.absolute()
    for place in reversed([given, *given.parents]):
        if not os.path.lexists(place):
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.mkdir(place, 0o755)
        _check(place, os.lstat(place), within=place != given)
    resolved = Path(os.path.realpath(given))
    for place in reversed([resolved, *resolved.parents]):
        _check(place, os.lstat(place), within=place != resolved)
    if not resolved.is_dir():
        raise UntrustedError(f"{resolved} is not a folder: delete it, or {_CURE}")
    return resolved


def read_trusted(path: Path) -> bytes:
    """The content of a file in a trusted folder.

    Raises:
        UntrustedError: it is not ours, others can write to it, or it is no regular file.
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise UntrustedError(f"{path} is no regular file: delete it")
    # It could have been exchanged since: do not follow a link, do not wait for a FIFO's writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        _check(path, os.fstat(descriptor), within=False)
        return file.read()


def _check(place: Path, status: os.stat_result, within: bool) -> None:
    """
    Args:
        within: only what is inside `place` is of interest, not who can add to it. Then a sticky
            folder such as /tmp will do: nobody can rename or delete there what is another's.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise UntrustedError(f"{place} belongs to another user (uid {status.st_uid}): {_CURE}")
    if stat.S_ISLNK(status.st_mode):  # its mode says nothing; where it leads is checked by itself
        return
    if within and stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedError(f"others can write to {place}: chmod go-w it, or {_CURE}")
