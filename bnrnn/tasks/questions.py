"""Answer questions about CNN news articles by attention (paper, section 5.4).

A question is a sentence with one entity left out; the passage contains this entity. The passage is
the whole article, or its four sentences that match the question best.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnrnn.datasets import (
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
from bnrnn.nn.options import ReaderOptions, chosen
from bnrnn.runs.record import ERROR
from bnrnn.settings.schema import AttentiveReaderConfig, NormConfig, QuestionConfig
from bnrnn.tasks.base import Batch, Loss, Progress, Sums, Task, checksums, classify, number
from bnrnn.tasks.streams import Purpose, stream


class QuestionTask(Task):
    metric = ERROR
    padded = True

    def __init__(
        self, config: QuestionConfig, seed: int, data_dir: Path, synthetic: int | None
    ) -> None:
        super().__init__(config, seed)
        self.config: QuestionConfig = config
        self.corpus: QuestionCorpus = load_cnn(data_dir, config.four_sentences, synthetic)
        self._synthetic = synthetic is not None
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

    @property
    def data_name(self) -> str:
        kind = "cnn4" if self.config.four_sentences else "cnn"
        return kind + ("-synthetic" if self._synthetic else "" if self.whole_data else "-part")

    @property
    def data_title(self) -> str:
        kind = "four sentences" if self.config.four_sentences else "whole articles"
        if self._synthetic:
            return f"Generated CNN questions, {kind}"
        return f"CNN questions, {kind}" + ("" if self.whole_data else ": a part of the corpus")

    @property
    def steps_per_epoch(self) -> int:
        return len(self.corpus.train) // self.config.batch_size

    def build_model(self, config: NormConfig, kernel: str) -> AttentiveReader:
        assert isinstance(config, AttentiveReaderConfig)
        return AttentiveReader(
            vocabulary=len(self.corpus.words),
            hidden_size=config.hidden_size,
            kernel=kernel,
            **chosen(ReaderOptions, config),
        )

    def train_batch(self, epoch: int, index: int) -> Batch:
        batches = self._drawn(epoch, self._draw_batches)
        purpose = Purpose.CALIBRATION_RELABEL if epoch < 0 else Purpose.RELABEL
        generator = stream(self.seed, purpose, max(epoch, 0), index)
        return self._batch(self.corpus.train, batches[index], generator)

    def _draw_batches(self, generator: np.random.Generator) -> list[np.ndarray]:
        lengths = self.corpus.train.passages.lengths
        return bucketed_batches(lengths, self.config.batch_size, generator, self.config.buckets)

    def valid_batches(self) -> list[Batch]:
        return self._batches(self.corpus.valid)

    def loss(self, model: nn.Module, batch: Batch, carry: None = None) -> Loss:
        """Compute the loss over the whole vocabulary.

        "correct_named" counts right answers when the choice is restricted to the entities of the
        passage.
        """
        logits = model(*batch.input)[0]
        found = classify(logits, batch.target)
        named = {"correct_named": self._correct_named(logits.detach(), batch)}
        return found._replace(sums=found.sums | named)

    def _correct_named(self, logits: Tensor, batch: Batch) -> Any:
        passage, lengths, *_ = batch.input
        real = torch.arange(len(passage), device=passage.device)[:, None] < lengths
        named = torch.zeros_like(logits, dtype=torch.bool)
        named.scatter_(1, torch.where(real, passage, 0).t(), True)
        self._is_entity = self._is_entity.to(logits.device)  # moves only the first time
        named &= self._is_entity
        # A passage without entities leaves no choice; its question counts as wrong.
        chosen = logits.masked_fill(~named, -torch.inf).argmax(1)
        return number(((chosen == batch.target) & named.any(1)).sum())

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {
            "error": 1 - sums["correct"] / sums["count"],
            "error_named": 1 - sums["correct_named"] / sums["count"],
            "cross_entropy": sums["nll"] / sums["count"],
        }

    def test(self, model: nn.Module, device: torch.device, progress: Progress) -> dict[str, float]:
        batches = self._batches(self.corpus.test)
        return self.metrics(self.score(model, progress(batches), device))

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Draw the attention over the first validation passage."""
        try:
            from bnrnn.plots.attention import heat_map
        except ImportError:  # matplotlib is optional
            return {}
        split = self.corpus.valid
        batch = self._batch(split, np.array([0])).to(device)
        logits, attention = model(*batch.input)
        words, question = (
            self.corpus.decode(rows[0]) for rows in (split.passages, split.questions)
        )
        predicted, correct = (self.corpus.words[int(k)] for k in (logits.argmax(1), batch.target))
        weights = attention[:, 0].double().cpu().numpy()
        title = f"predicted {predicted}, correct {correct}"
        return {"attention": heat_map(words, weights, question, [title])}

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """Convert words to ids (n,) int64, by the rules of the corpus."""
        known = {word: k for k, word in enumerate(self.corpus.words)}
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
        if state.get("words") != "\n".join(self.corpus.words):
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
        """relabel: the generator that renames the entities, if task.relabel asks for it."""
        passage, passage_lengths = pad([split.passages[k] for k in examples])
        question, question_lengths = pad([split.questions[k] for k in examples])
        answers = np.asarray(split.answers[examples], np.int64)
        if relabel is not None and self.config.relabel == "batch":
            passage, question, answers = relabel_entities(
                passage, question, answers, self.corpus.entity_ids, relabel
            )
        arrays = (passage, passage_lengths, question, question_lengths)
        return Batch(tuple(map(torch.from_numpy, arrays)), torch.from_numpy(answers))
