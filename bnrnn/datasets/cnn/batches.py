"""Minibatches of passages and questions: order, padding and entity names."""

import math
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


def bucketed_batches(
    lengths: np.ndarray,
    batch_size: int,
    generator: np.random.Generator | None,
    buckets: int = 12,
) -> list[np.ndarray]:
    """Return the example indices of each batch; passages in a batch have similar lengths.

    lengths: (n,).

    With a generator (training): shuffle the examples, sort groups of `buckets` batches by length,
    cut them into batches of `batch_size`, and shuffle the batches. Every example is used at most
    once; n modulo `batch_size` random examples are left out.

    Without a generator (evaluation): use every example once, longest first, in batches of nearly
    equal size. Each batch has at least 2 examples, because one example has no batch statistics.
    (With a batch_size of 2 and odd n, one batch has 3. With a batch_size of 1, or n = 1, batches
    have one example.)
    """
    lengths = np.asarray(lengths)
    n = len(lengths)
    if generator is None:
        if n == 0:
            return []
        count = math.ceil(n / batch_size)
        if batch_size > 1:
            count = max(1, min(count, n // 2))
        return np.array_split(np.argsort(-lengths.astype(np.int64), kind="stable"), count)
    # Drop examples before sorting; dropped after it, they would be the longest of the last bucket.
    order = generator.permutation(n)[: n - n % batch_size]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), buckets * batch_size):
        bucket = order[start : start + buckets * batch_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


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
