"""A text as a sequence of symbol indices, in three parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnrnn.errors import DataError

CHUNK = 1 << 20  # characters encoded at a time, to bound the memory for a large text


@dataclass(frozen=True, eq=False)
class CharacterCorpus:
    """A text over `symbols`, in order of their code points: index k stands for `symbols[k]`.

    train, valid, test: (characters,), uint8 up to 256 symbols, else the next wider unsigned type.
    whole: False where only a part of the published corpus is at hand.
    """

    name: str
    symbols: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    whole: bool = True

    def decode(self, indices: np.ndarray | Sequence[int]) -> str:
        """indices (n,), each below the number of symbols -> n characters."""
        points = _code_points(self.symbols)[np.asarray(indices, dtype=np.int64)]
        return points.tobytes().decode("utf-32-le")

    def encode(self, text: str) -> np.ndarray:
        """n characters -> indices (n,), of the dtype of `train`.

        Raises:
            DataError: a character is not among the symbols.
        """
        return encode(text, self.symbols)


def build_corpus(name: str, parts: Sequence[str], symbols: str | None = None) -> CharacterCorpus:
    """A corpus of the train, valid and test text; `symbols`: those that occur.

    Raises:
        DataError: a part is empty, or has a character that is not in `symbols`.
    """
    if not all(parts):
        raise DataError(
            f"{name} is too short: of its {sum(map(len, parts))} characters none are left for "
            "validation or test; use a longer text"
        )
    symbols = symbols or "".join(sorted(set[str]().union(*parts)))
    train, valid, test = (encode(part, symbols) for part in parts)
    return CharacterCorpus(name, symbols, train, valid, test)


def split(text: str) -> tuple[str, str, str]:
    """The first 90 %, the next 5 % and the last 5 %."""
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return text[:first], text[first:second], text[second:]


def encode(text: str, symbols: str) -> np.ndarray:
    """The index of each character in `symbols`, which is sorted: (n,), the smallest unsigned type.

    Raises:
        DataError: a character is not among the symbols.
    """
    known = _code_points(symbols)
    indices = np.empty(len(text), np.min_scalar_type(len(symbols) - 1))
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


def _code_points(text: str) -> np.ndarray:
    # "surrogatepass": a command line that is not UTF-8 brings surrogates; they are just unknown.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
