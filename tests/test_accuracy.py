"""The criterion of `tests.accuracy` accepts rounding errors and nothing else."""

import pytest
import torch

from tests.accuracy import assert_as_accurate, assert_rounded, in_double

pytestmark = pytest.mark.numeric
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def softmax(problem):
    return torch.softmax(problem["x"] @ problem["w"], 1)


def draw(dtype):
    return {"x": torch.randn(20, 30, dtype=dtype), "w": torch.randn(30, 10, dtype=dtype)}


@DTYPES
def test_another_order_of_the_same_sums_is_accurate(dtype):
    def blocked(problem):
        x, w = problem["x"], problem["w"]
        y = sum(x[:, k : k + 7] @ w[k : k + 7] for k in (21, 28, 7, 0, 14))
        return (y - y.logsumexp(1, keepdim=True)).exp()

    assert_as_accurate(blocked, softmax, draw(dtype))


@pytest.mark.parametrize(("dtype", "off_by"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_a_slight_difference_is_not(dtype, off_by):
    def off(problem):
        return softmax(problem) * (1 + off_by)

    with pytest.raises(AssertionError, match="the error and the reference's own"):
        assert_as_accurate(off, softmax, draw(dtype))


def test_neither_is_a_sum_in_half_precision():
    def half(problem):
        return softmax({name: value.bfloat16() for name, value in problem.items()}).float()

    with pytest.raises(AssertionError, match="the error and the reference's own"):
        assert_as_accurate(half, softmax, draw(torch.float32))


def test_an_ill_conditioned_problem_allows_what_it_multiplies():
    def difference(x):
        return (x[0] + 1e4) - (x[1] + 1e4)

    def otherwise(x):
        return ((x[0] + 5e3) - (x[1] + 1e4)) + 5e3

    x = torch.randn(2, 100)
    assert_as_accurate(otherwise, difference, x)
    with pytest.raises(AssertionError, match="roundings"):
        assert_rounded(otherwise(x), difference(in_double(x)), operations=4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_wrong(value):
    problem = draw(torch.float32)
    with pytest.raises(AssertionError):
        assert_as_accurate(lambda p: softmax(p).fill_(value), softmax, problem)
    with pytest.raises(AssertionError, match="the reference is not finite"):
        assert_as_accurate(
            softmax, lambda p: softmax(p).fill_(value) if p["x"].dtype != torch.float64 else
            softmax(p), problem,
        )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_rounded(torch.full((3,), value), torch.ones(3), operations=10)


def test_results_of_other_names_or_shapes_are_wrong():
    problem = draw(torch.float32)
    with pytest.raises(AssertionError):
        assert_as_accurate(lambda p: softmax(p)[:, :1], softmax, problem)
    with pytest.raises(AssertionError):
        assert_as_accurate(lambda p: [softmax(p)] * 2, softmax, problem)
