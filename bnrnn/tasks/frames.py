"""Classify each frame of an utterance as an HMM state, as in hybrid speech recognition.

Laurent et al. 2015, "Batch Normalized Recurrent Neural Networks", section on speech: five
bidirectional layers, sequence-wise batch normalisation of the input term.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from bnrnn.datasets.batches import bucketed_batches
from bnrnn.datasets.frames import (
    Cmvn,
    FrameCorpus,
    FrameSplit,
    Normalizer,
    Sources,
    corpus_sources,
    load_frames,
)
from bnrnn.datasets.hmm import generate_frames
from bnrnn.errors import CheckpointError, ConfigError, DataError
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.options import LSTMOptions, chosen
from bnrnn.runs.record import Metric
from bnrnn.settings.schema import DataConfig, FrameConfig, NormConfig, SpeechConfig
from bnrnn.tasks.base import IGNORED, Batch, Loss, Progress, Sums, Task, classify, glorot_

FRAME_ERROR = Metric("fer", "frame error rate", True, "%", 100.0, 2)
TITLES = {"an4": "AN4, 102 states of a monophone alignment"}


class SpeechModel(nn.Module):
    """LSTM layers and a softmax at every frame.

    Weights are drawn as in `glorot_`; biases are zero.
    """

    def __init__(self, config: SpeechConfig, features: int, classes: int, kernel: str) -> None:
        super().__init__()
        self.lstm = BNLSTM(
            features,
            config.hidden_size,
            config.num_layers,
            dropout=config.dropout,
            bidirectional=config.bidirectional,
            **chosen(LSTMOptions, config),
            kernel=kernel,
        )
        width = config.hidden_size * self.lstm.num_directions
        self.head = nn.Linear(width, classes)
        glorot_(self.lstm, self.head)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """frames (T, B, D), lengths (B,) -> logits (T, B, classes)."""
        return self.head(self.lstm(frames, lengths=lengths)[0])


class FrameTask(Task):
    metric = FRAME_ERROR
    padded = True
    advice = "lower optimizer.lr"

    def __init__(self, config: FrameConfig, data: DataConfig, seed: int, data_dir: Path) -> None:
        super().__init__(config, seed)
        self.config: FrameConfig = config
        self._data = data
        self.corpus = load_corpus(config, data, data_dir)
        self.fingerprint = self.corpus.fingerprint
        self._normalizer = Normalizer(_cmvn(config), self.corpus.train)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"there are {len(self.corpus.train.names)} training utterances, fewer than a "
                f"batch: lower task.batch_size ({config.batch_size})"
            )

    @property
    def data_name(self) -> str:
        if self._data.synthetic is not None:
            return "frames-synthetic"
        if self._data.name:
            return self._data.name
        if self.config.corpus and self._data.features is None:
            return self.config.corpus
        return f"frames-{zlib.crc32(self.corpus.fingerprint.encode()):08x}"

    @property
    def data_title(self) -> str:
        name = self.data_name
        if name == "frames-synthetic":
            return "Generated frames of a hidden Markov model"
        return TITLES.get(name, f"Frames of speech, {name}")

    @property
    def steps_per_epoch(self) -> int:
        return len(self.corpus.train.names) // self.config.batch_size

    def build_model(self, config: NormConfig, kernel: str) -> SpeechModel:
        assert isinstance(config, SpeechConfig)
        return SpeechModel(config, self.corpus.features, self.corpus.classes, kernel)

    def train_batch(self, epoch: int, index: int) -> Batch:
        return self._batch(self.corpus.train, self._drawn(epoch, self._draw_batches)[index])

    def _draw_batches(self, generator: np.random.Generator) -> list[np.ndarray]:
        lengths, size = self.corpus.train.lengths, self.config.batch_size
        return bucketed_batches(lengths, size, generator, self.config.buckets)

    def valid_batches(self) -> Sequence[Batch]:
        return self._batches(self.corpus.dev)

    def loss(self, model: nn.Module, batch: Batch, carry: None = None) -> Loss:
        found = classify(model(*batch.input), batch.target)
        if self.config.loss == "utterance":
            utterances = batch.target.shape[1]
            return found._replace(value=found.value * (found.sums["count"] / utterances))
        return found

    def weight(self, batch: Batch, sums: Sums) -> Any:
        return batch.target.shape[1] if self.config.loss == "utterance" else sums["count"]

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {
            "fer": 1 - sums["correct"] / sums["count"],
            "fce": sums["nll"] / sums["count"],
        }

    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        batches = self._batches(self.corpus.test)
        return self.metrics(self.score(model, progress(batches), device))

    def describe(self) -> str:
        corpus = self.corpus
        parts = (corpus.train, corpus.dev, corpus.test)
        utterances = " / ".join(f"{len(part.names):,}" for part in parts)
        frames = " / ".join(f"{int(part.lengths.sum()):,}" for part in parts)
        remarks = "".join(f"; {remark}" for remark in corpus.remarks)
        return (
            f"{self.data_name}: {utterances} utterances, {frames} frames of {corpus.features} "
            f"features, {corpus.classes:,} classes{remarks}"
        )

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"features": self.corpus.features, "classes": self.corpus.classes}
        if self._normalizer.kind == "global":
            mean, deviation = self._normalizer.global_moments()
            found |= {"mean": torch.from_numpy(mean), "deviation": torch.from_numpy(deviation)}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        for name, ours in (("features", self.corpus.features), ("classes", self.corpus.classes)):
            theirs = state.get(name)
            if theirs != ours:
                unit = "features a frame" if name == "features" else "classes"
                raise CheckpointError(
                    f"the checkpoint was trained on {theirs!r} {unit}, and these data have {ours}: "
                    "use the data it was trained on" + ", or task.classes" * (name == "classes")
                )
        if self._normalizer.kind == "global":
            moments = [state.get(name) for name in ("mean", "deviation")]
            arrays = [m.cpu().numpy() for m in moments if isinstance(m, Tensor)]
            shape = (self.corpus.features,)
            if len(arrays) != 2 or any(
                a.shape != shape or a.dtype != np.float32 or not np.isfinite(a).all()
                for a in arrays
            ):
                raise CheckpointError(
                    "the checkpoint has no mean and deviation of the features: it is damaged, or "
                    "of another task.cmvn"
                )
            self._normalizer.of_training = arrays[0], arrays[1]

    def _batches(self, split: FrameSplit) -> "LazyBatches":
        size = self.config.eval_batch_size or self.config.batch_size
        numbers = bucketed_batches(split.lengths, size, None)
        return LazyBatches(numbers, functools.partial(self._batch, split))

    def _batch(self, split: FrameSplit, numbers: np.ndarray) -> Batch:
        """Return frames (T, B, D), lengths (B,) and targets (T, B).

        Targets are IGNORED at padding and at frames that `subsampling` leaves without a target.
        """
        step = self.config.subsampling
        lengths = split.lengths[numbers]
        steps = int(lengths.max())
        frames = np.zeros((steps, len(numbers), self.corpus.features), np.float32)
        target = np.full((steps, len(numbers)), IGNORED, np.int64)
        for column, number in enumerate(numbers):
            length = int(lengths[column])
            frames[:length, column] = self._normalizer.features(split, int(number))
            target[:length:step, column] = split.targets(int(number))
        arrays = tuple(map(torch.from_numpy, (frames, lengths.copy())))
        return Batch(arrays, torch.from_numpy(target))


class LazyBatches(Sequence[Batch]):
    """Batches made on access, so that a development set need not fit in memory."""

    def __init__(self, numbers: list[np.ndarray], make: Callable[[np.ndarray], Batch]) -> None:
        self._numbers, self._make = numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyBatches": ...
    def __getitem__(self, index: int | slice) -> "Batch | LazyBatches":
        if isinstance(index, slice):
            return LazyBatches(self._numbers[index], self._make)
        return self._make(self._numbers[index])


def load_corpus(config: FrameConfig, data: DataConfig, data_dir: Path) -> FrameCorpus:
    """Load or generate the frames that the settings name.

    Raises:
        ConfigError: the settings name no data.
        DataError, OutputError: see `load_frames`.
    """
    if data.synthetic is not None:
        for name, usual in (("subsampling", 1), ("classes", None)):
            if getattr(config, name) != usual:
                raise ConfigError(f"task.{name} is only for archives, not for data.synthetic")
        return generate_frames(data.synthetic)
    if data.features is None and config.corpus is not None:
        sources = corpus_sources(data_dir / config.corpus)
    else:
        sources = (_sources(data, ""), _sources(data, "dev_"), _sources(data, "test_"))
    return load_frames(*sources, config.classes, config.subsampling, data.pipes)


def _sources(data: DataConfig, part: str) -> Sources:
    found = {}
    for name in ("features", "targets"):
        found[name] = getattr(data, part + name)
        if not found[name]:
            raise ConfigError(
                f"task=frames needs data.{part}{name}: a Kaldi archive or its .scp (data/kaldi.md "
                "in the sources says how to make one); or generate frames with data.synthetic=N"
            )
    return Sources(**found, utt2spk=getattr(data, f"{part}utt2spk"), prefix=f"data.{part}")


def _cmvn(config: FrameConfig) -> Cmvn:
    return config.cmvn  # type: ignore[return-value]


__all__ = ["FrameTask", "LazyBatches", "SpeechModel", "load_corpus"]
