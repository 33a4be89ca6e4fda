"""The papers' results: their tables, and curves read off their figures.

Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017; Laurent et al., "Batch Normalized
Recurrent Neural Networks", 2016 (arXiv 2015).
"""

import functools
import json
import re
from importlib import resources
from typing import Any, NamedTuple

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bnrnn.runs.record import ACCURACY, BITS_PER_CHARACTER, ERROR, PERPLEXITY, Metric
from bnrnn.settings.compose import CONF, defaults, options
from bnrnn.settings.schema import SIZES

Points = list[list[float]]  # [[x, y], ...]


class Paper(NamedTuple):
    title: str
    authors: str


class Data(NamedTuple):
    title: str
    metric: Metric
    paper: Paper


class Reported(NamedTuple):
    """One number from a paper, in the metric's unit."""

    value: float
    split: str  # "test" or "valid"
    source: str
    steps: int | None  # training steps: the length of the paper's curve; None: unknown


COOIJMANS = Paper("Recurrent Batch Normalization", "Cooijmans et al., ICLR 2017")
LAURENT = Paper("Batch Normalized Recurrent Neural Networks", "Laurent et al., 2016 (arXiv 2015)")
# In the order of the papers.
DATA = {
    "mnist": Data("MNIST, one pixel per step", ACCURACY, COOIJMANS),
    "pmnist_official": Data(
        "Permuted MNIST, the pixel map of the released code", ACCURACY, COOIJMANS
    ),
    "ptb": Data("Penn Treebank, characters", BITS_PER_CHARACTER, COOIJMANS),
    "text8": Data("text8", BITS_PER_CHARACTER, COOIJMANS),
    "cnn4": Data("CNN questions, four sentences", ERROR, COOIJMANS),
    "cnn": Data("CNN questions, whole articles", ERROR, COOIJMANS),
    "ptb_characters": Data(
        "Penn Treebank, characters, stacked layers", BITS_PER_CHARACTER, LAURENT
    ),
    "ptb_words": Data("Penn Treebank, words", PERPLEXITY, LAURENT),
}
# In the order of the papers.
MODELS = (
    "lstm", "bnlstm", "attentive_lstm", "attentive_bnlstm", "attentive_bn_everywhere",
    "attentive_bne_star", "attentive_bne_star_star", "characters_lstm", "characters_bn_sum",
    *(f"words_{size}{norm}" for size in SIZES for norm in ("", "_bn_input")),
    "speech_lstm", "speech_bn", "speech_bn_frame",
)  # fmt: skip
_SPEECH = "frames"  # the family of data sets of speech
RESULTS: dict[tuple[str, str], Reported] = {
    ("mnist", "lstm"): Reported(98.9, "test", "table 1", 100_000),
    ("mnist", "bnlstm"): Reported(99.0, "test", "table 1", 100_000),
    ("pmnist_official", "lstm"): Reported(90.2, "test", "table 1", 100_000),
    ("pmnist_official", "bnlstm"): Reported(95.4, "test", "table 1", 100_000),
    ("ptb", "lstm"): Reported(1.38, "test", "table 2", 39_500),
    ("ptb", "bnlstm"): Reported(1.32, "test", "table 2", 39_500),
    ("text8", "lstm"): Reported(1.43, "test", "table 3", 195_300),
    ("text8", "bnlstm"): Reported(1.36, "test", "table 3", 195_300),
    ("cnn4", "attentive_lstm"): Reported(50.3, "valid", "section 5.4", 800_000),
    ("cnn4", "attentive_bnlstm"): Reported(49.5, "valid", "section 5.4", 322_000),
    ("cnn4", "attentive_bn_everywhere"): Reported(50.0, "valid", "section 5.4", 250_000),
    ("cnn4", "attentive_bne_star"): Reported(47.1, "valid", "section 5.4", 550_000),
    ("cnn4", "attentive_bne_star_star"): Reported(43.9, "valid", "section 5.4", 337_000),
    ("cnn", "attentive_lstm"): Reported(45.0, "test", "table 4; validation 45.5", 409_000),
    ("cnn", "attentive_bne_star_star"): Reported(36.3, "test", "table 4; validation 37.9", 88_000),
    ("ptb_words", "words_small"): Reported(119.2, "valid", "table 2", 30_199),
    ("ptb_words", "words_small_bn_input"): Reported(120.9, "valid", "table 2", 30_199),
    ("ptb_words", "words_medium"): Reported(89.0, "valid", "table 2", 51_753),
    ("ptb_words", "words_medium_bn_input"): Reported(90.6, "valid", "table 2", 51_753),
    ("ptb_words", "words_large"): Reported(81.8, "valid", "table 2", 72_985),
    ("ptb_words", "words_large_bn_input"): Reported(97.4, "valid", "table 2", 72_985),
}
# Results of other papers' models on the same tasks, and the experiment with their settings.
FAMILY: dict[tuple[str, str], tuple[Reported, str]] = {
    ("pmnist_official", "bn_zoneout"): (
        Reported(95.9, "test", "Krueger et al. 2017", None), "zoneout_paper",
    ),
    ("ptb", "zoneout"): (Reported(1.27, "test", "Krueger et al. 2017", None), "zoneout_paper"),
    ("ptb", "lnlstm"): (Reported(1.267, "test", "Ha et al. 2017, table 3", None), "ln_paper"),
}  # fmt: skip
# Laurent et al., table 2: training perplexity.
WORDS_TRAINING = {
    "words_small": 78.5, "words_small_bn_input": 62.5, "words_medium": 49.1,
    "words_medium_bn_input": 41.0, "words_large": 49.3, "words_large_bn_input": 35.0,
}  # fmt: skip
# Zaremba et al., 2014, table 1: test perplexity.
WORDS_TEST = {"words_small": 114.5, "words_medium": 82.7, "words_large": 78.4}
GAMMA = 0.1  # the initial γ in all experiments of the papers


