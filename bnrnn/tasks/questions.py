"""Answering questions about news articles by attention (paper, section 5.4).

A question is a sentence with one entity left out, which the passage names: CNN articles, the whole
passage or its four sentences that match the question best.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnrnn.config import AttentiveReaderConfig, ModelConfig, QuestionConfig
from bnrnn.datasets import (
    NUM,
    UNK,
    QuestionCorpus,
    QuestionSplit,
    bucketed_batches,
    load_cnn,
    pad,
    relabel_entities,
)
from bnrnn.errors import CheckpointError, DataError
from bnrnn.nn.attentive_reader import AttentiveReader
from bnrnn.tasks.base import Batch, Progress, Task, checksums
from bnrnn.tasks.scoring import Score, score_batches, score_logits


class QuestionTask(Task):
    metric = "error"
    lower_is_better = True
    padded = True

    def __init__(
        self, config: QuestionConfig, seed: int, data_dir: Path, synthetic: int | None
    ) -> None:
        super().__init__(config, seed)
        self.config: QuestionConfig = config
        self.corpus: QuestionCorpus = load_cnn(
            data_dir,
            config.four_sentences,
            synthetic,
            config.on_error,  # type: ignore[arg-type]
            config.numbers,
        )
        self.whole_data = self.corpus.whole
        parts = (self.corpus.train, self.corpus.valid, self.corpus.test)
        self.fingerprint = checksums(*(a for p in parts for a in (p.answers, p.passages.lengths)))
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.corpus.name} has {len(self.corpus.train)} training questions, fewer than a "
                f"batch: lower task.batch_size ({config.batch_size})"
            )
        entities = np.zeros(len(self.corpus.words), bool)
        entities[self.corpus.entity_ids] = True
        self._is_entity = torch.from_numpy(entities)
        self._order: tuple[int, list[np.ndarray]] | None = None  # of the last epoch asked for

    @property
    def steps_per_epoch(self) -> int:
        return len(self.corpus.train) // self.config.batch_size

    def build_model(self, config: ModelConfig, kernel: str) -> AttentiveReader:
        assert isinstance(config, AttentiveReaderConfig)
        return AttentiveReader(
            vocabulary=len(self.corpus.words),
            hidden_size=config.hidden_size,
            bidirectional=config.bidirectional,
            input_norm=config.input_norm,  # type: ignore[arg-type]
            recurrent_norm=config.recurrent_norm,  # type: ignore[arg-type]
            cell_norm=config.cell_norm,  # type: ignore[arg-type]
            attention_norm=config.attention_norm,
            gamma_init=config.gamma_init,
            eps=config.eps,
            sequence_eps=config.sequence_eps,
            momentum=config.momentum,
            max_length=config.max_length,
            dropout=config.dropout,
            mean_passage=config.mean_passage,
            similarity=config.similarity,
            mask_attention_statistics=config.mask_attention_statistics,
            count_padding=config.count_padding,
            init=config.init,  # type: ignore[arg-type]
            learned_state=config.learned_state,
            forget_bias=config.forget_bias,
            kernel=kernel,
        )

    def train_batch(self, epoch: int, index: int) -> Batch:
        if self._order is None or self._order[0] != epoch:
            lengths = self.corpus.train.passages.lengths
            size, buckets = self.config.batch_size, self.config.buckets
            batches = bucketed_batches(lengths, size, self._generator(epoch), buckets)
            self._order = epoch, batches
        generator = np.random.default_rng([self.seed, epoch + 1, index])
        return self._batch(self.corpus.train, self._order[1][index], generator)

    def valid_batches(self) -> list[Batch]:
        return self._batches(self.corpus.valid)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(*batch.input)[0]

    def score(self, logits: Tensor, batch: Batch) -> Score:
        """Over the whole vocabulary, and over the entities that the passage names."""
        score = score_logits(logits, batch.target)
        passage, lengths, *_ = batch.input
        real = torch.arange(len(passage), device=passage.device)[:, None] < lengths
        named = torch.zeros_like(logits, dtype=torch.bool)
        named.scatter_(1, torch.where(real, passage, 0).t(), True)
        named &= self._is_entity.to(logits.device)
        # A passage that names no entity leaves no choice: its question counts as not answered.
        chosen = logits.masked_fill(~named, -torch.inf).argmax(1)
        score.correct_named = int(((chosen == batch.target) & named.any(1)).sum())
        return score

    def metrics(self, score: Score) -> dict[str, float]:
        return {
            "error": 1 - score.correct / score.count,
            "error_named": 1 - score.correct_named / score.count,
            "cross_entropy": score.nll / score.count,
        }

    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        batches = self._batches(self.corpus.test)
        return self.metrics(score_batches(model, self, progress(batches), device))

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """The attention over the first validation passage."""
        try:
            from bnrnn.report.attention import heat_map
        except ImportError:  # matplotlib is optional
            return {}
        split = self.corpus.valid
        batch = self._batch(split, np.array([0])).to(device)
        logits, attention = model(*batch.input)
        words, question = (
            self.corpus.decode(rows[0]) for rows in (split.passages, split.questions)
        )
        said, right = (self.corpus.words[int(k)] for k in (logits.argmax(1), batch.target))
        weights = attention[:, 0].double().cpu().numpy()
        return {"attention": heat_map(words, weights, question, [f"says {said}, right is {right}"])}

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """Words of a text -> ids (n,) int64, by the rules of the corpus."""
        known = {word: k for k, word in enumerate(self.corpus.words)}
        if self.config.numbers:
            known |= {word: NUM for word in words if word.isascii() and word.isdigit()}
        return np.array([known.get(word, UNK) for word in words], np.int64)

    def describe(self) -> str:
        corpus = self.corpus
        sizes = " / ".join(f"{len(part):,}" for part in (corpus.train, corpus.valid, corpus.test))
        facts = "".join(
            f"; {part} keeps {found['recall']:.1%} of the answers"
            for part, found in corpus.facts.items()
            if part == "valid" and "recall" in found
        )
        return f"{corpus.name}: {sizes} questions, {len(corpus.words):,} words{facts}"

    def state(self) -> dict[str, Any]:
        return {"words": "\n".join(self.corpus.words)}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["words"] != "\n".join(self.corpus.words):
            raise CheckpointError(
                f"the checkpoint was trained on another vocabulary than the "
                f"{len(self.corpus.words):,} words of {self.corpus.name}: use the data it was "
                "trained on"
            )

    def _batches(self, split: QuestionSplit) -> list[Batch]:
        size = self.config.eval_batch_size or self.config.batch_size
        batches = bucketed_batches(split.passages.lengths, size, None)
        return [self._batch(split, batch) for batch in batches]

    def _batch(
        self, split: QuestionSplit, examples: np.ndarray, relabel: np.random.Generator | None = None
    ) -> Batch:
        """relabel: draws other names for the entities, as the setting says."""
        padded = partial(pad, repeat=self.config.repeat_padding)
        passage, passage_lengths = padded([split.passages[k] for k in examples])
        question, question_lengths = padded([split.questions[k] for k in examples])
        answers = np.asarray(split.answers[examples], np.int64)
        if relabel is not None:
            passage, question, answers = relabel_entities(
                passage, question, answers, self.corpus.entity_ids, relabel,
                self.config.relabel,  # type: ignore[arg-type]
            )  # fmt: skip
        arrays = (passage, passage_lengths, question, question_lengths)
        return Batch(tuple(map(torch.from_numpy, arrays)), torch.from_numpy(answers))
