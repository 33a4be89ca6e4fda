"""The report on all runs under a folder: tables and figures, as Markdown and as one HTML page."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bnrnn.errors import CheckpointError
from bnrnn.files import write_atomic
from bnrnn.report import analysis_figures, paper
from bnrnn.report.document import (
    Block,
    Bullets,
    Code,
    Figure,
    Heading,
    Inline,
    Paragraph,
    Table,
    Text,
    to_html,
    to_markdown,
)
from bnrnn.report.figures import encode, gamma_sweep, plt, validation_curves
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
from bnrnn.report.runs import ANALYSES, DATA, METRICS, MODELS, Found, Run, analysed_data, find

_T = TypeVar("_T")

MOST_COLUMNS = 12


def write_report(outputs: Path, target: Path) -> None:
    """All runs and analyses under `outputs` into `target`: report.md, report.html and figures/.

    Raises:
        CheckpointError: there is nothing to report on.
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
        "Every run under the outputs folder, against what the paper reports.",
        lambda run: Code(run_name(found, run)),
        resume=lambda run: f"bnrnn resume={run.path.as_posix()}",
    )
    target.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, encoded in draw(blocks, ("png", "svg")):
        write_pictures(target / "figures", name, encoded)
        pictures[name] = encoded["svg"]
    for picture in (target / "figures").glob("*.*"):
        if picture.stem not in pictures and picture.suffix in (".png", ".svg"):
            picture.unlink()  # of runs that are gone, or have another name by now
    write_atomic(target / "report.md", to_markdown(blocks).encode())
    write_atomic(target / "report.html", to_html("bnrnn: report", blocks, pictures).encode())


def draw(blocks: list[Block], kinds: tuple[str, ...]) -> list[tuple[str, dict[str, bytes]]]:
    """The name and the encoded pictures of each `Figure` of a document."""
    drawn = []
    for block in blocks:
        if isinstance(block, Figure):
            figure = block.draw()
            drawn.append((block.name, {kind: encode(figure, kind) for kind in kinds}))
            plt.close(figure)
    return drawn


