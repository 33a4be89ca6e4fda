"""Training curves as data: matplotlib draws them, and the HTML page makes them interactive.

A curve has its points on every x axis that its records allow: training steps, epochs, seconds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnrnn.errors import printable
from bnrnn.report import paper
from bnrnn.report.groups import mean, unlike_the_paper
from bnrnn.runs.record import Run

STEPS, EPOCHS, SECONDS = "steps", "epochs", "seconds"
LABELS = {STEPS: "training steps", EPOCHS: "epochs", SECONDS: "seconds, validation included"}
MOST_POINTS = 200  # per curve in the page
LARGEST = 1e30  # larger magnitudes are not drawn
_LONGEST = 160  # characters of a name


@dataclass(frozen=True)
class Curve:
    """A curve. One switch in the page shows and hides all curves with the same `name`."""

    name: str
    x: Mapping[str, Sequence[float]]  # per axis; NaN if a record has no value
    y: Sequence[float]
    colour: str
    note: str = ""  # distinguishes curves with the same name, such as "seed 1"
    legend: str | None = None  # the label in the picture's legend
    dash: str = "-"  # a matplotlib line style: "-", "--", ":"
    width: float = 2.0
    alpha: float | None = None
    marker: str | None = None


@dataclass(frozen=True)
class Panel:
    y_label: str
    curves: Sequence[Curve]
    title: str = ""
    decimals: int = 3  # of a value shown to the reader
    limits: tuple[float, float] | None = None  # of the y axis; None: fit the curves
    level: float | None = None  # the height of a dotted horizontal line


@dataclass(frozen=True)
class Chart:
    panels: Sequence[Panel]
    axis: str = STEPS  # shown first


def along(runs: Sequence[Run], steps: Sequence[int], split: str) -> dict[str, Sequence[float]]:
    """The x coordinates of a curve on each axis, at these steps; seconds are a mean over the runs.

    Args:
        split: the split whose records supply the seconds.
    """
    each = max(runs[0].subject.steps_per_epoch, 1)  # 0 only in a file edited by hand
    x: dict[str, Sequence[float]] = {STEPS: steps, EPOCHS: [step / each for step in steps]}
    clocks = [
        {r.step: r.values[SECONDS] for r in run.records if r.split == split and SECONDS in r.values}
        for run in runs
    ]
    seconds = [mean([clock.get(step, math.nan) for clock in clocks]) for step in steps]
    return x | {SECONDS: seconds} if any(map(math.isfinite, seconds)) else x


def papers_epoch(runs: Sequence[Run], model: str) -> int | None:
    """Steps per epoch in the paper's run of a model.

    Known only if one of `runs` has the same data and batches as the paper; otherwise None.
    """
    for run in runs:
        if (
            run.model == model
            and run.subject.whole_data
            and run.subject.steps_per_epoch
            and paper.settings(run.data, model)
            and not any(key.startswith(("task.", "data.")) for key in unlike_the_paper(run))
        ):
            return run.subject.steps_per_epoch
    return None


def embedded(chart: Chart) -> str:
    """The chart as JSON that is safe inside a script element.

    Curves are thinned to at most `MOST_POINTS` points: the first, the last, and the minimum and
    maximum of each interval between them. Numbers have seven significant digits.
    """
    content = {
        "axis": chart.axis,
        "labels": LABELS,
        "panels": [
            {
                "title": _name(panel.title),
                "y": _name(panel.y_label),
                "decimals": panel.decimals,
                "limits": _limits(panel.limits),
                "level": None if panel.level is None else _number(panel.level),
                "curves": [_embedded(curve) for curve in panel.curves],
            }
            for panel in chart.panels
        ],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _embedded(curve: Curve) -> dict[str, Any]:
    kept = thinned(curve.y, MOST_POINTS)
    found = {
        "name": _name(curve.name),
        "note": _name(curve.note),
        "colour": None if curve.colour == "black" else curve.colour,
        "dash": curve.dash,
        "width": curve.width,
        "alpha": curve.alpha,
        "marker": curve.marker,
        "of": len(curve.y) if len(kept) < len(curve.y) else None,
        "x": {
            axis: [_number(values[k]) for k in kept]
            for axis, values in curve.x.items()
            if any(map(math.isfinite, values))
        },
        "y": [_number(curve.y[k]) for k in kept],
    }
    return {key: value for key, value in found.items() if value not in (None, "")}


def _limits(limits: tuple[float, float] | None) -> list[float] | None:
    found = [number for value in limits or () if (number := _number(value)) is not None]
    return found if len(found) == 2 and found[0] < found[1] else None


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Indices of the points that remain after thinning; see `embedded`."""
    if len(values) <= most:
        return list(range(len(values)))
    stretches = most // 2 - 1
    inner = len(values) - 2
    kept = {0, len(values) - 1}
    for k in range(stretches):
        stretch = range(1 + inner * k // stretches, 1 + inner * (k + 1) // stretches)
        finite = [i for i in stretch if math.isfinite(values[i])] or stretch[:1]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def _number(value: float) -> float | int | None:
    if not abs(value) < LARGEST:  # true for NaN as well
        return None
    return int(value) if value == int(value) else float(f"{value:.7g}")


def _name(text: str) -> str:
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
