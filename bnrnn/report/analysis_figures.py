"""The figures of `bnrnn.analyses`: from its results, with the paper's curves behind ours."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

from bnrnn.report import paper
from bnrnn.report.figures import COLOURS, plt
from bnrnn.report.runs import DATA, MODELS, analysed_data, departures

Results = list[dict[str, Any]]

CAPTIONS = {
    "gradient_flow": (
        "Norm of the gradient of the loss with respect to h_t in an untrained batch-normalised "
        "tanh RNN over in-order MNIST (figure 1a): lines are our medians over several draws of the "
        "weights, bands the lowest to the highest, dots the paper's curves, which have the same "
        "order and ends but for γ from 0.6 to 0.8 fall several decades lower; where W_h is "
        "orthogonal a large γ makes the gradient explode instead of vanish."
    ),
    "tanh_derivative": (
        "Derivative of tanh(x) for x ~ N(0, σ²) (figure 1b): its mean and its middle half, exact "
        "where the paper draws samples; batch normalisation makes σ = γ, and at the paper's choice "
        "of 0.1 hardly any of the derivative is lost."
    ),
    "lengths": (
        "Test bits per character against the length of the sequences the test string is cut into, "
        "as in figure 3b: ours after the training steps in the legend; a BN-LSTM is dashed with "
        "population and solid with batch statistics."
    ),
    "population": (
        "Population mean and variance of random units of our BN-LSTM at each time step, as in "
        "figure 5, after the training steps in the title: each thin line is a unit, the black one "
        "their median; in the paper, on Penn Treebank, all have settled after about ten time steps."
    ),
}
_BESIDE_THE_PAPER = (
    " Lines with markers are ours, wide pale ones the paper's, after its full training."
)

_MARKERS = "os^Dv"  # of one model, for each of its settings
_LONG = 100  # letters beyond which two legend entries do not fit side by side
_LOWEST, _HIGHEST = -25, 15  # powers of ten that are shown
_TITLES = {"identity": "$W_h = I$, as in the authors' code", "orthogonal": "$W_h$ orthogonal"}
_TERMS = {"recurrent": "recurrent term $W_h h$", "cell": "cell state $c$"}


def caption(kind: str, data: str | None) -> str:
    """Of the figure of one analysis of models of one data set."""
    beside = kind == "lengths" and data == "ptb"
    return CAPTIONS[kind] + (_BESIDE_THE_PAPER if beside else "")


def gradient_flow(results: Results) -> Figure:
    """A panel for each matrix; the first result."""
    result = results[0]
    gammas, matrices, t = result["gammas"], result["matrices"], result["t"]
    shades = colormaps["viridis"](np.linspace(0, 0.92, len(gammas)))
    colours = dict(zip(gammas, shades, strict=True))
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(4.6 * len(matrices) + 0.9, 4.4), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, matrix in zip(panels[0], matrices, strict=True):
        for curve in result["curves"]:
            if curve["matrix"] == matrix:
                median, lowest, highest = (
                    np.array(curve[name], dtype=float) for name in ("median", "lowest", "highest")
                )
                colour = colours[curve["gamma"]]
                axes.fill_between(t, lowest, highest, color=colour, alpha=0.1, linewidth=0)
                axes.plot(t, median, color=colour, linewidth=1.6)
        if matrix == "identity":
            for gamma in paper.gradient_flow().keys() & colours.keys():
                x, y = np.transpose(paper.gradient_flow()[gamma])
                axes.plot(x, y, color=colours[gamma], linestyle=":", linewidth=1.6)
            axes.legend(
                handles=[
                    Line2D([], [], color="0.3", label="ours, median"),
                    Patch(color="0.3", alpha=0.2, label="ours, lowest to highest"),
                    Line2D([], [], color="0.3", linestyle=":", label="the paper"),
                ],
                frameon=False, loc="upper left",
            )  # fmt: skip
        axes.set_title(_TITLES[matrix], fontsize=11, loc="left")
        _tidy(axes, "time step $t$", "")
        axes.set_xlim(0, t[-1])
        axes.set_ylim(_LOWEST, _HIGHEST)
        axes.yaxis.set_major_locator(MultipleLocator(5))
        axes.yaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$")
    panels[0, 0].set_ylabel("norm of the gradient with respect to $h_t$")
    handles = [Line2D([], [], color=colours[g], linewidth=3, label=str(g)) for g in gammas]
    figure.legend(handles=handles, title="γ", loc="outside right center", frameon=False)
    return figure


def tanh_derivative(results: Results) -> Figure:
    result = results[0]
    sigma, colour = result["deviations"], COLOURS["lstm"]
    figure, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    axes.fill_between(
        sigma, result["lower_quartile"], result["upper_quartile"], color=colour, alpha=0.2,
        linewidth=0, label="25 % to 75 %",
    )  # fmt: skip
    axes.plot(sigma, result["mean"], color=colour, linewidth=2, label="mean")
    axes.axvline(0.1, color="black", linestyle=":", linewidth=1)
    axes.annotate("γ = 0.1", (0.1, 0.5), xytext=(5, 0), textcoords="offset points")
    _tidy(axes, "standard deviation of $x$", r"$1 - \tanh^2(x)$")
    axes.set_xlim(sigma[0], sigma[-1])
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    return figure


def lengths(results: Results) -> Figure:
    """All results, of one data set, in one panel; the paper's curves behind Penn Treebank's."""
    of_model: dict[tuple[Any, ...], Results] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        same = (result["model"], tuple(departures(result)), result.get("scale") or "")
        of_model.setdefault(same, []).append(result)
    ordered = sorted(of_model, key=lambda key: (key[0] != "lstm", key))
    several = len({result["seed"] for result in results}) > 1
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    if analysed_data(results[0]) == "ptb":
        for model, by_statistics in paper.lengths().items():
            for statistics, points in sorted(by_statistics.items()):
                x, y = np.transpose(points)
                style = _line(model, statistics, "batch" in by_statistics, "the paper")
                axes.plot(x, y, alpha=0.3, linewidth=4, **style)
    drawn: dict[str, int] = {}  # how many kinds of each model
    for key in ordered:
        members, model = of_model[key], key[0]
        marker = _MARKERS[drawn.get(model, 0) % len(_MARKERS)]
        drawn[model] = drawn.get(model, 0) + 1
        for statistics in sorted(members[0]["bpc"]):
            style = _line(model, statistics, "batch" in members[0]["bpc"], _made(members, several))
            for result in members:  # its seeds
                values = result["bpc"][statistics]
                axes.plot(result["lengths"], values, marker=marker, markersize=3.5, **style)
                style.pop("label", None)
    axes.set_title(_data_title(results[0]), fontsize=11, loc="left")
    _tidy(axes, "length of the test sequences, characters", "test bits per character")
    labels = axes.get_legend_handles_labels()[1]
    halves = labels[: (len(labels) + 1) // 2], labels[(len(labels) + 1) // 2 :]
    columns = 2 if sum(max(map(len, half), default=0) for half in halves) < _LONG else 1
    figure.set_figheight(4.2 + 0.2 * len(labels) / columns)
    figure.legend(
        loc="outside upper left", ncols=columns, columnspacing=1, frameon=False, fontsize=9
    )
    return figure


def _line(model: str, statistics: str, normalizes: bool, note: str) -> dict[str, Any]:
    """Solid: batch statistics, or a model without any; dashed: population statistics."""
    name = MODELS.get(model, model) + (f", {statistics} statistics" if normalizes else "")
    return {
        "color": COLOURS.get(model, "black"),
        "linestyle": "--" if normalizes and statistics == "population" else "-",
        "label": f"{name}, {note}",
    }


def _made(results: Results, several: bool, steps: str = "steps") -> str:
    """`3,160 steps`, and what else tells the models of these results from others.

    Args:
        results: of one model and settings, each of another seed.
        several: there are other seeds in the figure.
    """
    at = [f"{result['step']:,}" for result in results]
    seeds = [str(result["seed"]) for result in results]
    parts = [*departures(results[0]), f"{'/'.join(at if len(set(at)) > 1 else at[:1])} {steps}"]
    if several:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {'/'.join(seeds)}")
    if results[0].get("scale"):
        parts.append(f"scale={results[0]['scale']}")
    return ", ".join(parts)


def population(results: Results) -> Figure:
    """Two rows a result, of one data set: recurrent term and cell."""
    results = sorted(results, key=lambda r: (r["model"], departures(r), r["seed"]))
    figure = plt.figure(figsize=(8.4, 5.5 * len(results)), layout="constrained")
    several = len({result["seed"] for result in results}) > 1
    parts = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for part, result in zip(parts, results, strict=True):
        model = MODELS.get(result["model"], result["model"])
        made = _made([result], several, "training steps")
        title = f"{_data_title(result)}: {model}, {made}"
        part.suptitle(title, fontsize=12, x=0.01, ha="left")
        t = np.array(result["t"]) + 1
        for row, (term, name) in zip(part.subplots(2, 2), _TERMS.items(), strict=True):
            for axes, statistic in zip(row, ("mean", "variance"), strict=True):
                curves = np.array(result[term][statistic])
                axes.plot(t, curves.T, color=COLOURS["bnlstm"], alpha=0.45, linewidth=0.8)
                axes.plot(t, np.median(curves, axis=0), color="black", linewidth=1.8)
                axes.set_title(f"{statistic} of the {name}", fontsize=11, loc="left")
                _tidy(axes, "time step" if term == "cell" else "", "")
                axes.set_xscale("log")  # what there is to see is in the first steps
                axes.set_xlim(1, t[-1])
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
                axes.xaxis.set_minor_locator(NullLocator())
                if statistic == "variance":
                    axes.set_ylim(bottom=0)
    return figure


def _data_title(result: dict[str, Any]) -> str:
    data = str(analysed_data(result))
    return DATA.get(data, data)


def _tidy(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "gradient_flow": gradient_flow,
    "tanh_derivative": tanh_derivative,
    "lengths": lengths,
    "population": population,
}
