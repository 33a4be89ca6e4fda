"""Minibatches of passages and questions: padding and entity names."""

from collections.abc import Sequence

import numpy as np


def relabel_entities(
    passage: np.ndarray,
    question: np.ndarray,
    answers: np.ndarray,
    entity_ids: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rename the entities at random, so that a model cannot learn anything about a name.

    passage (T, B), question (S, B), answers (B,): ids below 2**31 of any integer type; they are not
    modified. entity_ids (E,): all entities of the vocabulary, each once. One uniformly random
    permutation of them is used for the whole batch, as in the authors' code; the paper uses one per
    example. Returns the three renamed arrays with their types unchanged.
    """
    if len(entity_ids) == 0:
        return passage, question, answers
    permutation = generator.permuted(entity_ids[None], axis=1)[0]
    # The index of each id among the entities; -1: not an entity. Long enough for every id.
    size = 1 + max(int(ids.max(initial=0)) for ids in (passage, question, answers, entity_ids))
    place = np.full(size, -1, np.int64)
    place[entity_ids] = np.arange(len(entity_ids))

    def renamed(ids: np.ndarray) -> np.ndarray:
        places = place[ids]
        return np.where(places >= 0, permutation[places], ids).astype(ids.dtype)

    return renamed(passage), renamed(question), renamed(answers)


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Stack rows of ids as columns, padded with zeros.

    Returns ids (T, B) int64, with T the longest length, and lengths (B,) int64.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    steps = int(lengths.max(initial=0))
    ids = np.zeros((steps, len(rows)), np.int64)
    for column, row in enumerate(rows):
        ids[: len(row), column] = row
    return ids, lengths
