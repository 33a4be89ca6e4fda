"""The settings of a run: dataclasses with defaults and checks.

Hydra composes `conf/` against them (`bnrnn.settings.compose`).
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from bnrnn.errors import ConfigError
from bnrnn.nn.options import LSTMOptions, NoiseOptions, NormOptions, ReaderOptions, require

MOST = 2**53  # the largest count in a run's files: JSON has larger integers only as floats
# Key in a field's metadata: a resumed run may change this field and is still the same run.
FREE = "free"
_FREE = {FREE: True}
_LARGEST = 1e38  # of a number; the largest float32 is 3.4e38


def free(default: Any) -> Any:
    """A field that a resumed run may change, such as a path or the length of a run."""
    return field(default=default, metadata=_FREE)


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    try:
        require(condition, key, value, allowed)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _choice(key: str, value: str, *allowed: str) -> None:
    _require(value in allowed, key, value, "one of " + ", ".join(allowed))


def _positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value > 0, prefix + name, value, "positive")


def _at_most(most: int, prefix: str, config: Any, *names: str) -> None:
    """Check settings that would take days, or all memory, beyond this number."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value <= most, prefix + name, value, f"{most} or less")


def _one_line(key: str, value: str | None) -> None:
    """Check a title or name, which is printed in tables and in the log."""
    _require((value or "").splitlines() in ([], [value]), key, value, "one line")


def _seed(key: str, value: int) -> None:
    _require(0 <= value < 2**32, key, value, "in 0..4294967295")


def check_numbers(config: Any, prefix: str = "") -> None:
    """Check that float32 can hold all numbers and their differences, and JSON all counts.

    Raises:
        ConfigError: a number, also one in a list, is infinite, NaN or too large.
    """
    for key, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{prefix}{key}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                _require(math.isfinite(number), prefix + key, number, "a finite number")
                _require(abs(number) < _LARGEST, prefix + key, number, f"below {_LARGEST:g}")
            elif isinstance(number, int):
                _require(number <= MOST, prefix + key, number, f"{MOST} or less")


@dataclass
class NormConfig(NormOptions):
    """Settings that all models share; see `bnrnn.BNLSTM` for each."""

    name: str = MISSING
    title: str = free("")  # in reports and figures; empty: the name
    # The default is no normalisation; a model's file in conf/model says what it normalises.
    input_norm: str = "none"
    recurrent_norm: str = "none"
    cell_norm: str = "none"
    hidden_size: int = 200
    dropout: float = 0.0
    stabilizer: float = 0.0  # β of the norm stabiliser, see `bnrnn.nn.stabilizer`

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error
        _one_line("model.title", self.title)
        _positive("model.", self, "hidden_size")
        _at_most(2**16, "model.", self, "hidden_size")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        _require(self.stabilizer >= 0, "model.stabilizer", self.stabilizer, "0 or more")
        if self.cell_norm == "layer":
            allowed = "2 or more with model.cell_norm=layer: one unit is its mean"
            _require(self.hidden_size > 1, "model.hidden_size", self.hidden_size, allowed)


@dataclass
class StackConfig(NormConfig, NoiseOptions):
    """Settings of stacked layers, with noise in their recurrence; see `bnrnn.BNLSTM`."""

    num_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("model.", self, "num_layers")
        _at_most(1000, "model.", self, "num_layers")


@dataclass
class LaurentConfig(StackConfig):
    """Settings of the networks of Laurent et al., which start from a state of zeros."""

    learned_state: bool = False
    forget_bias: float = 0.0


@dataclass
class ModelConfig(StackConfig):
    """A `BNLSTM`, defined by the normalisation in its three slots."""

    learned_state: bool = True
    cell_bias: bool = LSTMOptions.cell_bias
    recurrent_init: str = LSTMOptions.recurrent_init
    input_dropout: float = 0.0  # of the elements of x_t; `dropout` is between layers
    output_dropout: float = 0.0  # of the input of the softmax

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_dropout", "output_dropout"):
            _require(
                0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)"
            )
        _choice("model.recurrent_init", self.recurrent_init, "orthogonal", "identity")


@dataclass
class AttentiveReaderConfig(NormConfig, ReaderOptions):
    """An Attentive Reader, defined by what it normalises; see `bnrnn.nn.AttentiveReader`."""

    hidden_size: int = 240
    dropout: float = ReaderOptions.dropout


@dataclass
class WordModelConfig(LaurentConfig):
    """Embeddings, a stack of LSTM layers and a softmax; see `bnrnn.tasks.words.WordModel`."""

    size: str = "small"  # selects the training schedule of task=ptb_words
    num_layers: int = 2
    init_range: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("model.size", self.size, *SIZES)
        _positive("model.", self, "init_range")


