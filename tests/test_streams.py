"""Streams of random numbers are distinct and independent."""

import itertools

import numpy as np
import pytest

from bnrnn.tasks.streams import LIMIT, Purpose, stream

NUMBERS = (0, 1, 2, 5, LIMIT - 1)


def first(*arguments) -> tuple[int, ...]:
    return tuple(stream(*arguments).integers(1 << 63, size=4).tolist())


def test_a_stream_is_a_function_of_its_arguments():
    for arguments in itertools.product((0, 3), Purpose, (0, 7), (0, 9)):
        assert first(*arguments) == first(*arguments)
    assert first(5, Purpose.RELABEL) == first(5, Purpose.RELABEL, 0, 0)


def test_no_two_streams_are_the_same():
    seeds = (0, 1, 2, LIMIT - 1, LIMIT, LIMIT + 1, (1 << 64) + 1, (1 << 128) - 1)
    arguments = list(itertools.product(seeds, Purpose, NUMBERS, NUMBERS))
    assert len({first(*each) for each in arguments}) == len(arguments)


def test_a_batch_does_not_share_the_stream_of_its_epoch():
    """`default_rng([seed, epoch])` and `default_rng([seed, epoch, 0])` would share one."""
    old = [np.random.default_rng(key).integers(1 << 63, size=4) for key in ([3, 1], [3, 1, 0])]
    np.testing.assert_array_equal(*old)
    assert all(first(3, purpose, 1) != tuple(old[0].tolist()) for purpose in Purpose)
    assert first(3, Purpose.CALIBRATION_RELABEL, 1) != first(3, Purpose.RELABEL, 1)


def test_streams_are_not_correlated():
    keys = itertools.product((0, 1), Purpose, (0, 1), (0, 1))
    draws = np.array([stream(*key).standard_normal(10_000) for key in keys])
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.05  # five standard deviations


@pytest.mark.parametrize(
    ("seed", "epoch", "index"),
    [(-1, 0, 0), (1 << 128, 0, 0), (0, -1, 0), (0, LIMIT, 0), (0, 0, -1), (0, 0, LIMIT)],
)
def test_arguments_out_of_range(seed: int, epoch: int, index: int):
    with pytest.raises(ValueError, match=f"seed {seed}, epoch {epoch}, index {index}"):
        stream(seed, Purpose.RELABEL, epoch, index)


def test_values_of_purposes_are_fixed():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "RELABEL": 0, "CALIBRATION_RELABEL": 1,
    }  # fmt: skip
