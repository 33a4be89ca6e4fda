"""Word-level Penn Treebank, as Mikolov prepared it and Zaremba et al. (2014) used it."""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnrnn.datasets import ptb

END = "<eos>"  # end of a line; an ordinary word of the vocabulary


@dataclass(frozen=True, eq=False)
class WordCorpus:
    """A text as indices into `words` (most frequent first), in three parts.

    train, valid, test: (words,), uint16.
    """

    name: str
    words: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def load_ptb_words(data_dir: Path) -> WordCorpus:
    """Load Penn Treebank from `data_dir/ptb`; download it if it is missing. It has 10,000 words.

    Each line ends with the word `END`: 929,589 / 73,760 / 82,430 words. The files already replace
    rare words by "<unk>", so the training text contains every word of the other two.

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
    """Cut the text (words,) into `streams` consecutive pieces of equal length: (streams, length).

    The remaining words at the end, fewer than there are streams, are dropped.
    """
    length = len(text) // streams
    return text[: streams * length].reshape(streams, length)


def windows(length: int, size: int, whole: bool = True) -> list[tuple[int, int]]:
    """Return the (begin, end) of windows of `size` words; every word in a window has a successor.

    Args:
        length: words in the stream.
        whole: leave out the last window if it is shorter than `size`.
    """
    edges = [*range(0, length - 1, size), length - 1]
    found = list(itertools.pairwise(edges))
    return [(a, b) for a, b in found if b - a == size or (b > a and not whole)]
