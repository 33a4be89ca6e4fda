"""Flush files to disk."""

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that a rename survives a power cut.

    Some file systems, such as the folders that a virtual machine shares with its host, cannot flush
    a folder and say so. They decide by themselves when they write the names.

    Raises:
        OSError: it cannot be read or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
