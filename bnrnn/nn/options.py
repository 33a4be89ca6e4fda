"""The options that the modules add to `torch.nn.LSTM`: names, defaults and checks.

This does not import torch, so that the command can refuse a setting immediately.
"""

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Options = TypeVar("Options")
# What each type of a field accepts, and its name in messages.
_KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    str: (str, "a string"),
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "an integer"),
    float | None: ((numbers.Real, type(None)), "a number or None"),
    int | None: ((numbers.Integral, type(None)), "an integer or None"),
}


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """
    Raises:
        ValueError: the condition does not hold; the first word of the message is the name.
    """
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def require_choice(name: str, value: str, *allowed: str) -> None:
    require(value in allowed, name, value, "one of " + ", ".join(allowed))


class Checked:
    """The base class that ends a chain of `__post_init__` calls."""

    def __post_init__(self) -> None:
        """Check the types of all fields, and that numbers are finite.

        Raises:
            ValueError: a value has the wrong type, or is infinite or NaN.
        """
        for f in fields(self):  # type: ignore[arg-type]
            if f.type not in _KINDS:
                continue
            (kinds, allowed), value = _KINDS[f.type], getattr(self, f.name)
            is_kind = isinstance(value, kinds) and (f.type is bool or not isinstance(value, bool))
            require(is_kind, f.name, value, allowed)
            if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
                require(math.isfinite(value), f.name, value, "a finite number")


@dataclass
class NormOptions(Checked):
    """The options of every model with batch-normalised LSTMs. `BNLSTM` documents each option.

    Raises:
        ValueError: an option is out of range.
    """

    input_norm: str = "frame"
    recurrent_norm: str = "frame"
    cell_norm: str = "frame"
    gamma_init: float = 0.1
    eps: float = 1e-5
    sequence_eps: float | None = None
    momentum: float = 0.1
    max_length: int | None = None
    learned_state: bool = False
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("input_norm", self.input_norm, "none", "frame", "sequence", "layer")
        require_choice("recurrent_norm", self.recurrent_norm, "none", "frame", "sum", "layer")
        require_choice("cell_norm", self.cell_norm, "none", "frame", "layer")
        alone = self.recurrent_norm != "sum" or self.input_norm == "none"
        with_sum = "none with recurrent_norm=sum, which normalises the input term as well"
        require(alone, "input_norm", self.input_norm, with_sum)
        require(self.gamma_init != 0, "gamma_init", self.gamma_init, "non-zero")
        for name in ("eps", "sequence_eps", "max_length"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "positive")
        require(0 < self.momentum <= 1, "momentum", self.momentum, "in (0, 1]")

    @property
    def needs_batch(self) -> bool:
        """Whether some batch statistics are per time step; these need at least two sequences."""
        kinds = {self.input_norm, self.recurrent_norm, self.cell_norm}
        return bool(kinds & {"frame", "sum"})


@dataclass
class NoiseOptions(Checked):
    """The options of noise in training. `BNLSTM` documents each option.

    Raises:
        ValueError: an option is out of range.
    """

    zoneout_cell: float = 0.0
    zoneout_hidden: float = 0.0
    recurrent_dropout: float = 0.0
    hidden_dropout: float = 0.0
    weight_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(NoiseOptions):
            value = getattr(self, f.name)
            require(0 <= value < 1, f.name, value, "in [0, 1)")

    @property
    def is_noisy(self) -> bool:
        """Whether there is noise in the steps; `weight_dropout`, on the weights, does not count."""
        states = (self.zoneout_cell, self.zoneout_hidden, self.recurrent_dropout)
        return any(p > 0 for p in (*states, self.hidden_dropout))


@dataclass
class LSTMOptions(NormOptions, NoiseOptions):
    """The options of a `BNLSTM`, which documents them.

    Raises:
        ValueError: an option is out of range.
    """

    init_noise: float = 0.0
    cell_bias: bool = False
    count_padding: bool = False
    recurrent_init: str = "orthogonal"
    synchronised: bool = False
    kernel: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.init_noise >= 0, "init_noise", self.init_noise, "0 or more")
        require_choice("recurrent_init", self.recurrent_init, "orthogonal", "identity")


@dataclass
class ReaderOptions(NormOptions):
    """The options of an `AttentiveReader`, which documents them.

    Raises:
        ValueError: an option is out of range.
    """

    input_norm: str = "none"
    recurrent_norm: str = "none"
    cell_norm: str = "none"
    learned_state: bool = True
    forget_bias: float = 0.0
    bidirectional: bool = False
    attention_norm: bool = False
    dropout: float = 0.5
    mean_passage: bool = True
    similarity: bool = True
    mask_attention_statistics: bool = True
    count_padding: bool = True
    init: str = "sound"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require_choice("init", self.init, "sound", "official_code")

    @property
    def needs_batch(self) -> bool:
        return super().needs_batch or self.attention_norm


def chosen(options: type, config: Any) -> dict[str, Any]:
    """The fields of a dataclass that `config` has as attributes, by name."""
    return {f.name: getattr(config, f.name) for f in fields(options) if hasattr(config, f.name)}


def take_options(options: type[Options], owner: str, given: dict[str, Any]) -> Options:
    """The options of a class `owner`, from the keyword arguments that it was given.

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of range.
    """
    known = [f.name for f in fields(options)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}; it has {', '.join(known)}")
    return options(**given)


def spell_out_options(init: Callable[..., Any], options: type) -> None:
    """Make `help` show a dataclass's fields for a function that takes them as `**options`."""
    *arguments, _ = inspect.signature(init).parameters.values()
    named = inspect.signature(options).parameters.values()
    init.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*arguments, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in named)]
    )
