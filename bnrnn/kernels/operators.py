"""The C++ operators as PyTorch's autograd, compiler and `vmap` see them."""

import functools
from typing import Any

import torch
from torch import Tensor

from bnrnn.kernels import build, reference
from bnrnn.kernels.interface import (
    Moments,
    Normalization,
    TermMoments,
    Weights,
)

_TENSORS, _DIFFERENTIABLE = 17, 10  # so many of the operators' arguments, from the first on
_GAMMAS = slice(6, 9)


@functools.cache
def load() -> None:
    """Make `torch.ops.bnrnn_cpu` available, with all that PyTorch must know of it.

    Raises:
        BuildError: see `bnrnn.kernels.build.load`.
    """
    build.load()
    library = torch.library
    library.register_fake("bnrnn_cpu::forward", _fake_forward)
    library.register_fake("bnrnn_cpu::backward", _fake_backward)
    library.register_fake("bnrnn_cpu::multiply", torch.mm)
    library.register_autograd("bnrnn_cpu::forward", _backward, setup_context=_save)


def _fake_forward(
    input: Tensor, h_0: Tensor, c_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Any
) -> Any:
    _, gamma_ih, gamma_hh, gamma_c, _, *given = rest[:11]
    sequence, sums, keep, grad_input = rest[13], rest[14], rest[17], rest[18]
    (steps, batch), hidden = input.shape[:2], weight_hh.shape[1]
    by_batch = all(moments is None for moments in given)
    sequence = sequence and by_batch and gamma_ih is not None
    new, moments, saved = weight_hh.new_empty, [], []
    for gamma, rows in ((gamma_ih, 1 if sequence else steps), (gamma_hh, steps), (gamma_c, steps)):
        if gamma is not None and by_batch:
            moments += [new(rows, len(gamma)), new(rows, len(gamma))]
    if keep:
        lanes = torch.ops.bnrnn_cpu.lanes(weight_hh.dtype == torch.float64)
        width = (batch + lanes - 1) // lanes * lanes
        saved = [new(steps, 4 * hidden, width), *(new(steps + 1, hidden, width) for _ in range(2))]
        narrow = weight_ih.shape[1] <= torch.ops.bnrnn_cpu.narrow()
        wide = sequence or grad_input or not narrow
        if input.is_floating_point() and wide and not sums:
            saved.append(new(steps * batch, 4 * hidden))
    return new(steps, batch, hidden), new(batch, hidden), new(batch, hidden), moments, saved


def _fake_backward(*arguments: Any) -> Any:
    layer, (grad_input, grad_weight_ih) = arguments[3 : 3 + _TENSORS], arguments[-2:]
    wanted = [grad_input, True, True, grad_weight_ih, *[True] * 6]
    return tuple(
        layer[1].new_empty(t.shape if want and t is not None else 0)
        for t, want in zip(layer[:_DIFFERENTIABLE], wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, moments, saved = output
    ctx.save_for_backward(*inputs[:_TENSORS], *moments, *saved)
    ctx.settings, ctx.found = inputs[_TENSORS : _TENSORS + 5], len(moments)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> Any:
    grads = grads[:3]  # of output, h_n and c_n; the rest is no part of any loss
    kept = ctx.saved_tensors  # once: to checkpointing each access is another
    layer, rest = kept[:_TENSORS], kept[_TENSORS:]
    moments, saved = iter(rest[: ctx.found]), rest[ctx.found :]
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    if torch.is_grad_enabled():  # create_graph
        found = _backward_of_reference(grads, layer, ctx.settings, needed)
    else:
        *tensors, lengths = layer
        if ctx.found:
            gammas = layer[_GAMMAS]
            tensors[_DIFFERENTIABLE:] = [
                None if gamma is None else next(moments) for gamma in gammas for _ in range(2)
            ]
        found = torch.ops.bnrnn_cpu.backward(
            *grads, *tensors, lengths, *ctx.settings, ctx.found > 0,
            *saved, *[None] * (4 - len(saved)), needed[0], needed[3],
        )  # fmt: skip
    of_tensors = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    return *of_tensors, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


def _backward_of_reference(
    grads: Any, layer: Any, settings: Any, needed: Any
) -> list[Tensor | None]:
    """The gradients by the reference's graph, which can be differentiated again."""
    aliases: list[Any] = [t if t is None else t.view_as(t) for t in layer]
    input, h_0, c_0, *weights = aliases[:_DIFFERENTIABLE]
    given, lengths = aliases[_DIFFERENTIABLE:-1], aliases[-1]
    count_padding, sequence, sums, eps, eps_ih = settings
    w = Weights(*weights)
    ih, hh, c = ("none" if g is None else "frame" for g in (w.gamma_ih, w.gamma_hh, w.gamma_c))
    ih, hh = "sequence" if sequence else ih, "sum" if sums else hh
    normalization = Normalization(ih, hh, c, eps, eps_ih)
    moments = [Moments(*given[i : i + 2]) if given[i] is not None else None for i in (0, 2, 4)]
    results = reference.recurrence(
        input, h_0, c_0, w, normalization,
        population=TermMoments(*moments) if any(moments) else None,
        lengths=lengths, count_padding=count_padding,
    )[:3]  # fmt: skip
    used = [i for i, grad in enumerate(grads) if grad is not None]
    wanted = [t for t, need in zip(aliases, needed, strict=False) if need]
    found = iter(
        torch.autograd.grad(
            [results[i] for i in used], wanted, [grads[i] for i in used],
            create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if need else None for need in needed]
