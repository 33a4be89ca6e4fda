"""Predict the next word of Penn Treebank, as in Zaremba et al. (2014) and Laurent et al. (2015).

Zaremba, Sutskever, Vinyals, "Recurrent Neural Network Regularization", arXiv 1409.2329, define the
networks and their training. Laurent et al., "Batch Normalized Recurrent Neural Networks", ICASSP
2016, section 5, add normalisation.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnrnn.datasets import WordCorpus, load_ptb_words
from bnrnn.datasets.words import cut, windows
from bnrnn.errors import CheckpointError, DataError
from bnrnn.nn import share
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.options import LSTMOptions, chosen
from bnrnn.runs import checkpoint
from bnrnn.runs.record import PERPLEXITY
from bnrnn.settings.schema import NormConfig, WordConfig, WordModelConfig
from bnrnn.tasks.base import Batch, Loss, Progress, Sums, Task, checksums, number

State = tuple[Tensor, Tensor]


class WordModel(nn.Module):
    """Embeddings, LSTM layers and a softmax at every step.

    Dropout is applied before, between and after the layers, never to the recurrence.

    Parameters are drawn from U(-r, r), r = `init_range`, with these exceptions, which start as in
    `BNLSTM`: γ, β_c, the initial states, and the bias if the input term or the sum is normalised.
    `forget_bias` is added to the bias of the forget gate.
    """

    def __init__(self, config: WordModelConfig, words: int, kernel: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embedding = nn.Embedding(words, config.hidden_size)
        self.lstm = BNLSTM(
            config.hidden_size,
            config.hidden_size,
            config.num_layers,
            dropout=config.dropout,
            **chosen(LSTMOptions, config),
            kernel=kernel,
        )
        self.head = nn.Linear(config.hidden_size, words)
        self._initialise(config)

    @torch.no_grad()
    def _initialise(self, config: WordModelConfig) -> None:
        is_shift = config.input_norm != "none" or config.recurrent_norm == "sum"
        drawn = ["weight"] if is_shift else ["weight", "bias"]
        for name, parameter in self.named_parameters():
            if not name.startswith("lstm.") or name.removeprefix("lstm.").startswith(tuple(drawn)):
                parameter.uniform_(-config.init_range, config.init_range)
                if name.startswith("lstm.bias"):
                    parameter.chunk(4)[1].add_(config.forget_bias)

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """words (T, B) -> logits (T, B, words) of the next word at each step, and the last state.

        Args:
            state: (h_0, c_0), each (layers, B, H); None: the initial one.
        """
        x = share.dropout(self.embedding(words), self.dropout, self.training)
        output, last = self.lstm(x, state)
        return self.head(share.dropout(output, self.dropout, self.training)), last


class WordTask(Task):
    """Truncated backpropagation through time over parallel streams of text.

    The training text is cut into `batch_size` streams of equal length. A batch is a window of
    `length` words of each stream, and windows are consecutive. The hidden and cell state at the end
    of a window is the initial state of the next, without a gradient. An epoch is one pass along the
    streams from a zero state, or `resets` passes of equal length. The rest at the end of a pass,
    less than a window, is dropped, as in the implementations of Zaremba and TensorFlow. Validation
    passes along streams of the validation text in the same way. The population statistics are
    averaged along the training streams, also with the state carried.

    The loss is the cross-entropy summed over time and averaged over the streams; the clipping norm
    refers to the gradient of that sum.

    The test text is a single stream (batch size 1) with all words; its last window is shorter. One
    row has no batch statistics, so the model must be calibrated.

    Frame-wise statistics are kept by position in the window. After the first windows of an epoch,
    the state at position t comes from a long preceding text, regardless of t, so all positions have
    the same distribution and their statistics differ only by sampling noise. The test therefore
    uses windows of the training length too: word k is normalised by the statistics of position
    k mod `length`. These describe the middle of a text; a zero initial state contributes only one
    window per epoch to them. Pooled over the positions, the mean would be the mean of the means,
    and the variance the mean of the variances plus the variance of the means, over `length` times
    as many words. Such statistics would not depend on the position and would fit any window. The
    plain model does not depend on the window: its test equals that of the whole text in one piece.
    """

    metric = PERPLEXITY
    carries = True
    advice = "optimizer.max_grad_norm=1"

    def __init__(self, config: WordConfig, seed: int, data_dir: Path) -> None:
        super().__init__(config, seed)
        self.config: WordConfig = config
        self.corpus: WordCorpus = load_ptb_words(data_dir)
        self.fingerprint = checksums(self.corpus.train, self.corpus.valid, self.corpus.test)
        self._train = cut(self.corpus.train, config.batch_size)
        self._valid = cut(self.corpus.valid, config.eval_batch_size or config.batch_size)
        for name, streams in (("training", self._train), ("validation", self._valid)):
            if not windows(streams.shape[1], config.length):
                raise DataError(
                    f"{self.corpus.name}: {len(streams)} streams of the {name} text have "
                    f"{streams.shape[1]} words each, fewer than a window of task.length="
                    f"{config.length} and a word to predict: lower it, or task.batch_size"
                )
        if config.resets > self.steps_per_epoch:
            raise DataError(
                f"an epoch has {self.steps_per_epoch:,} windows: task.resets={config.resets} is "
                "too many"
            )

    @property
    def data_name(self) -> str:
        return "ptb_words"

    @property
    def data_title(self) -> str:
        return "Penn Treebank, words"

    @property
    def steps_per_epoch(self) -> int:
        return len(windows(self._train.shape[1], self.config.length))

    def build_model(self, config: NormConfig, kernel: str) -> WordModel:
        assert isinstance(config, WordModelConfig)
        return WordModel(config, len(self.corpus.words), kernel)

    def train_batch(self, epoch: int, index: int) -> Batch:
        """Return window `index` of all streams, the same in every epoch."""
        steps, resets = self.steps_per_epoch, self.config.resets
        first = index in {steps * k // resets for k in range(resets)}
        begin = index * self.config.length
        return _window(self._train, begin, begin + self.config.length, first)

    def valid_batches(self) -> list[Batch]:
        return _walk(self._valid, self.config.length)

    def loss(self, model: nn.Module, batch: Batch, carry: State | None = None) -> Loss:
        words, first = batch.input
        logits, (h, c) = model(words, None if first else carry)
        # Not `classify`: its argmax over 10,000 words takes a tenth of a step and is not needed.
        nll = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none")
        sums = {"nll": number(nll.detach().double().sum()), "count": nll.numel()}
        return Loss(nll.sum() / words.shape[1], sums, (h.detach(), c.detach()))

    def metrics(self, sums: Sums) -> dict[str, float]:
        nats = sums["nll"] / sums["count"]
        return {
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            "cross_entropy": nats,
        }

    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        """Score one stream; every word except the first is predicted."""
        batches = _walk(cut(self.corpus.test, 1), self.config.length, whole=False)
        return self.metrics(self.score(model, progress(batches), device))

    def describe(self) -> str:
        parts = (self.corpus.train, self.corpus.valid, self.corpus.test)
        sizes = " / ".join(f"{len(part):,}" for part in parts)
        return f"{self.corpus.name}: {sizes} words, {len(self.corpus.words):,} types"

    def state(self) -> dict[str, Any]:
        return {"words": "\n".join(self.corpus.words)}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("words") != "\n".join(self.corpus.words):
            raise CheckpointError(
                "the checkpoint was trained on another vocabulary than the "
                f"{len(self.corpus.words):,} words of {self.corpus.name}: use the data it was "
                "trained on"
            )

    def load_carry(self, model: nn.Module, carry: Any, path: Path) -> State | None:
        if carry is None:
            return None
        assert isinstance(model, WordModel)
        lstm = model.lstm
        shape = (lstm.num_layers, self.config.batch_size, lstm.hidden_size)
        match carry:
            case (Tensor() as h, Tensor() as c) if all(
                state.shape == shape and state.dtype == lstm.get_parameter("weight_hh_l0").dtype
                for state in (h, c)
            ):
                return h, c
        raise checkpoint.damaged(path, "its carried state does not fit this model")


def _walk(streams: np.ndarray, length: int, whole: bool = True) -> list[Batch]:
    """Return all windows of the streams (B, words), in order."""
    found = windows(streams.shape[1], length, whole)
    return [_window(streams, begin, end, begin == 0) for begin, end in found]


def _window(streams: np.ndarray, begin: int, end: int, first: bool) -> Batch:
    """Return words `begin` to `end` of each stream and their successors, (T, B) each.

    first: the state is reset before this window.
    """
    words = torch.from_numpy(np.ascontiguousarray(streams[:, begin : end + 1].T).astype(np.int64))
    return Batch((words[:-1], first), words[1:])
