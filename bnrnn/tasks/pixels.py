"""MNIST, one pixel per step: in order, or in a fixed random order (paper, section 5.1)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnrnn.datasets import even_batches, load_mnist
from bnrnn.errors import CheckpointError, DataError
from bnrnn.nn import share
from bnrnn.runs.record import ACCURACY
from bnrnn.settings.schema import ModelConfig, NormConfig, PixelConfig
from bnrnn.tasks.base import (
    Batch,
    Loss,
    Progress,
    Sums,
    Task,
    build_head,
    build_lstm,
    classify,
)

PIXELS, CLASSES = 784, 10
# permutation -> name and title of the data, and a description of the order.
ORDERS = {
    "none": ("mnist", "MNIST, one pixel per step", "in order"),
    "true": ("pmnist", "Permuted MNIST, a true permutation", "permuted"),
    "official_code": (
        "pmnist_official",
        "Permuted MNIST, the pixel map of the released code",
        "mapped with replacement, as in the authors' code",
    ),
}


class PixelModel(nn.Module):
    """An LSTM over the pixels and a softmax on its last hidden state."""

    def __init__(self, config: ModelConfig, init_noise: float, kernel: str) -> None:
        super().__init__()
        self.lstm = build_lstm(config, 1, init_noise, kernel)
        self.head = build_head(config.hidden_size, CLASSES)
        self.input_dropout, self.output_dropout = config.input_dropout, config.output_dropout

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (T, B, 1) -> logits (B, 10)."""
        pixels = share.dropout(pixels, self.input_dropout, self.training)
        _, (h_n, _) = self.lstm(pixels)
        return self.head(share.dropout(h_n[-1], self.output_dropout, self.training, 0))


class PixelTask(Task):
    metric = ACCURACY
    advice = "task.init_noise=0.1 where all sequences begin alike"

    def __init__(self, config: PixelConfig, seed: int, data_dir: Path) -> None:
        super().__init__(config, seed)
        self.config: PixelConfig = config
        self.data = load_mnist(data_dir)
        self.order = pixel_order(config.permutation, config.permutation_seed)  # (784,)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"MNIST has {len(self.data.train_labels):,} training images, fewer than a batch: "
                f"lower task.batch_size ({config.batch_size})"
            )

    @property
    def data_name(self) -> str:
        return ORDERS[self.config.permutation][0]

    @property
    def data_title(self) -> str:
        return ORDERS[self.config.permutation][1]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_labels) // self.config.batch_size

    def build_model(self, config: NormConfig, kernel: str) -> PixelModel:
        assert isinstance(config, ModelConfig)
        return PixelModel(config, self.config.init_noise, kernel)

    def train_batch(self, epoch: int, index: int) -> Batch:
        count = len(self.data.train_labels)
        examples = self._drawn(epoch, lambda generator: generator.permutation(count))
        size = self.config.batch_size
        chosen = examples[index * size : (index + 1) * size]
        return self._batch(self.data.train_images, self.data.train_labels, chosen)

    def valid_batches(self) -> list[Batch]:
        return self._batches(self.data.valid_images, self.data.valid_labels)

    def loss(self, model: nn.Module, batch: Batch, carry: None = None) -> Loss:
        return classify(model(batch.input), batch.target)

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {
            "accuracy": sums["correct"] / sums["count"],
            "cross_entropy": sums["nll"] / sums["count"],
        }

    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        batches = self._batches(self.data.test_images, self.data.test_labels)
        return self.metrics(self.score(model, progress(batches), device))

    def describe(self) -> str:
        order = ORDERS[self.config.permutation][2]
        return (
            f"MNIST, 784 pixels {order} ({checksum(self.order)}); 50,000 / 10,000 / 10,000 images"
        )

    def state(self) -> dict[str, Any]:
        return {"order": torch.from_numpy(self.order.copy()), "checksum": checksum(self.order)}

    def load_state(self, state: dict[str, Any]) -> None:
        order = state.get("order")
        if (
            not isinstance(order, Tensor)
            or order.shape != (PIXELS,)
            or not 0 <= int(order.min()) <= int(order.max()) < PIXELS
            or checksum(order.cpu().numpy()) != state.get("checksum")
        ):
            raise CheckpointError("the checkpoint's pixel order does not match its checksum")
        self.order = order.cpu().numpy()

    def _batches(self, images: np.ndarray, labels: np.ndarray) -> list[Batch]:
        size = self.config.eval_batch_size or self.config.batch_size
        return [self._batch(images, labels, part) for part in even_batches(len(labels), size)]

    def _batch(self, images: np.ndarray, labels: np.ndarray, examples: np.ndarray | slice) -> Batch:
        pixels = images[examples][:, self.order].T  # (T, B)
        input = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255)
        return Batch(input[:, :, None], torch.from_numpy(labels[examples]))


def pixel_order(kind: str, seed: int) -> np.ndarray:
    """Return the pixel seen at each of the 784 steps, (784,) int64.

    "official_code" is the authors' map, regardless of the seed: 784 draws with replacement, so 283
    pixels are never seen.
    """
    if kind == "none":
        return np.arange(PIXELS)
    if kind == "official_code":
        return np.random.RandomState(1).randint(0, PIXELS, PIXELS).astype(np.int64)
    return np.random.RandomState(seed).permutation(PIXELS).astype(np.int64)


def checksum(order: np.ndarray) -> str:
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:12]
