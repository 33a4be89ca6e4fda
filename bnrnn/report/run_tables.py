"""The report's tables of runs: per data set, those not finished, and all of them."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

from bnrnn.report.command import command
from bnrnn.report.document import Block, Bullets, Code, Heading, Inline, Paragraph, Table, Text
from bnrnn.report.groups import groups, order
from bnrnn.runs.find import Found
from bnrnn.runs.record import Run

_ENDED_EARLY = "ended early, tested"
_STATES = ("finished", _ENDED_EARLY, "running", "stopped", "unfinished", "failed", "unreadable")


def counts(found: Found) -> str:
    states = [_state(run) for run in found.runs] + ["unreadable"] * len(found.unreadable)
    counts = [f"{states.count(state)} {state}" for state in _STATES if state in states]
    between = "; " if _ENDED_EARLY in states else ", "
    return f"{len(states)} run{'s' * (len(states) != 1)}: {between.join(counts) or 'none'}."


def _state(run: Run) -> str:
    """The state; a run with a test after fewer steps than planned ended early."""
    ended = run.result is not None and run.state in ("stopped", "unfinished")
    return _ENDED_EARLY if ended else run.state


def overview(runs: list[Run]) -> list[Block]:
    """A table with one row per data set: runs, models, best result; empty for a single data set."""
    rows: list[list[Text]] = []
    all_groups = groups(runs)
    for data, grouped in itertools.groupby(sorted(runs, key=order), key=lambda run: run.data):
        members = list(grouped)
        of_data = [group for group in all_groups if group.first.data == data]
        means = {group.mean: group for group in of_data if math.isfinite(group.mean)}
        best = "-" if of_data else "no run is finished"
        if means:
            group = means[of_data[0].metric.best(means)]
            best = f"{group.metric.show(group.mean)}, {group.split}: "
            best += group.first.subject.model_title
        models = dict.fromkeys(run.subject.model_title for run in members)
        rows.append([
            members[0].subject.data_title, str(len(members)), "; ".join(models), best,
        ])  # fmt: skip
    return [Table(["data", "runs", "models", "the best"], "wrww", rows)] if len(rows) > 1 else []


def unfinished(
    found: Found, name: Callable[[Run], Inline], resume: Callable[[Run], str] | None
) -> list[Block]:
    rows: list[list[Text]] = []
    for run in found.runs:
        state = _state(run)
        if state == "finished" or (state == _ENDED_EARLY and not run.resumable):
            continue
        steps, values = run.curve()
        last = f"{run.metric.number(values[-1])} at {steps[-1]:,}" if steps else "none"
        notes: dict[str, Text] = {
            "running": "a process is training there",
            "failed": "" if run.failure is None else run.failure.error,
            "stopped": ("resume with ", Code(resume(run))) if resume else "it can be resumed",
            "unfinished": "-" if resume is None else "no checkpoint to resume from",
        }
        rows.append([name(run), state, f"{run.step:,}", last, notes[run.state]])
    for path, reason in found.unreadable:
        rows.append([Code(place(found, path)), "unreadable", "-", "-", reason])
    if not rows:
        return []
    header: list[Text] = ["run", "state", "step", "last validation", ""]
    if all(row[-1] == "-" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return [Heading(2, "Not finished"), Table(header, "llrlw"[: len(header)], rows)]


def all_runs(runs: list[Run], name: Callable[[Run], Inline]) -> list[Block]:
    if not runs:
        return []
    header = [
        "run", "test", "validation, population", "validation, batch", "best step", "steps",
        "wall time", "ms a training step", "kernel", "commit", "machine, threads",
    ]  # fmt: skip
    shown = ordered(runs)
    commands: list[Text] = [
        (name(run), ": ", Code(command(run))) for run in shown if run.result is not None
    ]
    blocks: list[Block] = [
        Heading(2, "All runs"),
        Paragraph("Validation at the best step, or the last if that is selected, while training."),
        Table(header, "lrrrrrrrlll", [_run_row(run, name(run)) for run in shown]),
    ]
    if commands:
        title = "The commands, with the settings that are not the usual ones:"
        blocks += [Paragraph(title), Bullets(commands)]
    return blocks


def ordered(runs: list[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (*order(run), run.seed, str(run.path)))


def _run_row(run: Run, name: Inline) -> list[Text]:
    best, result = run.best_step(), run.result

    def at_best(statistics: str) -> str:
        at = dict(zip(*run.curve(statistics), strict=True))
        return run.metric.number(at[best]) if best in at else "-"

    row: list[Text] = [
        name,
        run.state if result is None else run.metric.show(run.final("test")),
        at_best("population"),
        at_best("batch"),
        "-" if best is None else f"{best:,}",
    ]
    if result is None:
        return [*row, f"{run.step:,}", *["-"] * 5]
    return [
        *row,
        f"{result.steps:,}",
        _duration(result.wall_seconds),
        f"{result.milliseconds_per_step:.0f}",
        result.kernel,
        ", ".join(result.commits) or result.commit or "-",
        f"{'; '.join(result.machines) or result.machine}, {result.threads}",
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def place(found: Found, path: Path) -> str:
    return path.relative_to(found.root).as_posix()
