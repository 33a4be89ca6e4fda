"""Where data come from, their hashes and formats. Arrays out; nothing here knows of models."""

from bnrnn.datasets.cache import cached_arrays
from bnrnn.datasets.characters import CharacterCorpus
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.mnist import MNIST, load_mnist
from bnrnn.datasets.ptb import load_ptb
from bnrnn.datasets.text import load_pydocs, load_text
from bnrnn.datasets.text8 import load_text8

__all__ = [
    "MNIST", "CharacterCorpus", "RemoteFile", "cached_arrays", "fetch", "load_mnist", "load_ptb",
    "load_pydocs", "load_text", "load_text8",
]  # fmt: skip
