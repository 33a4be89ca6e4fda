"""The paper's analyses, one a mode: figures 1a, 1b, 3b and 5."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bnrnn.analyses.gradient_flow import gradient_flow
from bnrnn.analyses.lengths import lengths
from bnrnn.analyses.population import population
from bnrnn.analyses.tanh_derivative import tanh_derivative
from bnrnn.config import Config
from bnrnn.datasets import load_mnist
from bnrnn.errors import ConfigError
from bnrnn.evaluate import load_calibrated
from bnrnn.interrupt import Interruption
from bnrnn.tasks import CharacterTask, build_task


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
        facts |= {"task": config.task.name, "model": config.model.name, "seed": config.seed}
        if config.mode == "population":
            return population(model, config.population.units, config.seed) | facts
        assert isinstance(task, CharacterTask)
        cut = config.lengths
        return lengths(model, task, cut.lengths, cut.batch_size, device, progress) | facts
