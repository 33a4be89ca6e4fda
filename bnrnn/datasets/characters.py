"""A text as a sequence of symbol indices, in three parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnrnn.errors import DataError

CHUNK = 1 << 20  # characters encoded at a time, to bound the memory for a large text


@dataclass(frozen=True, eq=False)
class CharacterCorpus:
    """A text as indices: index k stands for `symbols[k]`; symbols are sorted by code point.

    train, valid, test: (characters,), uint8 up to 256 symbols, else the next wider unsigned type.
    whole: False if only part of the published corpus was found.
    """

    name: str
    symbols: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    whole: bool = True

    def decode(self, indices: np.ndarray | Sequence[int]) -> str:
        """Convert indices (n,), each below the number of symbols, to n characters."""
        points = _code_points(self.symbols)[np.asarray(indices, dtype=np.int64)]
        return points.tobytes().decode("utf-32-le")

    def encode(self, text: str) -> np.ndarray:
        """Convert n characters to indices (n,) with the dtype of `train`.

        Raises:
            DataError: a character is not one of the symbols.
        """
        return encode(text, self.symbols)


def split_corpus(name: str, symbols: str, text: np.ndarray) -> CharacterCorpus:
    """Split a text of indices (characters,) into its first 90 %, next 5 % and last 5 %.

    Raises:
        DataError: the text is too short.
    """
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    parts = text[:first], text[first:second], text[second:]
    if not all(map(len, parts)):
        raise DataError(
            f"{name} is too short: of its {len(text)} characters none are left for validation or "
            "test; use a longer text"
        )
    return CharacterCorpus(name, symbols, *parts)


def encode(text: str, symbols: str) -> np.ndarray:
    """Return each character's index in the sorted `symbols`: (n,), in the smallest unsigned type.

    Raises:
        DataError: a character is not one of the symbols.
    """
    known = _code_points(symbols)
    indices = np.empty(len(text), index_type(symbols))
    for start in range(0, len(text), CHUNK):
        points = _code_points(text[start : start + CHUNK])
        found = np.minimum(np.searchsorted(known, points), len(known) - 1)
        unknown = np.flatnonzero(known[found] != points)
        if len(unknown):
            position = start + int(unknown[0])
            raise DataError(
                f"character {text[position]!r} at position {position} is not one of the "
                f"{len(symbols)} symbols of the corpus; leave it out"
            )
        indices[start : start + CHUNK] = found
    return indices


def index_type(symbols: str) -> np.dtype:
    """Return the smallest unsigned type for indices into `symbols`."""
    return np.min_scalar_type(max(0, len(symbols) - 1))


def _code_points(text: str) -> np.ndarray:
    # "surrogatepass": a command-line argument that is not UTF-8 contains surrogates; the caller
    # reports them as unknown characters.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
