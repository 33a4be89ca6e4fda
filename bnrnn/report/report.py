"""The report on all runs in a folder: tables and figures, as Markdown and as one HTML page."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnrnn.errors import CheckpointError
from bnrnn.plots.style import encode, plt
from bnrnn.report import first_attempt, laurent, leaderboard, paper, words
from bnrnn.report.analyses import furthest
from bnrnn.report.analysis_figures import FIGURES
from bnrnn.report.command import command
from bnrnn.report.document import (
    Block,
    Bullets,
    Code,
    Figure,
    Folded,
    Heading,
    Inline,
    Paragraph,
    Table,
    Text,
    to_html,
    to_markdown,
    to_text,
)
from bnrnn.report.figures import gamma_chart, gamma_sweep, validation_chart, validation_curves
from bnrnn.report.groups import (
    MEASURED,
    Group,
    cluster,
    groups,
    one_a_seed,
    order,
    sweeps,
    unlike_the_paper,
)
from bnrnn.runs.analysis import Analysis
from bnrnn.runs.files import write_atomic
from bnrnn.runs.find import Found, find
from bnrnn.runs.record import Run
from bnrnn.runs.text import quoted, slug

Pictures = dict[str, dict[str, bytes]]  # name -> kind -> encoded

MOST_COLUMNS = 12
_MOST_GROUPS = 8  # of settings in a figure
_HOW_TO_READ = (
    "Each number is the test of the model with the best validation (of the last model with "
    "selection=last). It uses population statistics, averaged over the training set or over "
    "test_calibration_batches batches of it. If the paper has no test number, the number is marked "
    "valid, and is the best validation with batch statistics. A row is a group of runs that differ "
    "only in their seed: the mean with the standard deviation over three seeds or more (by n - 1), "
    "or the range of two. If steps and settings are those of the paper, the verdict states whether "
    "its number is within that spread. The difference of a shorter run is not a verdict."
)
_ENDED_EARLY = "ended early, tested"
_STATES = ("finished", _ENDED_EARLY, "running", "stopped", "unfinished", "failed", "unreadable")


def write_report(outputs: Path, target: Path) -> None:
    """Write a report on all runs and analyses under `outputs` to `target`.

    The files are report.md, report.html and figures/.

    Raises:
        CheckpointError: there are no runs or analyses under `outputs`.
        OutputError: the files cannot be written.
    """
    found = find(outputs)
    if not (found.runs or found.analyses or found.unreadable):
        raise CheckpointError(
            f"no run under {outputs}: train one first, or name another folder with outputs=DIR"
        )
    blocks = document(
        found,
        "Report",
        "Every run under the outputs folder, against what the papers report.",
        lambda run: Code(place(found, run.path)),
        resume=lambda run: f"bnrnn resume={quoted(run.path)}",
    )
    _write_document("report", "bnrnn: report", blocks, target)


def write_leaderboard(outputs: Path, target: Path) -> str:
    """Write the leaderboards of all runs under `outputs` to `target`, as HTML and as Markdown.

    Returns:
        the leaderboards as text for a terminal.

    Raises:
        CheckpointError: no data set has finished runs of enough models.
        OutputError: the files cannot be written.
    """
    found = leaderboard.blocks(find(outputs).runs)
    if not found:
        raise CheckpointError(
            f"no data set under {outputs} has finished runs of {leaderboard.FEWEST} models: train "
            "more, or name another folder with outputs=DIR"
        )
    _write_document("leaderboard", "bnrnn: leaderboard", found, target)
    return to_text(found)


def _write_document(name: str, title: str, blocks: list[Block], target: Path) -> None:
    """Write NAME.md, NAME.html and their figures, and remove figures that are no longer used."""
    blocks, pictures = draw(blocks, ("png", "svg"))
    figures = target / "figures"
    write_pictures(figures, pictures)
    for picture in figures.glob("*.*"):
        if picture.stem not in pictures and picture.suffix in (".png", ".svg"):
            picture.unlink()
    vectors = {name: kinds["svg"] for name, kinds in pictures.items()}
    write_atomic(target / f"{name}.md", to_markdown(blocks).encode())
    write_atomic(target / f"{name}.html", to_html(title, blocks, vectors).encode())


def draw(blocks: Sequence[Block], kinds: Sequence[str]) -> tuple[list[Block], Pictures]:
    """The document and its pictures; a figure that cannot be drawn becomes a line of text."""
    drawn: list[Block] = []
    pictures: Pictures = {}
    for block in blocks:
        if isinstance(block, Figure):
            try:
                figure = block.draw()
                pictures[block.name] = {kind: encode(figure, kind) for kind in kinds}
            # matplotlib raises various errors for numbers that it cannot draw.
            except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
                block = Paragraph(f"{block.alt}: no figure, its numbers cannot be drawn ({error}).")
            finally:
                plt.close("all")
        drawn.append(block)
    return drawn, pictures


def write_pictures(folder: Path, pictures: Pictures) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoded in pictures.items():
        for kind, content in encoded.items():
            write_atomic(folder / f"{name}.{kind}", content)


def place(found: Found, path: Path) -> str:
    return path.relative_to(found.root).as_posix()


def document(
    found: Found,
    title: str,
    introduction: Text,
    name: Callable[[Run], Inline],
    resume: Callable[[Run], str] | None = None,
) -> list[Block]:
    """The report as blocks.

    Args:
        name: returns the name of a run in the tables.
        resume: returns the command that resumes a stopped run; None: show no command.
    """
    return _named_apart([
        Heading(1, title),
        Paragraph(introduction),
        Paragraph(_counts(found)),
        *_overview(found.runs),
        Paragraph(_HOW_TO_READ),
        *_results(found.runs),
        *leaderboard.blocks(found.runs),
        *_analyses(furthest(found.analyses)),
        *_unfinished(found, name, resume),
        *_all_runs(found.runs, name),
        *_same_step(found.runs, name),
        *_not_run(found.runs),
    ])  # fmt: skip


def _named_apart(blocks: list[Block]) -> list[Block]:
    """The blocks, with a unique file name for each figure."""
    taken: set[str] = set()
    named: list[Block] = []
    for block in blocks:
        if isinstance(block, Figure):
            names = (f"{slug(block.name, most=150)}{f'-{k}' * (k > 1)}" for k in itertools.count(1))
            block = replace(block, name=next(name for name in names if name not in taken))
            taken.add(block.name)
        named.append(block)
    return named


def _counts(found: Found) -> str:
    states = [_state(run) for run in found.runs] + ["unreadable"] * len(found.unreadable)
    counts = [f"{states.count(state)} {state}" for state in _STATES if state in states]
    between = "; " if _ENDED_EARLY in states else ", "
    return f"{len(states)} run{'s' * (len(states) != 1)}: {between.join(counts) or 'none'}."


def _state(run: Run) -> str:
    """The state; a run with a test after fewer steps than planned ended early."""
    ended = run.result is not None and run.state in ("stopped", "unfinished")
    return _ENDED_EARLY if ended else run.state


def _overview(runs: list[Run]) -> list[Block]:
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


def _results(runs: list[Run]) -> list[Block]:
    """A section per paper: for each data set a table of results, and figures of their curves."""
    sections: dict[str, list[Block]] = {}  # heading -> blocks
    all_groups = groups(runs)
    for data, grouped in itertools.groupby(sorted(runs, key=order), key=lambda run: run.data):
        members = list(grouped)
        blocks = sections.setdefault(_paper_heading(paper.paper_of(data)), [])
        blocks.append(Heading(3, members[0].subject.data_title))
        rows = [_result_row(group) for group in all_groups if group.first.data == data]
        if rows:
            header = [
                "model", "settings", f"ours, {members[0].metric.label}", "the paper", "difference",
                "verdict", "seeds", "steps",
            ]  # fmt: skip
            blocks.append(_without_empty_columns(Table(header, "lwrrrlrr", rows)))
        else:
            blocks.append(Paragraph("No run is finished yet."))
        blocks += _OWN_FIGURES.get(paper.family(data), _figures)(members)
    if speech := laurent.speech(runs):
        sections.setdefault(_paper_heading(paper.LAURENT), []).extend(speech)
    return [
        block for heading, blocks in sections.items() for block in (Heading(2, heading), *blocks)
    ]


def _paper_heading(found: paper.Paper | None) -> str:
    return "Other data" if found is None else f"{found.title}: {found.authors}"


def _without_empty_columns(table: Table) -> Table:
    kept = [k for k in range(len(table.header)) if any(row[k] != "-" for row in table.rows)]
    return Table(
        [table.header[k] for k in kept],
        "".join(table.align[k] for k in kept),
        [[row[k] for k in kept] for row in table.rows],
    )


def _result_row(group: Group) -> list[Text]:
    run, number, n = group.first, group.metric.number, len(group.runs)
    if n == 1:
        spread = ""
    elif n == 2:
        spread = f" ({number(min(group.values))} to {number(max(group.values))})"
    else:
        spread = f" ± {number(group.deviation)}"
    low, high = group.steps
    steps = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    reported, difference = group.reported, group.difference
    if reported is not None and reported.steps is not None:
        steps += f" of {reported.steps:,}"
    scales = sorted({run.scale for run in group.runs if run.scale})
    settings = ", ".join([*filter(None, [group.label]), *(f"scale={scale}" for scale in scales)])
    signed = "" if difference is None else ("+" * (difference >= 0) + number(difference))
    return [
        run.subject.model_title,
        settings or "-",
        f"{number(group.mean)}{spread} {group.split}",
        f"{_as_in_the_paper(run, reported)}, {reported.source}" if reported else "-",
        signed.replace("-", "−") or "-",
        group.verdict(),
        str(n),
        steps,
    ]


def _as_in_the_paper(run: Run, reported: paper.Reported) -> str:
    return run.metric.number(reported.value, max(run.metric.decimals - 1, 0))


def _figures(runs: list[Run]) -> list[Block]:
    """Figures of runs on the same data: validation curves and sweeps over the initial γ."""
    data, data_title = runs[0].data, runs[0].subject.data_title
    found_sweeps = sweeps(runs)
    own_figure = {
        run.path
        for by_gamma in found_sweeps
        for gamma, of_gamma in by_gamma.items()
        for run in of_gamma
        if gamma != paper.GAMMA
    }
    shown = [run for run in runs if run.curve()[0] and run.path not in own_figure]
    like, other = ([r for r in shown if bool(unlike_the_paper(r)) is no] for no in (False, True))
    drawn: list[tuple[str, str, list[Run], float]] = []
    if like and other:
        models = {run.model for run in other}
        beside = [run for run in like if run.model in models] + other
        last = max(run.step for run in other)
        drawn = [("", "", like, math.inf), ("-settings", ", other settings", beside, last)]
    elif shown:
        drawn = [("", "", shown, math.inf)]
    blocks: list[Block] = []
    for suffix, of, members, last in drawn:
        best = _at_best_settings(members, runs)
        caption = _curve_caption(best)
        if len(best) < len(members):
            caption += " Each model is shown at its best settings, as in the leaderboard."
        blocks.append(
            Figure(
                data + suffix,
                f"Validation against training steps, {data_title}{of}",
                caption,
                functools.partial(validation_curves, best, data_title + of, last),
                functools.partial(validation_chart, best, data_title + of, last),
            )
        )
    for by_gamma in found_sweeps:
        run = next(iter(by_gamma.values()))[0]
        title = run.subject.model_title
        blocks.append(
            Figure(
                f"{data}-{run.model}-gamma",
                f"Training and validation from several initial γ, {data_title}, {title}",
                "From several initial values of γ, as in figure 6.",
                functools.partial(gamma_sweep, by_gamma, title),
                functools.partial(gamma_chart, by_gamma, title),
            )
        )
    return blocks


def _at_best_settings(shown: list[Run], runs: list[Run]) -> list[Run]:
    """Of many groups of settings, those in the leaderboard of `runs`, if there is one."""
    if len(cluster(shown, MEASURED)) <= _MOST_GROUPS:
        return shown
    ranked = leaderboard.standings(runs)
    if len(ranked) < leaderboard.FEWEST:
        return shown
    best = {run.path for standing in ranked for run in standing.runs}
    return [run for run in shown if run.path in best] or shown


# Families of data for which the paper's figure has another form.
_OWN_FIGURES: dict[str, Callable[[list[Run]], list[Block]]] = {
    "sum": first_attempt.blocks, "words": words.blocks,
}  # fmt: skip


def _curve_caption(runs: list[Run]) -> str:
    clusters = cluster(runs, MEASURED)
    parts = ["Validation against training steps."]
    if any(run.curve("batch")[0] for run in runs):
        parts.append(
            "With batch statistics if the model normalises, as in the paper."
            if len(clusters) > 3
            else "Solid: batch statistics if the model normalises, as in the paper; dashed: "
            "population statistics."
        )
    if paper.validation(runs[0].data):
        parts.append("Wide and pale: the paper, read off its figures.")
    if any(len(one_a_seed(members)) > 1 for members in clusters):
        parts.append("Thin lines are single seeds.")
    return " ".join(parts)


def _not_run(runs: list[Run]) -> list[Block]:
    begun = {(run.data, run.model): run.result is not None for run in sorted(runs, key=_finished)}
    items: list[Text] = []
    for (data, model), reported in paper.RESULTS.items():
        if begun.get((data, model)):
            continue
        title, metric, source = paper.DATA[data]
        value = metric.show(reported.value, metric.decimals - 1)
        state = "; begun, not finished" if (data, model) in begun else ""
        items.append(
            f"{title}, {paper.model_title(model)}: {source.authors.partition(',')[0]} have {value} "
            f"({reported.split}, {reported.source}, {reported.steps:,} steps){state}"
        )
    if not items:
        return []
    listed = [Paragraph("Without a finished run here:"), Bullets(items)]
    return [Folded(Heading(2, f"Not run: {len(items)} of the papers' results"), listed)]


def _finished(run: Run) -> bool:
    return run.result is not None


def _analyses(found: dict[str, Analysis]) -> list[Block]:
    """A figure for each analysis and data set; Penn Treebank, the paper's data, comes first."""
    by_figure: dict[tuple[str, str | None], list[Analysis]] = {}
    for name in sorted(found, key=lambda name: ("-ptb-" not in name, name)):
        analysis = found[name]
        data = None if analysis.of is None else analysis.of.data
        by_figure.setdefault((analysis.analysis, data), []).append(analysis)
    blocks: list[Block] = []
    for kind, data in sorted(by_figure, key=lambda key: list(FIGURES).index(key[0])):
        entry, members = FIGURES[kind], by_figure[kind, data]
        name, title, of = kind, entry.title, members[0].of
        if of is not None and of.data != "ptb":
            name, title = f"{kind}-{of.data}", f"{title}: {of.data_title}"
        draw_it = functools.partial(entry.draw, members)
        blocks += [Heading(3, title), Figure(name, title, entry.caption_on(data), draw_it)]
    return [Heading(2, "Analyses"), *blocks] if blocks else []


