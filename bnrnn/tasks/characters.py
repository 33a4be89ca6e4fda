"""Predict the next character of Penn Treebank, text8, the Python manual, or a text file.

Paper, sections 5.2 and 5.3: training uses non-overlapping sequences with a new random offset in
each epoch, and resets the state to the learned initial state before each sequence. The test treats
the whole string as one sequence.

`CharacterStackTask` is the same task with the network of Laurent et al., "Batch Normalized
Recurrent Neural Networks", ICASSP 2016, figure 1.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnrnn.datasets import (
    CharacterCorpus,
    even_batches,
    load_ptb,
    load_pydocs,
    load_text,
    load_text8,
)
from bnrnn.errors import CheckpointError, DataError
from bnrnn.nn import share
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.options import LSTMOptions, chosen
from bnrnn.runs.record import BITS_PER_CHARACTER
from bnrnn.settings.schema import CharacterConfig, CharacterStackConfig, ModelConfig, NormConfig
from bnrnn.tasks.base import (
    Batch,
    Loss,
    Progress,
    Sums,
    Task,
    build_head,
    build_lstm,
    checksums,
    classify,
    glorot_,
    read,
)

State = tuple[Tensor, Tensor]
NATS_PER_BIT = float(np.log(2))
TITLES = {
    "ptb": "Penn Treebank, characters",
    "text8": "text8",
    "pydocs": "Python's documentation, the embedded corpus",
}


class CharacterModel(nn.Module):
    """An LSTM over one-hot characters and a softmax at every step."""

    def __init__(self, config: ModelConfig, symbols: int, kernel: str) -> None:
        super().__init__()
        self.lstm = build_lstm(config, symbols, 0.0, kernel)
        self.head = build_head(config.hidden_size, symbols)
        self.input_dropout, self.output_dropout = config.input_dropout, config.output_dropout

    def forward(
        self, characters: Tensor, state: State | None = None, first_step: int = 0
    ) -> tuple[Tensor, State]:
        """characters (T, B) -> logits (T, B, symbols) of the next character at each step."""
        if self.training and self.input_dropout > 0:
            one_hot = F.one_hot(characters, self.lstm.input_size).to(self.head.weight.dtype)
            characters = share.dropout(one_hot, self.input_dropout, True)
        output, last = self.lstm(characters, state, first_step=first_step)
        return self.head(share.dropout(output, self.output_dropout, self.training)), last


class CharacterStack(CharacterModel):
    """A lookup table, LSTM layers and a softmax at every step.

    The lookup table is as wide as a layer and drawn from N(0, 1). The other weights are drawn as
    in `glorot_`; biases are zero.
    """

    def __init__(self, config: CharacterStackConfig, symbols: int, kernel: str) -> None:
        nn.Module.__init__(self)
        size = config.hidden_size
        self.input_dropout = self.output_dropout = 0.0
        self.embedding = nn.Embedding(symbols, size)
        self.lstm = BNLSTM(
            size, size, config.num_layers, dropout=config.dropout, kernel=kernel,
            **chosen(LSTMOptions, config),
        )  # fmt: skip
        self.head = nn.Linear(size, symbols)
        glorot_(self.lstm, self.head)

    def forward(
        self, characters: Tensor, state: State | None = None, first_step: int = 0
    ) -> tuple[Tensor, State]:
        return super().forward(self.embedding(characters), state, first_step)


class CharacterTask(Task):
    metric = BITS_PER_CHARACTER

    def __init__(self, config: CharacterConfig, seed: int, data_dir: Path) -> None:
        super().__init__(config, seed)
        self.config: CharacterConfig = config
        self.corpus = load_corpus(config, data_dir)
        self.whole_data = self.corpus.whole
        self.fingerprint = checksums(*self._splits())
        if self.steps_per_epoch == 0:
            needed = config.length * (config.batch_size + 1)
            raise DataError(
                f"{self.corpus.name} has {len(self.corpus.train)} training characters, and one "
                f"batch needs {needed}: lower task.length ({config.length}) or task.batch_size "
                f"({config.batch_size})"
            )
        if len(self.corpus.valid) < 2 * config.length:
            raise DataError(
                f"{self.corpus.name} has {len(self.corpus.valid)} validation characters, fewer "
                f"than two sequences of task.length={config.length}: lower it"
            )
        if len(self.corpus.test) < 2:
            raise DataError(f"{self.corpus.name} has no test string of two characters or more")

    @property
    def data_name(self) -> str:
        corpus = self.config.corpus
        if corpus == "text":
            return f"text-{Path(self.config.path or '').stem}"
        if not self.whole_data:
            return f"{corpus}-part"
        return corpus if self.config.variant == "paper" else f"{corpus}-{self.config.variant}"

    @property
    def data_title(self) -> str:
        title = TITLES.get(self.config.corpus, f"The text {self.data_name.partition('-')[2]}")
        return title if self.whole_data else f"Part of {title}"

    @property
    def steps_per_epoch(self) -> int:
        # The offset is at most length - 1, so every epoch has this many whole sequences.
        sequences = (len(self.corpus.train) - self.config.length + 1) // self.config.length
        return sequences // self.config.batch_size

    def build_model(self, config: NormConfig, kernel: str) -> CharacterModel:
        assert isinstance(config, ModelConfig)
        return CharacterModel(config, len(self.corpus.symbols), kernel)

    def train_batch(self, epoch: int, index: int) -> Batch:
        length, size = self.config.length, self.config.batch_size
        starts = self._drawn(epoch, self._draw_starts)[index * size : (index + 1) * size]
        return self._batch(self.corpus.train[starts[:, None] + np.arange(length)])

    def _draw_starts(self, generator: np.random.Generator) -> np.ndarray:
        """Draw where the sequences of an epoch start, in their order."""
        length = self.config.length
        offset = int(generator.integers(length))
        return offset + length * generator.permutation((len(self.corpus.train) - offset) // length)

    def valid_batches(self) -> list[Batch]:
        length = self.config.length
        sequences = len(self.corpus.valid) // length
        rows = self.corpus.valid[: sequences * length].reshape(sequences, length)
        size = self.config.eval_batch_size or self.config.batch_size
        return [self._batch(rows[part]) for part in even_batches(sequences, size)]

    def loss(self, model: nn.Module, batch: Batch, carry: State | None = None) -> Loss:
        return classify(model(batch.input)[0], batch.target)

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {
            "bpc": sums["nll"] / sums["count"] / NATS_PER_BIT,
            "accuracy": sums["correct"] / sums["count"],
        }

    @torch.no_grad()
    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        """Score the whole test string as one sequence, in pieces; the state is carried on."""
        text = torch.from_numpy(self.corpus.test.astype(np.int64))[:, None]
        state, sums = None, Counter[str]()
        for first in progress(range(0, len(text) - 1, self.config.stream_length)):
            piece = text[first : first + self.config.stream_length + 1].to(device)
            logits, state = model(piece[:-1], state, first_step=first)
            sums.update(classify(logits, piece[1:]).sums)  # type: ignore[arg-type]
        return self.metrics(read(sums))

    def describe(self) -> str:
        sizes = " / ".join(f"{len(part):,}" for part in self._splits())
        return f"{self.corpus.name}: {sizes} characters, {len(self.corpus.symbols)} symbols"

    def state(self) -> dict[str, Any]:
        return {"symbols": self.corpus.symbols}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("symbols") != self.corpus.symbols:
            raise CheckpointError(
                "the checkpoint was trained on other symbols than the "
                f"{len(self.corpus.symbols)} of {self.corpus.name}: use the data it was trained on"
            )

    def _splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.corpus.train, self.corpus.valid, self.corpus.test

    def _batch(self, rows: np.ndarray) -> Batch:
        """rows (B, length) -> input and target (length - 1, B)."""
        characters = torch.from_numpy(np.ascontiguousarray(rows.T).astype(np.int64))
        return Batch(characters[:-1], characters[1:])


class CharacterStackTask(CharacterTask):
    """The experiment of Laurent et al. on the characters of Penn Treebank.

    They report the training cross-entropy. They state neither the sequence length nor whether the
    state is carried between sequences; both are as in the other character tasks here.
    """

    @property
    def data_name(self) -> str:
        corpus, dash, rest = super().data_name.partition("-")
        return f"{corpus}_characters{dash}{rest}"

    @property
    def data_title(self) -> str:
        return f"{super().data_title}, stacked layers"

    def build_model(self, config: NormConfig, kernel: str) -> CharacterStack:
        assert isinstance(config, CharacterStackConfig)
        return CharacterStack(config, len(self.corpus.symbols), kernel)


def load_corpus(config: CharacterConfig, data_dir: Path) -> CharacterCorpus:
    if config.corpus == "ptb":
        return load_ptb(data_dir, "stripped" if config.variant == "stripped" else "paper")
    if config.corpus == "text8":
        return load_text8(data_dir)
    if config.corpus == "text":
        assert config.path is not None
        return load_text(Path(config.path))
    return load_pydocs()
