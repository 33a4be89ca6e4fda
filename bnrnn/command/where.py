"""Choose the folder that a command reads or writes: that of an existing run, or a new one."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bnrnn.errors import CheckpointError
from bnrnn.runs.directory import RunDirectory, claim, clean, refuse_links
from bnrnn.runs.files import not_writable
from bnrnn.runs.find import find_finished, find_matching
from bnrnn.runs.record import write_settings
from bnrnn.settings.same import to_dict
from bnrnn.settings.schema import Config


def run_to_train(config: Config) -> RunDirectory:
    """Return the folder to train in, locked: the one that `resume` names, or a new one.

    Raises:
        CheckpointError: there is no such run, or a damaged run may be the one to resume.
        OutputError: the folder cannot be written to, or another process trains in it.
    """
    if config.resume not in (None, "auto"):
        return RunDirectory(resumed_folder(Path(config.resume))).__enter__()
    parent = Path(config.outputs) / config.task.name / config.model.name
    make_folder(parent)
    with _one_at_a_time(parent):
        clean(parent)
        if config.resume == "auto":
            found = find_matching(Path(config.outputs), config)
            if found is not None:
                return RunDirectory(found).__enter__()
        run = claim(parent, stamp())
        # Write them now, so that another process with the same settings finds this run.
        write_settings(run.config, to_dict(config))
    return run


def resumed_folder(path: Path) -> Path:
    """Return `path`, the folder of a run to resume.

    Raises:
        CheckpointError: it contains no run that can be resumed.
    """
    if not path.is_dir():
        raise CheckpointError(f"no run directory at {path}")
    run = RunDirectory(path)
    if not (run.last.exists() or run.result.exists()):
        raise CheckpointError(f"{path} has no last.pt to resume from: start the run again")
    return path


def used_run(config: Config) -> Path:
    """Return the run in `run=DIR`; for auto, the longest finished run with the same settings.

    Raises:
        CheckpointError: there is none, or a folder in it leads out of it.
    """
    assert config.run is not None
    if config.run != "auto":
        if not Path(config.run).is_dir():
            raise CheckpointError(f"no run directory at {config.run}")
        refuse_links(Path(config.run))
        return Path(config.run)
    found = find_finished(Path(config.outputs), config)
    if found is None:
        raise CheckpointError(
            f"no finished run of task={config.task.name} model={config.model.name} with these "
            f"settings under {config.outputs}: train it first, with resume=auto instead of run=auto"
        )
    refuse_links(found)
    return found


def new_folder(parent: Path) -> Path:
    """Make a folder in `parent`, named after the current time.

    Raises:
        OutputError: it cannot be created.
    """
    with claim(parent, stamp()) as folder:
        return folder.path


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(path, error) from error


def stamp() -> str:
    return time.strftime("%Y-%m-%d_%H-%M-%S")


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lock `folder`: otherwise two processes with the same settings could both start a new run."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # another process just removed it as empty; claim makes it
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