def family(data: str) -> str:
    """The family of a data set, shared with the paper's data: "text8-part" -> "text8"."""
    named = {"ptb_words": "words", "ptb_characters": "sum", "an4": _SPEECH}
    name = named.get(data.partition("-")[0])
    return name or re.split("[-_]", data, maxsplit=1)[0]


def paper_of(data: str) -> Paper | None:
    """The paper that uses this data set or another of its family; None if no paper does.

    The paper on speech used WSJ, which no run here has.
    """
    if family(data) == _SPEECH:
        return LAURENT
    return next((d.paper for name, d in DATA.items() if family(name) == family(data)), None)


def order(data: str, model: str) -> tuple[int, bool, str, int, str]:
    """A sort key: the papers' order; related data follow the papers' own, other data are last."""
    families = [*(family(name) for name in DATA), _SPEECH]
    return (
        families.index(family(data)) if family(data) in families else len(families),
        data not in DATA,
        data,
        MODELS.index(model) if model in MODELS else len(MODELS),
        model,
    )


def reported(data: str, model: str) -> Reported | None:
    """The number that a paper reports for a model on these data; None if there is none."""
    if (data, model) in FAMILY:
        return FAMILY[data, model][0]
    return RESULTS.get((data, model))


@functools.cache
def model_title(model: str) -> str:
    """The title of a model in `conf/`."""
    file = resources.files(CONF) / "model" / f"{model}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))["title"]


@functools.cache
def settings(data: str, model: str) -> dict[str, Any]:
    """The flat settings of the paper's run; {} if the paper has no such run.

    They come from `reproduce=`, or from `experiment=` for the results in `FAMILY`.
    """
    data = data.removesuffix("-part")
    if (data, model) in FAMILY:
        return defaults(f"experiment={FAMILY[data, model][1]}", f"task={data}", f"model={model}")
    if (data, model) not in RESULTS:
        return {}
    return defaults(f"reproduce={family(data)}", f"task={data}", f"model={model}")


@functools.cache
def usual(task: str, model: str, *more: str) -> dict[str, Any]:
    """The flat settings of `task=`, `model=` and `more`; {} if `conf/` lacks one of them."""
    return _defaults(task, model, *more)


@functools.cache
def official_code(task: str, model: str) -> dict[str, Any]:
    """The flat settings that `experiment=official_code` changes for a task and model."""
    ours, theirs = usual(task, model), _defaults(task, model, "experiment=official_code")
    return {key: value for key, value in theirs.items() if value != ours[key]}


def _defaults(task: str, model: str, *more: str) -> dict[str, Any]:
    if task not in options("task") or model not in options("model"):
        return {}
    try:
        return defaults(f"task={task}", f"model={model}", *more)
    except (HydraException, OmegaConfBaseException):  # the task does not take the model
        return {}


@functools.cache
def _curves() -> dict[str, Any]:
    file = resources.files("bnrnn.report").joinpath("paper_curves.json")
    return json.loads(file.read_text(encoding="utf-8"))


def validation(data: str) -> dict[str, Points]:
    """Figures 2, 3a, 4: model -> [[training step, value]], batch statistics.

    Values have the unit of a run's records: a fraction for accuracy and error. {} if the paper has
    no curve on these data.
    """
    return _curves()["validation"].get(data, {})


def words() -> dict[str, dict[str, Points]]:
    """Laurent et al., figure 3: model -> "train" or "valid" -> [[epoch, perplexity]]."""
    return _curves()["words"]


def sums() -> dict[str, Points]:
    """Laurent et al., figure 1: model -> [[epoch, training cross entropy in nats]]."""
    return _curves()["sums"]


def gradient_flow() -> dict[float, Points]:
    """Figure 1a: γ -> [[t, log10 of the gradient norm]]."""
    return {float(gamma): points for gamma, points in _curves()["gradient_flow"].items()}


def lengths() -> dict[str, dict[str, Points]]:
    """Figure 3b: model -> statistics -> [[length, test bits per character]]."""
    return _curves()["lengths"]
