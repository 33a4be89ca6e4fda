"""Penn Treebank by words, as Mikolov prepared it and Zaremba et al. (2014) used it."""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnrnn.datasets import ptb

END = "<eos>"  # of a line: a word like the others


@dataclass(frozen=True, eq=False)
class WordCorpus:
    """A text as indices into `words`, the commonest first, in three parts.

    train, valid, test: (words,), uint16.
    """

    name: str
    words: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def load_ptb_words(data_dir: Path) -> WordCorpus:
    """Penn Treebank from `data_dir/ptb`, downloaded if it is not there; 10,000 words.

    Each line ends with the word `END`: 929,589 / 73,760 / 82,430 words. Rare words are "<unk>" in
    the files already, so that the training text has all words of the other two.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    train, valid, test = (
        [word for line in lines for word in [*line.split(), END]]
        for lines in ptb.read_lines(data_dir)
    )
    counts = Counter(train)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    index = {word: k for k, word in enumerate(words)}
    parts = (np.array([index[word] for word in part], np.uint16) for part in (train, valid, test))
    return WordCorpus("Penn Treebank (words)", words, *parts)


def cut(text: np.ndarray, streams: int) -> np.ndarray:
    """The text (words,) in `streams` pieces of the same length, in order: (streams, length).

    What is left at its end, fewer words than there are streams, is dropped.
    """
    length = len(text) // streams
    return text[: streams * length].reshape(streams, length)


def windows(length: int, size: int, whole: bool = True) -> list[tuple[int, int]]:
    """Where windows of `size` words of a stream begin and end, each word of which has a successor.

    Args:
        length: of the stream.
        whole: leave out the last window where it is shorter.
    """
    edges = [*range(0, length - 1, size), length - 1]
    found = list(itertools.pairwise(edges))
    return [(a, b) for a, b in found if b - a == size or (b > a and not whole)]
