"""Text as arrays of symbol indices, in three splits."""

from dataclasses import dataclass

import numpy as np

from bnrnn.datasets.cache import Arrays
from bnrnn.errors import DataError


@dataclass(frozen=True)
class CharacterCorpus:
    """Symbol k is `symbols[k]`, in code point order; train, valid, test are 1-d index arrays."""

    name: str
    symbols: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """
        Raises:
            DataError: a character is not among the symbols.
        """
        unknown = sorted(set(text) - set(self.symbols))
        if unknown:
            raise DataError(f"{unknown[0]!r} is not among the symbols of {self.name}")
        return np.array([self.symbols.index(character) for character in text], np.int64)

    def decode(self, indices: np.ndarray) -> str:
        return "".join(self.symbols[index] for index in indices)


def index_splits(splits: dict[str, str]) -> Arrays:
    """Each split as indices into the sorted symbols of all, and the symbols' code points."""
    points = {
        name: np.frombuffer(text.encode("utf-32-le"), np.uint32) for name, text in splits.items()
    }
    symbols = np.unique(np.concatenate(list(points.values())))
    dtype = np.min_scalar_type(max(len(symbols) - 1, 0))
    indices = {name: np.searchsorted(symbols, p).astype(dtype) for name, p in points.items()}
    return {**indices, "symbols": symbols}


def corpus_from_arrays(name: str, arrays: Arrays) -> CharacterCorpus:
    symbols = "".join(chr(point) for point in arrays["symbols"])
    return CharacterCorpus(name, symbols, arrays["train"], arrays["valid"], arrays["test"])


def split_in_order(name: str, text: str, valid: float = 0.05, test: float = 0.05) -> dict[str, str]:
    """The last `test` of the text for testing, the part before it for validation.

    Raises:
        DataError: a split would be empty.
    """
    a = round(len(text) * (1 - valid - test))
    b = round(len(text) * (1 - test))
    splits = {"train": text[:a], "valid": text[a:b], "test": text[b:]}
    if not all(splits.values()):
        raise DataError(f"{name} has {len(text)} characters: too few to split in three")
    return splits
