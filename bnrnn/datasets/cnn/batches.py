"""Minibatches of passages and questions: their order, their padding, their entity names."""

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

    passage (T, B), question (S, B), answers (B,): ids below 2**31 of any integer type, not changed.
    entity_ids (E,): all entities of the vocabulary, each once. One uniformly random permutation of
    them holds for the whole batch, as in the authors' code; the paper has one for each example.
    Returns the three renamed arrays, with their own types.
    """
    if len(entity_ids) == 0:
        return passage, question, answers
    permutation = generator.permuted(entity_ids[None], axis=1)[0]
    # The place of each id among the entities; -1: not an entity. Long enough for every id.
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
    """The indices of the examples in each batch; a batch holds passages of similar length.

    lengths: (n,). With a generator, for training: shuffle the examples, sort every `buckets`
    batches of them by length, cut them into batches of `batch_size`, shuffle the batches. Every
    example is used at most once; n modulo `batch_size` random ones are left out.
    Without a generator, for evaluation: every example once, longest first, in batches of nearly
    equal size with at least 2 examples each, because one example has no batch statistics. (With a
    batch_size of 2 and an odd n one batch has 3; a batch_size of 1, or n = 1, gives single
    examples.)
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
    # Drop examples before sorting; afterwards they would be the longest of the last bucket.
    order = generator.permutation(n)[: n - n % batch_size]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), buckets * batch_size):
        bucket = order[start : start + buckets * batch_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids side by side: ids (T, B) int64 and lengths (B,) int64, T the longest.

    A row is followed by zeros.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    steps = int(lengths.max(initial=0))
    ids = np.zeros((steps, len(rows)), np.int64)
    for column, row in enumerate(rows):
        ids[: len(row), column] = row
    return ids, lengths
