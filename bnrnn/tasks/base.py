"""The interface between tasks and the training loop."""

import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnrnn import processes
from bnrnn.errors import ConfigError
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.options import LSTMOptions, chosen
from bnrnn.nn.precision import autocast_of
from bnrnn.nn.share import Share, within
from bnrnn.runs import checkpoint
from bnrnn.runs.record import Metric
from bnrnn.settings.schema import ModelConfig, NormConfig, TaskConfig

# Shows progress over its argument, and stops between two items on request.
Progress = Callable[[Iterable[Any]], Iterable[Any]]
Sums = dict[str, Any]  # numbers, or one-element tensors on a device that is not the CPU: `number`
IGNORED = -100  # the target of padding
Drawn = TypeVar("Drawn")


class Batch(NamedTuple):
    """A minibatch of B sequences; tensors are (T, B, ...) or (B,)."""

    input: Any  # a tensor, or a tuple of tensors and plain values
    target: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `change` to each tensor."""
        if not isinstance(self.input, tuple):
            return Batch(change(self.input), change(self.target))
        parts = (change(x) if isinstance(x, Tensor) else x for x in self.input)
        return Batch(tuple(parts), change(self.target))

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda x: x.to(device))

    def part(self) -> "tuple[Batch, Share]":
        """Return this process's share of the batch; several processes may train one model."""
        share = processes.share(self.target.shape[-1])
        return (self if share.is_whole else self.map(share.of)), share


class Loss(NamedTuple):
    """The loss on one batch, or on a process's share of one.

    sums: numbers that are added over batches, for `Task.metrics`. carry: the state for the next
    batch of the same stream, a tuple of detached tensors (layers, B, ...); None if batches are
    independent.
    """

    value: Tensor
    sums: Sums
    carry: Any = None


class Task(ABC):
    """Batches, model, loss, metrics and test protocol of one task.

    The examples in a training batch are a function of seed, epoch and index alone, so a resumed run
    sees the same batches as an uninterrupted one.
    """

    metric: ClassVar[Metric]  # selects the best model
    padded: ClassVar[bool] = False  # sequences in a batch differ in length
    carries: ClassVar[bool] = False  # the state is carried from batch to batch
    advice: ClassVar[str] = ""  # a setting of this task that helps when gradients explode
    fingerprint: str | None = None  # of the data; None: there is only one version, verified by hash
    whole_data: bool = True  # False: only part of the data was found; results do not compare

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._epoch: tuple[int, Any] | None = None  # the most recent one, and what it has drawn

    @property
    @abstractmethod
    def data_name(self) -> str:
        """Return a short name of the data, equal for two runs exactly if they use the same data."""

    @property
    @abstractmethod
    def data_title(self) -> str:
        """Return the title of the data in reports and figures."""

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
        """Compute the loss to minimise, and the sums for `metrics`.

        Args:
            carry: the carry that the previous batch returned; None for the first batch of an epoch
                or of a validation.
        """

    @abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]: ...

    @abstractmethod
    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        """Run the paper's test protocol on a calibrated model in evaluation mode."""

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Draw matplotlib figures of a model in evaluation mode, by name, for TensorBoard."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """Describe the data in one line, for the log."""

    def state(self) -> dict[str, Any]:
        """Return what the model depends on and a checkpoint must save: tensors and plain data."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most tasks have none)
        """Restore what `state` returned.

        Raises:
            CheckpointError: the state does not belong to this task.
        """

    def load_carry(self, model: nn.Module, carry: Any, path: Path) -> Any:
        """Check and return the carry that was saved in the checkpoint at `path`.

        Raises:
            CheckpointError: `loss` cannot have returned it.
        """
        if carry is not None:
            raise checkpoint.damaged(path, "it has a carried state, which this task does not have")
        return None

    def calibration_batches(self, n: int | None) -> Iterator[Batch]:
        """Yield the first n training batches in a separate order; None: all of them."""
        n = self.steps_per_epoch if n is None else min(n, self.steps_per_epoch)
        return (self.train_batch(-1, index) for index in range(n))

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Sums:
        """Return the sums over consecutive batches."""
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
        """Return the weight of a share's loss: proportional to the number of terms in its mean."""
        return sums.get("count", batch.target.shape[-1])

    def everywhere(self, found: Loss, batch: Batch, share: Share) -> Loss:
        """Combine the processes' losses and sums to those of the whole batch.

        The gradient is that of this share's part of the loss, multiplied by the number of
        processes, because DistributedDataParallel averages gradients over processes.
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
        """Name the kernels that run the model's recurrences; every result records them.

        Raises:
            ConfigError: the requested kernel cannot run them.
        """
        lstms = [module for module in model.modules() if isinstance(module, BNLSTM)]
        call = self.padded, self.config.batch_size // processes.count()
        try:
            with autocast_of(model):
                return ", ".join(sorted({lstm.active_kernel(*call) for lstm in lstms}))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def is_better(self, value: float, best: float | None) -> bool:
        if best is None:
            return True
        return value < best if self.metric.lower_is_better else value > best

    def _drawn(self, epoch: int, draw: Callable[[np.random.Generator], Drawn]) -> Drawn:
        """Return what `draw` draws for the order of an epoch; epoch -1 is that of calibration.

        It is drawn once per epoch, because all training examples take long to permute.
        """
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, draw(self._generator(epoch))
        return self._epoch[1]

    def _generator(self, epoch: int) -> np.random.Generator:
        """Return the generator for an epoch's order."""
        # Older than `streams`. Another generator would change every result.
        return np.random.default_rng([self.seed, epoch + 1])


def classify(logits: Tensor, target: Tensor) -> Loss:
    """Compute the mean cross-entropy, in nats, over all targets except `IGNORED` ones.

    Args:
        logits: (..., classes).
        target: (...), integers.

    Returns:
        sums: "nll" in nats; "correct", how often the most probable class is right; "count".
    """
    logits, target = logits.flatten(0, -2), target.flatten()
    nll = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED)
    count = (target != IGNORED).sum()
    correct = (logits.detach().argmax(1) == target).sum()
    # Sum in float64: a test string has half a million predictions.
    total = nll.detach().double().sum()
    sums = {"nll": number(total), "correct": number(correct), "count": number(count)}
    return Loss(nll.sum() / count, sums)


def reading_waits(device: torch.device) -> bool:
    """Return whether reading a number waits for all queued work of the device."""
    return device.type != "cpu"


def number(value: Tensor) -> Any:
    """Return the number in a tensor on the CPU; return any other tensor as it is, to read later."""
    return value.detach() if reading_waits(value.device) else value.item()


def read(sums: dict[Any, Any]) -> dict[Any, float]:
    """Return `sums` with all tensors read, in one transfer."""
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
    """Initialise every gate's W_x and W_h, and the softmax, as in Glorot and Bengio (2010).

    Weights are uniform in ±sqrt(6 / (inputs + outputs)); the bias of the softmax is zero.
    """
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.chunk(4):
                nn.init.xavier_uniform_(gate)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)


def checksums(*arrays: np.ndarray) -> str:
    """Return the lengths and checksums of the arrays."""
    return ", ".join(f"{len(a)} {zlib.crc32(a.tobytes()):08x}" for a in arrays)
