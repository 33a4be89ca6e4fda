"""Sums over predictions, and what they are summed from."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from bnrnn.tasks.base import Batch, Task


@dataclass
class Score:
    """Sums, so that scores of batches of different sizes add up exactly."""

    nll: float = 0.0  # nats
    correct: int = 0
    correct_named: int = 0  # choosing among the entities of the passage, where there is one
    count: int = 0

    def __iadd__(self, other: "Score") -> "Score":
        self.nll += other.nll
        self.correct += other.correct
        self.correct_named += other.correct_named
        self.count += other.count
        return self


def score_logits(logits: Tensor, target: Tensor) -> Score:
    """logits (..., classes) against target (...)."""
    logits, target = logits.flatten(0, -2), target.flatten()
    # One value a prediction, added up in float64: a test string has half a million of them.
    nll = F.cross_entropy(logits, target, reduction="none").double().sum()
    correct = (logits.argmax(1) == target).sum()
    return Score(float(nll), int(correct), count=target.numel())


@torch.no_grad()
def score_batches(
    model: nn.Module, task: "Task", batches: Iterable["Batch"], device: torch.device
) -> Score:
    score = Score()
    for batch in batches:
        batch = batch.to(device)
        score += task.score(task.predict(model, batch), batch)
    return score
