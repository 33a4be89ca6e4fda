"""Select the sentences of a passage that match its question best."""

import math
import re
from collections.abc import Iterable

from bnrnn.datasets.cnn.questions import PLACEHOLDER

SENTENCE_ENDS = (".", "?", "!")
_STOP = """
a about after against all also an and any are as at be because been before being but by can could
did do does for from had has have he her hers him his how i if in into is it its just may more
most n't no not of on one or other our out over said says she should so some such than that the
their them then there they this those to too up us was we were what when where which while who
whom why will with would you your 's
"""
STOP_WORDS = frozenset(_STOP.split())


def split_sentences(words: list[str]) -> list[list[str]]:
    """Split after each ".", "?" or "!" that is a separate word."""
    sentences, start = [], 0
    for position, word in enumerate(words, 1):
        if word in SENTENCE_ENDS or position == len(words):
            sentences.append(words[start:position])
            start = position
    return sentences


def select_sentences(passage: list[str], question: list[str], n: int = 4) -> list[str]:
    """Return the n sentences of the passage that match the question best, in passage order.

    The score of a sentence is the number of distinct content words it shares with the question,
    divided by the square root of the number of its distinct content words. Up to a constant, this
    is the cosine similarity of the two sets. Content words include entities and exclude
    `STOP_WORDS`, punctuation and the placeholder. Ties go to the earlier sentence. If fewer than n
    sentences match, others are added, so a passage of at most n sentences is returned whole. The
    authors' selector is not published; an early draft of the paper mentions string matching and a
    normalised score, with n = 4.
    """
    sentences = split_sentences(passage)
    wanted = _content(question)

    def score(position: int) -> float:
        words = _content(sentences[position])
        return len(words & wanted) / math.sqrt(max(1, len(words)))

    # sorted() is stable, also in reverse.
    best = sorted(range(len(sentences)), key=score, reverse=True)[:n]
    return [word for position in sorted(best) for word in sentences[position]]


def _content(words: Iterable[str]) -> set[str]:
    return {
        word
        for word in words
        if word not in STOP_WORDS and word != PLACEHOLDER and re.search(r"\w", word)
    }
