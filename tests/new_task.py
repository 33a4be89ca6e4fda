"""A task from outside the package: classify each frame of a sequence into five classes.

The frames of a sequence are noisy vectors of its class, so that a small model can learn them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bnrnn.errors import ConfigError
from bnrnn.runs.record import Metric
from bnrnn.settings.schema import Config, TaskConfig
from bnrnn.tasks import Batch, Task, classify, register
from bnrnn.tasks.base import build_head, build_lstm

CLASSES, FEATURES = 5, 8


@dataclass
class FrameConfig(TaskConfig):
    name: str = "noisy"
    batch_size: int = 10
    max_epochs: int = 2
    sequences: int = 100
    length: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequences < 2 * self.batch_size:
            raise ConfigError("task.sequences must be two batches or more")


class FrameModel(nn.Module):
    def __init__(self, config, kernel) -> None:
        super().__init__()
        self.lstm = build_lstm(config, FEATURES, 0.0, kernel)
        self.head = build_head(config.hidden_size, CLASSES)

    def forward(self, frames):
        """frames (T, B, D) -> logits (T, B, classes)."""
        return self.head(self.lstm(frames)[0])


class FrameTask(Task):
    metric = Metric("frame_error", "frame error rate", True, "%", 100.0, 1)
    data_name = "frames-noisy"  # type: ignore[assignment] (a property there)
    data_title = "Noisy frames"  # type: ignore[assignment]

    def __init__(self, config: FrameConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.config: FrameConfig = config
        generator = np.random.default_rng(0)
        self.labels = generator.integers(CLASSES, size=config.sequences)
        means = generator.normal(size=(CLASSES, FEATURES))[self.labels]
        noise = generator.normal(size=(config.length, config.sequences, FEATURES))
        self.frames = (means + noise).astype(np.float32)

    @property
    def steps_per_epoch(self) -> int:
        return self.config.sequences // self.config.batch_size - 1  # the last batch is held out

    def build_model(self, config, kernel) -> nn.Module:
        return FrameModel(config, kernel)

    def train_batch(self, epoch, index) -> Batch:
        return self._batch(index)

    def valid_batches(self) -> list[Batch]:
        return [self._batch(self.steps_per_epoch)]

    def loss(self, model, batch, carry=None):
        return classify(model(batch.input), batch.target)

    def metrics(self, sums) -> dict[str, float]:
        return {"frame_error": 1 - sums["correct"] / sums["count"]}

    def test(self, model, device, progress) -> dict[str, float]:
        return self.metrics(self.score(model, progress(self.valid_batches()), device))

    def describe(self) -> str:
        return f"{self.config.sequences} sequences of {self.config.length} noisy frames"

    def _batch(self, index: int) -> Batch:
        part = slice(index * self.config.batch_size, (index + 1) * self.config.batch_size)
        target = np.tile(self.labels[part], (self.config.length, 1))
        return Batch(torch.from_numpy(self.frames[:, part]), torch.from_numpy(target))


def build(config: Config) -> Task:
    assert isinstance(config.task, FrameConfig)
    return FrameTask(config.task, config.seed)


def add() -> None:
    register(FrameConfig(), build)
