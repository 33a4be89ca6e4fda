"""Figures of runs: validation curves, sweeps over γ, validation against steps and seconds.

Needs matplotlib (`pip install bnrnn[plot]`). Numbers too large to draw are left out.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnrnn.plots.style import MARKERS, colour, entry, plain, plt, tidy
from bnrnn.report import chart, paper
from bnrnn.report.chart import (
    EPOCHS,
    LARGEST,
    MOST_POINTS,
    STEPS,
    Chart,
    Panel,
    along,
    papers_epoch,
    thinned,
)
from bnrnn.report.groups import (
    MEASURED,
    Curve,
    cluster,
    kind,
    label,
    mean_curve,
    one_a_seed,
    order,
)
from bnrnn.runs.record import Metric, Run

_LONG = 50  # characters; with a longer label, the legend is below the axes, in one column
_MANY = 5  # entries; a legend with more is below the axes, in two columns
_DOTTED = 40  # points; the markers of a longer curve would overlap
_START = 1 / 8  # of the values of a figure, the worst ones, which its y axis cuts off
_FEWEST = 8  # values; with fewer, the y axis has all of them
_FEW = 4  # with fewer groups, each is labelled in full, with both kinds of statistics


def validation_curves(runs: list[Run], title: str = "", last: float = math.inf) -> Figure:
    """`validation_chart` as a picture, with the paper's curves pale behind ours.

    Solid: batch statistics if the model normalises, as in the paper. Dashed: population statistics,
    shown only for up to three groups of settings. The curves of several seeds are thin, and their
    mean is thick.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    (panel,) = validation_chart(runs, title, last).panels
    plot(axes, panel.curves, STEPS)
    _tidy(axes, panel.y_label)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    _legend(figure, axes)
    if title:
        axes.set_title(plain(title), fontsize=10, loc="left")
    return figure


def _legend(figure: Figure, axes: Axes, outside: bool = False) -> None:
    """Add a legend; if `outside`, or with long or many entries, make room for it below the axes."""
    labels = axes.get_legend_handles_labels()[1]
    longest = max(map(len, labels), default=0)
    if longest <= _LONG and len(labels) <= _MANY and not outside:
        axes.legend(frameon=False, loc="best", fontsize=9)
        return
    columns = 1 if longest > _LONG else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(frameon=False, loc="outside lower center", fontsize=9, ncols=columns)


def validation_chart(runs: list[Run], title: str = "", last: float = math.inf) -> Chart:
    """Validation curves of runs on the same data, and the paper's curves.

    Args:
        last: the last step to draw.
    """
    clusters = sorted(cluster(runs, MEASURED), key=lambda members: order(members[0]))
    few = len(clusters) < _FEW
    curves = _papers_curves(runs, last, few)
    for members in clusters:
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        curves += _settings_curves(members, siblings, last, few)
    metric = runs[0].metric
    limits = end_limits([curve.y for curve in curves], metric, _START)
    return Chart([Panel(f"validation {metric.label}", curves, title, metric.decimals, limits)])


def end_limits(
    curves: Sequence[Sequence[float]], metric: Metric, start: float
) -> tuple[float, float] | None:
    """Limits of the y axis that cut off the steep start; the end of every curve is within them.

    Args:
        start: the fraction of all values, the worst ones, to cut off.

    Returns:
        None if there are few values, or if nothing is cut off.
    """
    kept = [[value for value in curve if abs(value) < LARGEST] for curve in curves]
    ends = [values[-1] for values in kept if values]
    values = sorted(itertools.chain(*kept), reverse=metric.lower_is_better)  # the worst first
    if len(values) < _FEWEST:
        return None
    best = values[-1]
    edge = max([values[int(start * len(values))], *ends], key=lambda value: abs(value - best))
    if edge == values[0]:
        return None
    margin = 0.06 * (edge - best)
    low, high = sorted((best - margin, edge + margin))
    return low, high


