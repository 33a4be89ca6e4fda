"""The training loop, for every task."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from bnrnn import processes
from bnrnn.ahead import TrainingBatches
from bnrnn.errors import CheckpointError, ConfigError
from bnrnn.evaluate import build_model, check_data, final_test, load_best, validate
from bnrnn.job import Job, LoopState, Metrics
from bnrnn.nn.share import within
from bnrnn.nn.stabilizer import NormStabilizer
from bnrnn.optim import clip_gradients, set_adam_eps, set_learning_rate
from bnrnn.progress import TrainingBar, validation_line
from bnrnn.runs import checkpoint
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.interrupt import Interrupted, Interruption
from bnrnn.runs.metrics import format_values
from bnrnn.runs.provenance import commit, machine, provenance
from bnrnn.runs.record import Result, Subject, write_json, write_settings
from bnrnn.settings.same import free_settings, to_dict
from bnrnn.settings.schema import Config
from bnrnn.tasks import Task

log = logging.getLogger(__name__)


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
