"""What the paper reports: its tables, and its curves read off the figures.

Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017.
"""

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

Points = list[list[float]]  # [[x, y], ...]


class Reported(NamedTuple):
    """One number of the paper, in the unit of `bnrnn.report.runs.METRICS`."""

    value: float
    split: str  # "test" or "valid"
    source: str


# (data, model) -> its result. "data" is the task, and how its data are made where the paper's text
# and the code behind its numbers differ: see `bnrnn.report.runs.Run.data`.
RESULTS: dict[tuple[str, str], Reported] = {
    ("mnist", "lstm"): Reported(98.9, "test", "table 1"),
    ("mnist", "bnlstm"): Reported(99.0, "test", "table 1"),
    ("pmnist-official-map", "lstm"): Reported(90.2, "test", "table 1"),
    ("pmnist-official-map", "bnlstm"): Reported(95.4, "test", "table 1"),
    ("ptb", "lstm"): Reported(1.38, "test", "table 2"),
    ("ptb", "bnlstm"): Reported(1.32, "test", "table 2"),
    ("text8", "lstm"): Reported(1.43, "test", "table 3"),
    ("text8", "bnlstm"): Reported(1.36, "test", "table 3"),
    ("cnn4", "attentive_lstm"): Reported(50.3, "valid", "section 5.4"),
    ("cnn4", "attentive_bnlstm"): Reported(49.5, "valid", "section 5.4"),
    ("cnn4", "attentive_bn_everywhere"): Reported(50.0, "valid", "section 5.4"),
    ("cnn4", "attentive_bne_star"): Reported(47.1, "valid", "section 5.4"),
    ("cnn4", "attentive_bne_star_star"): Reported(43.9, "valid", "section 5.4"),
    ("cnn", "attentive_lstm"): Reported(45.0, "test", "table 4"),
    ("cnn", "attentive_bne_star_star"): Reported(36.3, "test", "table 4"),
}

# As in a run's records.
METRIC = {
    "mnist": "accuracy", "pmnist-official-map": "accuracy", "ptb": "bpc", "text8": "bpc",
    "cnn4": "error", "cnn": "error",
}  # fmt: skip

# Steps of training behind those numbers.
STEPS = {
    "mnist": 100_000, "pmnist-official-map": 100_000, "ptb": 39_500, "text8": 195_300,
    "cnn4": 800_000, "cnn": 277_000,
}  # fmt: skip

# Settings behind them of which the paper and the released code leave no doubt.
_PIXELS = {
    "model.hidden_size": 100, "model.gamma_init": 0.1, "task.batch_size": 100,
    "optimizer.name": "rmsprop", "optimizer.lr": 1e-3,
}  # fmt: skip
_CHARACTERS = {"model.gamma_init": 0.1, "optimizer.name": "adam", "max_valid_batches": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": _PIXELS,
    "pmnist-official-map": _PIXELS,
    "ptb": _CHARACTERS | {
        "model.hidden_size": 1000, "task.length": 100, "task.batch_size": 64, "optimizer.lr": 2e-3,
    },
    "text8": _CHARACTERS | {
        "model.hidden_size": 2000, "task.length": 180, "task.batch_size": 128, "optimizer.lr": 1e-3,
    },
    "cnn4": {"model.hidden_size": 240, "model.gamma_init": 0.1, "optimizer.name": "adam"},
    "cnn": {"model.gamma_init": 0.1, "optimizer.name": "adam"},
}  # fmt: skip


@functools.cache
def _curves() -> dict[str, Any]:
    file = resources.files("bnrnn.report").joinpath("paper_curves.json")
    return json.loads(file.read_text(encoding="utf-8"))


def validation(data: str) -> dict[str, Points]:
    """Figures 2, 3a, 4: model -> [[training step, value]], batch statistics.

    Values are as recorded in a run's metrics: a share for accuracy and error. {} where the paper
    has no curve on these data: its pMNIST is the released code's map, its CNN corpus the real one.
    """
    task = {"pmnist-official-map": "pmnist"}.get(data, data)
    return {} if data == "pmnist" else _curves()["validation"].get(task, {})


def gradient_flow() -> dict[float, Points]:
    """Figure 1a: γ -> [[t, log10 of the gradient's norm]]."""
    return {float(gamma): points for gamma, points in _curves()["gradient_flow"].items()}


def lengths() -> dict[str, dict[str, Points]]:
    """Figure 3b: model -> statistics -> [[length, test bits per character]]."""
    return _curves()["lengths"]