def _unfinished(
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


def _all_runs(runs: list[Run], name: Callable[[Run], Inline]) -> list[Block]:
    if not runs:
        return []
    header = [
        "run", "test", "validation, population", "validation, batch", "best step", "steps",
        "wall time", "ms a training step", "kernel", "commit", "machine, threads",
    ]  # fmt: skip
    ordered = _ordered(runs)
    commands: list[Text] = [
        (name(run), ": ", Code(command(run))) for run in ordered if run.result is not None
    ]
    blocks: list[Block] = [
        Heading(2, "All runs"),
        Paragraph("Validation at the best step, or the last if that is selected, while training."),
        Table(header, "lrrrrrrrlll", [_run_row(run, name(run)) for run in ordered]),
    ]
    if commands:
        title = "The commands, with the settings that are not the usual ones:"
        blocks += [Paragraph(title), Bullets(commands)]
    return blocks


def _ordered(runs: list[Run]) -> list[Run]:
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


def _same_step(runs: list[Run], name: Callable[[Run], Inline]) -> list[Block]:
    """Tables of our validation and the paper's at the same steps."""
    blocks: list[Block] = []
    for run in _ordered(runs):
        points = paper.validation(run.data).get(run.model, [])
        found = [
            (step, ours, theirs * run.metric.factor)
            for step, ours in zip(*run.paper_like_curve(), strict=True)
            if (theirs := interpolate(points, step)) is not None
        ]
        if found and not unlike_the_paper(run):
            found = thinned(found, MOST_COLUMNS)
            number = run.metric.number
            table = Table(
                ["step", *(f"{step:,}" for step, *_ in found)],
                "l" + "r" * len(found),
                [
                    ["ours", *(number(ours) for _, ours, _ in found)],
                    ["the paper", *(number(theirs) for *_, theirs in found)],
                ],
            )
            blocks += [Paragraph(name(run)), table]
    if not blocks:
        return []
    return [
        Heading(2, "Validation against the paper's curves, at the same step"),
        Paragraph(
            "With batch statistics if the model normalises, as in the paper. The paper's values "
            "are read off its figures 2, 3a and 4, and interpolated linearly between points."
        ),
        *blocks,
    ]


def interpolate(points: paper.Points, step: float) -> float | None:
    """The paper's value at a step, interpolated linearly; None outside its curve."""
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if s0 <= step <= s1:
            return v0 + (step - s0) / (s1 - s0) * (v1 - v0) if s1 > s0 else v0
    return None


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` evenly spaced items, including the last."""
    stride = math.ceil(len(items) / most)
    return list(items[::-1][::stride][::-1]) if items else []
