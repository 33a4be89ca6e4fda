"""Figures; needs matplotlib (`pip install bnrnn[plot]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnrnn.report.runs import METRICS, Run

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
Curve = tuple[Sequence[float], Sequence[float]]


def validation_curves(
    runs: list[Run], path: Path, paper: Mapping[str, Curve] | None = None, note: str = ""
) -> None:
    """Validation against steps, one line a run; the paper's curve lightly behind.

    Solid: batch statistics where there are some, as the paper's curves (an LSTM has no such
    choice). Dashed: population statistics.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    longest = max(max(run.curve()[0], default=0) for run in runs)
    for model, (steps, values) in (paper or {}).items():
        shown = [(s, v) for s, v in zip(steps, values, strict=True) if s <= longest * 1.05]
        if shown:
            axes.plot(*zip(*shown, strict=True), color=COLOURS[model], alpha=0.3, linewidth=4,
                      label=f"{dict(lstm='LSTM', bnlstm='BN-LSTM')[model]}, the paper")  # fmt: skip
    for run in runs:
        colour = COLOURS.get(run.model, "black")
        dots = {"marker": "o", "markersize": 3}
        by_batch = run.curve("batch")
        if by_batch[0]:
            axes.plot(*by_batch, color=colour, label=f"{run.title}, batch statistics", **dots)
            axes.plot(*run.curve(), color=colour, linestyle="--", linewidth=1.2,
                      label=f"{run.title}, population statistics")  # fmt: skip
        else:
            axes.plot(*run.curve(), color=colour, label=run.title, **dots)
    _label(axes, runs[0].metric, "training steps")
    if note:
        axes.set_title(note, fontsize=10, loc="left")
    save(figure, path)


def steps_and_seconds(runs: list[Run], path: Path) -> None:
    """Validation against steps and against time, side by side: a step of one model costs more."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4), layout="constrained", sharey=True
    )  # fmt: skip
    for run in runs:
        steps, values = run.curve()
        clock = {r["step"]: r["seconds"] for r in run.records if r["split"] == "valid"}
        seconds = [clock[step] for step in steps]
        style = {"color": COLOURS.get(run.model, "black"), "marker": "o", "markersize": 3}
        left.plot(steps, values, label=run.title, **style)
        right.plot(seconds, values, label=run.title, **style)
    _label(left, runs[0].metric, "training steps")
    _label(right, runs[0].metric, "seconds, validation included")
    right.set_ylabel("")
    save(figure, path)


def _label(axes: Axes, metric: str, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel("validation " + METRICS[metric][0])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
