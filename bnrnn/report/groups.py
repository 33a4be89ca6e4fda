"""Groups of runs that differ only in their seed: mean, spread and difference from the paper."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnrnn.report import paper
from bnrnn.runs.record import Metric, Run
from bnrnn.settings.same import flatten
from bnrnn.settings.schema import SIZES

_WORDS = tuple(f"words_{size}" for size in SIZES)
# The models without normalisation and without noise, one for each kind of task.
BASELINES = ("lstm", "attentive_lstm", "characters_lstm", "speech_lstm", *_WORDS)
GAMMA = "model.gamma_init"
# Labels of the best-known settings, in the order in which they are shown.
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
# A run that differs from the paper only in these settings still repeats its experiment.
_AS_GOOD = MEASURED - {"test_calibration_batches"} | {"precision"}

Curve = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Group:
    """Finished runs with the same data, model, settings and steps; one per seed."""

    runs: list[Run]
    label: str  # distinguishes it from other groups with the same data and model

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
        """The split of the paper's number, so that ours is comparable."""
        return self.reported.split if self.reported else "test"

    @property
    def values(self) -> list[float]:
        if self.split == "valid":
            # The paper's numbers are the best of its curves, which use batch statistics.
            return [_best(run.metric, run.paper_like_curve()[1]) for run in self.runs]
        return [run.final(self.split) for run in self.runs]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation over the seeds (divisor n - 1), for three seeds or more."""
        with np.errstate(all="ignore"):
            return float(np.std(self.values, ddof=1))

    @property
    def steps(self) -> tuple[int, int]:
        """The fewest and the most steps of a run; they differ if runs stop early."""
        steps = [run.result.steps for run in self.runs if run.result is not None]
        return min(steps), max(steps)

    @property
    def share(self) -> float | None:
        """Our steps as a fraction of the paper's; None if the paper's are not known."""
        if self.reported is None or self.reported.steps is None:
            return None
        return self.steps[0] / self.reported.steps

    @property
    def difference(self) -> float | None:
        return self.mean - self.reported.value if self.reported else None

    def verdict(self) -> str:
        """Whether the paper's number is reached, and what our runs lack; "-" if there is none."""
        if self.reported is None:
            return "-"
        if unlike_the_paper(self.first):
            return "not the paper's settings"
        theirs = self.reported.value
        within = self._has_in_its_spread(theirs)
        better = self.metric.best([self.mean, theirs]) == self.mean
        reached = "reached" if within or better else "not reached"
        if self.share is None:
            return f"{reached}: the paper's steps are not known"
        if self.share < 0.995:
            return f"{reached} after {percent(self.share)} of the paper's steps"
        if len(self.runs) == 1:
            return f"{reached}: one seed"
        if within:
            return f"{reached}: within the seeds' spread"
        return f"{reached}: outside the seeds' spread, {'better' if better else 'worse'}"

    def _has_in_its_spread(self, value: float) -> bool:
        """Whether a paper's number is within the seeds' spread; of one seed, whether ours is the
        same in the paper's decimals."""
        if len(self.runs) == 1:
            return round(self.mean, paper_decimals(self.metric)) == value
        if len(self.runs) == 2:
            return min(self.values) <= value <= max(self.values)
        return abs(self.mean - value) <= self.deviation


def paper_decimals(metric: Metric) -> int:
    """Decimals of the papers' numbers: one fewer than of ours."""
    return max(metric.decimals - 1, 0)


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.095 else f"{100 * share:.0f} %"


def mean(values: Sequence[float]) -> float:
    with np.errstate(all="ignore"):
        return float(np.mean(values))


