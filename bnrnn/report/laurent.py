"""The speech results of Laurent et al., and our runs on frames in the same form.

Laurent, Pereyra, Brakel, Zhang, Bengio, "Batch Normalized Recurrent Neural Networks", 2016 (arXiv
1510.01378, 2015): table 1 and figure 2, on WSJ. None of our runs is on WSJ, so their numbers and
ours are never in the same column or panel.
"""

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources

from matplotlib.figure import Figure as Picture

from bnrnn.plots.style import colour, plain, plt, tidy
from bnrnn.report import chart
from bnrnn.report.chart import STEPS, Chart, Panel, along
from bnrnn.report.document import Block, Figure, Folded, Heading, Paragraph, Table, Text
from bnrnn.report.figures import plot
from bnrnn.report.groups import cluster, label, mean, mean_curve, one_a_seed, order
from bnrnn.runs.record import Run

METRIC = "fer"  # the metric of the runs in this part of the report
# Model, training FCE and FER, dev FCE and FER; each number is the best over the run.
TABLE_1 = [
    ("BiRNN", 0.95, 0.28, 1.11, 0.33),
    ("BiRNN (BN)", 0.73, 0.22, 1.19, 0.34),
]
TITLES = {"speech_lstm": "BiRNN", "speech_bn": "BiRNN (BN)"}
COLUMNS = ["training FCE", "training FER, %", "dev FCE", "dev FER, %"]


def speech(runs: list[Run]) -> list[Block]:
    """Table 1 and figure 2 from all runs on frames; empty if there are none."""
    found = [run for run in runs if run.metric.name == METRIC and run.curve()[0]]
    if not found:
        return []
    blocks: list[Block] = [
        Heading(3, "Speech, as in table 1 and figure 2"),
        Paragraph(
            "Frame cross entropy (FCE, nats) and frame error rate (FER), as in their table 1. Each "
            "number is the best over the run. Training: the mean between two records, with "
            "dropout and batch statistics. Dev: with population statistics. Test: the model with "
            "the best dev FER. A row is a group of runs that differ only in their seed."
        ),
    ]
    for _, grouped in itertools.groupby(sorted(found, key=order), key=lambda run: run.data):
        members = list(grouped)
        title = members[0].subject.data_title
        header = ["model", "settings", *COLUMNS, "test FER, %", "seeds", "steps"]
        rows = _rows(members)
        if all(row[1] == "-" for row in rows):
            header.remove("settings")
            rows = [[row[0], *row[2:]] for row in rows]
        blocks += [
            Heading(4, f"{title}: in the form of table 1"),
            Table(header, "l" + "w" * ("settings" in header) + "r" * 7, rows),
            Figure(
                f"{members[0].data}-laurent-figure-2",
                f"Frame cross entropy against batches, {title}, and figure 2 of Laurent et al.",
                "Left: theirs, on WSJ, read off their figure 2. Right: ours, on other data: only "
                "the order and the form of the curves compare. Dotted: training; solid: dev.",
                functools.partial(figure_2, members, title),
                functools.partial(chart_2, members, title),
            ),
        ]
    theirs: list[list[Text]] = [
        [model, *(f"{v:.2f}" if k % 2 == 0 else f"{100 * v:.0f}" for k, v in enumerate(values))]
        for model, *values in TABLE_1
    ]
    return [
        *blocks,
        Folded(Heading(4, "Their table 1, on WSJ"), [Paragraph(
            "80 hours of read news and 3546 classes, where guessing costs 8.17 nats. No run here "
            "is on WSJ, so the numbers above cannot be compared with these, only the order of the "
            "models: BN trains faster and generalises no better."
        ), Table(["model", *COLUMNS], "lrrrr", theirs)]),
    ]  # fmt: skip


def _rows(runs: list[Run]) -> list[list[Text]]:
    clusters = cluster(runs)
    rows: list[list[Text]] = []
    for members in clusters:
        siblings = [c[0] for c in clusters if c[0].model == members[0].model]
        seeds = one_a_seed(members)
        run = seeds[0]
        values = [mean([_best(run, *which) for run in seeds]) for which in (
            ("fce", "train"), ("fer", "train"), ("fce", "valid"), ("fer", "valid"),
        )]  # fmt: skip
        cells = [f"{v:.2f}" if k % 2 == 0 else f"{100 * v:.1f}" for k, v in enumerate(values)]
        finished = [run.final("test") for run in seeds if run.result is not None]
        test = f"{mean(finished):.1f}" if finished else "not finished"
        steps = sorted({run.step for run in seeds})
        shown = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        settings = ", ".join(
            filter(None, [label(run, siblings), f"scale={run.scale}" if run.scale else ""])
        )
        title = run.subject.model_title
        rows.append([title, settings or "-", *cells, test, str(len(seeds)), shown])
    return rows


def _best(run: Run, name: str, split: str) -> float:
    statistics = "population" if split == "valid" else None
    values = [v for v in run.values(name, split, statistics).values() if math.isfinite(v)]
    return min(values, default=math.nan)


def figure_2(runs: list[Run], title: str) -> Picture:
    """`chart_2` as a picture."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, panel in zip(panels, chart_2(runs, title).panels, strict=True):
        plot(axes, panel.curves, STEPS)
        tidy(axes, "batches", panel.y_label if axes is panels[0] else "")
        axes.set_title(plain(panel.title), fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.legend(frameon=False, fontsize=8)
    return figure


def chart_2(runs: list[Run], title: str) -> Chart:
    """A chart with their curves on the left and ours on the right."""
    theirs, ours = [], []
    for model, curves in curves_of_figure_2().items():
        for split, points in curves.items():
            steps, values = zip(*points, strict=True)
            theirs.append(_line({STEPS: steps}, values, model, split, TITLES[model]))
    for members in cluster(runs):
        seeds = one_a_seed(members)
        run = seeds[0]
        siblings = [c[0] for c in cluster(runs) if c[0].model == run.model]
        name = ", ".join(filter(None, [run.subject.model_title, label(run, siblings)]))
        for split in ("train", "valid"):
            steps, values = mean_curve(seeds, functools.partial(_curve, split=split))
            ours.append(_line(along(seeds, steps, split), values, run.model, split, name))
    y_label = "frame cross entropy, nats"
    return Chart([
        Panel(y_label, theirs, "Laurent et al., WSJ"), Panel(y_label, ours, title),
    ])  # fmt: skip


def _line(
    x: Mapping[str, Sequence[float]], y: Sequence[float], model: str, split: str, name: str
) -> chart.Curve:
    of, dash, legend = ("training", ":", None) if split == "train" else ("dev", "-", name)
    return chart.Curve(f"{name}, {of}", x, y, colour(model), legend=legend, dash=dash, width=1.5)


def _curve(run: Run, split: str) -> tuple[list[int], list[float]]:
    found = run.values("fce", split, "population" if split == "valid" else None)
    return list(found), list(found.values())


@functools.cache
def curves_of_figure_2() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The curves of figure 2: model -> "train" or "valid" -> [(batches, FCE in nats)]."""
    file = resources.files("bnrnn.report").joinpath("laurent_figure2.json")
    return json.loads(file.read_text(encoding="utf-8"))["curves"]
