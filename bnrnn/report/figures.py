"""Figures of runs: `validation_curves`, `gamma_sweep`, `steps_and_seconds`.

Needs matplotlib (`pip install bnrnn[plot]`). Numbers that no axis has room for are left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnrnn.plots.style import colour, entry, plain, plt, tidy
from bnrnn.report import paper
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
from bnrnn.runs.record import Run

_MARKERS = "os^Dv"  # of one model, for each of its settings
_LONG = 50  # letters beyond which labels stand below the curves, not over them
_DOTTED = 40  # points of a curve beyond which its dots run into each other
_FEW = 4  # curves below which each is labelled in full, with both kinds of statistics
LARGEST = 1e30


def validation_curves(runs: list[Run], title: str = "", last: float = math.inf) -> Figure:
    """Validation against steps for runs on the same data, the paper's curves lightly behind.

    Solid: batch statistics where there are some, as the paper's curves (an LSTM has no such
    choice). Dashed: population statistics, up to three curves. Several seeds are thin, their mean
    is thick.

    Args:
        last: the last step that is drawn.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    clusters = sorted(cluster(runs, MEASURED), key=lambda members: order(members[0]))
    few = len(clusters) < _FEW
    _papers_curves(axes, runs, last, few)
    for members in clusters:
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        _settings_curves(axes, members, siblings, last, few)
    _tidy(axes, f"validation {runs[0].metric.label}")
    if max(map(len, axes.get_legend_handles_labels()[1]), default=0) > _LONG:
        figure.set_figheight(4.5 + 0.2 * len(clusters))
        figure.legend(frameon=False, loc="outside lower center", fontsize=9)
    else:
        axes.legend(frameon=False, loc="best", fontsize=9)
    if title:
        axes.set_title(plain(title), fontsize=10, loc="left")
    return figure


def _papers_curves(axes: Axes, runs: list[Run], last: float, few: bool) -> None:
    titles = {run.model: run.subject.model_title for run in runs}
    longest = min(last, max(max(run.curve()[0], default=0) for run in runs))
    for model, points in paper.validation(runs[0].data).items():
        shown = [(s, v * runs[0].metric.factor) for s, v in points if s <= longest * 1.05]
        if shown and model in titles:
            # The colours of many are explained once; the caption explains what is wide and pale.
            name = entry(f"{titles[model]}, the paper") if few else None
            steps, values = zip(*shown, strict=True)
            style: dict[str, Any] = {"color": colour(model), "alpha": 0.3, "linewidth": 4}
            axes.plot(steps, _drawable(values), label=name, **style)


def _settings_curves(
    axes: Axes, members: list[Run], siblings: list[Run], last: float, few: bool
) -> None:
    """The curves of runs that differ in their seed only."""
    run = members[0]
    seeds = one_a_seed([run for run in members if run.curve()[0]])
    n = len(_averaged(seeds))
    parts = [run.subject.model_title, label(run, siblings, MEASURED)]
    name = ", ".join(filter(None, [*parts, f"mean of {n} seeds" if n > 1 else ""]))
    style: dict[str, Any] = {
        "color": colour(run.model),
        "marker": _MARKERS[siblings.index(run) % len(_MARKERS)],
    }
    both = few and any(run.curve("batch")[0] for run in seeds)
    statistics = ", batch statistics" if both else ""
    _seeds(axes, seeds, _until(last, Run.paper_like_curve), label=entry(name + statistics), **style)
    if both:
        _seeds(axes, seeds, _until(last, Run.curve), label=entry(f"{name}, population statistics"),
               linestyle="--", thick=1.2, **style)  # fmt: skip


def gamma_sweep(by_gamma: dict[float, list[Run]], title: str = "") -> Figure:
    """Training and validation from several initial γ, as the paper's figure 6.

    A metric that rises is shown by its loss, the cross-entropy. Validation with batch statistics.

    Args:
        by_gamma: γ -> a run of each seed, all of the same data and model; two γ or more.
    """
    metric = next(iter(by_gamma.values()))[0].metric
    key, factor, name = metric.name, metric.factor, metric.label
    if not metric.lower_is_better:
        key, factor, name = "cross_entropy", 1.0, "cross-entropy, nats"
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
    # The run from the usual γ often went on for long: what the others have is compared.
    *_, second, longest = sorted(max(run.step for run in runs) for runs in by_gamma.values())
    last = second if longest > 2 * second else longest

    def values(split: str, statistics: str | None) -> Callable[[Run], Curve]:
        def curve(run: Run) -> Curve:
            found = run.values(key, split, statistics)
            return list(found), [value * factor for value in found.values()]

        return _until(last, curve)

    training, validation = values("train", None), values("valid", "batch")
    for k, (gamma, runs) in enumerate(by_gamma.items()):
        # Yellow, the last of viridis, is too pale on white, and too dark when a page inverts it.
        style = {
            "color": colormaps["viridis"](0.78 * k / (len(by_gamma) - 1)),
            "label": f"γ = {gamma:g}",
        }
        _seeds(panels[0], runs, training, marker=None, **style)
        _seeds(panels[1], runs, validation, marker="o", **style)
    _tidy(panels[0], name)
    _tidy(panels[1], "")
    panels[0].set_title(plain(f"{title}: training"), fontsize=10, loc="left")
    panels[1].set_title("validation, batch statistics", fontsize=10, loc="left")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center", title="at the start")
    return figure


def steps_and_seconds(runs: list[Run]) -> Figure:
    """Validation against steps and against time, side by side: a step of one model costs more."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for run in runs:
        steps, values = run.curve()
        clock = run.values("seconds", "valid", "population")
        seconds = [clock.get(step, math.nan) for step in steps]
        style: dict[str, Any] = {
            "color": colour(run.model), "label": entry(run.subject.model_title),
            "marker": "o", "markersize": 3,
        }  # fmt: skip
        left.plot(steps, _drawable(values), **style)
        right.plot(_drawable(seconds), _drawable(values), **style)
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
    axes: Axes,
    runs: list[Run],
    curve: Callable[[Run], Curve],
    thick: float = 2.0,
    **style: Any,
) -> None:
    """One run: its curve. Several: a thin line each, and the mean at the steps all have."""
    curves = [curve(run) for run in runs]
    if len(runs) > 1:
        thin = {key: style[key] for key in ("color", "linestyle") if key in style}
        for steps, values in curves:
            axes.plot(steps, _drawable(values), linewidth=0.7, alpha=0.5, **thin)
        curves = [mean_curve(_averaged(runs), curve)]
    for steps, values in curves:
        if len(steps) > _DOTTED:
            style["marker"] = None
        axes.plot(steps, _drawable(values), linewidth=thick, markersize=3.5, **style)


def _averaged(runs: list[Run]) -> list[Run]:
    """Those that went as far as the furthest, of the finished ones if any: one that stopped early
    would cut their mean short."""
    finished = [run for run in runs if run.result is not None] or runs
    furthest = max((run.step for run in finished), default=0)
    return [run for run in finished if run.step == furthest]


def _drawable(values: Sequence[float]) -> list[float]:
    return [value if abs(value) < LARGEST else math.nan for value in values]


def _tidy(axes: Axes, y_label: str, x_label: str = "training steps") -> None:
    tidy(axes, x_label, plain(y_label))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
