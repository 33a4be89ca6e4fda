"""What the training loop needs to know of a task."""

import itertools
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnrnn import processes
from bnrnn.errors import ConfigError
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.options import LSTMOptions, chosen
from bnrnn.nn.share import Share, within
from bnrnn.runs import checkpoint
from bnrnn.runs.record import Metric
from bnrnn.settings.schema import ModelConfig, NormConfig, TaskConfig

# Shows progress over its argument, and stops between two items when asked to.
Progress = Callable[[Iterable[Any]], Iterable[Any]]
Sums = dict[str, Any]  # numbers, or tensors of one on another device than the CPU: see `number`
IGNORED = -100  # the target of padding


class Batch(NamedTuple):
    """Tensors are (T, B, ...) or (B,), B sequences."""

    input: Any  # a tensor, or a tuple of tensors and plain values
    target: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """`change` of each tensor."""
        if not isinstance(self.input, tuple):
            return Batch(change(self.input), change(self.target))
        parts = (change(x) if isinstance(x, Tensor) else x for x in self.input)
        return Batch(tuple(parts), change(self.target))

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda x: x.to(device))

    def part(self) -> "tuple[Batch, Share]":
        """This process's share of the batch, where several train together."""
        share = processes.share(self.target.shape[-1])
        return (self if share.is_whole else self.map(share.of)), share


class Loss(NamedTuple):
    """Of one batch, or of a process's share of one.

    sums: numbers that add up over batches, for `Task.metrics`. carry: the state for the next batch
    of the same stream, a tuple of tensors (layers, B, ...), detached; None where batches are
    independent.
    """

    value: Tensor
    sums: Sums
    carry: Any = None


class Task(ABC):
    """Batches, model, loss, metrics and test protocol of one task.

    Which examples a training batch holds is a function of seed, epoch and index alone, so a run
    that is resumed anywhere sees what it would have seen.
    """

    metric: ClassVar[Metric]  # what models are selected by
    padded: ClassVar[bool] = False  # sequences of different lengths in a batch
    carries: ClassVar[bool] = False  # a state goes from batch to batch
    advice: ClassVar[str] = ""  # a setting of this task that helps where a gradient explodes
    fingerprint: str | None = None  # of the data; None: they have one form, verified when read
    whole_data: bool = True  # False: only a part of them is at hand, and results do not compare

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    @property
    @abstractmethod
    def data_name(self) -> str:
        """A short name of the data: runs on the same data have the same, and no others."""

    @property
    @abstractmethod
    def data_title(self) -> str:
        """The same for people: the title of a figure."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def build_model(self, config: NormConfig, kernel: str) -> nn.Module: ...

    @abstractmethod
    def train_batch(self, epoch: int, index: int) -> Batch: ...

    @abstractmethod
    def valid_batches(self) -> Sequence[Batch]: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, carry: Any = None) -> Loss:
        """The loss to minimise, and what `metrics` needs.

        Args:
            carry: what the batch before returned; None for the first of an epoch, or of a
                validation.
        """

    @abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]: ...

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

    def load_carry(self, model: nn.Module, carry: Any, path: Path) -> Any:
        """What `loss` carried when the checkpoint at `path` was saved, checked.

        Raises:
            CheckpointError: `loss` cannot have returned it.
        """
        if carry is not None:
            raise checkpoint.damaged(path, "it has a carried state, which this task has not")
        return None

    def calibration_batches(self, n: int | None) -> Iterator[Batch]:
        """The first n training batches of an order of their own; None: all of them."""
        n = self.steps_per_epoch if n is None else min(n, self.steps_per_epoch)
        return (self.train_batch(-1, index) for index in range(n))

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Sums:
        """The sums over batches that follow one another."""
        shared, whole, carry = Counter[str](), Counter[str](), None
        for batch in batches:
            part, share = batch.part()
            with within(share):
                _, sums, carry = self.loss(model, part.to(device), carry)
            of_kind = whole if share.is_whole else shared
            of_kind.update(sums)  # type: ignore[arg-type] (a Counter adds floats as well)
        whole.update(processes.add_up(shared))  # type: ignore[arg-type]
        return read(whole)

    def weight(self, batch: Batch, sums: Sums) -> Any:
        """What `loss` is a mean over, or in proportion to it: how much a share's loss counts."""
        return sums.get("count", batch.target.shape[-1])

    def everywhere(self, found: Loss, batch: Batch, share: Share) -> Loss:
        """The loss and the sums of the whole batch, from what each process found in its share.

        The gradient is that of the share times the number of processes, over which
        DistributedDataParallel averages.
        """
        if share.is_whole:
            return found
        value, weight = found.value, self.weight(batch, found.sums)
        ours = {"loss": value.detach() * weight, "weight": weight}
        sums = processes.add_up(ours | {f"sum {name}": v for name, v in found.sums.items()})
        total, all_weight = sums.pop("loss"), sums.pop("weight")
        scaled = value * (weight * processes.count() / all_weight)
        return found._replace(
            value=scaled + (total / all_weight - scaled.detach()),
            sums={name.removeprefix("sum "): v for name, v in sums.items()},
        )

    def kernel(self, model: nn.Module) -> str:
        """The kernels that run the recurrences of a model: recorded with every result.

        Raises:
            ConfigError: the kernel that was asked for cannot run them.
        """
        lstms = [module for module in model.modules() if isinstance(module, BNLSTM)]
        try:
            return ", ".join(sorted({lstm.active_kernel(self.padded) for lstm in lstms}))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def is_better(self, value: float, best: float | None) -> bool:
        if best is None:
            return True
        return value < best if self.metric.lower_is_better else value > best

    def _generator(self, epoch: int) -> np.random.Generator:
        """Random numbers that are a function of seed and epoch; -1 is the calibration's order."""
        return np.random.default_rng([self.seed, epoch + 1])


