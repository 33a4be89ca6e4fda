"""Figures of runs; needs matplotlib (`pip install bnrnn[plot]`).

The functions return a figure; `encode` and `save` make the same bytes of the same runs.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnrnn.files import write_atomic
from bnrnn.report import paper
from bnrnn.report.groups import MEASURED, cluster, kind, label, mean_curve, one_a_seed, order
from bnrnn.report.runs import METRICS, MODELS, Run

# Okabe and Ito's colours, told apart by the colour-blind; one a model.
COLOURS = {
    "lstm": "#0072B2",
    "bnlstm": "#D55E00",
    "bn_input": "#009E73",
    "bn_input_sequence": "#CC79A7",
    "attentive_lstm": "#0072B2",
    "attentive_bnlstm": "#D55E00",
    "attentive_bn_everywhere": "#E69F00",
    "attentive_bne_star": "#009E73",
    "attentive_bne_star_star": "#CC79A7",
}
_DOT = {"marker": "o", "markersize": 3}
_MARKERS = "os^Dv"  # of one model, for each of its settings
_LONG = 50  # letters beyond which labels stand below the curves, not over them
_DOTTED = 40  # points of a curve beyond which its dots run into each other
RunCurve = Callable[[Run], tuple[list[int], list[float]]]


def validation_curves(runs: list[Run], title: str = "", last: float = math.inf) -> Figure:
    """Validation against steps for runs on the same data, the paper's curves lightly behind.

    Solid: batch statistics where there are some, as the paper's curves (an LSTM has no such
    choice). Dashed: population statistics, up to three curves. Several seeds are thin, their mean
    is thick.

    Args:
        last: the last step that is drawn.
    """

    def until_last(curve: RunCurve) -> RunCurve:
        def cut(run: Run) -> tuple[list[int], list[float]]:
            points = [(s, v) for s, v in zip(*curve(run), strict=True) if s <= last]
            return [s for s, _ in points], [v for _, v in points]

        return cut

    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    factor = METRICS[runs[0].metric][1]
    clusters = sorted(cluster(runs, MEASURED), key=lambda members: order(members[0]))
    longest = min(last, max(max(run.curve()[0], default=0) for run in runs))
    for model, points in paper.validation(runs[0].data).items():
        shown = [(s, v * factor) for s, v in points if s <= longest * 1.05]
        if shown and model in {run.model for run in runs}:
            # The colours of many are told once; the caption tells what is wide and pale.
            name = f"{MODELS[model]}, the paper" if len(clusters) < 4 else None
            axes.plot(
                *zip(*shown, strict=True), color=COLOURS[model], alpha=0.3, linewidth=4, label=name
            )
    for members in clusters:
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        settings = label(members[0], siblings, MEASURED)
        seeds = one_a_seed([run for run in members if run.curve()[0]])
        n = len(_averaged(seeds))
        of_seeds = f", mean of {n} seeds" if n > 1 else ""
        name = members[0].title + (f", {settings}" if settings else "") + of_seeds
        style: dict[str, Any] = {
            "color": COLOURS.get(members[0].model, "black"),
            "marker": _MARKERS[siblings.index(members[0]) % len(_MARKERS)],
        }
        both = any(run.curve("batch")[0] for run in seeds)
        kinds = ", batch statistics" if both and len(clusters) < 4 else ""
        like_the_papers = until_last(Run.paper_like_curve)
        _seeds(axes, seeds, like_the_papers, label=name + kinds, **style)
        if kinds:
            _seeds(axes, seeds, until_last(Run.curve), label=f"{name}, population statistics",
                   linestyle="--", thick=1.2, **style)  # fmt: skip
    _label(axes, runs[0].metric, "training steps")
    if max(len(text) for text in axes.get_legend_handles_labels()[1]) > _LONG:
        figure.set_figheight(4.5 + 0.2 * len(clusters))
        figure.legend(frameon=False, loc="outside lower center", fontsize=9)
    else:
        axes.legend(frameon=False, loc="best", fontsize=9)
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    return figure


def gamma_sweep(by_gamma: dict[float, list[Run]], title: str = "") -> Figure:
    """Training and validation from several initial γ, as the paper's figure 6.

    Cross-entropy of pixels, else the task's metric. Validation with batch statistics.

    Args:
        by_gamma: γ -> a run of each seed, all of the same data and model.
    """
    first = next(iter(by_gamma.values()))[0]
    key, factor = first.metric, METRICS[first.metric][1]
    name = METRICS[first.metric][0]
    if first.metric == "accuracy":
        key, factor, name = "cross_entropy", 1.0, "cross-entropy, nats"
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
    # The run from the usual γ is often one that went on for long: what the others have is compared.
    *_, second, longest = sorted(max(r.step for r in runs) for runs in by_gamma.values())
    last = second if longest > 2 * second else longest

    def values(split: str) -> RunCurve:
        def curve(run: Run) -> tuple[list[int], list[float]]:
            found = [
                (r["step"], r[key] * factor)
                for r in run.records
                if r["split"] == split
                and r.get("statistics", "batch") == "batch"
                and key in r
                and r["step"] <= last
            ]
            return [s for s, _ in found], [v for _, v in found]

        return curve

    for k, (gamma, runs) in enumerate(by_gamma.items()):
        # Yellow, the last of viridis, is too pale on white, and too dark when a page inverts it.
        colour = colormaps["viridis"](0.78 * k / (len(by_gamma) - 1))
        for axes, split in zip(panels, ("train", "valid"), strict=True):
            marker = "o" if split == "valid" else None
            _seeds(axes, runs, values(split), color=colour, marker=marker, label=f"γ = {gamma:g}")
    for axes, split in zip(panels, ("training", "validation, batch statistics"), strict=True):
        _label(axes, first.metric, "training steps")
        axes.set_ylabel(name if split == "training" else "")
        axes.set_title(f"{title}: {split}" if title and split == "training" else split,
                       fontsize=10, loc="left")  # fmt: skip
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center", title="at the start")
    return figure


def steps_and_seconds(runs: list[Run]) -> Figure:
    """Validation against steps and against time, side by side: a step of one model costs more."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for run in runs:
        steps, values = run.curve()
        clock = {r["step"]: r["seconds"] for r in run.records if r["split"] == "valid"}
        seconds = [clock[step] for step in steps]
        style = {"color": COLOURS.get(run.model, "black"), **_DOT}
        left.plot(steps, values, label=run.title, **style)
        right.plot(seconds, values, label=run.title, **style)
    for axes, label_ in ((left, "training steps"), (right, "seconds, validation included")):
        _label(axes, runs[0].metric, label_)
        axes.legend(frameon=False, loc="best", fontsize=9)
    right.set_ylabel("")
    return figure