@dataclass
class CharacterStackConfig(LaurentConfig):
    """A lookup table and stacked LSTMs; see `bnrnn.tasks.characters.CharacterStack`."""

    hidden_size: int = 250
    num_layers: int = 3
    gamma_init: float = 1.0


@dataclass
class SpeechConfig(LaurentConfig):
    """Stacked LSTMs for speech frames; see `bnrnn.tasks.frames.SpeechModel`."""

    hidden_size: int = 250  # per direction
    num_layers: int = 5
    bidirectional: bool = True
    gamma_init: float = 1.0


@dataclass
class DataConfig:
    """Generated data, or data of the user; files are Kaldi archives or their .scp."""

    # Number of questions (task=cnn, cnn4) or utterances (task=frames, an4) to generate.
    synthetic: int | None = None
    features: str | None = free(None)
    targets: str | None = free(None)
    utt2spk: str | None = free(None)
    dev_features: str | None = free(None)
    dev_targets: str | None = free(None)
    dev_utt2spk: str | None = free(None)
    test_features: str | None = free(None)
    test_targets: str | None = free(None)
    test_utt2spk: str | None = free(None)
    name: str | None = free(None)  # of the data, in the report
    # Run Kaldi's commands, `cmd |`; must be given on the command line itself.
    pipes: bool = free(False)

    def __post_init__(self) -> None:
        _positive("data.", self, "synthetic")
        _at_most(10**6, "data.", self, "synthetic")
        _one_line("data.name", self.name)


@dataclass
class TaskConfig:
    """Settings that all tasks share: batch size and number of epochs."""

    model_kind: ClassVar[type[NormConfig]] = ModelConfig  # the settings class of its models
    models: ClassVar[str] = "lstm, bnlstm, bn_input…"  # their names, for messages
    data_settings: ClassVar[tuple[str, ...]] = ()  # the settings `data.…` that it takes

    name: str = MISSING
    batch_size: int = 64
    max_epochs: int = 50
    # Batch statistics depend on the batch size, so validation uses the training one by default.
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        _positive("task.", self, "batch_size", "max_epochs", "eval_batch_size")


@dataclass
class PixelConfig(TaskConfig):
    """MNIST, one pixel per step."""

    batch_size: int = 100
    max_epochs: int = 200
    permutation: str = "none"
    permutation_seed: int = 0
    init_noise: float = 0.0  # on h_0, see `BNLSTM`

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.permutation", self.permutation, "none", "true", "official_code")
        _require(self.init_noise >= 0, "task.init_noise", self.init_noise, "0 or more")
        _seed("task.permutation_seed", self.permutation_seed)


@dataclass
class CharacterConfig(TaskConfig):
    """Next-character prediction, in bits per character."""

    corpus: str = MISSING
    variant: str = "paper"
    path: str | None = free(None)
    length: int = 100
    # Steps of the test string in memory at once; the result does not depend on it.
    stream_length: int = free(2000)

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.corpus", self.corpus, "ptb", "text8", "pydocs", "text")
        _choice("task.variant", self.variant, "paper", "stripped")
        _require(self.length >= 2, "task.length", self.length, "2 or more")
        _positive("task.", self, "stream_length")
        if self.corpus == "text" and not self.path:
            raise ConfigError("task=text needs the file to learn from: add task.path=FILE")
        if self.path and self.corpus != "text":
            raise ConfigError(f"task.path={self.path} is the text of task=text: add task=text")


@dataclass
class CharacterStackTaskConfig(CharacterConfig):
    """Next-character prediction with stacked LSTMs, as in Laurent et al."""

    model_kind: ClassVar[type[NormConfig]] = CharacterStackConfig
    models: ClassVar[str] = "characters_lstm, characters_bn_sum"


@dataclass
class WordConfig(TaskConfig):
    """Next-word prediction, in perplexity, by truncated backpropagation through time."""

    model_kind: ClassVar[type[NormConfig]] = WordModelConfig
    models: ClassVar[str] = "words_…"

    batch_size: int = 20  # streams
    length: int = 20  # of a window, in words
    resets: int = 1  # how often per epoch the state is set to zero, at equal intervals

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("task.", self, "length", "resets")


@dataclass
class QuestionConfig(TaskConfig):
    """Questions about CNN articles, answered with an entity of the article."""

    model_kind: ClassVar[type[NormConfig]] = AttentiveReaderConfig
    models: ClassVar[str] = "attentive_…"
    data_settings: ClassVar[tuple[str, ...]] = ("synthetic",)

    four_sentences: bool = False
    # "batch": permute all entity names at random for each training batch; "none": do not.
    relabel: str = "batch"
    # This many batches are sorted by length together, so that a batch has similar lengths.
    buckets: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.relabel", self.relabel, "batch", "none")
        _positive("task.", self, "buckets")


