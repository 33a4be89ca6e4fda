"""Run directories read back: settings, records, result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bnrnn import metrics
from bnrnn.errors import CheckpointError

# What a person calls it, its unit, and the factor from the recorded value to that unit.
METRICS = {
    "bpc": ("bits per character", 1.0),
    "accuracy": ("accuracy, %", 100.0),
    "error": ("error, %", 100.0),
}
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


@dataclass(frozen=True)
class Run:
    """A run directory; `result` is None while it is unfinished."""

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def model(self) -> str:
        return self.config["model"]["name"]

    @property
    def metric(self) -> str:
        kinds = {"pixels": "accuracy", "characters": "bpc", "questions": "error"}
        return kinds[self.config["task"]["kind"]]

    @property
    def title(self) -> str:
        return MODELS.get(self.model, self.model)

    def curve(self, statistics: str = "population") -> tuple[list[int], list[float]]:
        """Steps and validation metric, in the unit of `METRICS`; [] where there is none."""
        factor = METRICS[self.metric][1]
        found = [
            (r["step"], r[self.metric] * factor)
            for r in self.records
            if r["split"] == "valid" and r.get("statistics") == statistics
        ]
        return [step for step, _ in found], [value for _, value in found]


def read_run(path: Path) -> Run:
    """
    Raises:
        CheckpointError: this is no run directory.
    """
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        records = metrics.read(path / "metrics.jsonl")
        file = path / "result.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is no readable run directory: {error}") from error
    return Run(path, config, records, result)


def find_runs(folder: Path) -> list[Run]:
    """All runs at or under `folder`, by path."""
    return [read_run(file.parent) for file in sorted(folder.glob("**/metrics.jsonl"))]
