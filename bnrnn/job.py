"""`Job`: a run in training, its model, optimizer and progress; and what its checkpoints save."""

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from bnrnn import processes
from bnrnn.errors import CheckpointError, NonFiniteError
from bnrnn.nn.share import WHOLE, Share
from bnrnn.optim import build_optimizer
from bnrnn.runs import checkpoint
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.metrics import MetricsWriter, NoMetrics, kept_records
from bnrnn.runs.record import Count, Finite, Record
from bnrnn.settings.same import to_dict
from bnrnn.settings.schema import Config
from bnrnn.tasks import Sums, Task, base

log = logging.getLogger(__name__)

Metrics = MetricsWriter | NoMetrics

# Warn above this mean gradient norm: float32 has seven digits, so a sum this large loses terms of
# ordinary size.
ROUNDING_ERRORS = 1e6
# Read the losses and gradient norms from a GPU at the latest after this number of steps.
MOST_UNREAD = 1000


@dataclass
class LoopState:
    """The state of the training loop from step to step: plain data, saved in checkpoints."""

    step: Count = 0
    validated: Annotated[int, msgspec.Meta(ge=-1)] = -1  # the step of the last validation
    best: Finite | None = None
    best_step: Count = 0
    stale: Count = 0  # validations since the best one
    seconds: Finite = 0.0
    train_seconds: Finite = 0.0  # the part of `seconds` spent in training steps
    # Sums since the last line of metrics, kept so that a resumed run writes the same lines.
    sums: dict[str, Finite] = field(default_factory=dict)
    grad_norm: Finite = 0.0
    logged: Count = 0  # the step of that line
    records: Count = 0  # number of the run's metrics records when the checkpoint was saved
    commits: list[str] = field(default_factory=list)  # of the source, in order of use
    machines: list[str] = field(default_factory=list)  # in order of use


