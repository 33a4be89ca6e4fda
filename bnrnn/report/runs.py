"""Run directories and analyses read back: settings, records, result, and what became of them."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bnrnn import metrics
from bnrnn.errors import CheckpointError
from bnrnn.rundir import is_held

# What a person calls it, its unit, and the factor from the recorded value to that unit.
METRICS = {
    "bpc": ("bits per character", 1.0),
    "accuracy": ("accuracy, %", 100.0),
    "error": ("error, %", 100.0),
}
_METRIC_OF = {"pixels": "accuracy", "characters": "bpc", "questions": "error"}
MODELS = {
    "lstm": "LSTM",
    "bnlstm": "BN-LSTM",
    "bn_input": "LSTM, BN on the input term",
    "bn_input_sequence": "LSTM, sequence-wise BN on the input term",
    "attentive_lstm": "LSTM",
    "attentive_bnlstm": "BN-LSTM",
    "attentive_bn_everywhere": "BN-everywhere",
    "attentive_bne_star": "BN-e*",
    "attentive_bne_star_star": "BN-e**",
}
# In the paper's order, what it does not have after what it has.
DATA = {
    "mnist": "MNIST, a pixel a step",
    "pmnist-official-map": "Permuted MNIST, the pixel map of the released code",
    "pmnist": "Permuted MNIST, a true permutation",
    "ptb": "Penn Treebank, characters",
    "text8": "text8",
    "text8-part": "text8, a part of it",
    "cnn4": "CNN questions, four sentences",
    "cnn4-part": "CNN questions, four sentences: a part of the corpus",
    "cnn4-synthetic": "CNN questions, four sentences: generated ones",
    "cnn": "CNN questions, whole articles",
    "cnn-part": "CNN questions, whole articles: a part of the corpus",
    "cnn-synthetic": "CNN questions, whole articles: generated ones",
    "pydocs": "Python's documentation, the embedded corpus",
}
ANALYSES = {
    "gradient_flow": "Gradients through time",
    "tanh_derivative": "The derivative of tanh",
    "lengths": "Longer sequences than in training",
    "population": "Population statistics over time",
}


@dataclass(frozen=True)
class Run:
    """A run directory; `result` is None while it is unfinished."""

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None
    failure: str | None = None
    held: bool = False

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def model(self) -> str:
        return self.config["model"]["name"]

    @property
    def data(self) -> str:
        """The task, and what its data are where they are not the paper's."""
        task = self.config["task"]
        if task.get("permutation") == "official_code":
            return self.task + "-official-map"
        if self.config.get("data", {}).get("synthetic"):
            return self.task + "-synthetic"
        if not (self.result or {}).get("whole_data", True):
            return self.task + "-part"
        if task.get("variant", "paper") != "paper":
            return f"{self.task}-{task['variant']}"
        if task.get("path"):
            return f"{self.task}-{Path(task['path']).stem}"
        return self.task

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def scale(self) -> str | None:
        return self.config.get("scale")

    @property
    def metric(self) -> str:
        return _METRIC_OF[self.config["task"]["kind"]]

    @property
    def title(self) -> str:
        return MODELS.get(self.model, self.model)

    @property
    def state(self) -> str:
        """finished; failed; running; stopped: `bnrnn resume=` goes on; unfinished: it cannot."""
        if self.held:
            return "running"
        if self.failure is not None:
            return "failed"
        if self.result is not None:
            return "finished"
        return "stopped" if (self.path / "last.pt").exists() else "unfinished"

    @property
    def step(self) -> int:
        """The last one there is a record of."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def better(self) -> Any:
        """`max` or `min`, whichever finds the best value of the metric."""
        return max if self.metric == "accuracy" else min

    def curve(self, statistics: str = "population") -> tuple[list[int], list[float]]:
        """Steps and validation metric, in the unit of `METRICS`; [] where there is none."""
        factor = METRICS[self.metric][1]
        found = [
            (r["step"], r[self.metric] * factor)
            for r in self.records
            if r["split"] == "valid" and r.get("statistics") == statistics
        ]
        return [step for step, _ in found], [value for _, value in found]

    def paper_like_curve(self) -> tuple[list[int], list[float]]:
        """With batch statistics where the model normalises: so the paper's curves are."""
        by_batch = self.curve("batch")
        return by_batch if by_batch[0] else self.curve()

    def best_step(self) -> int | None:
        """Of the best validation with population statistics; None before the first."""
        if self.result is not None:
            return self.result["best_step"]
        steps, values = self.curve()
        finite = [
            (v, s) for s, v in zip(steps, values, strict=True) if math.isfinite(v)
        ]  # fmt: skip
        return self.better(finite)[1] if finite else None

    def final(self, split: str) -> float:
        """The best model on "test" or "valid", with population statistics of the training set."""
        assert self.result is not None
        return self.result[split][self.metric] * METRICS[self.metric][1]


