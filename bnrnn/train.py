"""The training loop, for every task."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from bnrnn import processes
from bnrnn.ahead import TrainingBatches
from bnrnn.errors import CheckpointError, ConfigError, NonFiniteError
from bnrnn.evaluate import build_model, check_data, final_test, load_best, validate
from bnrnn.nn.share import WHOLE, Share, within
from bnrnn.nn.stabilizer import NormStabilizer
from bnrnn.optim import build_optimizer, clip_gradients, set_adam_eps, set_learning_rate
from bnrnn.progress import TrainingBar, validation_line
from bnrnn.runs import checkpoint
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.interrupt import Interrupted, Interruption
from bnrnn.runs.metrics import MetricsWriter, NoMetrics, format_values, kept_records
from bnrnn.runs.provenance import commit, machine, provenance
from bnrnn.runs.record import Count, Finite, Record, Result, Subject, write_json, write_settings
from bnrnn.settings.same import free_settings, to_dict
from bnrnn.settings.schema import Config
from bnrnn.tasks import Sums, Task, base

log = logging.getLogger(__name__)

Metrics = MetricsWriter | NoMetrics

# Warn above this mean gradient norm: float32 has seven digits, so a sum this large loses terms of
# ordinary size.
ROUNDING_ERRORS = 1e6
# Read the losses and gradient norms from a GPU at the latest after this number of steps.
MOST_UNREAD = 1000


def train(config: Config, task: Task, run: RunDirectory, device: torch.device) -> Result:
    """Train, select a model on the validation set and test it; resume if `run` has a checkpoint.

    Args:
        run: the run's folder, locked by `with`.

    Raises:
        Interrupted: by a signal, after saving a checkpoint.
        NonFiniteError: the loss or the gradient is not finite.
        ConfigError: `config` allows fewer steps than `run` has done.
        CheckpointError: `run` was trained on other data, or is damaged.
        OutputError: the disk is full.
    """
    with Interruption(processes.largest) as stop:
        job = begin(config, task, run, device)
        model, optimizer, state = job.model, job.optimizer, job.state
        stabilizer = NormStabilizer(model, config.model.stabilizer)
        batches = TrainingBatches(task, device)
        with job.recording() as metrics, training_bar(job) as bar:
            try:
                while True:
                    if job.validation_is_due:
                        validate_and_select(job, metrics, stop)
                    if job.is_over:
                        break

                    began = time.monotonic()
                    epoch, index = divmod(state.step, task.steps_per_epoch)
                    batch = batches.take(state.step)
                    model.train()
                    with within(batches.share):
                        found = task.loss(job.parallel, batch, job.carry if index else None)
                        added = stabilizer.take()
                    loss, sums, carry = task.everywhere(found, batch, batches.share)
                    optimizer.zero_grad(set_to_none=True)
                    (loss + added).backward()
                    grad_norm = clip_gradients(model, config.optimizer)
                    job.measured(loss, grad_norm, sums)
                    set_learning_rate(optimizer, config.optimizer, epoch + 1)
                    set_adam_eps(optimizer, config.optimizer, state.step + 1)
                    optimizer.step()
                    if state.step + 1 < job.total:
                        batches.prepare(state.step + 1)
                    job.advance(carry, batches.share, time.monotonic() - began)
                    bar.update()

                    if state.step % config.log_every == 0:
                        values = job.averages()
                        metrics.write(state.step, "train", values)
                        bar.measured(task.metric.name, values[task.metric.name])
                    if job.checkpoint_is_due:
                        job.save_last(metrics)
                    stop.check()
                bar.close()
                return test_best(job, metrics, stop)
            except Interrupted:
                job.save_last(metrics)
                raise


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


def begin(config: Config, task: Task, run: RunDirectory, device: torch.device) -> Job:
    """Build the model or load the checkpoint of `run`; check everything before writing anything.

    Raises:
        CheckpointError, ConfigError: see `train`.
    """
    place = processes.where_to_load(device)
    resumed = processes.from_first(
        lambda: checkpoint.load(run.last, place) if run.last.exists() else None
    )
    if resumed is not None:
        task.load_state(resumed["task"])
        check_data(resumed, task, run.path)
    torch.manual_seed(config.seed)
    model = build_model(config, task, device)
    kernel = task.kernel(model)  # raises before anything is written
    job = Job(config, task, run, device, model, LoopState())
    if resumed is not None:
        job = restore(job, resumed)
    state = job.state
    if state.step > job.total:
        raise ConfigError(
            f"{run.path} is at step {state.step} already, beyond the {job.total} that max_steps "
            f"and max_epochs allow: max_steps={state.step} tests it as it is, a larger "
            "one continues"
        )
    if processes.is_first():
        job.check_files()
    for used, now in ((state.commits, commit()), (state.machines, machine(device))):
        if now is not None and now not in used[-1:]:
            used.append(now)

    subject = describe(job)
    processes.wait_for_all()
    job.parallel = processes.wrapped(model, task.carries)
    if processes.is_first():
        write_settings(run.config, to_dict(config))
        write_json(run.subject, subject)
    if resumed is None:
        job.save_last()
    if processes.is_first():
        run.failure.unlink(missing_ok=True)
    if resumed is not None:
        log.info("Resuming at step %d of %s", state.step, run.path)
    _announce(job, subject, kernel)
    return job


def _announce(job: Job, subject: Subject, kernel: str) -> None:
    log.info("%s", subject.description)
    log.info(
        "%s: %s parameters; %s steps (%s an epoch) on %s, kernel %s; %s",
        job.config.model.name,
        f"{sum(p.numel() for p in job.model.parameters()):,}",
        f"{job.total:,}",
        f"{job.task.steps_per_epoch:,}",
        job.device,
        kernel,
        job.run.path,
    )


def restore(job: Job, resumed: dict[str, Any]) -> Job:
    """Return the job in the state that its checkpoint saved.

    Raises:
        CheckpointError: a part is missing or belongs to another model.
    """
    path = job.run.last
    if not isinstance(training := resumed.get("training"), dict):
        raise CheckpointError(f"{path} is a model without its training state: cannot resume")
    checkpoint.load_model(job.model, resumed, path)
    state = checkpoint.typed(path, training.get("loop"), LoopState)
    if state.step != resumed["step"] or state.step < max(
        state.validated, state.best_step, state.logged
    ):
        raise checkpoint.damaged(path, f"its loop is at step {state.step}, not {resumed['step']}")
    job = Job(job.config, job.task, job.run, job.device, job.model, state)
    checkpoint.load_optimizer(job.optimizer, training.get("optimizer"), state.step, path)
    job.carry = job.task.load_carry(job.model, training.get("carry"), path)
    if job.carry is not None and processes.count() > 1:
        job.share = processes.share(job.carry[0].shape[1])
        job.carry = tuple(job.share.of(state).to(job.device) for state in job.carry)
    job.random = checkpoint.restore_random_state(training.get("random"), job.device, path)
    return job


def describe(job: Job) -> Subject:
    """Describe the run for the commands that read it later."""
    config, task = job.config, job.task
    return Subject(
        task=config.task.name,
        data=task.data_name,
        data_title=task.data_title,
        description=task.describe(),
        whole_data=task.whole_data,
        model=config.model.name,
        model_title=config.model.title or config.model.name,
        metric=task.metric,
        steps_per_epoch=task.steps_per_epoch,
        total_steps=job.total,
        free_settings=free_settings(config),
    )


def validate_and_select(job: Job, metrics: Metrics, stop: Interruption) -> None:
    """Validate with each kind of statistics; keep the model if it is the best so far."""
    config, task, model, state = job.config, job.task, job.model, job.state
    name = task.metric.name
    job.settle()
    # All processes use the metrics of the first: processors round differently, and could otherwise
    # disagree on the best model.
    found = validate(model, task, config, job.device, stop)
    found = processes.from_first(lambda: found)
    state.validated, seconds = state.step, job.tick()
    for kind, values in found.items():
        job.check_finite(f"validation {name} with {kind} statistics", values[name], state.step)
        metrics.write(state.step, "valid", values | {"seconds": seconds}, kind)
    metrics.write_parameters(state.step, model)
    if processes.is_first():
        metrics.write_figures(state.step, draw(job))
    chosen_by = found.get(config.selection, found["population"])[name]
    if config.selection == "last" or task.is_better(chosen_by, state.best):
        state.best, state.best_step, state.stale = chosen_by, state.step, 0
        job.save_best(model, state.step, None)
    else:
        state.stale += 1
    job.save_last(metrics)
    line = validation_line(
        state.step, job.total, state.step / task.steps_per_epoch, state.seconds, name,
        {kind: values[name] for kind, values in found.items()},
        None if config.selection == "last" else state.best_step == state.step,
    )  # fmt: skip
    log.info("%s", line)


def test_best(job: Job, metrics: Metrics, stop: Interruption) -> Result:
    """Test the best model, save it with the statistics used in the test, and write the result."""
    config, task, state = job.config, job.task, job.state
    model, content = load_best(config, job.run.path, task, job.device)
    step = content["step"]
    found, calibrated = final_test(model, task, config, job.device, stop, content["calibrated"])
    job.save_best(model, step, calibrated)
    metrics.write(step, "test", found["test"], "population")
    metrics.sync()
    log.info(
        "%s model, step %d, population statistics: valid %s; test %s",
        "Last" if config.selection == "last" else "Best", step,
        format_values(found["valid"]), format_values(found["test"]),
    )  # fmt: skip
    job.tick()
    result = Result(
        valid=found["valid"],
        test=found["test"],
        best_step=step,
        calibrated=calibrated,
        task=config.task.name,
        model=config.model.name,
        seed=config.seed,
        data=task.describe(),
        whole_data=task.whole_data,
        steps=state.step,
        max_steps=job.total,
        epochs=state.step / task.steps_per_epoch,
        wall_seconds=round(state.seconds, 1),
        train_seconds=round(state.train_seconds, 1),
        kernel=task.kernel(model),
        processes=processes.count(),
        commits=state.commits,
        machines=state.machines,
        **provenance(job.device),
    )
    if processes.is_first():
        write_json(job.run.result, result)
    return result


@torch.no_grad()
def draw(job: Job) -> dict[str, Any]:
    job.model.eval()
    with torch.random.fork_rng():
        return job.task.figures(job.model, job.device)


@contextmanager
def training_bar(job: Job) -> Iterator[TrainingBar]:
    """Show a progress bar and print log messages above it."""
    step, steps_per_epoch = job.state.step, job.task.steps_per_epoch
    with (
        logging_redirect_tqdm(),
        TrainingBar(step, job.total, steps_per_epoch, shown=processes.is_first()) as bar,
    ):
        yield bar
