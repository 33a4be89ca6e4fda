"""Frames from a small hidden Markov model, for tests and trials without speech.

48 classes: 16 phones of three states, each followed by itself or the next; a phone is followed by
one of four. A state emits 24 features, Gaussian about its mean with variance 1. The means are so
close that whoever looks at one frame alone errs in about half of them; the neighbours tell the
rest, so that a recurrent network has something to learn.
"""

import numpy as np

from bnrnn.datasets.frames import FrameCorpus

VERSION = 1  # of the frames: raise it when they change
PHONES, STATES, FEATURES = 16, 3, 24
CLASSES = PHONES * STATES
FOLLOWERS = 4
STAY = 0.75  # probability of one more frame of a state
SPREAD = 0.5  # standard deviation of the means
LEAST, MOST = 8, 24  # phones an utterance


class HmmSplit:
    """n utterances; each is a function of the split's and its own number."""

    def __init__(self, part: int, n: int) -> None:
        self.part = part
        self.names = [f"hmm-{part}-{k}" for k in range(n)]
        generator = _generator(0, 0)
        self.means = (SPREAD * generator.standard_normal((CLASSES, FEATURES))).astype(np.float32)
        self.followers = np.stack(
            [generator.choice(PHONES, FOLLOWERS, replace=False) for _ in range(PHONES)]
        )
        self.lengths = np.array([len(self.targets(k)) for k in range(n)], np.int64)

    def targets(self, number: int) -> np.ndarray:
        return self._targets(_generator(1 + self.part, number))

    def features(self, number: int) -> np.ndarray:
        generator = _generator(1 + self.part, number)
        targets = self._targets(generator)
        noise = generator.standard_normal((len(targets), FEATURES), np.float32)
        return self.means[targets] + noise

    def speaker(self, number: int) -> str:
        return self.names[number]

    def _targets(self, generator: np.random.Generator) -> np.ndarray:
        phones = [int(generator.integers(PHONES))]
        for choice in generator.integers(FOLLOWERS, size=generator.integers(LEAST, MOST)):
            phones.append(int(self.followers[phones[-1], choice]))
        states = (STATES * np.array(phones)[:, None] + np.arange(STATES)).ravel()
        frames = generator.geometric(1 - STAY, len(states))
        return np.repeat(states, frames).astype(np.int32)


def generate_frames(n: int) -> FrameCorpus:
    """n training utterances, and a tenth as many, but 24 at least, for dev and for test."""
    held_out = max(24, n // 10)
    return FrameCorpus(
        HmmSplit(0, n), HmmSplit(1, held_out), HmmSplit(2, held_out),
        FEATURES, CLASSES, f"hmm {VERSION} {n}",
    )  # fmt: skip


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(VERSION, spawn_key=key))
