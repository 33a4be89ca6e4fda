"""What the training loop needs to know of a task."""

import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bnrnn.config import ModelConfig, TaskConfig
from bnrnn.nn import BNLSTM
from bnrnn.tasks.scoring import Score, score_logits

# Shows progress over its argument, and stops between two items when asked to.
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Batch(NamedTuple):
    input: Any  # a tensor, or a tuple of them
    target: Tensor

    def to(self, device: torch.device) -> "Batch":
        if isinstance(self.input, tuple):
            return Batch(tuple(x.to(device) for x in self.input), self.target.to(device))
        return Batch(self.input.to(device), self.target.to(device))


class Task(ABC):
    """Batches, model, loss, metrics and test protocol of one task.

    Which examples a training batch holds is a function of seed, epoch and index alone, so a run
    that is resumed anywhere sees what it would have seen.
    """

    metric: ClassVar[str]  # what models are selected by
    lower_is_better: ClassVar[bool]
    padded: ClassVar[bool] = False  # sequences of different lengths in a batch
    fingerprint: str | None = None  # of the data, wherever they lie; None: verified when read
    whole_data: bool = True  # False: only a part of them is at hand, and results do not compare

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def build_model(self, config: ModelConfig, kernel: str) -> nn.Module: ...

    @abstractmethod
    def train_batch(self, epoch: int, index: int) -> Batch: ...

    @abstractmethod
    def valid_batches(self) -> list[Batch]: ...

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (..., classes) for `batch.target` (...)."""

    def score(self, logits: Tensor, batch: Batch) -> Score:
        """Sums over a batch's predictions, for `metrics`."""
        return score_logits(logits, batch.target)

    @abstractmethod
    def metrics(self, score: Score) -> dict[str, float]: ...

    @abstractmethod
    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        """The paper's test protocol, on a calibrated model in evaluation mode."""

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """matplotlib figures of a model in evaluation mode, for TensorBoard, by name."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """The data in one line, for people."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the model to mean the same: tensors and plain data."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most tasks have none)
        """
        Raises:
            CheckpointError: the state does not belong to this task.
        """

    def calibration_batches(self, n: int | None) -> Iterator[Batch]:
        """The first n training batches of an order of their own; None: all of them."""
        n = self.steps_per_epoch if n is None else min(n, self.steps_per_epoch)
        return (self.train_batch(-1, index) for index in range(n))

    def is_better(self, value: float, best: float | None) -> bool:
        return best is None or (value < best if self.lower_is_better else value > best)

    def _generator(self, epoch: int) -> np.random.Generator:
        """Random numbers that are a function of seed and epoch; -1 is the calibration's order."""
        return np.random.default_rng([self.seed, epoch + 1])


def build_lstm(config: ModelConfig, input_size: int, init_noise: float, kernel: str) -> BNLSTM:
    return BNLSTM(
        input_size,
        config.hidden_size,
        config.num_layers,
        dropout=config.dropout,
        input_norm=config.input_norm,  # type: ignore[arg-type]
        recurrent_norm=config.recurrent_norm,  # type: ignore[arg-type]
        cell_norm=config.cell_norm,  # type: ignore[arg-type]
        gamma_init=config.gamma_init,
        eps=config.eps,
        sequence_eps=config.sequence_eps,
        momentum=config.momentum,
        max_length=config.max_length,
        init_noise=init_noise,
        learned_state=config.learned_state,
        cell_bias=config.cell_bias,
        forget_bias=config.forget_bias,
        recurrent_init=config.recurrent_init,  # type: ignore[arg-type]
        kernel=kernel,
    )


def build_head(hidden_size: int, classes: int) -> nn.Linear:
    head = nn.Linear(hidden_size, classes)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def checksums(*arrays: np.ndarray) -> str:
    """Lengths and check sums."""
    return ", ".join(f"{len(a)} {zlib.crc32(a.tobytes()):08x}" for a in arrays)


def even_batches(n: int, batch_size: int) -> list[slice]:
    """0..n in order, in batches whose sizes differ by one at most, none above `batch_size`.

    An uneven last batch could hold a single example, which has no batch statistics.
    """
    edges = np.linspace(0, n, -(-n // batch_size) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
