"""Frames from a small hidden Markov model, for tests and trials without speech data.

48 classes: 16 phones of three states. A state is followed by itself or by the next state, and a
phone by one of four phones. A state emits 24 Gaussian features with variance 1 about its mean. The
means are so close that a classifier of single frames errs on about half of them. Neighbouring
frames resolve the rest, so a recurrent network has something to learn.
"""

import numpy as np

from bnrnn.datasets.frames import FrameCorpus

VERSION = 1  # of the generated frames; increase it when they change
PHONES, STATES, FEATURES = 16, 3, 24
CLASSES = PHONES * STATES
FOLLOWERS = 4
STAY = 0.75  # probability of staying in a state for one more frame
SPREAD = 0.5  # standard deviation of the means
LEAST, MOST = 8, 24  # phones per utterance


class HmmSplit:
    """n utterances; each is a function of its number and the number of the split."""

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
    """Generate n training utterances, and n / 10 each for dev and test, but at least 24."""
    held_out = max(24, n // 10)
    return FrameCorpus(
        HmmSplit(0, n), HmmSplit(1, held_out), HmmSplit(2, held_out),
        FEATURES, CLASSES, f"hmm {VERSION} {n}",
    )  # fmt: skip


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(VERSION, spawn_key=key))