def write_pictures(folder: Path, name: str, encoded: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in encoded.items():
        write_atomic(folder / f"{name}.{kind}", content)


def run_name(found: Found, run: Run) -> str:
    return run.path.relative_to(found.root).as_posix()


def document(
    found: Found,
    title: str,
    introduction: Text,
    name: Callable[[Run], Inline],
    resume: Callable[[Run], str] | None = None,
) -> list[Block]:
    """
    Args:
        name: what a run is called in the tables.
        resume: the command to go on with a stopped run.
    """
    blocks: list[Block] = [
        Heading(1, title),
        Paragraph(introduction),
        Paragraph(_counts(found)),
    ]
    blocks += _results(found.runs)
    blocks += _not_run(found.runs)
    blocks += _analyses(found)
    blocks += _unfinished(found, name, resume)
    blocks += _all_runs(found.runs, name)
    blocks += _same_step(found.runs, name)
    return blocks


def _counts(found: Found) -> str:
    states = [run.state for run in found.runs] + ["unreadable"] * len(found.unreadable)
    known = ("finished", "running", "stopped", "unfinished", "failed", "unreadable")
    counts = [f"{states.count(state)} {state}" for state in known if state in states]
    return f"{len(states)} run{'s' * (len(states) != 1)}: " + (", ".join(counts) or "none") + "."


def _results(runs: list[Run]) -> list[Block]:
    """A section a data set: what came out, and how it came about."""
    of_data: dict[str, list[Run]] = {}
    for run in sorted(runs, key=order):
        of_data.setdefault(run.data, []).append(run)
    blocks: list[Block] = [
        Heading(2, "By data set"),
        Paragraph(
            "Numbers are of the model with the best validation, tested with population statistics "
            "averaged over the training set, or over so many batches of it as the settings say; "
            "those marked valid, where the paper has no other, are the best validation with batch "
            "statistics. A row is a group of runs that differ in their seed "
            "only: the mean with the standard deviation over three seeds or more (by n - 1), or "
            "the range of two. Where the steps and settings are the paper's, the verdict says "
            "whether its number lies within that spread; where a run is shorter, the difference "
            "is no verdict."
        ),
    ]
    all_groups = groups(runs)
    for data, members in of_data.items():
        blocks.append(Heading(3, data_title(data)))
        rows = [_result_row(group) for group in all_groups if group.first.data == data]
        unit = METRICS[members[0].metric][0]
        if rows:
            header = [
                "model", "settings", f"ours, {unit}", "the paper", "difference", "verdict", "seeds",
                "steps",
            ]  # fmt: skip
            blocks.append(_without_empty_columns(Table(header, "lwrrrlrr", rows)))
        else:
            blocks.append(Paragraph("No run is finished yet."))
        blocks += _figures(data, members)
    return blocks


def _without_empty_columns(table: Table) -> Table:
    kept = [k for k in range(len(table.header)) if any(row[k] != "-" for row in table.rows)]
    return Table(
        [table.header[k] for k in kept],
        "".join(table.align[k] for k in kept),
        [[row[k] for k in kept] for row in table.rows],
    )


def data_title(data: str) -> str:
    return DATA.get(data, data)


def digits(metric: str) -> int:
    return 3 if metric == "bpc" else 2


def with_unit(value: float, metric: str, decimals: int | None = None) -> str:
    """`98.9 % accuracy`; with as many decimals as the paper has, unless they are given."""
    shown = f"{value:.{digits(metric) - 1 if decimals is None else decimals}f}"
    return f"{shown} bits per character" if metric == "bpc" else f"{shown} % {metric}"


def _result_row(group: Group) -> list[Text]:
    run, n = group.first, len(group.runs)
    decimals = digits(run.metric)
    if n == 1:
        spread = ""
    elif n == 2:
        spread = f" ({min(group.values):.{decimals}f} to {max(group.values):.{decimals}f})"
    else:
        spread = f" ± {group.deviation:.{decimals}f}"
    low, high = group.steps
    steps = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    if group.share is not None:
        steps += f" of {paper.STEPS[run.data, run.model]:,}"
    scales = sorted({r.scale for r in group.runs if r.scale})
    settings = ", ".join([*filter(None, [group.label]), *(f"scale={scale}" for scale in scales)])
    reported, difference = group.reported, group.difference
    return [
        run.title,
        settings or "-",
        f"{group.mean:.{decimals}f}{spread} {group.split}",
        f"{reported.value:.{decimals - 1}f}, {reported.source}" if reported else "-",
        f"{difference:+.{decimals}f}".replace("-", "−") if difference is not None else "-",
        group.verdict(),
        str(n),
        steps,
    ]


def _figures(data: str, runs: list[Run]) -> list[Block]:
    blocks: list[Block] = []
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
    for suffix, of, members, last in drawn:
        blocks.append(
            Figure(
                data + suffix,
                f"Validation against training steps, {data_title(data)}{of}",
                _curve_caption(data, members),
                functools.partial(validation_curves, members, data_title(data) + of, last),
            )
        )
    for k, by_gamma in enumerate(found_sweeps):
        run = next(iter(by_gamma.values()))[0]
        name = "-".join([data, run.model, "gamma", *([str(k + 1)] if k else [])])
        title = f"{data_title(data)}, {run.title}"
        blocks.append(
            Figure(
                name,
                f"Training and validation from several initial γ, {title}",
                "From several initial values of γ, as in figure 6.",
                functools.partial(gamma_sweep, by_gamma, run.title),
            )
        )
    return blocks


def _curve_caption(data: str, runs: list[Run]) -> str:
    many = len(cluster(runs, MEASURED)) > 3
    parts = ["Validation against training steps."]
    if any(run.curve("batch")[0] for run in runs):
        parts.append(
            "With batch statistics where the model normalises, as in the paper."
            if many
            else "Solid: batch statistics where the model normalises, as in the paper; dashed: "
            "population statistics."
        )
    if paper.validation(data):
        parts.append("Wide and pale: the paper, read off its figures.")
    if any(len(one_a_seed(members)) > 1 for members in cluster(runs, MEASURED)):
        parts.append("Thin lines are single seeds.")
    return " ".join(parts)


def _not_run(runs: list[Run]) -> list[Block]:
    finished = {(run.data, run.model) for run in runs if run.result is not None}
    begun = {(run.data, run.model) for run in runs}
    items: list[Text] = []
    for (data, model), reported in paper.RESULTS.items():
        if (data, model) not in finished:
            metric = paper.METRIC[data]
            state = "; begun, not finished" if (data, model) in begun else ""
            value = with_unit(reported.value, metric)
            items.append(
                f"{data_title(data)}, {MODELS[model]}: the paper has {value} "
                f"({reported.split}, {reported.source}, {paper.STEPS[data, model]:,} steps){state}"
            )
    if not items:
        return []
    return [
        Heading(2, "Not run"),
        Paragraph("Results of the paper without a finished run here:"),
        Bullets(items),
    ]


def _analyses(found: Found) -> list[Block]:
    """A figure an analysis, and each data set; the paper's, Penn Treebank, first."""
    by_figure: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for name in sorted(found.analyses, key=lambda name: ("-ptb-" not in name, name)):
        result = found.analyses[name]
        by_figure.setdefault((result["analysis"], analysed_data(result)), []).append(result)
    blocks: list[Block] = []
    for kind, data in sorted(by_figure, key=lambda key: list(ANALYSES).index(key[0])):
        name, title = kind, ANALYSES[kind]
        if data not in (None, "ptb"):
            name, title = f"{kind}-{data}", f"{title}: {data_title(data)}"
        draw_it = functools.partial(analysis_figures.FIGURES[kind], by_figure[kind, data])
        caption = analysis_figures.caption(kind, data)
        blocks += [Heading(3, title), Figure(name, title, caption, draw_it)]
    return [Heading(2, "Analyses"), *blocks] if blocks else []


def _unfinished(
    found: Found, name: Callable[[Run], Inline], resume: Callable[[Run], str] | None
) -> list[Block]:
    rows: list[list[Text]] = []
    for run in found.runs:
        if run.state == "finished":
            continue
        steps, values = run.curve()
        last = "none"
        if steps:
            last = f"{values[-1]:.{digits(run.metric)}f} at {steps[-1]:,}"
        notes: dict[str, Text] = {
            "running": "a process is training there",
            "failed": run.failure or "",
            "stopped": ("go on with ", Code(resume(run))) if resume else "it can go on",
            "unfinished": "-" if resume is None else "no checkpoint to go on from",
        }
        rows.append([name(run), run.state, f"{run.step:,}", last, notes[run.state]])
    for path, reason in found.unreadable:
        place = path.relative_to(found.root).as_posix()
        rows.append([Code(place), "unreadable", "-", "-", reason])
    if not rows:
        return []
    return [
        Heading(2, "Not finished"),
        Table(["run", "state", "step", "last validation", ""], "llrlw", rows),
    ]


def _all_runs(runs: list[Run], name: Callable[[Run], Inline]) -> list[Block]:
    if not runs:
        return []
    header = [
        "run", "test", "validation, population", "validation, batch", "best step", "steps",
        "wall time", "ms a training step", "kernel", "commit", "machine, threads",
    ]  # fmt: skip
    ordered = sorted(runs, key=lambda run: (*order(run), run.seed, str(run.path)))
    commands = [
        (name(run), ": ", Code(str(run.result["command"])))
        for run in ordered
        if run.result is not None and "command" in run.result
    ]
    blocks: list[Block] = [
        Heading(2, "All runs"),
        Paragraph("Validation at the best step, while training."),
        Table(header, "lrrrrrrrlll", [_run_row(run, name(run)) for run in ordered]),
    ]
    if commands:
        blocks += [Paragraph("The commands:"), Bullets(commands)]
    return blocks


def _run_row(run: Run, name: Inline) -> list[Text]:
    decimals, best, result = digits(run.metric), run.best_step(), run.result or {}

    def at_best(statistics: str) -> str:
        at = dict(zip(*run.curve(statistics), strict=True))
        return f"{at[best]:.{decimals}f}" if best in at else "-"

    training, seconds = result.get("train_seconds"), result.get("wall_seconds")
    machine = [str(result[key]) for key in ("machine", "threads") if key in result]
    return [
        name,
        with_unit(run.final("test"), run.metric, decimals) if result else run.state,
        at_best("population"),
        at_best("batch"),
        "-" if best is None else f"{best:,}",
        f"{result.get('steps', run.step):,}",
        "-" if seconds is None else _duration(seconds),
        f"{1000 * training / result['steps']:.0f}" if training else "-",
        str(result.get("kernel", "-")),
        ", ".join(result.get("commits") or [str(result.get("commit", "-"))]),
        ", ".join(machine) or "-",
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def _same_step(runs: list[Run], name: Callable[[Run], Inline]) -> list[Block]:
    """Our validation at the steps where the paper's curve has a value."""
    blocks: list[Block] = []
    for run in sorted(runs, key=lambda run: (*order(run), run.seed, str(run.path))):
        points = paper.validation(run.data).get(run.model, [])
        decimals, factor = digits(run.metric), METRICS[run.metric][1]
        found = [
            (step, ours, theirs * factor)
            for step, ours in zip(*run.paper_like_curve(), strict=True)
            if (theirs := interpolate(points, step)) is not None
        ]
        if found and not unlike_the_paper(run):
            found = thinned(found, MOST_COLUMNS)
            table = Table(
                ["step", *(f"{step:,}" for step, *_ in found)],
                "l" + "r" * len(found),
                [
                    ["ours", *(f"{ours:.{decimals}f}" for _, ours, _ in found)],
                    ["the paper", *(f"{theirs:.{decimals}f}" for *_, theirs in found)],
                ],
            )
            blocks += [Paragraph(name(run)), table]
    if not blocks:
        return []
    return [
        Heading(2, "Validation against the paper's curves, at the same step"),
        Paragraph(
            "With batch statistics where the model normalises, as in the paper; the paper's values "
            "are read off its figures 2, 3a and 4, between its points by a straight line."
        ),
        *blocks,
    ]


def interpolate(points: paper.Points, step: float) -> float | None:
    """The paper's value at a step; None beyond its curve."""
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if s0 <= step <= s1:
            return v0 + (step - s0) / (s1 - s0) * (v1 - v0) if s1 > s0 else v0
    return None


def thinned(items: list[_T], most: int) -> list[_T]:
    """At most so many of them, evenly, the last among them."""
    stride = math.ceil(len(items) / most)
    return items[::-1][::stride][::-1] if items else items
