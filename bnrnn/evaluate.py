"""Validation during training, and the test of a finished model."""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnrnn import kernels, processes, progress
from bnrnn.errors import CheckpointError, NonFiniteError
from bnrnn.nn.precision import run_in_bfloat16
from bnrnn.nn.share import within
from bnrnn.nn.statistics import StepStatistics, batch_statistics, calibrate
from bnrnn.nn.synchronise import synchronise
from bnrnn.runs import checkpoint
from bnrnn.runs.interrupt import Interruption
from bnrnn.settings.schema import Config
from bnrnn.tasks import Batch, Task

log = logging.getLogger(__name__)

Metrics = dict[str, float]


def normalizes(model: nn.Module) -> bool:
    return any(isinstance(module, StepStatistics) for module in model.modules())


def validate(
    model: nn.Module, task: Task, config: Config, device: torch.device, stop: Interruption
) -> dict[str, Metrics]:
    """Return the validation metrics with population statistics and with batch statistics.

    First average the population statistics again over a sample of training batches. A model without
    normalisation has only one kind of metrics, reported as "population".

    Raises:
        Interrupted: by a signal; the statistics may have been averaged again by then.
    """
    batches = task.valid_batches()[: config.max_valid_batches]
    with _evaluation(model, config.seed):
        if normalizes(model):
            _calibrate(model, task, config.calibration_batches, device, stop)
        bar = _bar(batches, stop, "validation")
        found = {"population": task.metrics(task.score(model, bar, device))}
        if normalizes(model):
            with batch_statistics(model):
                bar = _bar(batches, stop, "validation, batch statistics")
                found["batch"] = task.metrics(task.score(model, bar, device))
    return found


def final_test(
    model: nn.Module,
    task: Task,
    config: Config,
    device: torch.device,
    stop: Interruption,
    calibrated: int | None = None,
) -> tuple[dict[str, Metrics], int | None]:
    """Calibrate over the training set, then validate and test by the task's protocol.

    Args:
        calibrated: the number of batches that the model's statistics are already averaged over;
            None if they must be calibrated.

    Returns:
        {"valid": metrics, "test": metrics}, both with population statistics, and the number of
        training batches that these are averaged over (None: the model does not normalise).

    Raises:
        Interrupted: by a signal.
        NonFiniteError: a metric is not finite.
    """
    with _evaluation(model, config.seed):
        if normalizes(model) and calibrated is None:
            log.info("Calibrating population statistics over the training set")
            calibrated = _calibrate(model, task, config.test_calibration_batches, device, stop)
        valid = task.metrics(
            task.score(model, _bar(task.valid_batches(), stop, "validation"), device)
        )
        log.info("Testing")
        test = task.test(model, device, lambda items: _bar(items, stop, "test"))
    for split, metrics in (("valid", valid), ("test", test)):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the {split} {name} of the best model is {value}: start the run again with a "
                    "lower optimizer.lr or model.gamma_init"
                )
    return {"valid": valid, "test": test}, calibrated


def evaluate(config: Config, run: Path, task: Task, device: torch.device) -> dict[str, Any]:
    """Test the best model of `run` again.

    Raises:
        CheckpointError: there is no best model, or it belongs to another model or other data.
        NonFiniteError: its weights or a metric are not finite.
    """
    model, content = load_best(config, run, task, device)
    check_data(content, task, run)
    with Interruption() as stop:
        metrics, calibrated = final_test(
            model, task, config, device, stop, content.get("calibrated")
        )
    return {**metrics, "step": content["step"], "calibrated": calibrated}


def build_model(config: Config, task: Task, device: torch.device) -> nn.Module:
    model = task.build_model(config.model, config.kernel).to(device)
    if config.precision == "bfloat16" and device.type == "cpu" and kernels.has_bfloat16():
        run_in_bfloat16(model)
    several = processes.count() > 1 and config.statistics == "synchronised"
    return synchronise(model) if several else model


def load_best(
    config: Config, run: Path, task: Task, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    path = run / "best.pt"
    content = processes.from_first(lambda: _best(run, path, processes.where_to_load(device)))
    task.load_state(content["task"])
    with torch.random.fork_rng():  # building draws initial weights, which are then overwritten
        model = build_model(config, task, device)
    task.kernel(model)
    checkpoint.load_model(model, content, path)
    return model, content


def check_data(content: dict[str, Any], task: Task, run: Path) -> None:
    """
    Raises:
        CheckpointError: the checkpoint in `run` was trained on other data than the task's.
    """
    if content["data"] not in (None, task.fingerprint):
        raise CheckpointError(
            f"{run} was trained on other data than these, {task.describe()}: use its own data, or "
            "train a new run"
        )


def _best(run: Path, path: Path, device: torch.device) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{run} has no best.pt: the run has not reached a validation yet")
    return checkpoint.load(path, device)


def load_calibrated(
    config: Config, run: Path, task: Task, device: torch.device, stop: Interruption
) -> tuple[nn.Module, int, int | None]:
    """Return the best model of `run` in evaluation mode, its training step, and the number of
    training batches that its population statistics are averaged over.

    Raises:
        CheckpointError: there is no best model, or it belongs to another model or other data.
    """
    model, content = load_best(config, run, task, device)
    check_data(content, task, run)
    calibrated = content["calibrated"]
    if normalizes(model) and calibrated is None:
        with _evaluation(model, config.seed):
            calibrated = _calibrate(model, task, config.test_calibration_batches, device, stop)
    return model.eval(), content["step"], calibrated


def _calibrate(
    model: nn.Module, task: Task, n: int | None, device: torch.device, stop: Interruption
) -> int:
    total = task.steps_per_epoch if n is None else min(n, task.steps_per_epoch)
    batches = _bar(task.calibration_batches(n), stop, "calibration", total)
    carry = None

    def run(batch: Batch) -> None:
        nonlocal carry
        part, share = batch.part()
        with within(share):
            carry = task.loss(model, part.to(device), carry).carry

    return calibrate(model, batches, run)


@contextlib.contextmanager
def _evaluation(model: nn.Module, seed: int) -> Iterator[None]:
    """Set evaluation mode and a separate random state: the noise on h_0 is the same in every
    evaluation, and the number of validations does not affect training."""
    training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _bar(
    items: Iterable[Any], stop: Interruption, name: str, total: int | None = None
) -> Iterable[Any]:
    """Return `items` with a progress bar, if stderr is a terminal; stop on a signal."""
    bar = progress.bar(items, name, shown=processes.is_first(), total=total, leave=False)
    return stop.guard(bar)
