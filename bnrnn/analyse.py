"""The paper's analyses, one a mode: figures 1a, 1b, 3b and 5."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bnrnn import config as settings
from bnrnn.analyses.gradient_flow import gradient_flow
from bnrnn.analyses.lengths import lengths
from bnrnn.analyses.population import population
from bnrnn.analyses.tanh_derivative import tanh_derivative
from bnrnn.config import Config
from bnrnn.datasets import load_mnist
from bnrnn.errors import ConfigError
from bnrnn.evaluate import load_calibrated
from bnrnn.interrupt import Interruption
from bnrnn.report.runs import Run
from bnrnn.rundir import RunDirectory
from bnrnn.tasks import CharacterTask, Task, build_task


def analyse(config: Config, source: Path | None, device: torch.device) -> dict[str, Any]:
    """What `result.json` holds: the settings and curves of the analysis `config.mode`.

    Args:
        source: the run that is looked into, for the analyses of a trained model.
    """
    with Interruption() as stop:

        def progress(items: Any) -> Any:
            bar = tqdm(items, desc=config.mode, disable=None, dynamic_ncols=True)
            return stop.guard(bar)

        if config.mode == "tanh_derivative":
            return tanh_derivative([k / 100 for k in range(101)])
        if config.mode == "gradient_flow":
            flow = config.gradient_flow
            data = load_mnist(Path(config.data_dir))
            images = data.train_images[: flow.batch_size]
            labels = data.train_labels[: flow.batch_size]
            return gradient_flow(
                images, labels, flow.gammas, flow.matrices, flow.repeats,
                flow.hidden_size, flow.init_noise, config.seed, progress,
            )  # fmt: skip
        assert source is not None
        task = build_task(config)
        if config.mode == "lengths" and not isinstance(task, CharacterTask):
            raise ConfigError(f"mode=lengths needs a character model, {source} is of another task")
        model, facts = load_calibrated(config, source, task, device, stop)
        facts |= _describe(config, source, task)
        if config.mode == "population":
            return population(model, config.population.units, config.seed) | facts
        assert isinstance(task, CharacterTask)
        cut = config.lengths
        return lengths(model, task, cut.lengths, cut.batch_size, device, progress) | facts


def _describe(config: Config, source: Path, task: Task) -> dict[str, Any]:
    """Of which model on which data an analysis is."""
    whole = {"whole_data": task.whole_data}
    return {
        "task": config.task.name,
        "data": Run(source, settings.to_dict(config), [], whole).data,
        "model": config.model.name,
        "gamma_init": config.model.gamma_init,
        "hidden_size": config.model.hidden_size,
        "seed": config.seed,
        "scale": config.scale,
    }


def find_analysis(config: Config, source: Path) -> Path | None:
    """The newest `result.json` of this analysis, with these settings, of the best model there is
    in the finished run `source`; None: not analysed so yet."""
    run = RunDirectory(source).read_result() or {}
    wanted = dataclasses.asdict(getattr(config, config.mode)) | {"step": run.get("best_step")}
    for file in sorted(source.glob(f"{config.mode}/*/result.json"), reverse=True):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if wanted.items() <= found.items():
            return file
    return None
