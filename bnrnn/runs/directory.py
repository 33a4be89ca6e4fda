"""A run directory: its file names, and the lock that admits one writer."""

import errno
import fcntl
import itertools
import os
import tempfile
from pathlib import Path

from bnrnn.errors import CheckpointError, OutputError
from bnrnn.runs.files import not_writable, remove_temporaries

# Files of a run before its first step. A folder with only these has nothing worth keeping.
_NOT_BEGUN = {"config.yaml", "run.json", "bnrnn.log"}


class RunDirectory:
    """outputs/<task>/<model>/<stamp>/; the `with` block holds its lock for one process.

    config.yaml    all settings
    run.json       a description of the run, see `bnrnn.runs.record`
    last.pt        the latest checkpoint, for resuming
    best.pt        the best model on validation; at the end with calibrated statistics
    metrics.jsonl  one JSON object per line; the source of tables and figures
    result.json    the final numbers and their provenance
    failed.json    the error that stopped the run, until it is resumed
    tb/            for TensorBoard
    bnrnn.log      the log, with times
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.subject = path / "run.json"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.failure = path / "failed.json"
        self.tensorboard = path / "tb"
        self.log = path / "bnrnn.log"
        self._lock: int | None = None
        self.is_protected = True

    def __enter__(self) -> "RunDirectory":
        """Create and lock the folder.

        Raises:
            CheckpointError: a file or folder in it leads out of it, see `refuse_links`.
            OutputError: the folder is not writable, or another process trains in it.
        """
        refuse_links(self.path)
        if self._lock is None and not self._try_lock():
            raise OutputError(f"another process is training in {self.path}: wait for it")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # releases the lock; so does the end of the process
            self._lock = None

    def _try_lock(self) -> bool:
        """Lock the folder; return False if another process holds the lock or removed the folder.

        On a file system without locks, it is then not protected from other processes.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.is_protected = _lock(descriptor)
                with tempfile.TemporaryFile(dir=self.path):  # check that it is writable
                    pass
                same = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
            except BaseException:
                os.close(descriptor)
                raise
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError as error:
            raise not_writable(self.path, error) from error
        if not same:
            os.close(descriptor)
            return False
        if self.is_protected:
            remove_temporaries(self.path)
        self._lock = descriptor
        return True

    @property
    def begun(self) -> bool:
        """Return whether the folder has anything of a run worth keeping."""
        try:
            names = {entry.name for entry in self.path.iterdir()}
        except OSError:
            return False
        return not {name for name in names if not name.startswith(".")} <= _NOT_BEGUN

    def discard(self) -> None:
        """Remove the folder, which this process has locked, if its run has not begun."""
        if self._lock is None or self.begun:
            return
        for name in _NOT_BEGUN:
            (self.path / name).unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:  # it contains other files
            return
        for folder in list(self.path.parents)[:2]:  # the model's and the task's folder, if empty
            try:
                folder.rmdir()
            except OSError:
                return


def claim(parent: Path, stamp: str) -> RunDirectory:
    """Create and lock a new folder in `parent`, named `stamp`, or `stamp-2` … if that exists.

    Raises:
        OutputError: it cannot be created.
    """
    for attempt in itertools.count(1):
        run = RunDirectory(parent / (stamp if attempt == 1 else f"{stamp}-{attempt}"))
        try:
            run.path.mkdir(parents=True)
        except FileNotFoundError:  # another process just removed the empty parent
            continue
        except OSError as error:
            taken = isinstance(error, FileExistsError)
            # A parent that is a link to nowhere exists too, regardless of the stamp.
            if taken and (error.filename == str(run.path) or not os.path.islink(error.filename)):
                continue
            raise not_writable(run.path, error) from error
        if run._try_lock():
            return run
    raise AssertionError


def clean(parent: Path) -> None:
    """Remove the folders in `parent` of processes that were killed before their first step."""
    for path in parent.iterdir() if parent.is_dir() else ():
        run = RunDirectory(path)
        if path.is_dir() and not path.is_symlink() and not run.begun and run.config.exists():
            try:
                if run._try_lock() and run.is_protected:
                    run.discard()
            except OutputError:
                continue
            finally:
                run.__exit__()


def refuse_links(folder: Path) -> None:
    """Refuse a run, maybe a stranger's, whose log or folders lead bnrnn to write elsewhere.

    Other files are replaced, never written through a link; so `best.pt` may be one.

    Raises:
        CheckpointError: an entry of `folder` links to no regular file, or bnrnn.log is none.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_log = path.name == "bnrnn.log"
        if path.is_symlink() and (is_log or not path.is_file()):
            raise CheckpointError(f"{path} is a link, and bnrnn writes only in {folder}: remove it")
        if is_log and not path.is_file():  # opening a pipe would wait for a reader
            raise CheckpointError(f"{path} is not a regular file: remove it")


def _lock(descriptor: int) -> bool:
    """Lock a folder; return False if its file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the lock failed for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return False
    return True


def is_held(folder: Path) -> bool:
    """Return whether a process is training in `folder` now."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False
