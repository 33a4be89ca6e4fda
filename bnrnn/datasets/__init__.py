"""Data sets as NumPy arrays: where they come from, their hashes, their formats."""

from bnrnn.datasets.corpus import CharacterCorpus
from bnrnn.datasets.mnist import MNIST, load_mnist
from bnrnn.datasets.ptb import load_ptb
from bnrnn.datasets.text import load_pydocs, load_text
from bnrnn.datasets.text8 import load_text8

__all__ = [
    "MNIST", "CharacterCorpus", "load_mnist", "load_ptb", "load_pydocs", "load_text", "load_text8",
]  # fmt: skip
