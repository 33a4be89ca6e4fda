"""What the paper reports: its tables, and its curves read off the figures.

Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017.
"""

import contextlib
import functools
import json
from importlib import resources
from typing import Any, NamedTuple

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bnrnn import config
from bnrnn.errors import BnrnnError

Points = list[list[float]]  # [[x, y], ...]


class Reported(NamedTuple):
    """One number of the paper, in the unit of `bnrnn.report.runs.METRICS`."""

    value: float
    split: str  # "test" or "valid"
    source: str


MAP = "-official-map"

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
    ("cnn", "attentive_lstm"): Reported(45.0, "test", "table 4; validation 45.5"),
    ("cnn", "attentive_bne_star_star"): Reported(36.3, "test", "table 4; validation 37.9"),
}

# As in a run's records.
METRIC = {
    "mnist": "accuracy", "pmnist-official-map": "accuracy", "ptb": "bpc", "text8": "bpc",
    "cnn4": "error", "cnn": "error",
}  # fmt: skip

# Steps of training behind those numbers: as far as the paper's curves go.
STEPS: dict[tuple[str, str], int] = {
    ("mnist", "lstm"): 100_000,
    ("mnist", "bnlstm"): 100_000,
    ("pmnist-official-map", "lstm"): 100_000,
    ("pmnist-official-map", "bnlstm"): 100_000,
    ("ptb", "lstm"): 39_500,
    ("ptb", "bnlstm"): 39_500,
    ("text8", "lstm"): 195_300,
    ("text8", "bnlstm"): 195_300,
    ("cnn4", "attentive_lstm"): 800_000,
    ("cnn4", "attentive_bnlstm"): 322_000,
    ("cnn4", "attentive_bn_everywhere"): 250_000,
    ("cnn4", "attentive_bne_star"): 550_000,
    ("cnn4", "attentive_bne_star_star"): 337_000,
    ("cnn", "attentive_lstm"): 409_000,
    ("cnn", "attentive_bne_star_star"): 88_000,
}
GAMMA = 0.1  # its initial value in all of them


@functools.cache
def settings(data: str, model: str) -> dict[str, Any]:
    """The settings of the paper's run, flat, as `reproduce=` has them; {} where there is none."""
    if (data, model) not in RESULTS:
        return {}
    overrides = [f"reproduce={data.removesuffix(MAP)}", f"model={model}"]
    return _composed(*overrides, *["task.permutation=official_code"] * data.endswith(MAP))


@functools.cache
def official_code(task: str, model: str) -> dict[str, Any]:
    """What `experiment=official_code` sets for a task and model, flat; {} where it has nothing."""
    overrides = [f"task={task}", f"model={model}"]
    try:
        ours, theirs = _composed(*overrides), _composed(*overrides, "experiment=official_code")
    except (BnrnnError, HydraException, OmegaConfBaseException):  # no such task or model any more
        return {}
    return {key: value for key, value in theirs.items() if value != ours[key]}


def _composed(*overrides: str) -> dict[str, Any]:
    config.register()
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # by no command
            stack.enter_context(initialize_config_module("bnrnn.conf", version_base="1.3"))
        composed = config.from_hydra(compose("config", list(overrides)))
    return config.flatten(config.to_dict(composed))


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
