"""Comparison of results with a tolerance derived from the reference's own error.

The order of sums, fused multiply-adds and vector widths depend on the processor, and so do rounding
errors. A problem also amplifies them by its condition, such as 1 / sqrt(ε) if a variance is near
zero. A fixed tolerance that holds on one machine may therefore fail on another.

The criterion is as follows. The truth is the result of the reference in float64. The reference's
own error is its largest error on the problem itself and on up to `NUDGES` copies of it. In each
copy, every number is perturbed by up to one unit in the last place, which is the effect of one
rounding. A result may be off by `ALLOWANCE` times that error, plus `FLOOR` units in the last place
of the largest number.

If the result itself is in float64, the truth is the reference's result, whose rounding errors are
unknown. The copies are then perturbed by many units: the comparison only shows whether two formulae
agree, not how accurately each is rounded.

Copies are needed because a single error is sometimes near zero by chance. If errors are normal, one
in six is more than four times another, but only one in a million is more than four times the
largest of 17 others.

Short problems in float64 are compared elsewhere with fixed tolerances of 1e-9 or less. With 20
seeds, no error exceeded a fiftieth of them.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALLOWANCE = 4
FLOOR = 4
NUDGES = 16
UNITS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 1, torch.float64: 256}

Results = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def assert_as_accurate(
    compute: Callable[[Any], Results], reference: Callable[[Any], Results], problem: Any,
    rounded_to: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Assert that each tensor of `compute(problem)` is as accurate as that of `reference(problem)`.

    Args:
        compute: the function under test, from a problem to a tensor or a sequence or mapping of
            tensors.
        reference: another implementation of the same, which also works in float64.
        problem: any nesting of dicts, lists and tuples of tensors. All floating-point tensors are
            in one dtype, float32 or narrower, or all are in float64. A number that is used in
            several places is perturbed in the same way everywhere, so numbers that could be rounded
            independently must be separate.
        rounded_to: the dtype to which both round within; None: that of the problem. The copies are
            perturbed by its units.
    """
    truth = _by_name(reference(in_double(problem)))
    found = _by_name(compute(problem))
    errors = _errors(found, truth)
    own = dict.fromkeys(truth, 0.0)
    beyond = {}
    copies = (_nudged(problem, seed, rounded_to) for seed in range(NUDGES))
    for copy in itertools.chain([problem], copies):
        for name, error in _errors(_by_name(reference(copy)), truth).items():
            assert math.isfinite(error), f"{name}: the reference is not finite"
            own[name] = max(own[name], error)
        beyond = {
            name: (error, own[name])
            for name, error in errors.items()
            if not error <= ALLOWANCE * own[name] + rounding(truth[name], FLOOR, found[name].dtype)
        }
        if not beyond:  # further copies could only increase the tolerance
            return
    raise AssertionError(f"by name, the error and the reference's own: {beyond}")


def assert_rounded(found: Tensor, truth: Tensor, operations: int) -> None:
    """Assert that no error exceeds `operations` roundings of the largest number in `truth`.

    This is for results of few operations, whose roundings can be counted.
    """
    (error,) = _errors({"": found}, {"": truth.double()}).values()
    allowed = rounding(truth, operations, found.dtype)
    assert error <= allowed, f"off by {error:.3g}, more than {operations} roundings: {allowed:.3g}"


def rounding(like: Tensor, units: float, dtype: torch.dtype) -> float:
    """`units` units in the last place, in `dtype`, of the largest number of `like`."""
    return units * torch.finfo(dtype).eps * like.abs().max().item()


def in_double(problem: Any) -> Any:
    """The same problem in float64; leaves stay leaves."""
    return mapped(problem, lambda values: values.double())


def _nudged(problem: Any, seed: int, rounded_to: torch.dtype | None) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def move(values: Tensor) -> Tensor:
        direction = 2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1
        dtype = rounded_to or values.dtype
        step = UNITS[dtype] * torch.finfo(dtype).eps
        return (values.double() * (1 + step * direction)).to(values.dtype)

    return mapped(problem, move)


def mapped(problem: Any, change: Callable[[Tensor], Tensor], leaves: bool = True) -> Any:
    """A copy of the problem with `change` applied to all floating-point tensors.

    Args:
        leaves: make the changed tensors leaves. Otherwise they depend on the original tensors, and
            tensors of other dtypes are changed too.
    """
    if isinstance(problem, Tensor):
        if not leaves:
            return change(problem)
        if not problem.is_floating_point():
            return problem
        return change(problem.detach()).requires_grad_(problem.requires_grad)
    if isinstance(problem, Mapping):
        return {name: mapped(value, change, leaves) for name, value in problem.items()}
    if isinstance(problem, tuple) and hasattr(problem, "_fields"):  # a NamedTuple
        return type(problem)(*(mapped(value, change, leaves) for value in problem))
    if isinstance(problem, list | tuple):
        return type(problem)(mapped(value, change, leaves) for value in problem)
    return problem


def _by_name(results: Results) -> dict[str, Tensor]:
    if isinstance(results, Tensor):
        results = [results]
    if not isinstance(results, Mapping):
        results = {str(k): value for k, value in enumerate(results)}
    return {name: value.detach() for name, value in results.items()}


def _errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference in each tensor, by name; NaN counts as infinite."""
    assert found.keys() == truth.keys()
    errors = {}
    for name, value in found.items():
        assert value.shape == truth[name].shape, name
        difference = (value.double() - truth[name]).abs().max().item() if value.numel() else 0.0
        errors[name] = math.inf if math.isnan(difference) else difference
    return errors
