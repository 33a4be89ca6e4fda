"""The leaderboard: each model at its best settings on the same data, by test and by speed."""

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from bnrnn.plots.style import colour
from bnrnn.report import chart, document
from bnrnn.report.chart import SECONDS, Chart, Panel, along
from bnrnn.report.command import command
from bnrnn.report.document import Block, Code, Heading, Paragraph, Table, Text
from bnrnn.report.figures import end_limits, picture
from bnrnn.report.groups import BASELINES, baseline, cluster, kind, label, mean, one_a_seed, order
from bnrnn.runs.record import Run

_START = 1 / 4  # of the validations of a figure, the worst ones, which its y axis cuts off
FEWEST = 3  # models; with fewer, there is no leaderboard
_HOW_TO_READ = (
    "Each model is shown at its settings with the best validation, compared on the seeds that all "
    "of its settings have. Validation uses population statistics. Steps and seconds are those "
    "until validation reaches {target}, {whose}; they are means over the seeds that reach it. "
    "Seconds include validation. The time between two validations counts as at most {most} times "
    "the median of its run, so that pauses do not count. Seconds can be compared only between runs "
    "on one machine that had the same load."
)
_MOST = 3  # times the median time between two validations of a run


@dataclass(frozen=True)
class Standing:
    """A model at its best settings."""

    runs: list[Run]  # finished, one per seed
    tried: int  # number of settings compared

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def valid(self) -> float:
        return mean([run.final("valid") for run in self.runs])

    @property
    def tests(self) -> list[float]:
        return [run.final("test") for run in self.runs]

    def reached(self, target: float) -> list[tuple[int, float]]:
        """Steps and seconds until validation reaches the target, for the runs that reach it."""
        found = (_first_at(run, target) for run in self.runs)
        return [point for point in found if point is not None]

    @property
    def steps(self) -> str:
        """The mean number of training steps: `3,160`."""
        return f"{mean([run.result.steps for run in self.runs if run.result is not None]):,.0f}"

    def test_shown(self) -> str:
        """The mean test over the seeds with its range: `1.553 (1.550 to 1.557)`."""
        number, tests = self.first.metric.number, self.tests
        several = f" ({number(min(tests))} to {number(max(tests))})" if len(tests) > 1 else ""
        return number(mean(tests)) + several

    def steps_shown(self, target: float) -> str:
        """The mean number of steps until validation reaches the target."""
        reached, n = self.reached(target), len(self.runs)
        if not reached:
            return "not reached"
        not_all = f" ({len(reached)} of {n} seeds)" if len(reached) < n else ""
        return f"{mean([steps for steps, _ in reached]):,.0f}{not_all}"


def standings(runs: Sequence[Run]) -> list[Standing]:
    """One standing per model from runs on the same data, the best test result first."""
    found = [Standing(_best(settings), len(settings)) for settings in _by_model(runs)]
    return sorted(
        found, key=lambda s: mean(s.tests) * (1 if s.first.metric.lower_is_better else -1)
    )


def _by_model(runs: Sequence[Run]) -> list[list[list[Run]]]:
    """For each model, its groups of finished runs: one run per seed for each group of settings."""
    finished = [run for run in runs if run.state == "finished"]
    by_model: dict[str, list[list[Run]]] = {}
    for members in cluster(sorted(finished, key=order)):
        by_model.setdefault(members[0].model, []).append(one_a_seed(members))
    return list(by_model.values())


def with_more_seeds(runs: Sequence[Run]) -> list[Standing]:
    """The models whose best settings have fewer seeds than others, at those with the most seeds."""
    return [
        Standing(max(settings, key=len), len(settings))
        for settings in _by_model(runs)
        if len(_best(settings)) < max(map(len, settings))
    ]


def _best(settings: list[list[Run]]) -> list[Run]:
    """The runs of the settings with the best validation.

    Settings are compared on the seeds that all of them have.

    Args:
        settings: for each group of settings, one run per seed.
    """
    shared = set.intersection(*({run.seed for run in runs} for runs in settings))

    def score(runs: list[Run]) -> float:
        return mean([run.final("valid") for run in runs if run.seed in shared or not shared])

    best = settings[0][0].metric.best(score(runs) for runs in settings)
    return next(runs for runs in settings if score(runs) == best)


def target(found: Sequence[Standing]) -> tuple[float, str]:
    """The target validation and whose it is.

    The target is the baseline's best validation; without a baseline, the worst model's best.
    """
    for standing in found:
        if standing.first.model in BASELINES:
            return standing.valid, "the mean over seeds of the LSTM's best"
    metric = found[0].first.metric
    best = [standing.valid for standing in found]
    worst = max(best) if metric.lower_is_better else min(best)
    return worst, "the best of the model that is worst"