def _best(metric: Metric, values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return metric.best(finite) if finite else math.nan


def comparable(run: Run) -> dict[str, Any]:
    """The flat settings that distinguish runs, without the seed."""
    others = {"seed", "model.name", "task.name", "model.title", *run.subject.free_settings}
    return {key: value for key, value in flatten(run.settings).items() if key not in others}


def baseline(model: str) -> str:
    """The one of `BASELINES` that a model is compared with."""
    if of_size := [name for name in _WORDS if f"{model}_".startswith(f"{name}_")]:
        return of_size[0]
    found = f"{model.partition('_')[0]}_lstm"
    return found if found in BASELINES else "lstm"


def kind(run: Run) -> tuple[str, str]:
    return run.data, run.model


def order(run: Run) -> tuple[Any, ...]:
    return paper.order(run.data, run.model)


def differing(ours: Run, other: Run) -> set[str]:
    """Keys of the settings in which two runs differ."""
    return {key for key, _ in _items(ours) ^ _items(other)}


def _items(run: Run, ignored: frozenset[str] = frozenset()) -> frozenset[tuple[str, str]]:
    """`comparable` as a set; values become strings because a list is not hashable."""
    return frozenset(
        (key, repr(value)) for key, value in comparable(run).items() if key not in ignored
    )


def unlike_the_paper(run: Run) -> set[str]:
    """Keys of the settings in which a run differs from the paper's run on the same data."""
    return unlike(run, paper.settings(run.data, run.model))


def unlike(run: Run, theirs: dict[str, Any]) -> set[str]:
    """Keys of the settings whose value differs from `theirs`, without those in `_AS_GOOD`."""
    return {
        key
        for key, value in comparable(run).items()
        if key not in _AS_GOOD and key in theirs and value != theirs[key]
    }


def cluster(runs: Iterable[Run], ignored: frozenset[str] = frozenset()) -> list[list[Run]]:
    """Lists of runs with the same data, model and settings, of any length, in the order given."""
    clusters: dict[Hashable, list[Run]] = {}
    for run in runs:
        key = (kind(run), run.metric, _items(run, ignored))
        clusters.setdefault(key, []).append(run)
    return list(clusters.values())


def how_far(run: Run) -> tuple[bool, int]:
    """A sort key for progress: every finished run is after every unfinished one."""
    return run.result is not None, run.step


def one_a_seed(runs: list[Run]) -> list[Run]:
    """The longest run of each seed, sorted by seed; finished runs are preferred."""
    furthest = sorted(runs, key=lambda run: (*how_far(run), str(run.path)))
    kept = {run.seed: run for run in furthest}
    return [kept[seed] for seed in sorted(kept)]


def groups(runs: list[Run]) -> list[Group]:
    """Groups of all finished runs, sorted by data and model as in the paper, then by settings."""
    found = []
    clusters = cluster(runs)
    for members in clusters:
        siblings = [c[0] for c in clusters if kind(c[0]) == kind(members[0])]
        planned: dict[Any, list[Run]] = {}
        for run in members:
            if run.result is not None:
                # With early stopping, seeds stop at different steps: group by the planned steps.
                patience, result = run.settings.get("patience"), run.result
                steps = result.steps if patience is None else result.max_steps
                planned.setdefault((repr(patience), steps), []).append(run)
        for same in planned.values():
            found.append(Group(one_a_seed(same), label(same[0], siblings)))
    return sorted(found, key=lambda group: (order(group.first), _natural(group.first), group.steps))


def _natural(run: Run) -> list[tuple[str, str, Any]]:
    """A sort key from the settings: γ 0.1 comes before γ 0.3, regardless of folder names."""
    return [
        (key, type(value).__name__, value if isinstance(value, (int, float)) else str(value))
        for key, value in sorted(comparable(run).items())
    ]


def label(run: Run, siblings: list[Run], ignored: frozenset[str] = frozenset()) -> str:
    """The settings that differ from `siblings` or from the paper, each with its value.

    Less known settings are included only if they differ from the defaults. If a run has all the
    settings of the released code, they are shown as `experiment=official_code`.
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
    """The label of a setting: `model.gamma_init`, 0.3 -> "γ 0.3"."""
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
    """A sort key for settings: the best-known ones come first."""
    named = list(_NAMES)
    return (named.index(key) if key in named else len(named)), key


def sweeps(runs: list[Run]) -> list[dict[float, list[Run]]]:
    """Runs on one data set and model that differ only in the initial γ: γ -> one run per seed."""
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
    """The mean over the runs, at the steps that all of them have."""
    each = [dict(zip(*curve(run), strict=True)) for run in runs]
    shared = sorted(set.intersection(*(set(values) for values in each))) if each else []
    return shared, [mean([values[step] for values in each]) for step in shared]
