"""Runs that differ in seed only, taken together: mean, spread, and how far the paper is."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnrnn.report import paper
from bnrnn.runs.record import Metric, Run
from bnrnn.settings.same import flatten

# The models that normalise nothing and have no noise, one for each kind of task.
BASELINES = ("lstm", "attentive_lstm", "characters_lstm", "speech_lstm")
GAMMA = "model.gamma_init"
# The settings that a reader knows best come first, in words of their own.
_NAMES = {
    GAMMA: "γ {}",
    "model.hidden_size": "{} units",
    "model.num_layers": "{} layers",
    "model.recurrent_init": "recurrent matrix {}",
    "model.init": "{} initialisation",
    "optimizer.name": "{}",
    "optimizer.lr": "learning rate {}",
    "task.batch_size": "batch {}",
    "task.length": "length {}",
    "task.permutation_seed": "permutation {}",
    "task.init_noise": "noise {}",
    "data.synthetic": "{} generated examples",
    "validate_every": "validated every {} steps",
    "calibration_batches": "{} calibration batches",
    "max_valid_batches": "validated on {} batches",
}
_WITHOUT_VALUE = {
    "validate_every": "validated every epoch",
    "max_valid_batches": "validated on all batches",
}
# Settings that affect only evaluation: runs that differ in nothing else share a curve.
MEASURED = frozenset([
    "validate_every", "calibration_batches", "test_calibration_batches", "selection",
])  # fmt: skip
# Those that make no other experiment than the paper's.
_AS_GOOD = MEASURED - {"test_calibration_batches"}

Curve = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Group:
    """Finished runs of the same data, model, settings and steps; one of each seed."""

    runs: list[Run]
    label: str  # what tells it from the other groups of these data and this model

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def metric(self) -> Metric:
        return self.first.metric

    @property
    def reported(self) -> paper.Reported | None:
        return paper.reported(self.first.data, self.first.model)

    @property
    def split(self) -> str:
        """The paper's, so that the numbers compare."""
        return self.reported.split if self.reported else "test"

    @property
    def values(self) -> list[float]:
        if self.split == "valid":
            # The paper's are the best of its curves, which are with batch statistics.
            return [_best(run.metric, run.paper_like_curve()[1]) for run in self.runs]
        return [run.final(self.split) for run in self.runs]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """Over three seeds or more: the standard deviation, by n - 1."""
        with np.errstate(all="ignore"):
            return float(np.std(self.values, ddof=1))

    @property
    def steps(self) -> tuple[int, int]:
        """Fewest and most, where runs stop early by themselves."""
        steps = [run.result.steps for run in self.runs if run.result is not None]
        return min(steps), max(steps)

    @property
    def share(self) -> float | None:
        """Of the paper's steps; None where the paper has no such run, or says no number."""
        if self.reported is None or self.reported.steps is None:
            return None
        return self.steps[0] / self.reported.steps

    @property
    def difference(self) -> float | None:
        return self.mean - self.reported.value if self.reported else None

    def verdict(self) -> str:
        """Whether the paper's number is within the seeds' spread, where that can be said."""
        if self.reported is None or self.difference is None:
            return "-"
        if self.share is not None and self.share < 0.995:
            return f"{percent(self.share)} of the paper's steps"
        if unlike_the_paper(self.first):
            return "not the paper's settings"
        if self.share is None:
            return "the paper's steps are not known"
        if len(self.runs) == 1:
            return "one seed"
        if len(self.runs) == 2:
            within = min(self.values) <= self.reported.value <= max(self.values)
        else:
            within = abs(self.difference) <= self.deviation
        if within:
            return "within the seeds' spread"
        better = self.metric.best([self.mean, self.reported.value]) == self.mean
        return f"outside the seeds' spread, {'better' if better else 'worse'}"


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.095 else f"{100 * share:.0f} %"


def mean(values: Sequence[float]) -> float:
    with np.errstate(all="ignore"):
        return float(np.mean(values))