class Measured(NamedTuple):
    """The results of one step: scalar tensors on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    sums: Sums


class Job:
    """One training run: its model, optimizer and progress."""

    def __init__(
        self,
        config: Config,
        task: Task,
        run: RunDirectory,
        device: torch.device,
        model: nn.Module,
        state: LoopState,
    ) -> None:
        self.config, self.task, self.run, self.device = config, task, run, device
        self.model, self.state = model, state
        self.parallel = model  # the model that averages gradients over processes; set in `begin`
        self.optimizer = build_optimizer(config.optimizer, model)
        self.total = config.total_steps(task.steps_per_epoch)
        self.carry: Any = None  # the task's state, carried from one batch to the next
        self.share = WHOLE  # this process's share of the batch that `carry` comes from
        # The state after the last step, because a checkpoint may be saved during a validation.
        self.random = checkpoint.random_state(self.device)
        self._began = time.monotonic() - state.seconds
        self._saved_at = time.monotonic()
        self._warned = False
        self._unread: list[Measured] = []

    @property
    def at_end(self) -> bool:
        return self.state.step >= self.total

    @property
    def is_over(self) -> bool:
        patience = self.config.patience
        return self.at_end or (patience is not None and self.state.stale >= patience)

    @property
    def validation_is_due(self) -> bool:
        state, every = self.state, self.config.validate_every or self.task.steps_per_epoch
        at_interval = state.step > 0 and state.step % every == 0
        return state.validated != state.step and (self.at_end or at_interval)

    @property
    def checkpoint_is_due(self) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        end_of_epoch = self.state.step % self.task.steps_per_epoch == 0
        late = processes.is_first() and minutes >= self.config.checkpoint_minutes
        return end_of_epoch or bool(processes.largest(late))

    def tick(self) -> float:
        """Update and return the seconds of the run, including those before it was resumed."""
        self.state.seconds = time.monotonic() - self._began
        return round(self.state.seconds, 2)

    def measured(self, loss: Tensor, grad_norm: Tensor, sums: Sums) -> None:
        """Keep the results of this step; on a CPU, read and check them immediately.

        On a GPU, reading waits for the device. The results of several steps are therefore read
        together, before anything is logged or saved.

        Raises:
            NonFiniteError: see `settle`.
        """
        self._unread.append(Measured(self.state.step, loss.detach(), grad_norm.detach(), sums))
        if not base.reading_waits(self.device):
            self.settle()

    def settle(self) -> None:
        """Read and check the results of all steps since the last call.

        Raises:
            NonFiniteError: a loss or gradient norm is not finite; the first such value is reported.
        """
        began, state = time.monotonic(), self.state
        unread, self._unread = self._unread, []
        numbers = base.read(
            {
                (k, name): value
                for k, (_, *found, sums) in enumerate(unread)
                for name, value in [*enumerate(found), *sums.items()]
            }
        )
        for k, (step, _, _, sums) in enumerate(unread):
            self.check_finite("loss", numbers[k, 0], step)
            self.check_finite("gradient norm", numbers[k, 1], step)
            state.grad_norm += numbers[k, 1]
            for name in sums:
                state.sums[name] = state.sums.get(name, 0) + numbers[k, name]
        if base.reading_waits(self.device):
            state.train_seconds += time.monotonic() - began

    def advance(self, carry: Any, share: Share, seconds: float) -> None:
        """Record that a step is done."""
        self.state.step += 1
        self.state.train_seconds += seconds
        self.carry, self.share, self.random = carry, share, checkpoint.random_state(self.device)
        if len(self._unread) >= MOST_UNREAD:
            self.settle()
        self.tick()

    def averages(self) -> dict[str, float]:
        """Return the means over the steps since the last line of metrics, and reset the sums."""
        self.settle()
        state = self.state
        values = self.task.metrics(state.sums) | {
            "grad_norm": state.grad_norm / (state.step - state.logged),
            "epoch": state.step / self.task.steps_per_epoch,
            "seconds": round(state.seconds, 2),
        }
        state.sums, state.grad_norm, state.logged = {}, 0.0, state.step
        if values["grad_norm"] > ROUNDING_ERRORS and not self._warned:
            self._warned = True
            log.warning(
                "the gradient norm is %.1e at step %d; after clipping, a float32 gradient that "
                "large is mostly rounding errors. Try a lower model.gamma_init%s",
                values["grad_norm"], state.step, self._or_advice(),
            )  # fmt: skip
        return values

    def check_finite(self, name: str, value: float, step: int) -> None:
        """Check that a loss, gradient norm or metric is finite.

        Raises:
            NonFiniteError: it is not finite.
        """
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {name} is {value} at step {step}; the last good checkpoint is "
                f"{self.run.last}. Try a lower optimizer.lr or optimizer.max_grad_norm, or "
                f"model.gamma_init=0.1{self._or_advice()}"
            )

    def _or_advice(self) -> str:
        return f", or {self.task.advice}" if self.task.advice else ""

    def recording(self) -> Metrics:
        if not processes.is_first():
            return NoMetrics()
        return MetricsWriter(
            self.run, to_dict(self.config), self.task.metric, self.state.step, self._kept()
        )

    def _kept(self) -> list[Record]:
        state = self.state
        return kept_records(self.run, state.step, state.validated, state.records)

    def check_files(self) -> None:
        """Check the run's other files against its checkpoint.

        Raises:
            CheckpointError: records are lost, or the best model is.
        """
        self._kept()
        if self.state.best is not None and not self.run.best.exists():
            raise CheckpointError(
                f"{self.run.path} has lost its best.pt, the model of step {self.state.best_step}: "
                "restore it, or start the run again"
            )

    def save_last(self, metrics: Metrics | None = None) -> None:
        """Save the last checkpoint in the first process; all processes must call this.

        Raises:
            NonFiniteError: see `settle`; then nothing is saved.
        """
        self.settle()
        if metrics is not None:
            metrics.sync()  # the checkpoint refers to these records
            self.state.records = metrics.count
        training = {
            "optimizer": self.optimizer.state_dict(),
            "loop": dataclasses.asdict(self.state),
            "carry": self._whole_carry(),
            "random": self.random,
        }
        if processes.is_first():
            checkpoint.save(self.run.last, self._content(self.model, self.state.step) | {
                "calibrated": None, "training": training,
            })  # fmt: skip
        self._saved_at = time.monotonic()

    def save_best(self, model: nn.Module, step: int, calibrated: int | None) -> None:
        if processes.is_first():
            checkpoint.save(self.run.best, self._content(model, step) | {"calibrated": calibrated})

    def _whole_carry(self) -> Any:
        if self.carry is None or self.share.is_whole:
            return self.carry
        return tuple(processes.gather(self.share, state) for state in self.carry)

    def _content(self, model: nn.Module, step: int) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "model": model.state_dict(),
            "task": self.task.state(),
            "data": self.task.fingerprint,
            "step": step,
        }
