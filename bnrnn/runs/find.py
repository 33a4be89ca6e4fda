"""Find runs and analyses under a folder: all of them, or one with given settings."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bnrnn.errors import CheckpointError
from bnrnn.runs.analysis import Analysis, read_analysis
from bnrnn.runs.directory import RunDirectory, is_held
from bnrnn.runs.record import (
    Failure,
    Result,
    Run,
    decode_json,
    read_records,
    read_settings,
    read_subject,
)
from bnrnn.settings.same import differences
from bnrnn.settings.schema import Config

_OF_A_RUN = {"run.json", "config.yaml", "metrics.jsonl", "last.pt", "best.pt", "failed.json"}


class Unreadable(NamedTuple):
    path: Path
    reason: str


class Found(NamedTuple):
    """The runs and analyses under a folder, by path."""

    root: Path
    runs: list[Run]
    analyses: list[tuple[Path, Analysis]]
    unreadable: list[Unreadable]


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        CheckpointError: `path` is not a run directory, or a file in it is damaged.
    """
    files = RunDirectory(path)
    settings, subject = read_settings(files.config), read_subject(files.subject)
    for file, content in ((files.config, settings), (files.subject, subject)):
        if content is None:
            raise CheckpointError(f"{path} has no {file.name}: restore it, or remove the folder")
    assert settings is not None
    assert subject is not None
    run = Run(
        path, settings, subject, read_records(files.metrics),
        decode_json(files.result, Result), decode_json(files.failure, Failure),
        is_held(path), files.last.exists(),
    )  # fmt: skip
    if run.result is not None and not all(
        run.metric.name in values for values in (run.result.test, run.result.valid)
    ):
        raise CheckpointError(f"{files.result} is damaged: it has no {run.metric.name}")
    return run


def find_runs(folder: Path) -> list[Run]:
    """Return all readable runs at or under `folder`, by path."""
    return find(folder).runs


def find(folder: Path) -> Found:
    """Return the runs and analyses at or under `folder`; damaged ones are listed, not raised."""
    found = Found(folder, [], [], [])
    for path, files in _walk(folder, found.unreadable):
        try:
            if _OF_A_RUN & files:
                if RunDirectory(path).begun or is_held(path):
                    found.runs.append(read_run(path))
            elif (analysis := read_analysis(path / "result.json")) is not None:
                found.analyses.append((path, analysis))
        except CheckpointError as error:
            found.unreadable.append(Unreadable(path, str(error).replace(f"{path}{os.sep}", "")))
    return found


def _walk(folder: Path, unreadable: list[Unreadable]) -> Iterator[tuple[Path, set[str]]]:
    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # `folder` itself, or one just removed
            unreadable.append(Unreadable(Path(error.filename), error.strerror or str(error)))

    for name, folders, files in os.walk(folder, onerror=failed):
        here = set(files) | {f for f in folders if f in _OF_A_RUN or f == "result.json"}
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "tb")
        if here & (_OF_A_RUN | {"result.json"}):
            yield Path(name), here


def find_matching(outputs: Path, config: Config) -> Path | None:
    """Return the run under `outputs` with these settings that is finished or can be resumed.

    A run that finished with at least the requested steps, or that this patience would have stopped
    where it is, comes first; the shortest, if there are several. Otherwise it is the run with the
    most steps, but not beyond the requested ones. Ties go to the newest.

    Raises:
        CheckpointError: a folder that may be this run is damaged. Training must not start again
            beside it.
    """
    finished, begun = [], []
    for path in _with_settings(outputs, config):
        files = RunDirectory(path)
        if not files.begun:
            if is_held(path):  # another process just started it
                begun.append((0, _changed(path), path))
            continue
        run = _sure(path)
        asked = config.total_steps(run.subject.steps_per_epoch)
        if run.result is not None and run.suffices(asked, config.patience):
            finished.append((-run.result.max_steps, _changed(path), path))
        elif not run.resumable:
            raise CheckpointError(
                f"{path} has these settings but has lost its last.pt: restore it, or move the "
                "folder elsewhere to start the run again"
            )
        elif (step := _saved_step(files)) <= asked:
            begun.append((step, _changed(path), path))
    return max(finished or begun)[-1] if finished or begun else None


def find_finished(outputs: Path, config: Config) -> Path | None:
    """Return the finished run under `outputs` with these settings and the most steps.

    Ties go to the newest.

    Raises:
        CheckpointError: a folder that may be this run is damaged.
    """
    runs = [_sure(path) for path in _with_settings(outputs, config) if RunDirectory(path).begun]
    found = [(r.result.steps, _changed(r.path), r.path) for r in runs if r.result is not None]
    return max(found)[-1] if found else None


def find_analysis(source: Path, name: str, settings: dict[str, Any]) -> Path | None:
    """Return the newest `result.json` of this analysis of the finished run `source`.

    It must have these settings and be of the run's current best model; None if there is none.
    """
    run = read_run(source)
    for file in sorted(source.glob(f"{name}/*/result.json"), reverse=True):
        try:
            found = read_analysis(file)
        except CheckpointError:
            continue
        if found is None or found.of is None or run.result is None:
            continue
        same = all(getattr(found, key, None) == value for key, value in settings.items())
        if same and found.of.step == run.result.best_step:
            return file
    return None


def _with_settings(outputs: Path, config: Config) -> Iterator[Path]:
    """Yield every folder under `outputs` whose run has the same settings.

    Raises:
        CheckpointError: the settings of a folder that may be such a run cannot be read.
    """
    for path, files in _walk(outputs, []):
        if not _OF_A_RUN & files:
            continue
        try:
            saved = read_settings(path / "config.yaml")
            if saved is None:
                if not RunDirectory(path).begun:
                    continue
                raise CheckpointError(f"{path} has no config.yaml")
        except CheckpointError as error:
            if _is_another(path, config):
                continue
            raise _unsure(error) from error
        if _same_files(config, saved) and not differences(config, saved):
            yield path


def _same_files(config: Config, saved: dict[str, Any]) -> bool:
    """Return whether both name the same data files. Only resume=DIR accepts files at new paths."""
    theirs = saved.get("data")
    return getattr(config.task, "path", None) == saved["task"].get("path") and all(
        value == (theirs.get(name) if isinstance(theirs, dict) else None)
        for name, value in vars(config.data).items()
        if name != "pipes"
    )


def _is_another(path: Path, config: Config) -> bool:
    """Return whether the rest of a damaged folder shows that its task or model is another."""
    try:
        subject = read_subject(path / "run.json")
    except CheckpointError:
        return False
    return subject is not None and (subject.task, subject.model) != (
        config.task.name, config.model.name,
    )  # fmt: skip


def _sure(path: Path) -> Run:
    try:
        return read_run(path)
    except CheckpointError as error:
        raise _unsure(error) from error


def _saved_step(files: RunDirectory) -> int:
    """Return the step of the last checkpoint; the records may end before or after it."""
    # Imported here, because --help and wrong settings do not need torch.
    import torch

    from bnrnn.runs import checkpoint

    try:
        return checkpoint.load(files.last, torch.device("cpu"))["step"]
    except CheckpointError as error:
        raise _unsure(error) from error


def _unsure(error: CheckpointError) -> CheckpointError:
    return CheckpointError(
        f"{error}; this may be the run to resume: restore the file, or move the folder elsewhere"
    )


def _changed(path: Path) -> float:
    last = path / "last.pt"
    return (last if last.exists() else path).stat().st_mtime