def _papers_curves(runs: list[Run], last: float, few: bool) -> list[chart.Curve]:
    titles = {run.model: run.subject.model_title for run in runs}
    longest = min(last, max(max(run.curve()[0], default=0) for run in runs))
    found = []
    for model, points in paper.validation(runs[0].data).items():
        shown = [(s, v * runs[0].metric.factor) for s, v in points if s <= longest * 1.05]
        if shown and model in titles:
            steps, values = zip(*shown, strict=True)
            x: dict[str, Sequence[float]] = {STEPS: steps}
            if (each := papers_epoch(runs, model)) is not None:
                x[EPOCHS] = [step / each for step in steps]
            name = f"{titles[model]}, the paper"
            # With many curves, all curves of the paper have one entry in the legend.
            legend = name if few else None if found else "the paper"
            found.append(
                chart.Curve(name, x, values, colour(model), legend=legend, width=4, alpha=0.3)
            )
    return found


def _settings_curves(
    members: list[Run], siblings: list[Run], last: float, few: bool
) -> list[chart.Curve]:
    """The curves of runs that differ only in their seed."""
    run = members[0]
    seeds = one_a_seed([run for run in members if run.curve()[0]])
    n = len(_averaged(seeds))
    parts = [run.subject.model_title, label(run, siblings, MEASURED)]
    name = ", ".join(filter(None, [*parts, f"mean of {n} seeds" if n > 1 else ""]))
    both = few and any(run.curve("batch")[0] for run in seeds)
    style: dict[str, Any] = {
        "colour": colour(run.model),
        "marker": MARKERS[siblings.index(run) % len(MARKERS)],
    }
    first = name + (", batch statistics" if both else "")
    found = _seeds(first, seeds, _until(last, Run.paper_like_curve), **style)
    if both:
        second = f"{name}, population statistics"
        style |= {"dash": "--", "width": 1.2}
        found += _seeds(second, seeds, _until(last, Run.curve), **style)
    return found


def gamma_sweep(by_gamma: dict[float, list[Run]], title: str = "") -> Figure:
    """`gamma_chart` as a picture, like figure 6 of the paper."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
    shown = gamma_chart(by_gamma, title).panels
    for axes, panel in zip(panels, shown, strict=True):
        plot(axes, panel.curves, STEPS)
        _tidy(axes, panel.y_label if panel is shown[0] else "")
        axes.set_title(plain(panel.title), fontsize=10, loc="left")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center", title="at the start")
    return figure


def gamma_chart(by_gamma: dict[float, list[Run]], title: str = "") -> Chart:
    """Training and validation curves for several initial γ; validation uses batch statistics.

    If a higher metric is better, the cross-entropy is drawn instead.

    Args:
        by_gamma: γ -> one run per seed, on the same data and model; at least two values of γ.
    """
    metric = next(iter(by_gamma.values()))[0].metric
    key, factor, name = metric.name, metric.factor, metric.label
    if not metric.lower_is_better:
        key, factor, name = "cross_entropy", 1.0, "cross-entropy, nats"
    # The run with the default γ is often much longer: then stop where the next longest ends.
    *_, second, longest = sorted(max(run.step for run in runs) for runs in by_gamma.values())
    last = second if longest > 2 * second else longest

    def values(split: str, statistics: str | None) -> Callable[[Run], Curve]:
        def curve(run: Run) -> Curve:
            found = run.values(key, split, statistics)
            return list(found), [value * factor for value in found.values()]

        return _until(last, curve)

    training, validation = values("train", None), values("valid", "batch")
    curves: tuple[list[chart.Curve], list[chart.Curve]] = ([], [])
    for k, (gamma, runs) in enumerate(by_gamma.items()):
        # The yellow end of viridis is too pale on white, and too dark when the page inverts it.
        shade = to_hex(colormaps["viridis"](0.78 * k / (len(by_gamma) - 1)))
        start = f"γ = {gamma:g}"
        curves[0].extend(_seeds(start, runs, training, "train", colour=shade))
        curves[1].extend(_seeds(start, runs, validation, colour=shade, marker="o"))
    return Chart([
        Panel(name, curves[0], f"{title}: training", metric.decimals),
        Panel(name, curves[1], "validation, batch statistics", metric.decimals),
    ])  # fmt: skip


def steps_and_seconds(runs: list[Run]) -> Figure:
    """Draw validation against steps and against seconds: models differ in the cost of a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for run in runs:
        steps, values = run.curve()
        clock = run.values("seconds", "valid", "population")
        seconds = [clock.get(step, math.nan) for step in steps]
        style: dict[str, Any] = {
            "color": colour(run.model), "label": entry(run.subject.model_title),
            "marker": "o", "markersize": 3,
        }  # fmt: skip
        left.plot(steps, drawable(values), **style)
        right.plot(drawable(seconds), drawable(values), **style)
    _tidy(left, f"validation {runs[0].metric.label}")
    _tidy(right, "", "seconds, validation included")
    for axes in (left, right):
        axes.legend(frameon=False, loc="best", fontsize=9)
    return figure


