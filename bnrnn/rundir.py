"""A run's directory: what lies where, who may write to it, and how to find one again."""

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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
    overrides.yaml what of them was typed
    last.pt        the latest checkpoint, to go on from
    best.pt        the best model on validation; at the end with calibrated statistics
    metrics.jsonl  one object a line; tables and figures are made from this
    result.json    the final numbers and where they come from
    failed.json    the error that stopped it, until it goes on
    tb/            for TensorBoard
    bnrnn.log      what was said
    .hydra/        what Hydra writes, before the folder is held
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.overrides = path / "overrides.yaml"
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
        # Hydra's own copy is overwritten by a command that is then refused.
        typed = self.path / ".hydra" / "overrides.yaml"
        if typed.exists():
            write_atomic(self.overrides, typed.read_bytes())

    def read_overrides(self) -> list[str]:
        """The command that trained here last, to go on by."""
        older = self.path / ".hydra" / "overrides.yaml"
        file = self.overrides if self.overrides.exists() else older
        try:
            return yaml.safe_load(file.read_text()) or []
        except (OSError, yaml.YAMLError):
            raise CheckpointError(
                f"{self.path} has no readable overrides.yaml: give all its settings again"
            ) from None

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


def find_matching(outputs: Path, ours: dict[str, Any]) -> Path | None:
    """The run under `outputs` with these settings to go on with, or that is finished already.

    First one that was finished with as many steps as are asked for, of several the shortest; then
    the one that went furthest, but not beyond those steps; of equals the newest.
    """
    done, begun = [], []
    for progress in _with_settings(outputs, ours):
        asked = progress.total(ours)
        newest = progress.changed
        if progress.planned is not None and progress.planned >= asked:
            done.append((-progress.planned, newest, progress.folder))
        elif progress.step <= asked:
            begun.append((progress.step, newest, progress.folder))
    return max(done or begun)[-1] if done or begun else None


def find_finished(outputs: Path, ours: dict[str, Any]) -> Path | None:
    """The finished run under `outputs` with these settings that went furthest, then the newest."""
    found = [
        (progress.step, progress.changed, progress.folder)
        for progress in _with_settings(outputs, ours)
        if progress.planned is not None
    ]
    return max(found)[-1] if found else None


@dataclass(frozen=True)
class _Progress:
    """How far a run went."""

    folder: Path
    changed: float  # when, in seconds
    step: int
    steps_per_epoch: float | None  # None: not known before the first record
    planned: int | None  # the steps a finished run was allowed

    def total(self, ours: dict[str, Any]) -> float:
        """The steps that these settings ask for."""
        epochs = ours["max_epochs"] or ours["task"]["max_epochs"]
        by_epochs = math.inf if self.steps_per_epoch is None else epochs * self.steps_per_epoch
        return min(round(by_epochs, 3), ours["max_steps"] or math.inf)


def _with_settings(outputs: Path, ours: dict[str, Any]) -> Iterator[_Progress]:
    """Of each run that these settings would not make another run: those with a checkpoint, and
    those that a process has just begun."""
    for config in outputs.glob("**/config.yaml"):
        run = RunDirectory(config.parent)
        if config.parent.name == ".hydra" or not (run.last.exists() or is_held(run.path)):
            continue
        try:
            saved = yaml.safe_load(run.config.read_text())
            if not isinstance(saved, dict) or settings.differences(ours, saved):
                continue
            # A text that was moved is the same to resume=DIR, which says where the run is.
            if ours["path"] != saved.get("path"):
                continue
            step, epochs, planned = _how_far(run)
            changed = (run.last if run.last.exists() else config).stat().st_mtime
        except (OSError, ValueError, KeyError, yaml.YAMLError, CheckpointError):
            continue
        yield _Progress(run.path, changed, step, step / epochs if epochs else None, planned)


def _how_far(run: RunDirectory) -> tuple[int, float, int | None]:
    """Steps, epochs, and the steps it was allowed if it is finished."""
    result = run.read_result()
    if result is not None:
        return result["steps"], result["epochs"], result["max_steps"]
    lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    for line in reversed(lines):
        record = json.loads(line)
        if "epoch" in record:
            return record["step"], record["epoch"], None
    return 0, 0.0, None


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
