"""The paper's analyses beside its training runs: figures 1a, 1b, 3b and 5.

Each analysis is a function that returns plain data, of a type in `bnrnn.runs.analysis`;
`bnrnn.report.analysis_figures` draws them. `ANALYSES` is the table of all analyses; each is a mode
of the command.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnrnn import progress
from bnrnn.analyses.gradient_flow import gradient_flow
from bnrnn.analyses.lengths import lengths
from bnrnn.analyses.population import population
from bnrnn.analyses.tanh_derivative import tanh_derivative
from bnrnn.datasets import load_mnist
from bnrnn.errors import ConfigError
from bnrnn.evaluate import load_calibrated
from bnrnn.runs.analysis import Analysed, Analysis
from bnrnn.runs.interrupt import Interruption
from bnrnn.settings.schema import Config
from bnrnn.tasks import CharacterTask, Progress, Task, build_task


@dataclass(frozen=True)
class Entry:
    """One analysis of the table.

    compute: (settings, the analysed run or None, device) -> result. settings: the fields in which
    two analyses of one model can differ.
    """

    compute: Callable[[Config, Path | None, torch.device], Analysis]
    settings: Callable[[Config], dict[str, Any]] = lambda config: {}
    uses_run: bool = False


def _gradient_flow(config: Config, source: None, device: torch.device) -> Analysis:
    flow, data = config.gradient_flow, load_mnist(Path(config.data_dir))
    images, labels = data.train_images[: flow.batch_size], data.train_labels[: flow.batch_size]
    with Interruption() as stop:
        return gradient_flow(
            images, labels, flow.gammas, flow.matrices, flow.repeats, flow.hidden_size,
            flow.init_noise, config.seed, _progress(config, stop),
        )  # fmt: skip


def _tanh_derivative(config: Config, source: None, device: torch.device) -> Analysis:
    return tanh_derivative([k / 100 for k in range(101)])


def _lengths(config: Config, source: Path, device: torch.device) -> Analysis:
    task = build_task(config)
    if not isinstance(task, CharacterTask):
        raise ConfigError(f"mode=lengths needs a character model, {source} is of another task")
    with Interruption() as stop:
        model, of = _load(config, source, task, device, stop)
        cut, progress = config.lengths, _progress(config, stop)
        found = lengths(model, task, cut.lengths, cut.batch_size, device, progress)
    return dataclasses.replace(found, of=of)


def _population(config: Config, source: Path, device: torch.device) -> Analysis:
    with Interruption() as stop:
        model, of = _load(config, source, build_task(config), device, stop)
    return dataclasses.replace(population(model, config.population.units, config.seed), of=of)


def _load(
    config: Config, source: Path, task: Task, device: torch.device, stop: Interruption
) -> tuple[torch.nn.Module, Analysed]:
    model, step, calibrated = load_calibrated(config, source, task, device, stop)
    return model, Analysed(
        task=config.task.name,
        data=task.data_name,
        data_title=task.data_title,
        model=config.model.name,
        model_title=config.model.title or config.model.name,
        gamma_init=config.model.gamma_init,
        hidden_size=config.model.hidden_size,
        seed=config.seed,
        step=step,
        calibrated=calibrated,
        scale=config.scale,
    )


def _progress(config: Config, stop: Interruption) -> Progress:
    return lambda items: stop.guard(progress.bar(items, config.mode))


ANALYSES: dict[str, Entry] = {
    "gradient_flow": Entry(_gradient_flow),  # type: ignore[arg-type]
    "tanh_derivative": Entry(_tanh_derivative),  # type: ignore[arg-type]
    "lengths": Entry(
        _lengths,  # type: ignore[arg-type]
        lambda c: {"lengths": c.lengths.lengths, "batch_size": c.lengths.batch_size},
        uses_run=True,
    ),
    "population": Entry(
        _population,  # type: ignore[arg-type]
        lambda c: {"units": c.population.units, "seed": c.seed},
        uses_run=True,
    ),
}
