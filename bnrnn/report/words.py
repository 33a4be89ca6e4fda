"""Table 2 and figure 3 of Laurent et al.: training and validation perplexity by epoch."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bnrnn.plots.style import MARKERS, colour
from bnrnn.report import chart, document, paper
from bnrnn.report.chart import EPOCHS, STEPS, Chart, Panel, along, papers_epoch
from bnrnn.report.document import Block, Paragraph, Table, Text
from bnrnn.report.figures import picture
from bnrnn.report.groups import MEASURED, cluster, kind, label, one_a_seed, order, percent
from bnrnn.runs.record import Run
from bnrnn.settings.schema import SIZES

Curve = dict[float, float]  # epoch -> perplexity
_HIGHEST = 300  # of the paper's y axis, perplexity
_MOST_EPOCHS = 11  # columns of a table, at most
_SPLITS = {"train": "training", "valid": "validation"}


def blocks(runs: list[Run]) -> list[Block]:
    """Tables and figures for runs on word-level Penn Treebank."""
    shown = [run for run in sorted(runs, key=order) if validation(run)]
    if not shown:
        return []
    found: list[Block] = [Paragraph(_TABLE), table(shown)]
    for size in SIZES:
        if members := [run for run in shown if f"words_{size}" in run.model]:
            title = f"Perplexity against epochs, Penn Treebank, words, {size}"
            draw = functools.partial(curves, members, title)
            make = functools.partial(chart_of, members, title)
            caption = _caption(members)
            found.append(document.Figure(f"ptb_words-{size}", title, caption, draw, make))
            found += _same_epoch(members)
    return found


_TABLE = (
    "Table 2, at the epoch of the best validation. Training: the mean over the epoch, with "
    "dropout. Validation: with batch statistics if the model normalises, which is closest to the "
    "paper's code. That code averages the perplexities of batches; ours is the perplexity of the "
    "mean loss, which is slightly lower. The paper's number for the large network with BN is not "
    "its best validation: its figure has 94.8 after 15 epochs. The paper has no test. Ours is of "
    "the last model, with population statistics; the column next to it is from Zaremba et al., "
    "2014."
)
_FIGURE = (
    "As figure 3. Dotted: training. Solid: validation, with batch statistics if the model "
    "normalises. Dashed: with population statistics. One line per seed."
)
_BESIDE_THE_PAPER = (
    " Wide and pale: the paper, read off its figure. Its axis begins at 0 with a trained model, so "
    "its epochs may be up to one behind ours."
)


def _caption(runs: Sequence[Run]) -> str:
    return _FIGURE + _BESIDE_THE_PAPER * any(run.model in paper.words() for run in runs)


def table(runs: Sequence[Run]) -> Table:
    header = [
        "model", "settings", "seed", "best epoch", "training", "the paper", "validation",
        "the paper", "test", "Zaremba et al.",
    ]  # fmt: skip
    firsts = [members[0] for members in cluster(runs, MEASURED)]
    return Table(header, "lwrrrrrrrr", [_row(run, firsts) for run in runs])


def _row(run: Run, firsts: list[Run]) -> list[Text]:
    found = validation(run)
    best = min(found, key=lambda epoch: found[epoch])
    trained = training(run).get(best)
    reported = paper.RESULTS.get((run.data, run.model))
    siblings = [other for other in firsts if kind(other) == kind(run)]
    state = "" if run.result is not None else f", {percent(run.step / run.subject.total_steps)} run"
    number = run.metric.number
    theirs = paper.WORDS_TRAINING.get(run.model)
    zaremba = paper.WORDS_TEST.get(run.model)
    return [
        run.subject.model_title + state,
        label(run, siblings, MEASURED) or "-",
        str(run.seed),
        f"{best:.3g}",
        "-" if trained is None else number(trained),
        "-" if theirs is None else number(theirs, 1),
        number(found[best]),
        "-" if reported is None else number(reported.value, 1),
        "-" if run.result is None else number(run.final("test")),
        "-" if zaremba is None else number(zaremba, 1),
    ]


def validation(run: Run, statistics: str | None = None) -> Curve:
    """Validation perplexity by epoch.

    Args:
        statistics: None: batch statistics if the model normalises.
    """
    points = run.paper_like_curve() if statistics is None else run.curve(statistics)
    each = _steps_per_epoch(run)
    return {step / each: value for step, value in zip(*points, strict=True) if math.isfinite(value)}


def training(run: Run) -> Curve:
    """Training perplexity at each validation, from the mean loss since the previous validation."""
    losses = means_in_training(run, "cross_entropy")
    return {epoch: math.exp(mean) for epoch, mean in losses.items() if mean < 700}


def means_in_training(run: Run, name: str) -> Curve:
    """The mean of the training records since the previous validation, at each validation.

    With a validation at the end of each epoch, this is the mean over the epoch.
    """
    recorded = run.values(name, "train", None)
    each, found = _steps_per_epoch(run), {}
    for before, step in itertools.pairwise([0, *run.paper_like_curve()[0]]):
        since = [value for at, value in recorded.items() if before < at <= step]
        if since:
            found[step / each] = sum(since) / len(since)
    return found


def _steps_per_epoch(run: Run) -> int:
    return max(run.subject.steps_per_epoch, 1)  # 0 only in a file edited by hand


def curves(runs: list[Run], title: str) -> Figure:
    """`chart_of` as a picture."""
    return picture(chart_of(runs, title))


def chart_of(runs: list[Run], title: str) -> Chart:
    """Training and validation curves of runs of one size, and the paper's curves."""
    longest = max(max(validation(run)) for run in runs)
    found: list[chart.Curve] = []
    for model, by_split in paper.words().items():
        if model in {run.model for run in runs}:
            for split, points in by_split.items():
                shown = {epoch: v for epoch, v in by_epoch(points).items() if epoch <= longest}
                name = f"{paper.model_title(model)}, the paper, {_SPLITS[split]}"
                dash = ":" if split == "train" else "-"
                found.append(papers(name, shown, papers_epoch(runs, model), model, dash))
    clusters = cluster(runs, MEASURED)
    for k, members in enumerate(clusters):
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        name = ", ".join(
            filter(None, [members[0].subject.model_title, label(members[0], siblings, MEASURED)])
        )
        seeds = one_a_seed(members)
        for run in seeds:
            marker = MARKERS[k % len(MARKERS)] if len(validation(run)) < 20 else None
            style: dict[str, Any] = {
                "width": 1.5 if len(seeds) == 1 else 0.9,
                "note": f"seed {run.seed}" if len(seeds) > 1 else "",
            }
            found += [
                by_epochs(f"{name}, validation", run, validation(run), marker=marker,
                          legend=name if run is seeds[0] else None, **style),
                by_epochs(f"{name}, training", run, training(run), dash=":", **style),
            ]  # fmt: skip
            if run.curve("batch")[0]:
                population = validation(run, "population")
                of = f"{name}, population statistics"
                found.append(by_epochs(of, run, population, dash="--", **style))
    values = [value for run in runs for value in validation(run).values()]
    limits = (0.0, float(_HIGHEST)) if min(values) < _HIGHEST else None
    return Chart([Panel("perplexity", found, title, 2, limits)], EPOCHS)


