"""Where data come from, their hashes and formats. Arrays out; nothing here knows of models."""

from bnrnn.datasets.cache import cached_arrays, cached_folder
from bnrnn.datasets.characters import CharacterCorpus
from bnrnn.datasets.cnn import (
    NUM,
    UNK,
    QuestionCorpus,
    QuestionSplit,
    Ragged,
    four_sentence_items,
    load_cnn,
    question_corpus,
    select_sentences,
)
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.mnist import MNIST, load_mnist
from bnrnn.datasets.ptb import load_ptb
from bnrnn.datasets.question_batches import bucketed_batches, pad, relabel_entities
from bnrnn.datasets.questions import (
    Question,
    QuestionError,
    format_question,
    parse_question,
    read_questions,
)
from bnrnn.datasets.text import load_pydocs, load_text
from bnrnn.datasets.text8 import load_text8

__all__ = [
    "MNIST",
    "NUM",
    "UNK",
    "CharacterCorpus",
    "Question",
    "QuestionCorpus",
    "QuestionError",
    "QuestionSplit",
    "Ragged",
    "RemoteFile",
    "bucketed_batches",
    "cached_arrays",
    "cached_folder",
    "fetch",
    "format_question",
    "four_sentence_items",
    "load_cnn",
    "load_mnist",
    "load_ptb",
    "load_pydocs",
    "load_text",
    "load_text8",
    "pad",
    "parse_question",
    "question_corpus",
    "read_questions",
    "relabel_entities",
    "select_sentences",
]  # fmt: skip
