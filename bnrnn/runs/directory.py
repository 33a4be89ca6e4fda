"""A run's directory: the names of its files, and who may write to it."""

import fcntl
import itertools
import os
import tempfile
from pathlib import Path

from bnrnn.errors import OutputError
from bnrnn.runs.files import remove_temporaries

# Files of a run that has not reached its first step; with no others there is nothing to keep.
_NOT_BEGUN = {"config.yaml", "run.json", "bnrnn.log"}


class RunDirectory:
    """outputs/<task>/<model>/<stamp>/, held by one process while it is entered.

    config.yaml    the settings in full
    run.json       what the run is: see `bnrnn.runs.record`
    last.pt        the latest checkpoint, to go on from
    best.pt        the best model on validation; at the end with calibrated statistics
    metrics.jsonl  one object a line; tables and figures are made from this
    result.json    the final numbers and where they come from
    failed.json    the error that stopped it, until it goes on
    tb/            for TensorBoard
    bnrnn.log      what was printed, with times
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

    def __enter__(self) -> "RunDirectory":
        """
        Raises:
            OutputError: the folder cannot be written to, or another process trains in it.
        """
        if self._lock is None and not self._try_lock():
            raise OutputError(f"another process is training in {self.path}: wait for it")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # releases the lock, as the end of the process would
            self._lock = None

    def _try_lock(self) -> bool:
        """Whether the folder is ours now; False: another process holds it, or has removed it."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with tempfile.TemporaryFile(dir=self.path):  # can it be written to?
                    pass
                same = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
            except BaseException:
                os.close(descriptor)
                raise
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {error.strerror}; choose another place with "
                "outputs=DIR"
            ) from error
        if not same:
            os.close(descriptor)
            return False
        remove_temporaries(self.path)
        self._lock = descriptor
        return True

    @property
    def begun(self) -> bool:
        """Whether there is anything of a run to keep."""
        try:
            names = {entry.name for entry in self.path.iterdir()}
        except OSError:
            return False
        return not {name for name in names if not name.startswith(".")} <= _NOT_BEGUN

    def discard(self) -> None:
        """Remove a folder that this process holds and whose run has not begun."""
        if self._lock is None or self.begun:
            return
        for name in _NOT_BEGUN:
            (self.path / name).unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:  # it holds files of somebody else
            return
        for folder in list(self.path.parents)[:2]:  # the model's and the task's, if empty
            try:
                folder.rmdir()
            except OSError:
                return


def claim(parent: Path, stamp: str) -> RunDirectory:
    """Make and hold a new folder in `parent`, named `stamp`, or `stamp-2` where that is taken.

    Raises:
        OutputError: it cannot be made.
    """
    for attempt in itertools.count(1):
        run = RunDirectory(parent / (stamp if attempt == 1 else f"{stamp}-{attempt}"))
        try:
            run.path.mkdir(parents=True)
        except FileExistsError:
            continue
        except FileNotFoundError:  # another process has just removed the empty parent
            continue
        except OSError as error:
            raise OutputError(
                f"cannot write to {run.path}: {error.strerror}; choose another place with "
                "outputs=DIR"
            ) from error
        if run._try_lock():
            return run
    raise AssertionError


def clean(parent: Path) -> None:
    """Remove the folders in `parent` that were left by processes killed before their first step."""
    for path in parent.iterdir() if parent.is_dir() else ():
        run = RunDirectory(path)
        if path.is_dir() and not path.is_symlink() and not run.begun and run.config.exists():
            try:
                if run._try_lock():
                    run.discard()
            except OutputError:
                continue
            finally:
                run.__exit__()


def is_held(folder: Path) -> bool:
    """Whether a process is training in `folder` at this moment."""
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
