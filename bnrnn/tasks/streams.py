"""Independent streams of random numbers, one for each purpose."""

from enum import IntEnum

import numpy as np

LIMIT = 1 << 32  # a larger epoch or index takes two words of the key, so two keys could coincide


class Purpose(IntEnum):
    """The purpose of a stream. Results depend on the values: never change or reuse one."""

    RELABEL = 0  # the names of the entities in a training batch
    CALIBRATION_RELABEL = 1


def stream(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """Return the generator for one purpose in one batch of one epoch.

    Equal arguments give the same numbers, and different arguments independent ones. This does not
    hold for `default_rng([seed, epoch, index])`, which ignores zeros at the end of the list.

    Args:
        seed: of the run, 0 to 2**128 - 1.
        epoch, index: 0 to 2**32 - 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (0 <= seed < 1 << 128 and 0 <= epoch < LIMIT and 0 <= index < LIMIT):
        raise ValueError(f"no stream for seed {seed}, epoch {epoch}, index {index}")
    key = (int(purpose), epoch, index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