def training_seconds(run: Run) -> dict[int, float]:
    """Step -> seconds until its validation, in which a pause counts little.

    The time between two validations counts as at most three times the median of the run.
    """
    recorded = run.values("seconds", "valid", "population")
    times = [value for value in recorded.values() if math.isfinite(value)]
    if not times:
        return recorded
    between = [after - before for before, after in itertools.pairwise([0.0, *times])]
    most = _MOST * statistics.median(between)
    passed = itertools.accumulate(min(seconds, most) for seconds in between)
    return {
        step: next(passed) if math.isfinite(value) else math.nan for step, value in recorded.items()
    }


def _first_at(run: Run, target: float) -> tuple[int, float] | None:
    seconds = training_seconds(run)
    better = run.metric.best
    for step, value in zip(*run.curve(), strict=True):
        if better([value, target]) == value:
            return step, seconds.get(step, math.nan)
    return None


def blocks(runs: list[Run]) -> list[Block]:
    """A table and a figure for each data set with finished runs of enough models."""
    found: list[Block] = []
    for data, size in dict.fromkeys((run.data, _size(run)) for run in sorted(runs, key=order)):
        compared = [run for run in runs if (run.data, _size(run)) == (data, size)]
        ranked = standings(compared)
        if len(ranked) >= FEWEST:
            found += _of_data(ranked, compared, size)
    return [Heading(2, "Leaderboard"), *found] if found else []


def _size(run: Run) -> str:
    """The size of a word model, "small"; models of different sizes are not compared."""
    found = baseline(run.model)
    return found.removeprefix("words_") if found.startswith("words_") else ""


def _of_data(ranked: list[Standing], runs: list[Run], size: str) -> list[Block]:
    first = ranked[0].first
    value, whose = target(ranked)
    title = ", ".join(filter(None, [first.subject.data_title, size]))
    return [
        Heading(3, f"{title}: all models"),
        Paragraph(_HOW_TO_READ.format(target=first.metric.number(value), whose=whose, most=_MOST)),
        table(ranked, value, runs),
        document.Figure(
            "-".join(filter(None, [first.data, size, "leaderboard"])),
            f"Validation against seconds, {title}",
            "Each model is shown at its best settings. Thin lines are single seeds. Dotted: the "
            "target. The time between two validations counts as at most three times the median of "
            "its run, so that pauses do not count.",
            functools.partial(figure, ranked, value, title),
            functools.partial(chart_of, ranked, value, title),
        ),
    ]


def table(ranked: list[Standing], target: float, runs: list[Run]) -> Table:
    metric = ranked[0].first.metric
    header: list[Text] = [
        "model", f"test, {metric.label}", "seeds", "steps", "best validation",
        "steps to the target", "seconds to the target", "best settings", "settings tried",
        "command",
    ]  # fmt: skip
    rows = [_row(standing, target, runs) for standing in ranked]
    return Table(header, "lrrrrrrwrw", rows)


def _row(found: Standing, target: float, runs: list[Run]) -> list[Text]:
    run, reached = found.first, found.reached(target)
    siblings = [c[0] for c in cluster(runs) if kind(c[0]) == kind(run)]
    return [
        run.subject.model_title,
        found.test_shown(),
        str(len(found.runs)),
        found.steps,
        run.metric.number(found.valid),
        found.steps_shown(target),
        f"{mean([seconds for _, seconds in reached]):,.0f}" if reached else "-",
        label(run, siblings) or "-",
        str(found.tried),
        Code(command(run)),
    ]


def figure(ranked: list[Standing], target: float, title: str) -> Figure:
    """`chart_of` as a picture."""
    return picture(chart_of(ranked, target, title), outside=True)


def chart_of(ranked: list[Standing], target: float, title: str) -> Chart:
    """Validation curves of each model at its best settings."""
    metric = ranked[0].first.metric
    curves = []
    for standing in ranked:
        several = len(standing.runs) > 1
        for run in standing.runs:
            steps, values = run.curve()
            seconds = training_seconds(run)
            x = along([run], steps, "valid") | {
                SECONDS: [seconds.get(step, math.nan) for step in steps]
            }
            name = run.subject.model_title
            curves.append(
                chart.Curve(
                    name, x, values, colour(run.model), note=f"seed {run.seed}" if several else "",
                    legend=name if run is standing.first else None, width=0.9 if several else 1.6,
                )
            )  # fmt: skip
    limits = end_limits([curve.y for curve in curves], metric, _START)
    panel = Panel(f"validation {metric.label}", curves, title, metric.decimals, limits, target)
    return Chart([panel], SECONDS)


__all__ = ["Standing", "blocks", "chart_of", "figure", "standings", "table", "target"]
