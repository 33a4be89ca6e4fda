"""The report's sections by paper: tables and figures of our results beside the paper's."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from bnrnn.report import first_attempt, laurent, leaderboard, paper, words
from bnrnn.report.document import (
    Block,
    Bullets,
    Figure,
    Folded,
    Heading,
    Inline,
    Paragraph,
    Table,
    Text,
)
from bnrnn.report.figures import gamma_chart, gamma_sweep, validation_chart, validation_curves
from bnrnn.report.groups import (
    MEASURED,
    Group,
    cluster,
    groups,
    one_a_seed,
    order,
    paper_decimals,
    sweeps,
    unlike_the_paper,
)
from bnrnn.report.run_tables import ordered
from bnrnn.runs.record import Run

MOST_COLUMNS = 12
_MOST_GROUPS = 8  # of settings in a figure


def results(runs: list[Run]) -> list[Block]:
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
    return run.metric.number(reported.value, paper_decimals(run.metric))


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


def not_run(runs: list[Run]) -> list[Block]:
    begun = {(run.data, run.model): run.result is not None for run in sorted(runs, key=_finished)}
    items: list[Text] = []
    for (data, model), reported in paper.RESULTS.items():
        if begun.get((data, model)):
            continue
        title, metric, source = paper.DATA[data]
        value = metric.show(reported.value, paper_decimals(metric))
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


def same_step(runs: list[Run], name: Callable[[Run], Inline]) -> list[Block]:
    """Tables of our validation and the paper's at the same steps."""
    blocks: list[Block] = []
    for run in ordered(runs):
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
