"""The settings of a run: dataclasses, checked, and plain objects from here on.

Hydra composes `conf/` against these schemas (`register`), `from_hydra` turns the result into a
`Config` once, and nothing after that sees a DictConfig.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from bnrnn.errors import ConfigError
from bnrnn.kernels import KERNELS


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


def _choice(key: str, value: str, *allowed: str) -> None:
    _require(value in allowed, key, value, "one of " + ", ".join(allowed))


def _positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value > 0, prefix + name, value, "positive")


@dataclass
class ModelConfig:
    """A BNLSTM by its three slots; see `bnrnn.BNLSTM` for each setting."""

    name: str = MISSING
    input_norm: str = "none"
    recurrent_norm: str = "none"
    cell_norm: str = "none"
    cell_bias: bool = False
    hidden_size: int = 200
    num_layers: int = 1
    dropout: float = 0.0
    gamma_init: float = 0.1
    eps: float = 1e-5
    sequence_eps: float | None = None  # of sequence-wise statistics; None: eps
    momentum: float = 0.1
    max_length: int | None = None
    learned_state: bool = True
    forget_bias: float = 1.0
    recurrent_init: str = "orthogonal"

    @property
    def normalizes(self) -> bool:
        return (self.input_norm, self.recurrent_norm, self.cell_norm) != ("none", "none", "none")

    @property
    def normalizes_frames(self) -> bool:
        return "frame" in (self.input_norm, self.recurrent_norm, self.cell_norm)

    def __post_init__(self) -> None:
        _choice("model.input_norm", self.input_norm, "none", "frame", "sequence")
        _choice("model.recurrent_norm", self.recurrent_norm, "none", "frame")
        _choice("model.cell_norm", self.cell_norm, "none", "frame")
        _choice("model.recurrent_init", self.recurrent_init, "orthogonal", "identity")
        _positive("model.", self, "hidden_size", "num_layers", "eps", "sequence_eps", "max_length")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        _require(0 < self.momentum <= 1, "model.momentum", self.momentum, "in (0, 1]")
        _require(self.gamma_init != 0, "model.gamma_init", self.gamma_init, "non-zero")


@dataclass
class AttentiveReaderConfig(ModelConfig):
    """An Attentive Reader by what it normalises; see `bnrnn.nn.AttentiveReader`."""

    hidden_size: int = 240
    dropout: float = 0.5
    forget_bias: float = 0.0
    bidirectional: bool = False
    attention_norm: bool = False
    mean_passage: bool = True
    similarity: bool = True
    mask_attention_statistics: bool = True
    count_padding: bool = True
    init: str = "sound"

    @property
    def normalizes_frames(self) -> bool:
        return super().normalizes_frames or self.attention_norm

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("model.init", self.init, "sound", "official_code")


# Settings of an LSTM by itself that an Attentive Reader's encoders do not have.
_READER_HAS_ONLY = {"num_layers": 1, "cell_bias": False, "recurrent_init": "orthogonal"}


@dataclass
class TaskConfig:
    """What every task has: how much of what is seen how often."""

    name: str = MISSING
    kind: str = MISSING
    batch_size: int = 64
    max_epochs: int = 50
    # Batch statistics depend on the batch size: validation keeps the training one, unless set.
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        _positive("task.", self, "batch_size", "max_epochs", "eval_batch_size")


@dataclass
class PixelConfig(TaskConfig):
    """MNIST, a pixel a step."""

    kind: str = "pixels"
    batch_size: int = 100
    max_epochs: int = 200
    permutation: str = "none"
    permutation_seed: int = 0
    init_noise: float = 0.0  # on h_0: see `BNLSTM`
    # The authors' code has noise on h_0 for its BN runs only.
    init_noise_for: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.permutation", self.permutation, "none", "true", "official_code")
        _choice("task.init_noise_for", self.init_noise_for, "all", "normalized")
        _require(self.init_noise >= 0, "task.init_noise", self.init_noise, "0 or more")
        _require(
            0 <= self.permutation_seed < 2**32,
            "task.permutation_seed",
            self.permutation_seed,
            "in 0..4294967295",
        )


@dataclass
class CharacterConfig(TaskConfig):
    """Next-character prediction, in bits per character."""

    kind: str = "characters"
    corpus: str = MISSING
    variant: str = "paper"
    path: str | None = None
    length: int = 100
    # How many steps of the test string are in memory at once; the result does not depend on it.
    stream_length: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.corpus", self.corpus, "ptb", "text8", "pydocs", "text")
        _choice("task.variant", self.variant, "paper", "stripped")
        _require(self.length >= 2, "task.length", self.length, "2 or more")
        _positive("task.", self, "stream_length")
        if self.corpus == "text" and not self.path:
            raise ConfigError("task=text needs the file to learn from: add path=FILE")


@dataclass
class QuestionConfig(TaskConfig):
    """Questions about CNN articles, answered with an entity of the article."""

    kind: str = "questions"
    four_sentences: bool = False
    # A random permutation of all entity names for each training batch, each example, or none.
    relabel: str = "batch"
    # Passages of similar length share a batch: this many batches are sorted together.
    buckets: int = 12
    numbers: bool = False
    on_error: str = "raise"
    repeat_padding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("task.relabel", self.relabel, "batch", "example", "none")
        _choice("task.on_error", self.on_error, "raise", "skip")
        _positive("task.", self, "buckets")


@dataclass
class OptimizerConfig:
    name: str = MISSING
    lr: float = 1e-3
    max_grad_norm: float = 1.0
    clip: str = "norm"  # by which law: see `bnrnn.train.clip_gradients`

    def __post_init__(self) -> None:
        _choice("optimizer.clip", self.clip, "norm", "square_root")
        _positive("optimizer.", self, "lr", "max_grad_norm")


@dataclass
class AdamConfig(OptimizerConfig):
    name: str = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_on: str = "corrected"  # which second moment's root: see `bnrnn.train.set_adam_eps`

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("optimizer.eps_on", self.eps_on, "corrected", "uncorrected")
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
    """Text from a trained character model (`mode=sample run=DIR`)."""

    length: int = 500
    temperature: float = 0.8
    prompt: str = ""

    def __post_init__(self) -> None:
        _positive("sample.", self, "length", "temperature")


@dataclass
class DataConfig:
    """Data that are made, not fetched."""

    synthetic: int | None = None  # so many questions for task=cnn and task=cnn4

    def __post_init__(self) -> None:
        _positive("data.", self, "synthetic")


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
        _require(self.batch_size > 1, "gradient_flow.batch_size", self.batch_size, "2 or more")


@dataclass
class LengthsConfig:
    """Figure 3b (`mode=lengths run=DIR`): the lengths into which the test string is cut."""

    lengths: list[int] = field(default_factory=lambda: list(range(100, 1001, 100)))
    batch_size: int = 100

    def __post_init__(self) -> None:
        _require(bool(self.lengths), "lengths.lengths", [], "one or more")
        for length in self.lengths:
            _require(length > 1, "lengths.lengths", length, "2 or more")
        # Below that an odd number of slices leaves one by itself, without batch statistics.
        _require(self.batch_size > 2, "lengths.batch_size", self.batch_size, "3 or more")


@dataclass
class PopulationConfig:
    """Figure 5 (`mode=population run=DIR`): how many units are drawn, at random."""

    units: int = 30

    def __post_init__(self) -> None:
        _positive("population.", self, "units")


@dataclass
class Config:
    """One run. The groups `model`, `task` and `optimizer` are chosen by name."""

    model: ModelConfig = MISSING
    task: TaskConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    sample: SampleConfig = field(default_factory=SampleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gradient_flow: GradientFlowConfig = field(default_factory=GradientFlowConfig)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    population: PopulationConfig = field(default_factory=PopulationConfig)
    mode: str = "train"
    run: str | None = None
    resume: str | None = None
    question: str | None = None
    path: str | None = None
    scale: str | None = None
    data_dir: str = "data"
    outputs: str = "outputs"
    seed: int = 0
    device: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    selection: str = "population"
    calibration_batches: int = 50
    test_calibration_batches: int | None = None
    max_valid_batches: int | None = None
    log_every: int = 50
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        _choice("mode", self.mode, *MODES)
        if self.scale is not None:
            _choice("scale", self.scale, *SCALES)
        _choice("selection", self.selection, "population", "batch")
        _choice("kernel", self.kernel, "auto", *KERNELS)
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in 0..4294967295")
        _positive(
            "", self, "threads", "max_epochs", "max_steps", "validate_every", "patience",
            "calibration_batches", "test_calibration_batches", "max_valid_batches", "log_every",
            "checkpoint_minutes",
        )  # fmt: skip
        if self.mode in USE_A_RUN and self.run is None:
            raise ConfigError(f"mode={self.mode} needs a finished run: add run=DIR")
        if self.run is not None and self.mode not in USE_A_RUN:
            modes = ", ".join(f"mode={mode}" for mode in USE_A_RUN)
            raise ConfigError(f"run=DIR goes with {modes}, not {self.mode}")
        if (self.question is None) != (self.mode != "answer"):
            raise ConfigError("mode=answer run=DIR question=FILE answers the question in a file")
        if self.resume is not None and self.mode != "train":
            raise ConfigError(f"resume goes with mode=train, not mode={self.mode}")
        if self.path is not None and getattr(self.task, "corpus", None) != "text":
            raise ConfigError(f"path={self.path} is the text of task=text: add task=text")
        questions = isinstance(self.task, QuestionConfig)
        if self.data.synthetic is not None and isinstance(self.task, TaskConfig) and not questions:
            raise ConfigError("data.synthetic goes with task=cnn and task=cnn4")
        if isinstance(self.model, ModelConfig) and isinstance(self.task, TaskConfig):
            if questions != isinstance(self.model, AttentiveReaderConfig):
                fitting = "attentive_…" if questions else "lstm, bnlstm, bn_input…"
                raise ConfigError(
                    f"task={self.task.name} takes model={fitting}, not model={self.model.name}"
                )
            if questions:
                for name, only in _READER_HAS_ONLY.items():
                    value = getattr(self.model, name)
                    _require(
                        value == only, f"model.{name}", value, f"{only} in an Attentive Reader"
                    )
            smallest = min(self.task.batch_size, self.task.eval_batch_size or self.task.batch_size)
            if self.model.normalizes_frames and smallest < 2:
                raise ConfigError(
                    f"task.batch_size must be 2 or more for model={self.model.name}, which "
                    "normalises by batch statistics; model=lstm takes 1"
                )


USE_A_RUN = ("evaluate", "sample", "answer", "lengths", "population")
ANALYSES = ("gradient_flow", "tanh_derivative", "lengths", "population")
MODES = ("train", "data", *USE_A_RUN, "gradient_flow", "tanh_derivative", "report")

# How far `reproduce=` goes: what two cores do in minutes, in an hour or so, or as in the paper.
SCALES = ("minutes", "hour", "full")

# What a resumed run may change: where things are and how long it goes on. All else must stay.
RESUME_MAY_CHANGE = frozenset({
    "mode", "run", "resume", "scale", "sample", "question", "data_dir", "outputs", "path",
    "task.path", "device", "kernel", "threads", "max_epochs", "max_steps", "patience", "log_every",
    "checkpoint_minutes", "task.stream_length", "gradient_flow", "lengths", "population",
})  # fmt: skip


def register() -> None:
    """Make known to Hydra the schemas, `base_*` in each group of `conf/`, and two resolvers."""
    OmegaConf.register_new_resolver("bnrnn.by_scale", _by_scale, replace=True)
    OmegaConf.register_new_resolver("bnrnn.if_equal", _if_equal, replace=True)
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    store.store(group="model", name="base_model", node=ModelConfig)
    store.store(group="model", name="base_attentive", node=AttentiveReaderConfig)
    store.store(group="task", name="base_pixels", node=PixelConfig)
    store.store(group="task", name="base_questions", node=QuestionConfig)
    store.store(group="task", name="base_characters", node=CharacterConfig)
    store.store(group="optimizer", name="base_adam", node=AdamConfig)
    store.store(group="optimizer", name="base_rmsprop", node=RMSPropConfig)
    store.store(group="optimizer", name="base_sgd", node=SGDConfig)


def _by_scale(scale: str | None, minutes: Any, hour: Any, full: Any) -> Any:
    """One of three, by how far `reproduce=` goes."""
    return {"minutes": minutes, "hour": hour}.get(scale or "full", full)


def _if_equal(value: Any, other: Any, then: Any, otherwise: Any) -> Any:
    return then if value == other else otherwise


def from_hydra(cfg: DictConfig) -> Config:
    """Plain objects, every range checked.

    Raises:
        ConfigError: a value is impossible; the message names the key and what it may be.
    """
    OmegaConf.resolve(cfg)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    # Hydra's +key=value adds keys that no schema knows.
    given = OmegaConf.to_container(cfg)
    assert isinstance(given, dict)
    for key in flatten({str(key): value for key, value in given.items()}):
        if key not in flatten(to_dict(config)):
            raise ConfigError(f"there is no setting {key!r}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, for YAML, JSON and checkpoints."""
    return dataclasses.asdict(config)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"task": {"length": 100}} -> {"task.length": 100}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# Which of these dataclasses a section is made of shows in its keys.
