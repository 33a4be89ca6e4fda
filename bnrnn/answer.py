"""Answer a `.question` file with a trained Attentive Reader."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bnrnn.datasets import Question, parse_question, select_sentences
from bnrnn.errors import DataError
from bnrnn.nn.attentive_reader import AttentiveReader
from bnrnn.tasks import QuestionTask


@dataclass(frozen=True)
class Answer:
    """entities: those of the passage, the likeliest first, with their probabilities among each
    other. words: the passage as it was read, with `attention`, (T,)."""

    question: Question
    entities: list[tuple[str, float]]
    words: list[str]
    attention: np.ndarray

    def lines(self, n: int = 5) -> list[str]:
        """For a person: the best n entities, and the n words that were looked at most."""
        text = []
        for entity, probability in self.entities[:n]:
            name = self.question.entities.get(entity)
            right = "   the answer" if entity == self.question.answer else ""
            text.append(f"{probability:6.1%}  {entity}{f' ({name})' if name else ''}{right}")
        order = np.argsort(-self.attention, kind="stable")[:n]
        seen = ", ".join(f"{self.words[k]} ({self.attention[k]:.1%})" for k in order)
        return [*text, f"looked at: {seen}"]


@torch.no_grad()
def answer(model: AttentiveReader, task: QuestionTask, path: Path) -> Answer:
    """Population statistics: the model must be calibrated.

    Raises:
        DataError: the file cannot be read, is no question, or names no entity that the model knows.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the question {path}: {error.strerror}") from error
    question = parse_question(content, str(path), answer_in_passage=False)
    words = question.passage
    if task.config.four_sentences:
        words = select_sentences(words, question.question)
    passage, asked = (task.encode(text) for text in (words, question.question))
    known = set(task.corpus.entity_ids.tolist())
    named = sorted({int(k) for k in passage if int(k) in known})
    if not named:
        raise DataError(
            f"{path} names no entity that the model was trained with; it knows "
            f"{len(known)}, such as {task.corpus.words[min(known)]}"
        )
    model.eval()
    device = next(model.parameters()).device

    def column(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = torch.from_numpy(ids)[:, None].to(device)
        return tensor, torch.tensor([len(ids)], device=device)

    logits, attention = model(*column(passage), *column(asked))
    probabilities = torch.softmax(logits[0, named].double(), 0).tolist()
    ranked = sorted(zip(named, probabilities, strict=True), key=lambda pair: -pair[1])
    entities = [(task.corpus.words[k], probability) for k, probability in ranked]
    return Answer(question, entities, list(words), attention[:, 0].double().cpu().numpy())
