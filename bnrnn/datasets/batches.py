"""The examples of each minibatch: consecutive ones, or ones of similar lengths."""

import itertools

import numpy as np


def even_batches(n: int, batch_size: int) -> list[slice]:
    """Split 0..n, in order, into batches of nearly equal size, as many as `batch_count`."""
    edges = np.linspace(0, n, batch_count(n, batch_size) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def batch_count(n: int, batch_size: int) -> int:
    """Return the number of batches of at most `batch_size` that n examples need.

    A batch of one example has no batch statistics. So with a batch_size of 2 and odd n there is one
    batch fewer, and one has 3 examples. With a batch_size of 1, or n = 1, batches have one example.
    """
    count = -(-n // batch_size)
    return min(count, n // 2) if batch_size > 1 and n > 1 else count


def bucketed_batches(
    lengths: np.ndarray,
    batch_size: int,
    generator: np.random.Generator | None,
    buckets: int = 12,
) -> list[np.ndarray]:
    """Return the example indices of each batch; examples in a batch have similar lengths.

    lengths: (n,).

    With a generator (training): shuffle the examples, sort groups of `buckets` batches by length,
    cut them into batches of `batch_size`, and shuffle the batches. Every example is used at most
    once; n modulo `batch_size` random examples are left out.

    Without a generator (evaluation): use every example once, longest first, in batches of nearly
    equal size, as many as `batch_count`.
    """
    lengths = np.asarray(lengths)
    n = len(lengths)
    if generator is None:
        longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
        return np.array_split(longest_first, batch_count(n, batch_size)) if n > 0 else []
    # Drop examples before sorting; dropped after it, they would be the longest of the last bucket.
    order = generator.permutation(n)[: n - n % batch_size]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), buckets * batch_size):
        bucket = order[start : start + buckets * batch_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]