def by_epochs(name: str, run: Run, points: Curve, **style: Any) -> chart.Curve:
    """A curve of our values at validation steps, with its points on every axis."""
    each = _steps_per_epoch(run)
    x = along([run], [round(epoch * each) for epoch in points], "valid")
    return chart.Curve(
        name, x | {EPOCHS: list(points)}, list(points.values()), colour(run.model), **style
    )


def papers(name: str, points: Curve, each: int | None, model: str, dash: str = "-") -> chart.Curve:
    """A curve from the paper, wide and pale.

    Args:
        each: the paper's steps per epoch; None if they are not known.
    """
    x: dict[str, Sequence[float]] = {EPOCHS: list(points)}
    if each is not None:
        x[STEPS] = [epoch * each for epoch in points]
    return chart.Curve(name, x, list(points.values()), colour(model), dash=dash, width=4, alpha=0.3)


def by_epoch(points: paper.Points) -> Curve:
    return {point[0]: point[1] for point in points}


def _same_epoch(runs: list[Run]) -> list[Block]:
    """Tables of our perplexity and the paper's at the same epochs, if the paper has curves."""
    found: list[Block] = []
    for run in runs:
        theirs = {split: by_epoch(p) for split, p in paper.words().get(run.model, {}).items()}
        ours = {"train": training(run), "valid": validation(run)}
        epochs = [epoch for epoch in ours["valid"] if epoch in theirs.get("valid", {})]
        if not epochs:
            continue
        epochs = epochs[:: -(-len(epochs) // _MOST_EPOCHS)]
        rows: list[list[Text]] = [
            [f"{name}, {of}", *(f"{values[k]:.1f}" if k in values else "-" for k in epochs)]
            for split, name in _SPLITS.items()
            for of, values in (("ours", ours[split]), ("the paper", theirs[split]))
        ]
        header = ["epoch", *(f"{epoch:g}" for epoch in epochs)]
        found += [
            Paragraph(f"{run.subject.model_title}, seed {run.seed}:"),
            Table(header, "l" + "r" * len(epochs), rows),
        ]
    return found


__all__ = [
    "blocks", "by_epoch", "by_epochs", "chart_of", "curves", "means_in_training", "papers", "table",
    "training", "validation",
]  # fmt: skip
