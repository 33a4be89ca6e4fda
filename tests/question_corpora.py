"""Corpora for tests with CNN questions, and the accuracies of simple baselines."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bnrnn.datasets import Question, QuestionCorpus
from bnrnn.datasets.cnn.corpus import read_corpus, write_corpus
from bnrnn.datasets.cnn.questions import SPLITS, parse_question, tokens


def question_corpus(
    name: str,
    train: Iterable[Question],
    valid: Iterable[Question],
    test: Iterable[Question],
) -> QuestionCorpus:
    """Make a corpus of the given questions, by the rules of `load_cnn`."""
    parts = zip(SPLITS, (train, valid, test), strict=True)
    found = ((split, question) for split, questions in parts for question in questions)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), found, name)
        # The mapped files stay readable after they are deleted.
        return replace(read_corpus(Path(folder)), name=name)


def four_sentence_items(path: Path) -> list[Question]:
    """Read the items of a four-sentence selection.

    Lines "1 …" to "4 …" are the passage; "5 …" is the question, a tab, the answer, a tab and a
    number. `url` and `entities` are empty.
    """
    items: list[Question] = []
    passage: list[str] = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        kind, _, rest = line.partition(" ")
        if kind in ("1", "2", "3", "4"):
            passage += tokens(rest)
            continue
        asked, answer, _ = rest.split("\t")
        assert kind == "5", line
        text = "\n\n".join(("", " ".join(passage), asked, answer, ""))
        items.append(parse_question(text, f"{path}, line {number},", answer_in_passage=False))
        passage = []
    assert items
    assert not passage
    return items


def baselines(corpus: QuestionCorpus, part: str = "valid") -> dict[str, float]:
    """Compute accuracies, in [0, 1], of guesses that do not combine question and passage.

    "frequent": the most frequent entity of the passage. "frequent_other": the most frequent one
    that does not occur in the question. "question": the most probable answer given the words of the
    question without entities, by naive Bayes with add-one smoothing, trained on the training split.
    "random": a random entity of the passage. "beside": the entity that is most often in a sentence
    with an entity of the question. Ties go to the first in the passage.
    """
    split = getattr(corpus, part)
    is_entity = np.zeros(len(corpus.words), bool)
    is_entity[corpus.entity_ids] = True
    ends = {k for k, word in enumerate(corpus.words) if word in (".", "?", "!")}
    guess = _naive_bayes(corpus, is_entity)
    right = Counter[str]()
    for row in range(len(split)):
        passage, question = split.passages[row], split.questions[row]
        answer = int(split.answers[row])
        named = set(question[is_entity[question]].tolist())
        entities = Counter(passage[is_entity[passage]].tolist())
        others = Counter({entity: n for entity, n in entities.items() if entity not in named})
        beside = Counter[int]()
        sentence: list[int] = []
        for word in passage.tolist():
            if is_entity[word]:
                sentence.append(word)
            elif word in ends:
                if named & set(sentence):
                    beside.update(set(sentence) - named)
                sentence = []
        # most_common() keeps ties in the order of the passage.
        right["frequent"] += bool(entities) and entities.most_common(1)[0][0] == answer
        right["frequent_other"] += bool(others) and others.most_common(1)[0][0] == answer
        right["beside"] += bool(beside) and beside.most_common(1)[0][0] == answer
        right["question"] += guess(question) == answer
        # The expected value, in billionths so that counts stay integers.
        right["random"] += round(1e9 / len(entities)) if answer in entities else 0
    accuracies = {name: count / len(split) for name, count in right.items()}
    return accuracies | {"random": accuracies["random"] / 1e9}


def _naive_bayes(corpus: QuestionCorpus, is_entity: np.ndarray) -> Callable[[np.ndarray], int]:
    places = {int(entity): place for place, entity in enumerate(corpus.entity_ids)}
    prior = np.ones(len(places))
    # (words, entities): how often a word occurs in questions with that answer.
    counts = np.ones((len(corpus.words), len(places)), np.float32)
    for row in range(len(corpus.train)):
        place = places.get(int(corpus.train.answers[row]))
        if place is not None:
            question = corpus.train.questions[row]
            prior[place] += 1
            np.add.at(counts[:, place], question[~is_entity[question]], 1)
    # In place, because for the whole corpus this is by far the largest array.
    counts /= counts.sum(axis=0)
    np.log(counts, out=counts)

    def guess(question: np.ndarray) -> int:
        scores = np.log(prior) + counts[question[~is_entity[question]]].sum(axis=0)
        return int(corpus.entity_ids[scores.argmax()])

    return guess