@dataclass
class FrameConfig(TaskConfig):
    """Classification of speech frames, from Kaldi archives (`data.features` …)."""

    model_kind: ClassVar[type[NormConfig]] = SpeechConfig
    models: ClassVar[str] = "speech_lstm, speech_bn, speech_bn_frame"
    data_settings: ClassVar[tuple[str, ...]] = tuple(f.name for f in dataclasses.fields(DataConfig))

    corpus: str | None = None  # a folder in data_dir with train, dev and test
    cmvn: str = "global"  # scope of the feature normalisation, see `bnrnn.datasets.frames`
    classes: int | None = None  # null: the number that the training targets use
    subsampling: int = 1  # frames per target
    loss: str = "frame"  # mean over frames; or sum over frames, averaged over utterances
    # This many batches are sorted by length together, so that a batch has similar lengths.
    buckets: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.cmvn", self.cmvn, "none", "utterance", "speaker", "global")
        _choice("task.loss", self.loss, "frame", "utterance")
        name = self.corpus is None or re.fullmatch(r"\w[\w.-]*", self.corpus) is not None
        _require(name, "task.corpus", self.corpus, "the name of a folder in data_dir, without /")
        _positive("task.", self, "classes", "subsampling", "buckets")


@dataclass
class OptimizerConfig:
    name: str = MISSING
    lr: float = 1e-3
    max_grad_norm: float = 1.0
    clip: str = "norm"  # how gradients are clipped, see `bnrnn.optim.clip_gradients`
    # Epochs at the full rate, and the factor for each later one: see `bnrnn.optim.learning_rate`.
    lr_decay_after: int | None = None  # None: the learning rate is constant
    lr_decay: float | None = None

    def __post_init__(self) -> None:
        _choice("optimizer.clip", self.clip, "norm", "square_root")
        _positive("optimizer.", self, "lr", "max_grad_norm")
        if (self.lr_decay is None) != (self.lr_decay_after is None):
            raise ConfigError(
                "optimizer.lr_decay and optimizer.lr_decay_after go together: set both, or none"
            )
        if self.lr_decay is not None and self.lr_decay_after is not None:
            _require(0 < self.lr_decay <= 1, "optimizer.lr_decay", self.lr_decay, "in (0, 1]")
            after = self.lr_decay_after
            _require(after >= 0, "optimizer.lr_decay_after", after, "0 or more")


@dataclass
class AdamConfig(OptimizerConfig):
    name: str = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_on: str = "corrected"  # second moment to whose root ε is added: `bnrnn.optim.set_adam_eps`

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("optimizer.eps_on", self.eps_on, "corrected", "uncorrected")
        _positive("optimizer.", self, "eps")
        _require(0 <= self.beta1 < 1, "optimizer.beta1", self.beta1, "in [0, 1)")
        _require(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "in [0, 1)")


@dataclass
class RMSPropConfig(OptimizerConfig):
    name: str = "rmsprop"
    decay: float = 0.9
    momentum: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("optimizer.", self, "eps")
        _require(0 <= self.decay < 1, "optimizer.decay", self.decay, "in [0, 1)")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")


@dataclass
class SGDConfig(OptimizerConfig):
    name: str = "sgd"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")


@dataclass
class SampleConfig:
    """Sampling text from a trained character model (`mode=sample run=DIR`)."""

    length: int = 500
    temperature: float = 0.8
    prompt: str = ""

    def __post_init__(self) -> None:
        _positive("sample.", self, "length")
        _at_most(10**7, "sample.", self, "length")
        _require(self.temperature >= 1e-6, "sample.temperature", self.temperature, "1e-6 or more")


@dataclass
class GradientFlowConfig:
    """Figure 1a (`mode=gradient_flow`); see `bnrnn.analyses.gradient_flow`."""

    gammas: list[float] = field(default_factory=lambda: [k / 10 for k in range(1, 11)])
    matrices: list[str] = field(default_factory=lambda: ["identity", "orthogonal"])
    repeats: int = 10
    hidden_size: int = 100
    batch_size: int = 100
    init_noise: float = 0.1

    def __post_init__(self) -> None:
        for matrix in self.matrices:
            _choice("gradient_flow.matrices", matrix, "identity", "orthogonal")
        for gamma in self.gammas:
            _require(gamma > 0, "gradient_flow.gammas", gamma, "positive")
        for name in ("gammas", "matrices"):
            _require(bool(getattr(self, name)), f"gradient_flow.{name}", [], "one or more")
        _positive("gradient_flow.", self, "repeats", "hidden_size", "init_noise")
        _at_most(2**16, "gradient_flow.", self, "repeats", "hidden_size", "batch_size")
        _require(self.batch_size > 1, "gradient_flow.batch_size", self.batch_size, "2 or more")


