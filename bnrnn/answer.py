"""Answer a `.question` file with a trained Attentive Reader."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bnrnn.datasets import Question, read_question, select_sentences
from bnrnn.errors import DataError, printable
from bnrnn.nn.attentive_reader import AttentiveReader
from bnrnn.tasks import QuestionTask


@dataclass(frozen=True)
class Answer:
    """The answer to a question. All texts are printable.

    entities: the entities in the passage, most probable first; the probabilities sum to 1.
    words: the passage as the model read it; `attention`, (T,), is that of its words.
    """

    question: Question
    entities: list[tuple[str, float]]
    words: list[str]
    attention: np.ndarray

    def lines(self, n: int = 5) -> list[str]:
        """Lines to print: the best n entities, and the n words with the most attention."""
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
    """Answer the question in a file. The model must be calibrated: it uses population statistics.

    Raises:
        DataError: the file cannot be read, is not a question, or names no entity known to the
            model.
    """
    question = read_question(path)
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
    shown = [printable(word) for word in words]
    return Answer(_printable(question), entities, shown, attention[:, 0].double().cpu().numpy())


def _printable(question: Question) -> Question:
    """Escape all texts for a terminal: a question file may contain anything."""
    return question._replace(
        url=printable(question.url),
        passage=[printable(word) for word in question.passage],
        question=[printable(word) for word in question.question],
        entities={entity: printable(name) for entity, name in question.entities.items()},
    )