def _until(last: float, curve: Callable[[Run], Curve]) -> Callable[[Run], Curve]:
    def cut(run: Run) -> Curve:
        points = [(s, v) for s, v in zip(*curve(run), strict=True) if s <= last]
        return [s for s, _ in points], [v for _, v in points]

    return cut


def _seeds(
    name: str, runs: list[Run], curve: Callable[[Run], Curve], split: str = "valid", **style: Any
) -> list[chart.Curve]:
    """The curve of one run; for several, a thin curve each and their mean at the shared steps."""
    found = []
    if len(runs) > 1:
        thin = style | {"marker": None, "width": 0.7, "alpha": 0.5}
        for run in runs:
            steps, values = curve(run)
            x = along([run], steps, split)
            found.append(chart.Curve(name, x, values, note=f"seed {run.seed}", **thin))
    if averaged := _averaged(runs):
        steps, values = mean_curve(averaged, curve) if len(runs) > 1 else curve(runs[0])
        if len(steps) > _DOTTED:
            style["marker"] = None
        x = along(averaged, steps, split)
        found.append(chart.Curve(name, x, values, legend=name, **style))
    return found


def picture(chart: Chart, outside: bool = False) -> Figure:
    """Draw a chart of one panel along its axis.

    Args:
        outside: whether the legend is below the axes, however few its entries are.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    (panel,) = chart.panels
    plot(axes, panel.curves, chart.axis)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linestyle=":", linewidth=1)
    tidy(axes, chart.axis, panel.y_label)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if chart.axis == EPOCHS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes, outside)
    axes.set_title(plain(panel.title), fontsize=10, loc="left")
    return figure


def plot(axes: Axes, curves: Sequence[chart.Curve], axis: str) -> None:
    """Plot the curves that have values on this axis, thinned as in the HTML page."""
    for curve in curves:
        if axis in curve.x:
            kept = thinned(curve.y, MOST_POINTS)
            x, y = ([values[k] for k in kept] for values in (curve.x[axis], curve.y))
            axes.plot(
                drawable(x), drawable(y), color=curve.colour,
                linestyle=curve.dash, linewidth=curve.width, alpha=curve.alpha,
                marker=curve.marker, markersize=3.5,
                label=None if curve.legend is None else entry(curve.legend),
            )  # fmt: skip


def _averaged(runs: list[Run]) -> list[Run]:
    """The runs to average: those with the most steps, of the finished runs if there are any.

    The mean ends with the shortest run, so that shorter runs are left out. With early stopping,
    every seed ends at another step, so that all are averaged.
    """
    finished = [run for run in runs if run.result is not None] or runs
    if all(run.settings.get("patience") is not None for run in finished):
        return finished
    furthest = max((run.step for run in finished), default=0)
    return [run for run in finished if run.step == furthest]


def drawable(values: Sequence[float]) -> list[float]:
    return [value if abs(value) < LARGEST else math.nan for value in values]


def _tidy(axes: Axes, y_label: str, x_label: str = "training steps") -> None:
    tidy(axes, x_label, plain(y_label))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