def classify(logits: Tensor, target: Tensor) -> Loss:
    """The mean cross-entropy, in nats, over all targets but `IGNORED` ones.

    Args:
        logits: (..., classes).
        target: (...), integers.

    Returns:
        sums: "nll", nats; "correct", of the likeliest class; "count".
    """
    logits, target = logits.flatten(0, -2), target.flatten()
    nll = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED)
    count = (target != IGNORED).sum()
    correct = (logits.detach().argmax(1) == target).sum()
    # Added up in float64: a test string has half a million predictions.
    total = nll.detach().double().sum()
    sums = {"nll": number(total), "correct": number(correct), "count": number(count)}
    return Loss(nll.sum() / count, sums)


def reading_waits(device: torch.device) -> bool:
    """Whether to read a number waits for all that the device was given to do."""
    return device.type != "cpu"


def number(value: Tensor) -> Any:
    """The number in a tensor, if that is at hand; else the tensor, to be read later."""
    return value.detach() if reading_waits(value.device) else value.item()


def read(sums: dict[Any, Any]) -> dict[Any, float]:
    """The same with all tensors read, in one transfer."""
    tensors = {name: value for name, value in sums.items() if isinstance(value, Tensor)}
    if not tensors:
        return dict(sums)
    values = torch.stack([value.double() for value in tensors.values()]).tolist()
    return sums | dict(zip(tensors, values, strict=True))


def build_lstm(config: ModelConfig, input_size: int, init_noise: float, kernel: str) -> BNLSTM:
    options = chosen(LSTMOptions, config) | {"init_noise": init_noise, "kernel": kernel}
    return BNLSTM(
        input_size, config.hidden_size, config.num_layers, dropout=config.dropout, **options
    )


def build_head(hidden_size: int, classes: int) -> nn.Linear:
    head = nn.Linear(hidden_size, classes)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def glorot_(lstm: BNLSTM, head: nn.Linear) -> None:
    """Every gate's W_x and W_h, and the softmax, uniform in ±sqrt(6 / (inputs + outputs)) (Glorot
    and Bengio 2010); the softmax's bias zero."""
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.chunk(4):
                nn.init.xavier_uniform_(gate)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)


def checksums(*arrays: np.ndarray) -> str:
    """Lengths and check sums."""
    return ", ".join(f"{len(a)} {zlib.crc32(a.tobytes()):08x}" for a in arrays)


def even_batches(n: int, batch_size: int) -> list[slice]:
    """0..n in order, in batches whose sizes differ by one at most, none above `batch_size`.

    An uneven last batch could hold a single example, which has no batch statistics.
    """
    edges = np.linspace(0, n, -(-n // batch_size) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
