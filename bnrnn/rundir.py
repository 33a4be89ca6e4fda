"""A run's directory: what lies where, who may write to it, and how to find one again."""

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bnrnn import config as settings
from bnrnn.errors import CheckpointError, OutputError
from bnrnn.files import write_atomic, write_json


class RunDirectory:
    """outputs/<task>/<model>/<stamp>/, held by one process while it is entered.

    config.yaml    the resolved settings
    last.pt        the latest checkpoint, to go on from
    best.pt        the best model on validation; at the end with calibrated statistics
    metrics.jsonl  one object a line; tables and figures are made from this
    result.json    the final numbers and where they come from
    failed.json    the error that stopped it, until it goes on
    tb/            for TensorBoard
    bnrnn.log      what was said
    .hydra/        the command's overrides, as Hydra writes them
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.failure = path / "failed.json"
        self.tensorboard = path / "tb"
        self._lock: int | None = None

    def __enter__(self) -> "RunDirectory":
        """
        Raises:
            OutputError: the folder cannot be written to, or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except BlockingIOError:
            raise OutputError(f"another process is training in {self.path}: wait for it") from None
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {error.strerror}; choose another place with "
                "outputs=DIR"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)  # releases the lock, as the end of the process would
            self._lock = None

    def write_config(self, config: settings.Config) -> None:
        text = yaml.safe_dump(settings.to_dict(config), sort_keys=False, allow_unicode=True)
        write_atomic(self.config, text.encode())

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.result, result)

    def read_result(self) -> dict[str, Any] | None:
        """None: the run is not finished."""
        try:
            return json.loads(self.result.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise CheckpointError(f"{self.result} is not JSON: delete it and resume") from None

    def write_failure(self, error: Exception) -> None:
        """Why the run stopped, for the report; not where it never began."""
        if not self.config.exists():
            return
        text = " ".join(str(error).split()) or type(error).__name__
        # The error itself is about to be told; a full disk must not take its place.
        with contextlib.suppress(OutputError):
            write_json(self.failure, {"error": text, "exit_code": getattr(error, "exit_code", 1)})

    def discard_if_empty(self, outputs: Path) -> None:
        """Remove what Hydra made for a run that never began, and its parents that are empty then,
        but neither `outputs` nor what that lies in."""
        if any((self.path / name).exists() for name in ("config.yaml", "last.pt", "result.json")):
            return
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if not names <= {".hydra", "bnrnn.log"}:
            return
        for file in [*self.path.glob(".hydra/*"), *self.path.glob("*.log")]:
            file.unlink(missing_ok=True)
        root = outputs.resolve()
        for folder in (self.path / ".hydra", self.path, *list(self.path.parents)[:2]):
            if root.is_relative_to(folder.resolve()):
                break
            try:
                folder.rmdir()
            except OSError:
                break


def find_matching(outputs: Path, ours: dict[str, Any], finished: bool = False) -> Path | None:
    """The newest run directory under `outputs` with these settings and something to go on from."""
    found = []
    for checkpoint in outputs.glob("**/last.pt"):
        if finished and not (checkpoint.parent / "result.json").exists():
            continue
        try:
            saved = yaml.safe_load((checkpoint.parent / "config.yaml").read_text())
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(saved, dict) and not settings.differences(ours, saved):
            found.append((checkpoint.stat().st_mtime, checkpoint.parent))
    return max(found)[1] if found else None


def is_held(folder: Path) -> bool:
    """Whether a process is training in `folder` at this moment."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
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
