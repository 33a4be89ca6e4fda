"""The C++ operators as PyTorch's autograd, compiler and `vmap` see them."""

import functools
from typing import Any

import torch
from torch import Tensor

from bnrnn.kernels import build, reference
from bnrnn.kernels.interface import Moments, Normalization, TermMoments, Weights

_TENSORS, _DIFFERENTIABLE = 17, 10  # so many of the operators' arguments, from the first on


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
    library.register_vmap("bnrnn_cpu::backward", _backward_of_each)


def _fake_forward(
    input: Tensor, h_0: Tensor, c_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Any
) -> Any:
    _, gamma_ih, gamma_hh, gamma_c, _, *given = rest[:11]
    sequence, keep, grad_input = rest[13], rest[16], rest[17]
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
        if input.is_floating_point() and (sequence or grad_input or not narrow):
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
    ctx.settings, ctx.found = inputs[_TENSORS : _TENSORS + 4], len(moments)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> Any:
    grads = grads[:3]  # of output, h_n and c_n; the rest is no part of any loss
    layer, rest = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS:]
    moments, saved = list(rest[: ctx.found]), list(rest[ctx.found :])
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    if torch.is_grad_enabled():  # create_graph
        found = _backward_of_reference(grads, layer, ctx.settings, needed)
    else:
        found = torch.ops.bnrnn_cpu.backward(
            *grads, *layer, *ctx.settings, moments, saved, _scratch(saved[0]), needed[0], needed[3]
        )
    of_tensors = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    return *of_tensors, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


def _scratch(recurrent: Tensor) -> Tensor:
    """Where to put the gradient of W_h h_{t-1}: over W_h h_{t-1} itself where nobody will read it
    again, which an eager backward pass knows and a traced or a mapped one does not."""
    eager = type(recurrent) is Tensor and not torch._C._are_functorch_transforms_active()  # pyright: ignore
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
    return recurrent if eager and not kept else torch.empty_like(recurrent)


def _backward_of_reference(
    grads: Any, layer: Any, settings: Any, needed: Any
) -> list[Tensor | None]:
    """The gradients by the reference's graph, which can be differentiated again."""
    aliases = [t if t is None else t.view_as(t) for t in layer]
    input, h_0, c_0, *weights = aliases[:_DIFFERENTIABLE]
    given, lengths = aliases[_DIFFERENTIABLE:-1], aliases[-1]
    count_padding, sequence, eps, eps_ih = settings
    w = Weights(*weights)
    kinds = ("none" if gamma is None else "frame" for gamma in (w.gamma_ih, w.gamma_hh, w.gamma_c))
    normalization = Normalization(*kinds, eps, eps_ih)
    if sequence:
        normalization = normalization._replace(ih="sequence")
    moments = [Moments(*given[i : i + 2]) if given[i] is not None else None for i in (0, 2, 4)]
    results = reference.recurrence(
        input, h_0, c_0, w, normalization,
        population=TermMoments(*moments) if any(moments) else None,
        lengths=lengths, count_padding=count_padding,
    )[:3]  # fmt: skip
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [t for t, need in zip(aliases, needed, strict=False) if need]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needed]


def _backward_of_each(info: Any, in_dims: Any, *arguments: Any) -> Any:
    """`vmap`: a pass for each example, as of `torch.autograd.grad(..., is_grads_batched=True)`."""

    def of(i: int) -> list[Any]:
        return [
            a if dim is None or isinstance(a, list) else a.select(dim, i)
            for a, dim in zip(arguments, in_dims, strict=True)
        ]

    each = [torch.ops.bnrnn_cpu.backward(*of(i)) for i in range(info.batch_size)]
    return tuple(torch.stack(found) for found in zip(*each, strict=True)), (0,) * len(each[0])