@dataclass
class LengthsConfig:
    """Figure 3b (`mode=lengths run=DIR`): the lengths of the slices of the test string."""

    lengths: list[int] = field(default_factory=lambda: list(range(100, 1001, 100)))
    batch_size: int = 100

    def __post_init__(self) -> None:
        _require(bool(self.lengths), "lengths.lengths", [], "one or more")
        for length in self.lengths:
            _require(length > 1, "lengths.lengths", length, "2 or more")
        once = len(set(self.lengths)) == len(self.lengths)
        _require(once, "lengths.lengths", self.lengths, "different lengths")
        _require(self.batch_size > 1, "lengths.batch_size", self.batch_size, "2 or more")


@dataclass
class PopulationConfig:
    """Figure 5 (`mode=population run=DIR`): the number of random units to draw."""

    units: int = 30

    def __post_init__(self) -> None:
        _positive("population.", self, "units")


@dataclass
class Config:
    """The settings of one run. The groups `model`, `task` and `optimizer` are chosen by name."""

    model: NormConfig = MISSING
    task: TaskConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    sample: SampleConfig = field(default_factory=SampleConfig, metadata=_FREE)
    data: DataConfig = field(default_factory=DataConfig)
    gradient_flow: GradientFlowConfig = field(default_factory=GradientFlowConfig, metadata=_FREE)
    lengths: LengthsConfig = field(default_factory=LengthsConfig, metadata=_FREE)
    population: PopulationConfig = field(default_factory=PopulationConfig, metadata=_FREE)
    mode: str = free("train")
    run: str | None = free(None)
    resume: str | None = free(None)
    question: str | None = free(None)
    scale: str | None = free(None)
    data_dir: str = free("data")
    outputs: str = free("outputs")
    seed: int = 0
    device: str = free("auto")
    kernel: str = free("auto")
    precision: str = "float32"
    threads: int | None = free(None)
    timeout: float = free(25.0)
    max_epochs: int | None = free(None)
    max_steps: int | None = free(None)
    validate_every: int | None = None
    patience: int | None = free(None)
    selection: str = "population"
    statistics: str = "local"
    calibration_batches: int = 50
    test_calibration_batches: int | None = None
    max_valid_batches: int | None = None
    log_every: int = free(50)
    checkpoint_minutes: float = free(10.0)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of training steps that the settings allow.

        Raises:
            ConfigError: there are too many.
        """
        epochs = self.max_epochs or self.task.max_epochs
        total = min(epochs * steps_per_epoch, self.max_steps or math.inf)
        if total > MOST:
            most = MOST // steps_per_epoch
            raise ConfigError(
                f"max_epochs must be {most} or less for epochs of {steps_per_epoch} steps, got "
                f"{epochs}: lower it or set max_steps"
            )
        return int(total)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.scale is not None:
            _choice("scale", self.scale, *SCALES)
        _choice("selection", self.selection, "population", "batch", "last")
        _choice("statistics", self.statistics, "local", "synchronised")
        _choice("precision", self.precision, "float32", "tf32", "bfloat16")
        if self.selection == "last" and self.patience is not None:
            raise ConfigError(
                "patience waits for a better validation, but selection=last ignores validations: "
                "set patience=null or another selection"
            )
        _seed("seed", self.seed)
        _positive(
            "", self, "threads", "max_epochs", "max_steps", "validate_every", "patience",
            "calibration_batches", "test_calibration_batches", "max_valid_batches", "log_every",
            "checkpoint_minutes", "timeout",
        )  # fmt: skip
        _at_most(1024, "", self, "threads")
        for key in ("data_dir", "outputs"):
            _require(bool(getattr(self, key)), key, "", "a folder")
        if isinstance(self.model, NormConfig) and isinstance(self.task, TaskConfig):
            self._check_model_of_task()

    def _check_model_of_task(self) -> None:
        taken = self.task.data_settings
        for name, value in vars(self.data).items():
            if value and name not in taken:
                others = f", only data.{', data.'.join(taken)}" if taken else ""
                raise ConfigError(f"task={self.task.name} takes no data.{name}{others}")
        if not isinstance(self.model, self.task.model_kind):
            raise ConfigError(
                f"task={self.task.name} takes model={self.task.models}, not model={self.model.name}"
            )
        for name in ("batch_size", "eval_batch_size"):
            if self.model.needs_batch and getattr(self.task, name) == 1:
                raise ConfigError(
                    f"task.{name} must be 2 or more for model={self.model.name}, which normalises "
                    "by batch statistics"
                )


# Scales of `reproduce=`: minutes or about an hour on two cores, or the paper's training length.
SCALES = ("minutes", "hour", "full")
# The word models of Zaremba et al., 2014, "Recurrent Neural Network Regularization".
SIZES = ("small", "medium", "large")
