"""Data sets as NumPy arrays: their sources, hashes and formats. Independent of models."""

from bnrnn.datasets.batches import bucketed_batches, even_batches
from bnrnn.datasets.characters import CharacterCorpus
from bnrnn.datasets.cnn.batches import pad, relabel_entities
from bnrnn.datasets.cnn.corpus import UNK, QuestionCorpus, QuestionSplit
from bnrnn.datasets.cnn.load import load_cnn
from bnrnn.datasets.cnn.questions import Question, read_question
from bnrnn.datasets.cnn.select import select_sentences
from bnrnn.datasets.mnist import MNIST, load_mnist
from bnrnn.datasets.ptb import load_ptb
from bnrnn.datasets.text import load_pydocs, load_text
from bnrnn.datasets.text8 import load_text8
from bnrnn.datasets.words import WordCorpus, load_ptb_words

__all__ = [
    "MNIST",
    "UNK",
    "CharacterCorpus",
    "Question",
    "QuestionCorpus",
    "QuestionSplit",
    "WordCorpus",
    "bucketed_batches",
    "even_batches",
    "load_cnn",
    "load_mnist",
    "load_ptb",
    "load_ptb_words",
    "load_pydocs",
    "load_text",
    "load_text8",
    "pad",
    "read_question",
    "relabel_entities",
    "select_sentences",
]