def _seeds(
    axes: Axes,
    runs: list[Run],
    curve: RunCurve,
    thick: float = 2.0,
    **style: Any,
) -> None:
    """One run: its curve. Several: a thin line each, and the mean at the steps all have."""
    curves = [curve(run) for run in runs]
    if len(runs) > 1:
        thin = {key: style[key] for key in ("color", "linestyle") if key in style}
        for steps, values in curves:
            axes.plot(steps, _finite(values), linewidth=0.7, alpha=0.5, **thin)
        curves = [mean_curve(_averaged(runs), curve)]
    for steps, values in curves:
        if len(steps) > _DOTTED:
            style["marker"] = None
        axes.plot(steps, _finite(values), linewidth=thick, markersize=3.5, **style)


def _averaged(runs: list[Run]) -> list[Run]:
    """Those that went as far as the furthest, of the finished ones if any: one that stopped early
    would cut their mean short."""
    finished = [run for run in runs if run.result is not None] or runs
    furthest = max((run.step for run in finished), default=0)
    return [run for run in finished if run.step == furthest]


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _label(axes: Axes, metric: str, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel("validation " + METRICS[metric][0])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def encode(figure: Figure, kind: str) -> bytes:
    """As "png" or "svg": the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "bnrnn"}):
        figure.savefig(
            buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
        )
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode(figure, path.suffix.removeprefix(".")))
    plt.close(figure)