class Unreadable(NamedTuple):
    path: Path
    reason: str


class Found(NamedTuple):
    """What lies under a folder, by path."""

    root: Path
    runs: list[Run]
    analyses: dict[str, dict[str, Any]]  # by `analysis_name`
    unreadable: list[Unreadable]


def read_run(path: Path) -> Run:
    """
    Raises:
        CheckpointError: this is no run directory.
    """
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        file = path / "metrics.jsonl"
        records = metrics.read(file) if file.exists() else []
        failure = _read_json(path / "failed.json")
        run = Run(
            path, config, records, _read_json(path / "result.json"),
            None if failure is None else str(failure["error"]), is_held(path),
        )  # fmt: skip
        _touch_all(run)
    except KeyError as error:
        raise CheckpointError(f"{path} is no readable run directory: no {error} there") from error
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is no readable run directory: {reason}") from error
    return run


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _touch_all(run: Run) -> None:
    """Look at all that a report will look at, so that what is missing is missed here."""
    _ = run.data, run.model, run.seed, run.scale, run.step, run.best_step()
    for statistics in ("population", "batch"):
        run.curve(statistics)
    if run.result is not None:
        _ = run.final("test"), run.result["steps"], run.result["wall_seconds"]


def find_runs(folder: Path) -> list[Run]:
    """All readable runs at or under `folder`, by path."""
    return find(folder).runs


def find(folder: Path) -> Found:
    """Runs and analyses at or under `folder`; what cannot be read is listed, and no error."""
    found = Found(folder, [], {}, [])
    ranks: dict[str, tuple[int, str]] = {}

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # of `folder`, or just removed
            found.unreadable.append(Unreadable(Path(error.filename), error.strerror or str(error)))

    for name, folders, files in os.walk(folder, onerror=unreadable):
        path = Path(name)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "tb")
        try:
            analysis = _analysis(path) if "result.json" in files else None
            if analysis is not None:
                key, rank = analysis_name(analysis), (trained(analysis), path.name)
                if rank >= ranks.get(key, rank):
                    found.analyses[key], ranks[key] = analysis, rank
            elif {"metrics.jsonl", "config.yaml", "failed.json"} & set(files):
                found.runs.append(read_run(path))
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path} is no readable run directory: ")
            found.unreadable.append(Unreadable(path, reason))
    return found


def _analysis(path: Path) -> dict[str, Any] | None:
    try:
        result = _read_json(path / "result.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"result.json: {error}") from error
    if not isinstance(result, dict) or "analysis" not in result:
        return None
    if result["analysis"] not in ANALYSES:
        raise CheckpointError(f"an analysis that this version does not know, {result['analysis']}")
    return result


def analysis_name(result: dict[str, Any]) -> str:
    """What tells an analysis from the others. Of a name the one counts whose model was trained
    furthest, then the newest."""
    if "model" not in result:
        return result["analysis"]
    own = map(slug, departures(result))
    parts = [result["analysis"], analysed_data(result), result["model"], *own]
    return "-".join([*parts, f"seed{result['seed']}"])


def slug(text: str) -> str:
    """For the name of a folder: "γ 0.3" -> "gamma0.3"."""
    return re.sub(r"[^\w.]+", "_", text.replace("γ ", "gamma").replace("'", ""))


def trained(analysis: dict[str, Any]) -> int:
    """Steps behind the model of an analysis; 0 where there is no trained model."""
    return analysis.get("step", 0)


def analysed_data(analysis: dict[str, Any]) -> str | None:
    """As `Run.data`; older results have the task only, and analyses without a model neither."""
    return analysis.get("data", analysis.get("task"))


def departures(analysis: dict[str, Any]) -> list[str]:
    """How its model departs from the usual one, which is what older results do not name."""
    gamma, units = analysis.get("gamma_init", 0.1), analysis.get("hidden_size", 1000)
    return [*[f"γ {gamma:g}"] * (gamma != 0.1), *[f"{units} units"] * (units != 1000)]
