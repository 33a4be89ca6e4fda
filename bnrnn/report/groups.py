"""Runs that differ in seed only, taken together: mean, spread, and how far the paper is."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bnrnn.config import RESUME_MAY_CHANGE, defaults_of, flatten
from bnrnn.report import paper
from bnrnn.report.runs import DATA, Run

GAMMA = "model.gamma_init"
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
    "data.synthetic": "{} generated questions",
    "validate_every": "validated every {} steps",
    "calibration_batches": "{} calibration batches",
    "max_valid_batches": "validated on {} batches",
}
# How often a run is measured, with how good statistics, and which of its models is kept makes it no
# other curve.
MEASURED = frozenset([
    "validate_every", "calibration_batches", "test_calibration_batches", "selection",
])  # fmt: skip
# Nor another experiment than the paper's.
_AS_GOOD = MEASURED - {"test_calibration_batches"}
_WITHOUT_VALUE = {
    "validate_every": "validated every epoch",
    "max_valid_batches": "validated on all batches",
}


@dataclass(frozen=True)
class Group:
    """Finished runs of the same data, model, settings and steps; one of each seed."""

    runs: list[Run]
    label: str  # what tells it from the other groups of these data and this model

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def reported(self) -> paper.Reported | None:
        return paper.RESULTS.get((self.first.data, self.first.model))

    @property
    def split(self) -> str:
        """The paper's, so that the numbers compare."""
        return self.reported.split if self.reported else "test"

    @property
    def values(self) -> list[float]:
        if self.split == "valid":
            # The paper's are the best of its curves, which are with batch statistics.
            return [run.better(run.paper_like_curve()[1]) for run in self.runs]
        return [run.final(self.split) for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Over three seeds or more: the standard deviation, by n - 1."""
        return statistics.stdev(self.values)

    @property
    def steps(self) -> tuple[int, int]:
        """Fewest and most: of a group that stops early by itself."""
        steps = [(run.result or {})["steps"] for run in self.runs]
        return min(steps), max(steps)

    @property
    def share(self) -> float | None:
        """Of the paper's steps; None where the paper has no such run."""
        return self.steps[0] / paper.STEPS[kind(self.first)] if self.reported else None

    @property
    def difference(self) -> float | None:
        return self.mean - self.reported.value if self.reported else None

    def verdict(self) -> str:
        """Whether the paper's number lies within the seeds' spread, where that can be said."""
        if self.reported is None or self.difference is None:
            return "-"
        if self.share is not None and self.share < 0.995:
            return f"{percent(self.share)} of the paper's steps"
        if unlike_the_paper(self.first):
            return "not the paper's settings"
        if len(self.runs) == 1:
            return "one seed"
        if len(self.runs) == 2:
            within = min(self.values) <= self.reported.value <= max(self.values)
        else:
            within = abs(self.difference) <= self.deviation
        if within:
            return "within the seeds' spread"
        better = self.first.better(self.mean, self.reported.value) == self.mean
        return f"outside the seeds' spread, {'better' if better else 'worse'}"


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.095 else f"{100 * share:.0f} %"


def comparable(run: Run) -> dict[str, Any]:
    """The settings that make a run another run, but for its seed; as it has them."""
    return _without_place_and_length(flatten(run.config))


def completed(run: Run) -> dict[str, Any]:
    """`comparable`, with the defaults of the settings that are younger than the run."""
    return _without_place_and_length(defaults_of(run.config)) | comparable(run)


def _without_place_and_length(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if key not in ("seed", "model.name", "task.name")
        and not any(key == k or key.startswith(k + ".") for k in RESUME_MAY_CHANGE)
    }


def differing(ours: Run, other: Run) -> list[str]:
    """Keys of the settings that differ."""
    ours_, other_ = completed(ours), completed(other)
    return sorted(key for key in ours_.keys() & other_.keys() if ours_[key] != other_[key])


def unlike_the_paper(run: Run) -> list[str]:
    """Keys of the settings that are not those of the paper's run on these data."""
    theirs = paper.settings(run.data.removesuffix("-part"), run.model)
    return [
        key
        for key, value in comparable(run).items()
        if key not in _AS_GOOD and key in theirs and value != theirs[key]
    ]


def cluster(runs: Iterable[Run], ignored: frozenset[str] = frozenset()) -> list[list[Run]]:
    """Runs of the same data, model and settings, however long, in the order of the runs."""
    clusters: list[list[Run]] = []
    for run in runs:
        for members in clusters:
            if (run.data, run.model) == (members[0].data, members[0].model) and all(
                set(differing(run, other)) <= ignored for other in members
            ):
                members.append(run)
                break
        else:
            clusters.append([run])
    return clusters


def how_far(run: Run) -> tuple[bool, int]:
    """To sort by: a finished run is further than any other."""
    return run.result is not None, run.step


def one_a_seed(runs: list[Run]) -> list[Run]:
    """Of each seed the run that went furthest, a finished one before others; by seed."""
    kept: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (*how_far(run), str(run.path))):
        kept[run.seed] = run
    return [kept[seed] for seed in sorted(kept)]


