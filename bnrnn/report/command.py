"""The command that makes a run again, with only the settings that are not the usual ones."""

import shlex
from dataclasses import fields
from typing import Any

from bnrnn.report import paper
from bnrnn.report.groups import comparable
from bnrnn.runs.record import Result, Run
from bnrnn.settings.compose import as_override
from bnrnn.settings.same import flatten
from bnrnn.settings.schema import DataConfig

# A run may change these when it is resumed, but its result depends on them.
_LENGTH = ("max_epochs", "max_steps", "patience")
_FILES = ("task.path", *(f"data.{f.name}" for f in fields(DataConfig) if f.name != "pipes"))


def command(run: Run) -> str:
    """The command of a finished run, made from its settings.

    It contains the settings that differ from those of its task and model, or from those of
    `experiment=official_code` or `reproduce=` if the run used them, or most of them. The steps are
    those that were run. If `conf/` has no such task, model or setting, this is the recorded
    command.
    """
    result = run.result
    assert result is not None
    words, usual = _choices(run)
    flat = flatten(run.settings)
    files = {key: flat[key] for key in _FILES if key in flat}
    values = comparable(run) | files | _length(run, result)
    if not usual or not values.keys() <= usual.keys():
        return result.command
    words += [f"seed={run.seed}"] * (run.seed != usual["seed"])
    changed = {key: value for key, value in values.items() if value != usual[key]}
    words += [_word(key, value) for key, value in changed.items()]
    return shlex.join(["bnrnn", *words])


def _choices(run: Run) -> tuple[list[str], dict[str, Any]]:
    """The words that choose task, model and a set of settings; the flat settings they give."""
    task, model, values = run.subject.task, run.model, comparable(run)
    words = [f"task={task}", f"model={model}"]
    if run.scale is not None:
        named = [f"reproduce={paper.family(run.data)}", f"scale={run.scale}"]
        return [*named, *words], paper.usual(task, model, *named)
    official = paper.official_code(task, model)
    agreeing = sum(values.get(key) == value for key, value in official.items())
    if len(official) > 1 and agreeing > len(official) / 2:
        words.append("experiment=official_code")
    optimizer = values.get("optimizer.name")
    if optimizer != paper.usual(task, model, *words[2:]).get("optimizer.name"):
        words.append(_word("optimizer", optimizer))
    return words, paper.usual(task, model, *words[2:])


def _length(run: Run, result: Result) -> dict[str, Any]:
    """`max_epochs`, `max_steps` and `patience`, so that the run ends where this one did."""
    flat = flatten(run.settings)
    found = {key: flat.get(key) for key in _LENGTH}
    stopped_early = found["patience"] is not None and result.steps < result.max_steps
    if not stopped_early and result.steps != run.subject.total_steps:
        found["max_steps"] = result.steps
        if result.steps > run.subject.total_steps:
            found["max_epochs"] = None
    return found


def _word(key: str, value: Any) -> str:
    return f"{key}={as_override(value)}"


__all__ = ["command"]
