"""Figure 1 of Laurent et al.: training cross entropy with BN on the sum of both terms."""

import functools
import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from bnrnn.plots.style import MARKERS
from bnrnn.report import document, paper
from bnrnn.report.chart import EPOCHS, Chart, Panel
from bnrnn.report.document import Block, Paragraph, Table, Text
from bnrnn.report.figures import picture
from bnrnn.report.groups import MEASURED, cluster, kind, label, one_a_seed, order
from bnrnn.report.words import by_epoch, by_epochs, means_in_training, papers
from bnrnn.runs.record import Run

Curve = dict[float, float]  # epoch -> nats
_EPOCHS = (1, 2, 5, 10, 15, 20)  # columns of the table, if a run has reached them
_RANGE = (1.5, 4.5)  # of the paper's y axis, nats


def blocks(runs: list[Run]) -> list[Block]:
    """A table and a figure for runs with stacked layers on character-level Penn Treebank."""
    shown = [run for run in sorted(runs, key=order) if training(run)]
    if not shown:
        return []
    title = f"Cross entropy in training against epochs, {shown[0].subject.data_title}"
    draw = functools.partial(figure, shown, title)
    name = f"{shown[0].data}-laurent-figure-1"
    make = functools.partial(chart_of, shown, title)
    return [Paragraph(_TABLE), table(shown), document.Figure(name, title, _FIGURE, draw, make)]


_TABLE = (
    "Figure 1: cross entropy in training, in nats per character. Our value at an epoch is the mean "
    "since the previous validation, with the statistics of each batch. The paper's curves are the "
    "best plain and the best normalised run of a random search over learning rate, momentum and "
    "batch size; it does not print the values found. It does not state whether its units were "
    "LSTMs, as ours are, or how long its sequences were. So the order of the models can be "
    "compared, but the numbers only roughly."
)
_FIGURE = (
    "As figure 1. Wide and pale: the paper, read off its figure, where the curves begin before "
    "training. One line per seed."
)


def training(run: Run) -> Curve:
    """Mean training cross entropy since the previous validation, at each validation, in nats."""
    bits = means_in_training(run, "bpc")
    return {epoch: value * math.log(2) for epoch, value in bits.items()}


def table(runs: Sequence[Run]) -> Table:
    ours = {run.path: training(run) for run in runs}
    epochs = [k for k in _EPOCHS if any(k in curve for curve in ours.values())]
    firsts = [members[0] for members in cluster(runs, MEASURED)]
    rows: list[list[Text]] = []
    for run in runs:
        curve, siblings = ours[run.path], [r for r in firsts if kind(r) == kind(run)]
        settings = label(run, siblings, MEASURED)
        shown = filter(None, [settings, f"scale={run.scale}" if run.scale else ""])
        last = max(curve)
        rows.append([
            run.subject.model_title, ", ".join(shown) or "-", str(run.seed),
            *_cells(curve, epochs), f"{curve[last]:.3f} at {last:.3g}",
        ])  # fmt: skip
    for model in dict.fromkeys(run.model for run in runs):
        if theirs := by_epoch(paper.sums().get(model, [])):
            last = max(theirs)
            cells = [*_cells(theirs, epochs), f"{theirs[last]:.3f} at {last:g}"]
            rows.append([f"{paper.model_title(model)}: the paper", "-", "-", *cells])
    header = ["model", "settings", "seed", *(f"epoch {k}" for k in epochs), "last, at epoch"]
    return Table(header, "lwr" + "r" * (len(epochs) + 1), rows)


def _cells(curve: Curve, epochs: Sequence[float]) -> list[Text]:
    return [f"{curve[k]:.3f}" if k in curve else "-" for k in epochs]


def figure(runs: list[Run], title: str) -> Figure:
    """`chart_of` as a picture."""
    return picture(chart_of(runs, title))


def chart_of(runs: list[Run], title: str) -> Chart:
    """Training cross entropy against epochs, and the paper's curves."""
    found = [
        papers(f"{paper.model_title(model)}, the paper", by_epoch(points), None, model)
        for model, points in paper.sums().items()
        if model in {run.model for run in runs}
    ]
    clusters = cluster(runs, MEASURED)
    for k, members in enumerate(clusters):
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        name = ", ".join(
            filter(None, [members[0].subject.model_title, label(members[0], siblings, MEASURED)])
        )
        seeds = one_a_seed(members)
        found += [
            by_epochs(
                name, run, training(run), note=f"seed {run.seed}" if len(seeds) > 1 else "",
                legend=name if run is seeds[0] else None, marker=MARKERS[k % len(MARKERS)],
                width=1.5 if len(seeds) == 1 else 0.9,
            )
            for run in seeds
        ]  # fmt: skip
    values = [value for run in runs for value in training(run).values()]
    limits = _RANGE if _RANGE[0] < min(values) < _RANGE[1] else None
    return Chart([Panel("cross entropy, nats", found, title, limits=limits)], EPOCHS)


__all__ = ["blocks", "chart_of", "figure", "table", "training"]
