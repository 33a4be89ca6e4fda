"""Registration of the C++ operators with PyTorch's autograd, compiler and `vmap`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd  # pyright: ignore

from bnrnn.kernels import build, gradient, reference
from bnrnn.kernels.interface import (
    Moments,
    Noise,
    Normalization,
    TermMoments,
    Weights,
)

# The operators take _TENSORS tensors, of which the first _DIFFERENTIABLE have gradients, and then
# _SETTINGS settings.
_TENSORS, _DIFFERENTIABLE, _SETTINGS = 21, 10, 11
_GIVEN = slice(_DIFFERENTIABLE, _DIFFERENTIABLE + 6)


@functools.cache
def load() -> None:
    """Make `torch.ops.bnrnn_cpu` available, with its fake implementations and its gradient.

    Raises:
        BuildError: see `bnrnn.kernels.build.load`.
    """
    build.load()
    library = torch.library
    library.register_fake("bnrnn_cpu::forward", _fake_forward)
    library.register_fake("bnrnn_cpu::backward", _fake_backward)
    library.register_fake(
        "bnrnn_cpu::bernoulli",
        lambda key, stream, count, p: key.new_empty(count, dtype=torch.bool),
    )
    gradient.register(torch.ops.bnrnn_cpu.forward.default, _save, _backward)


def forward_without_graph(*arguments: Any) -> Any:
    """`torch.ops.bnrnn_cpu.forward` without autograd, which takes 10 us even if it has no part."""
    if torch.compiler.is_compiling():
        return torch.ops.bnrnn_cpu.forward(*arguments)
    with _AutoDispatchBelowAutograd():
        return torch.ops.bnrnn_cpu.forward(*arguments)


def _fake_forward(
    input: Tensor, h_0: Tensor, c_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Any
) -> Any:
    layer = (input, h_0, c_0, weight_ih, weight_hh, *rest)
    settings, (keep, grad_input) = layer[_TENSORS : _TENSORS + _SETTINGS], layer[-2:]
    (steps, batch), hidden = input.shape[:2], weight_hh.shape[1]
    by_batch, kinds = all(moments is None for moments in layer[_GIVEN]), _normalization(settings)
    new, moments, saved = weight_hh.new_empty, [], []
    for term, features in (("ih", 4 * hidden), ("hh", 4 * hidden), ("c", hidden)):
        if by_batch and kinds.takes_moments(term):
            rows = 1 if getattr(kinds, term) == "sequence" else steps
            moments += [new(rows, features), new(rows, features)]
    if keep:
        lanes = torch.ops.bnrnn_cpu.lanes(weight_hh.dtype == torch.float64)
        width = (batch + lanes - 1) // lanes * lanes
        narrow = weight_ih.shape[1] <= torch.ops.bnrnn_cpu.narrow()
        whole_sequence = by_batch and kinds.ih == "sequence"
        is_dense = input.is_floating_point() and (whole_sequence or grad_input or not narrow)
        term = (0, 4 * hidden, 0)
        is_scalar = input.is_floating_point() and weight_ih.shape[1] == 1
        is_one_term = kinds.sums or (kinds.ih == kinds.hh == "none" and not is_scalar)
        if is_dense and not is_one_term:
            term = (steps, 4 * hidden, 1 if batch == 1 and not whole_sequence else width)
        saved = [
            new(steps, 4 * hidden, width), *(new(steps + 1, hidden, width) for _ in range(2)),
            new(3 if kinds.has_layer else 0, steps, 2, width),
            new(*term),
        ]  # fmt: skip
    return new(steps, batch, hidden), new(batch, hidden), new(batch, hidden), moments, saved


def _normalization(settings: Any) -> Normalization:
    _, ih, hh, c, eps, eps_ih, *_ = settings
    return Normalization(ih, hh, c, eps, eps_ih)


def _fake_backward(*arguments: Any) -> Any:
    layer, (grad_input, grad_weight_ih) = arguments[3 : 3 + _TENSORS], arguments[-2:]
    wanted = [grad_input, True, True, grad_weight_ih, *[True] * 6]
    return tuple(
        layer[1].new_empty(t.shape if want and t is not None else 0)
        for t, want in zip(layer[:_DIFFERENTIABLE], wanted, strict=True)
    )


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    *_, moments, saved = output
    ctx.save_for_backward(*inputs[:_TENSORS], *moments, *saved)
    ctx.settings, ctx.found = inputs[_TENSORS : _TENSORS + _SETTINGS], len(moments)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> Any:
    grads = grads[:3]  # of output, h_n and c_n; a loss cannot depend on the other results
    kept = ctx.saved_tensors  # read once: checkpointing unpacks the tensors at each access
    layer, rest = kept[:_TENSORS], kept[_TENSORS:]
    moments, saved = iter(rest[: ctx.found]), rest[ctx.found :]
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    if torch.is_grad_enabled():  # create_graph
        found = _backward_of_reference(grads, layer, ctx.settings, needed)
    else:
        tensors = list(layer)
        if ctx.found:
            kinds = _normalization(ctx.settings)
            tensors[_GIVEN] = [
                next(moments) if kinds.takes_moments(term) else None
                for term in TermMoments._fields
                for _ in range(2)
            ]
        found = torch.ops.bnrnn_cpu.backward(
            *grads, *tensors, *ctx.settings, ctx.found > 0, *saved, needed[0], needed[3]
        )
    of_tensors = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    return *of_tensors, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


def _backward_of_reference(
    grads: Any, layer: Any, settings: Any, needed: Any
) -> list[Tensor | None]:
    """The gradients from the reference kernel's graph, which can be differentiated again."""
    aliases: list[Any] = [t if t is None else t.view_as(t) for t in layer]
    input, h_0, c_0, *weights = aliases[:_DIFFERENTIABLE]
    given, (lengths, *masks) = aliases[_GIVEN], aliases[_GIVEN.stop :]
    count_padding, *_, bfloat16 = settings
    noise = Noise(*settings[-5:-1], *masks)
    moments = [Moments(*given[i : i + 2]) if given[i] is not None else None for i in (0, 2, 4)]
    results = reference.recurrence(
        input, h_0, c_0, Weights(*weights), _normalization(settings),
        population=TermMoments(*moments) if any(moments) else None,
        lengths=lengths, count_padding=count_padding, noise=noise, bfloat16=bfloat16,
    )[:3]  # fmt: skip
    return reference.gradients(results, grads, aliases, needed)
