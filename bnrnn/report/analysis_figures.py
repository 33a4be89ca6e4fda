"""Figures of analyses (`bnrnn.runs.analysis`), with the paper's curves behind ours.

`FIGURES` lists them. Each figure shows one or more results on the same data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

from bnrnn.plots.style import MARKERS, colour, entry, plain, plt, tidy
from bnrnn.report import paper
from bnrnn.report.analyses import departures, made
from bnrnn.report.chart import LARGEST
from bnrnn.runs.analysis import Analysed, GradientFlow, Lengths, Population, TanhDerivative

_LONG = 100  # characters, in both legend columns together; a wider legend has one column
_LOWEST, _HIGHEST = -25, 15  # limits of the y axis, powers of ten
_MATRICES = {"identity": "$W_h = I$, as in the authors' code", "orthogonal": "$W_h$ orthogonal"}
_PAPERS_DATA = "ptb"  # the data of figures 3b and 5


def gradient_flow(results: Sequence[GradientFlow]) -> Figure:
    """Draw the first result, with a panel for each recurrent matrix."""
    found = results[0]
    matrices = [matrix for matrix in _MATRICES if matrix in found.matrices]
    gammas = list(dict.fromkeys(band.gamma for band in found.curves))
    shades = colormaps["viridis"](np.linspace(0, 0.92, len(gammas)))
    colours = dict(zip(gammas, shades, strict=True))
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(4.6 * len(matrices) + 0.9, 4.4), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, matrix in zip(panels[0], matrices, strict=True):
        for band in found.curves:
            if band.matrix == matrix:
                median, lowest, highest = map(_numbers, (band.median, band.lowest, band.highest))
                shade = colours[band.gamma]
                axes.fill_between(found.t, lowest, highest, color=shade, alpha=0.1, linewidth=0)
                axes.plot(found.t, median, color=shade, linewidth=1.6)
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
        axes.set_title(_MATRICES[matrix], fontsize=11, loc="left")
        tidy(axes, "time step $t$", "")
        _limit(axes, 0, found.t[-1])
        axes.set_ylim(_LOWEST, _HIGHEST)
        axes.yaxis.set_major_locator(MultipleLocator(5))
        axes.yaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$")
    panels[0, 0].set_ylabel("norm of the gradient with respect to $h_t$")
    handles = [Line2D([], [], color=colours[g], linewidth=3, label=str(g)) for g in gammas]
    figure.legend(handles=handles, title="γ", loc="outside right center", frameon=False)
    return figure


def tanh_derivative(results: Sequence[TanhDerivative]) -> Figure:
    found, shade = results[0], colour("lstm")
    sigma = _numbers(found.deviations)
    figure, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    axes.fill_between(
        sigma, _numbers(found.lower_quartile), _numbers(found.upper_quartile), color=shade,
        alpha=0.2, linewidth=0, label="25 % to 75 %",
    )  # fmt: skip
    axes.plot(sigma, _numbers(found.mean), color=shade, linewidth=2, label="mean")
    axes.axvline(0.1, color="black", linestyle=":", linewidth=1)
    axes.annotate("γ = 0.1", (0.1, 0.5), xytext=(5, 0), textcoords="offset points")
    tidy(axes, "standard deviation of $x$", r"$1 - \tanh^2(x)$")
    _limit(axes, sigma[0], sigma[-1])
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    return figure


def lengths(results: Sequence[Lengths]) -> Figure:
    """Draw all results in one panel; on Penn Treebank, the paper's curves are behind ours."""
    alike: dict[Any, list[Lengths]] = {}
    for found in sorted(results, key=lambda found: _of(found).seed):
        of = _of(found)
        alike.setdefault((of.model, tuple(departures(of)), of.scale or ""), []).append(found)
    several = len({_of(found).seed for found in results}) > 1
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    if _of(results[0]).data == _PAPERS_DATA:
        for model, by_statistics in paper.lengths().items():
            for statistics, points in sorted(by_statistics.items()):
                x, y = np.transpose(points)
                normalizes = "batch" in by_statistics
                style = _line(model, paper.model_title(model), statistics, normalizes, "the paper")
                axes.plot(x, y, alpha=0.3, linewidth=4, **style)
    drawn: dict[str, int] = {}  # number of groups of settings drawn, per model
    for key in sorted(alike, key=lambda key: (paper.order("", key[0]), key)):
        members = alike[key]
        models = [_of(found) for found in members]
        marker = MARKERS[drawn.get(key[0], 0) % len(MARKERS)]
        drawn[key[0]] = drawn.get(key[0], 0) + 1
        for statistics in sorted(members[0].bpc):
            style = _line(
                models[0].model, models[0].model_title, statistics, "batch" in members[0].bpc,
                made(models, several),
            )  # fmt: skip
            for found in members:  # one per seed
                values = _numbers(found.bpc.get(statistics, [np.nan] * len(found.lengths)))
                axes.plot(found.lengths, values, marker=marker, markersize=3.5, **style)
                style.pop("label", None)
    axes.set_title(plain(_of(results[0]).data_title), fontsize=11, loc="left")
    tidy(axes, "length of the test sequences, characters", "test bits per character")
    labels = axes.get_legend_handles_labels()[1]
    halves = labels[: (len(labels) + 1) // 2], labels[(len(labels) + 1) // 2 :]
    columns = 2 if sum(max(map(len, half), default=0) for half in halves) < _LONG else 1
    figure.set_figheight(4.2 + 0.2 * len(labels) / columns)
    figure.legend(
        loc="outside upper left", ncols=columns, columnspacing=1, frameon=False, fontsize=9
    )
    return figure


def _line(model: str, title: str, statistics: str, normalizes: bool, note: str) -> dict[str, Any]:
    """Dashed for population statistics; solid for batch statistics and for models without BN."""
    name = title + (f", {statistics} statistics" if normalizes else "")
    return {
        "color": colour(model),
        "linestyle": "--" if normalizes and statistics == "population" else "-",
        "label": entry(f"{name}, {note}"),
    }


def population(results: Sequence[Population]) -> Figure:
    """Draw two rows of panels per result: the recurrent term and the cell state."""
    ordered = sorted(
        results, key=lambda found: (_of(found).model, departures(_of(found)), _of(found).seed)
    )
    several = len({_of(found).seed for found in ordered}) > 1
    figure = plt.figure(figsize=(8.4, 5.5 * len(ordered)), layout="constrained")
    parts = figure.subfigures(len(ordered), 1, squeeze=False)[:, 0]
    for part, found in zip(parts, ordered, strict=True):
        of = _of(found)
        title = f"{of.data_title}: {of.model_title}, {made([of], several, 'training steps')}"
        part.suptitle(plain(title), fontsize=12, x=0.01, ha="left")
        _population_panels(part, found)
    return figure


def _population_panels(part: SubFigure, found: Population) -> None:
    t = np.array(found.t) + 1
    terms = {"recurrent term $W_h h$": found.recurrent, "cell state $c$": found.cell}
    for row, (name, units) in zip(part.subplots(2, 2), terms.items(), strict=True):
        for axes, statistic in zip(row, ("mean", "variance"), strict=True):
            curves = [_numbers(curve) for curve in getattr(units, statistic)]
            if curves:
                axes.plot(
                    t, np.transpose(curves), color=colour("bnlstm"), alpha=0.45, linewidth=0.8
                )
                axes.plot(t, np.median(curves, axis=0), color="black", linewidth=1.8)
            axes.set_title(f"{statistic} of the {name}", fontsize=11, loc="left")
            tidy(axes, "time step" if units is found.cell else "", "")
            axes.set_xscale("log")  # the statistics change mostly in the first time steps
            _limit(axes, 1, t[-1])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            if statistic == "variance":
                axes.set_ylim(bottom=0)


def _of(found: Lengths | Population) -> Analysed:
    """The analysed model, or an unnamed one: a result has none until the command finishes."""
    return found.of or Analysed("", "", "", "", "", 0, 0, 0, 0, None)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """The values as an array; NaN for None and for magnitudes too large to draw."""
    found = np.array(values, dtype=float)
    return np.where(np.abs(found) < LARGEST, found, np.nan)


def _limit(axes: Axes, low: float, high: float) -> None:
    if np.isfinite(low) and np.isfinite(high) and low < high:
        axes.set_xlim(low, high)


@dataclass(frozen=True)
class Entry:
    title: str
    caption: str
    draw: Callable[[Any], Figure]  # takes a list of results of this kind
    beside_the_paper: str = ""  # added to the caption if the paper has curves on these data

    def caption_on(self, data: str | None) -> str:
        """The caption for models trained on `data`; `data` is None if there is no trained model."""
        return self.caption + (self.beside_the_paper if data == _PAPERS_DATA else "")


FIGURES = {
    "gradient_flow": Entry(
        "Gradients through time",
        "Norm of the gradient of the loss with respect to h_t in an untrained batch-normalised "
        "tanh RNN over in-order MNIST, as in figure 1a. Lines are our medians over several draws "
        "of the weights. Bands are from the lowest to the highest. Dots are the paper's curves. "
        "They have the same order and ends, but for γ from 0.6 to 0.8 they fall several decades "
        "lower. If W_h is orthogonal, a large γ makes the gradient explode instead of vanish.",
        gradient_flow,
    ),
    "tanh_derivative": Entry(
        "The derivative of tanh",
        "Derivative of tanh(x) for x ~ N(0, σ²), as in figure 1b: its mean and its middle half. "
        "The values are exact; the paper draws samples. Batch normalisation makes σ = γ. At the "
        "paper's choice of 0.1, hardly any of the derivative is lost.",
        tanh_derivative,
    ),
    "lengths": Entry(
        "Longer sequences than in training",
        "The test string is cut into sequences of one length, as in figure 3b. The legend has the "
        "training steps of our models. A BN-LSTM is dashed with population statistics and solid "
        "with batch statistics.",
        lengths,
        " Lines with markers are ours. Wide pale lines are the paper's, after its full training.",
    ),
    "population": Entry(
        "Population statistics over time",
        "Population mean and variance of random units of our BN-LSTM at each time step, as in "
        "figure 5. The title has the training steps. Each thin line is a unit; the black line is "
        "their median. In the paper, on Penn Treebank, all settle within about ten time steps.",
        population,
    ),
}