def _best(metric: Metric, values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return metric.best(finite) if finite else math.nan


def comparable(run: Run) -> dict[str, Any]:
    """The settings, flat, that make a run another run but for its seed."""
    others = {"seed", "model.name", "task.name", "model.title", *run.subject.free_settings}
    return {key: value for key, value in flatten(run.settings).items() if key not in others}


def kind(run: Run) -> tuple[str, str]:
    return run.data, run.model


def order(run: Run) -> tuple[Any, ...]:
    return paper.order(run.data, run.model)


def differing(ours: Run, other: Run) -> set[str]:
    """Keys of the settings that differ."""
    return {key for key, _ in _items(ours) ^ _items(other)}


def _items(run: Run, ignored: frozenset[str] = frozenset()) -> frozenset[tuple[str, str]]:
    """`comparable`, to compare by: a list is no element of a set."""
    return frozenset(
        (key, repr(value)) for key, value in comparable(run).items() if key not in ignored
    )


def unlike_the_paper(run: Run) -> set[str]:
    """Keys of the settings that are not those of the paper's run on these data."""
    return unlike(run, paper.settings(run.data, run.model))


def unlike(run: Run, theirs: dict[str, Any]) -> set[str]:
    """Keys of the settings that have another value in `theirs`, and make another experiment."""
    return {
        key
        for key, value in comparable(run).items()
        if key not in _AS_GOOD and key in theirs and value != theirs[key]
    }


def cluster(runs: Iterable[Run], ignored: frozenset[str] = frozenset()) -> list[list[Run]]:
    """Runs of the same data, model and settings, however long, in the order of the runs."""
    clusters: dict[Hashable, list[Run]] = {}
    for run in runs:
        key = (kind(run), run.metric, _items(run, ignored))
        clusters.setdefault(key, []).append(run)
    return list(clusters.values())


def how_far(run: Run) -> tuple[bool, int]:
    """To sort by: a finished run is further than any other."""
    return run.result is not None, run.step


def one_a_seed(runs: list[Run]) -> list[Run]:
    """Of each seed the run that went furthest, a finished one before others; by seed."""
    furthest = sorted(runs, key=lambda run: (*how_far(run), str(run.path)))
    kept = {run.seed: run for run in furthest}
    return [kept[seed] for seed in sorted(kept)]


def groups(runs: list[Run]) -> list[Group]:
    """All finished runs, by model as the paper lists them, then by what differs."""
    found = []
    clusters = cluster(runs)
    for members in clusters:
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        planned: dict[Any, list[Run]] = {}
        for run in members:
            if run.result is not None:
                # Where patience ends runs, seeds stop at steps of their own.
                patience, result = run.settings.get("patience"), run.result
                steps = result.steps if patience is None else result.max_steps
                planned.setdefault((repr(patience), steps), []).append(run)
        for same in planned.values():
            found.append(Group(one_a_seed(same), label(same[0], siblings)))
    return sorted(found, key=lambda group: (order(group.first), _natural(group.first), group.steps))


def _natural(run: Run) -> list[tuple[str, str, Any]]:
    """The settings, so that γ 0.1 comes before γ 0.3 and nothing depends on the folders' names."""
    return [
        (key, type(value).__name__, value if isinstance(value, (int, float)) else str(value))
        for key, value in sorted(comparable(run).items())
    ]


def label(run: Run, siblings: list[Run], ignored: frozenset[str] = frozenset()) -> str:
    """The settings that differ from those of `siblings` or of the paper, each with its value.

    Less known ones only where they are not as usual; all of the released code as one.
    """
    task, values = run.subject.task, comparable(run)
    usual = paper.usual(task, run.model)
    keys = unlike_the_paper(run) | {
        key
        for other in siblings
        for key in differing(run, other)
        if key in _NAMES or key not in usual or values.get(key) != usual[key]
    }
    parts = []
    official = paper.official_code(task, run.model) if len(keys) > 1 else {}
    if official and official.items() <= values.items():
        keys -= official.keys()
        parts = ["experiment=official_code"]
    shown = sorted(keys - ignored, key=rank)
    return ", ".join(parts + [part(key, values.get(key)) for key in shown])


def part(key: str, value: Any) -> str:
    """`model.gamma_init`, 0.3 -> "γ 0.3"."""
    if value is None and key in _WITHOUT_VALUE:
        return _WITHOUT_VALUE[key]
    name = key.rpartition(".")[2].replace("_", " ")
    if key == "model.mask_attention_statistics":
        return "attention statistics " + ("without padding" if value else "over padding too")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    shown = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    shown = {"official_code": "released code's"}.get(shown, shown)
    return _NAMES[key].format(shown) if key in _NAMES else f"{name} {shown}"


def rank(key: str) -> tuple[int, str]:
    """To sort settings by: those a reader knows best first."""
    named = list(_NAMES)
    return (named.index(key) if key in named else len(named)), key


def sweeps(runs: list[Run]) -> list[dict[float, list[Run]]]:
    """Runs of one data set and model that differ in the initial γ only: γ -> a run of each seed."""
    found = []
    for members in cluster(runs, ignored=frozenset({GAMMA})):
        by_gamma: dict[float, list[Run]] = {}
        for run in members:
            gamma = comparable(run).get(GAMMA)
            if run.curve()[0] and isinstance(gamma, float):
                by_gamma.setdefault(gamma, []).append(run)
        if len(by_gamma) > 1:
            found.append({gamma: one_a_seed(by_gamma[gamma]) for gamma in sorted(by_gamma)})
    return found


def mean_curve(runs: list[Run], curve: Callable[[Run], Curve]) -> Curve:
    """The mean over the seeds, at the steps that all of them have."""
    each = [dict(zip(*curve(run), strict=True)) for run in runs]
    shared = sorted(set.intersection(*(set(values) for values in each))) if each else []
    return shared, [mean([values[step] for values in each]) for step in shared]
