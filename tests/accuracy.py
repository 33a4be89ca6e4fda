"""How far a result may be from the truth: as far as the reference is, not a fixed number.

The order of sums, fused multiply-adds and the width of vectors are the processor's, so rounding
errors are too; and a problem multiplies them by its own condition, such as 1 / sqrt(ε) where a
variance is near zero. A tolerance that one machine meets may thus fail on the next.

The criterion: the truth is the reference in float64. The reference's own error is its largest on
the problem as it is and on up to `NUDGES` copies, whose every number moves by up to one unit in the
last place, which is what any rounding could do. A result may be off by `ALLOWANCE` times that, plus
`FLOOR` units in the last place of the largest number.

In float64 the truth is the reference's result, whose own roundings are unknown, so the copies move
by many units: there the question is whether two formulae agree, not how well either is rounded.

Why copies: a single error is near zero by chance now and then. Of normal errors, one in six is
more than four times another, but one in a million more than four times the largest of 17 others.

Short problems in float64 are compared with fixed tolerances elsewhere, 1e-9 or less: with 20 seeds
no error was above a fiftieth of them.
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
UNITS = {torch.bfloat16: 1, torch.float32: 1, torch.float64: 256}

Results = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def assert_as_accurate(
    compute: Callable[[Any], Results], reference: Callable[[Any], Results], problem: Any
) -> None:
    """That `compute(problem)` is as near to the truth as `reference(problem)`, tensor by tensor.

    Args:
        compute: what is tested; from a problem to a tensor, or a sequence or mapping of some.
        reference: the same by other means, in float64 too.
        problem: tensors, those of floats in float32 or bfloat16, or all in float64, in any nest of
            dicts, lists and tuples. A number that two parts of the problem share is rounded in both
            alike, so what could be rounded by itself should be there by itself.
    """
    truth = _by_name(reference(in_double(problem)))
    found = _by_name(compute(problem))
    errors = _errors(found, truth)
    own = dict.fromkeys(truth, 0.0)
    beyond = {}
    copies = (_nudged(problem, seed) for seed in range(NUDGES))
    for copy in itertools.chain([problem], copies):
        for name, error in _errors(_by_name(reference(copy)), truth).items():
            assert math.isfinite(error), f"{name}: the reference is not finite"
            own[name] = max(own[name], error)
        beyond = {
            name: (error, own[name])
            for name, error in errors.items()
            if not error <= ALLOWANCE * own[name] + rounding(truth[name], FLOOR, found[name].dtype)
        }
        if not beyond:  # further copies could only allow more
            return
    raise AssertionError(f"by name, the error and the reference's own: {beyond}")


def assert_rounded(found: Tensor, truth: Tensor, operations: int) -> None:
    """That nothing is off by more than so many roundings of the largest number in `truth`.

    For a result of few operations, whose roundings can be counted.
    """
    (error,) = _errors({"": found}, {"": truth.double()}).values()
    allowed = rounding(truth, operations, found.dtype)
    assert error <= allowed, f"off by {error:.3g}, more than {operations} roundings: {allowed:.3g}"


def rounding(like: Tensor, units: float, dtype: torch.dtype) -> float:
    """So many units in the last place of the largest number of `like`, counted in `dtype`."""
    return units * torch.finfo(dtype).eps * like.abs().max().item()


def in_double(problem: Any) -> Any:
    """The same problem in float64; a leaf stays a leaf."""
    return mapped(problem, lambda values: values.double())


def _nudged(problem: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def move(values: Tensor) -> Tensor:
        direction = 2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1
        step = UNITS[values.dtype] * torch.finfo(values.dtype).eps
        return (values.double() * (1 + step * direction)).to(values.dtype)

    return mapped(problem, move)


def mapped(problem: Any, change: Callable[[Tensor], Tensor], leaves: bool = True) -> Any:
    """A copy in which `change` was applied to all tensors of floats.

    Args:
        leaves: the changed tensors are leaves, as what they were. If not, they depend on what they
            were, and other tensors are changed too.
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
    """By name, the largest difference; infinite where there is no finite number to compare."""
    assert found.keys() == truth.keys()
    errors = {}
    for name, value in found.items():
        assert value.shape == truth[name].shape, name
        difference = (value.double() - truth[name]).abs().max().item() if value.numel() else 0.0
        errors[name] = math.inf if math.isnan(difference) else difference
    return errors