def groups(runs: list[Run]) -> list[Group]:
    """All finished runs, by model as the paper lists them, then by what differs."""
    found = []
    clusters = cluster(runs)
    for members in clusters:
        siblings = [c[0] for c in clusters if (c[0].data, c[0].model) == kind(members[0])]
        planned: dict[Any, list[Run]] = {}
        for run in members:
            if run.result is not None:
                planned.setdefault(_planned_steps(run), []).append(run)
        for same in planned.values():
            found.append(Group(one_a_seed(same), label(same[0], siblings)))
    return sorted(found, key=lambda group: (order(group.first), _natural(group.first), group.steps))


def kind(run: Run) -> tuple[str, str]:
    return run.data, run.model


def order(run: Run) -> tuple[int, str, int, str]:
    """The paper's order of data and models, others behind."""
    data, models = list(DATA), list(_MODEL_ORDER)
    return (
        data.index(run.data) if run.data in data else len(data),
        run.data,
        models.index(run.model) if run.model in models else len(models),
        run.model,
    )


_MODEL_ORDER = (
    "lstm", "bnlstm", "attentive_lstm", "attentive_bnlstm", "attentive_bn_everywhere",
    "attentive_bne_star", "attentive_bne_star_star", "bn_input", "bn_input_sequence",
)  # fmt: skip


def _natural(run: Run) -> list[tuple[str, str, Any]]:
    """The settings, so that γ 0.1 comes before γ 0.3 and nothing depends on the folders' names."""
    return [
        (key, type(value).__name__, value if isinstance(value, (int, float)) else str(value))
        for key, value in sorted(completed(run).items())
    ]


def _planned_steps(run: Run) -> tuple[int | None, int]:
    """Seeds stop at steps of their own where patience ends a run: what they were allowed counts."""
    assert run.result is not None
    patience = run.config.get("patience")
    steps = run.result["steps"]
    return patience, steps if patience is None else run.result.get("max_steps", steps)


def label(run: Run, siblings: list[Run], ignored: frozenset[str] = frozenset()) -> str:
    """The settings that differ from those of `siblings` or of the paper, each with its value.

    Less known ones only where they are not the default; all of the released code as one.
    """
    values, defaults = completed(run), defaults_of(run.config)
    keys = {
        key
        for other in siblings
        for key in differing(run, other)
        if key in _NAMES or values[key] != defaults.get(key)
    }
    keys |= set(unlike_the_paper(run))
    parts = []
    official = paper.official_code(run.task, run.model) if len(keys) > 1 else {}
    if official and official.items() <= values.items():
        keys -= official.keys()
        parts = ["experiment=official_code"]
    return ", ".join(parts + [part(key, values[key]) for key in sorted(keys - ignored, key=rank)])


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
    return _NAMES.get(key, name + " {}").format(shown)


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
            if run.curve()[0] and GAMMA in comparable(run):
                by_gamma.setdefault(comparable(run)[GAMMA], []).append(run)
        if len(by_gamma) > 1:
            found.append({gamma: one_a_seed(by_gamma[gamma]) for gamma in sorted(by_gamma)})
    return found


def mean_curve(
    runs: list[Run], curve: Callable[[Run], tuple[list[int], list[float]]]
) -> tuple[list[int], list[float]]:
    """The mean over the seeds, at the steps that all of them have."""
    each = [dict(zip(*curve(run), strict=True)) for run in runs]
    shared = sorted(set.intersection(*(set(values) for values in each))) if each else []
    return shared, [statistics.fmean(values[step] for values in each) for step in shared]