_SCHEMAS = {
    "model": (ModelConfig, AttentiveReaderConfig),
    "task": (PixelConfig, CharacterConfig, QuestionConfig),
    "optimizer": (AdamConfig, RMSPropConfig, SGDConfig),
}


def defaults_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the dataclasses that these settings are made of, flat.

    Settings that were saved by an older version may lack some keys.
    """
    found = _field_defaults(Config)
    for section, schemas in _SCHEMAS.items():
        fitting = [
            d for d in map(_field_defaults, schemas) if d.keys() >= settings.get(section, {}).keys()
        ]
        found[section] = min(fitting, key=len, default={})
    return {key: value for key, value in flatten(found).items() if value is not MISSING}


def _field_defaults(schema: type) -> dict[str, Any]:
    found = {}
    for f in dataclasses.fields(schema):
        made = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        found[f.name] = vars(made) if dataclasses.is_dataclass(made) else made
    return found


def differences(ours: dict[str, Any], saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that make two runs different runs: key -> (ours, saved).

    `ours` has every setting there is. One that `saved` lacks is younger than the saved run, which
    did what the setting's default still does.
    """
    defaults = defaults_of(ours)
    ours, saved = flatten(ours), flatten(saved)
    saved |= {key: defaults[key] for key in ours.keys() & defaults.keys() - saved.keys()}
    return {
        key: (ours.get(key), saved.get(key))
        for key in sorted(ours.keys() | saved.keys())
        if ours.get(key) != saved.get(key)
        and not any(key == k or key.startswith(k + ".") for k in RESUME_MAY_CHANGE)
    }
