"""Validation while training, and the test of a finished model."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnrnn import processes, progress
from bnrnn.errors import CheckpointError
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
    """Metrics on the validation set with population statistics and with batch statistics.

    The population statistics are averaged afresh over a sample of training batches. A model that
    normalises nothing has one kind only, reported as "population".

    Raises:
        Interrupted: the model's statistics are then as before.
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
        calibrated: over how many batches the model's statistics were averaged already, if so.

    Returns:
        {"valid": metrics, "test": metrics}, both with population statistics, and how many
        training batches are behind those (None: nothing is normalised).
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
    return {"valid": valid, "test": test}, calibrated


def evaluate(config: Config, run: Path, task: Task, device: torch.device) -> dict[str, Any]:
    """Test the best model of the run in `run` again.

    Raises:
        CheckpointError: there is none, or it is of another model or other data.
    """
    model, content = load_best(config, run, task, device)
    with Interruption() as stop:
        metrics, calibrated = final_test(
            model, task, config, device, stop, content.get("calibrated")
        )
    return {**metrics, "step": content["step"], "calibrated": calibrated}


def build_model(config: Config, task: Task, device: torch.device) -> nn.Module:
    model = task.build_model(config.model, config.kernel).to(device)
    several = processes.count() > 1 and config.statistics == "synchronised"
    return synchronise(model) if several else model


def load_best(
    config: Config, run: Path, task: Task, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    path = run / "best.pt"
    content = processes.from_first(lambda: _best(run, path, device))
    task.load_state(content["task"])
    with torch.random.fork_rng():  # its first weights are drawn, and overwritten
        model = build_model(config, task, device)
    task.kernel(model)
    checkpoint.load_model(model, content, path)
    return model, content


def _best(run: Path, path: Path, device: torch.device) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{run} has no best.pt: the run has not reached a validation yet")
    return checkpoint.load(path, device)


def load_calibrated(
    config: Config, run: Path, task: Task, device: torch.device, stop: Interruption
) -> tuple[nn.Module, int, int | None]:
    """The best model of the run in `run`, in evaluation mode; its training step, and how many
    training batches are behind its population statistics."""
    model, content = load_best(config, run, task, device)
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
    """Evaluation mode, with random numbers of its own: noise on h_0 is the same every time, and
    how often a run is validated does not change what it learns."""
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
    """`items` under a progress bar (none where the output is no terminal), stopping if asked."""
    bar = progress.bar(items, name, shown=processes.is_first(), total=total, leave=False)
    return stop.guard(bar)
