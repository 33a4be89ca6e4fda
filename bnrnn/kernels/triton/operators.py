"""The Triton kernels as PyTorch operators: allocation, launches, saved tensors and gradients."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bnrnn.kernels import gradient, reference
from bnrnn.kernels.interface import Moments, Normalization, TermMoments, Weights
from bnrnn.kernels.triton import plan, steps
from bnrnn.kernels.triton.layout import by_gate

INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore  # on the CPU, for tests

_TENSORS, _DIFFERENTIABLE = 12, 7  # how many leading arguments are tensors, and have gradients


def _operator(implementation: Callable[..., Any]) -> Any:
    # torch.library.custom_op does the same but imports the compiler, which takes seconds.
    name = f"bnrnn_triton::{implementation.__name__}"
    torch.library.define(name, torch.library.infer_schema(implementation, mutates_args=()))
    torch.library.impl(name, "default", implementation)
    return getattr(torch.ops.bnrnn_triton, implementation.__name__).default


@_operator
def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weight_hh: Tensor, gamma_hh: Tensor | None,
    gamma_c: Tensor | None, beta_c: Tensor | None, mean_hh: Tensor | None, var_hh: Tensor | None,
    mean_c: Tensor | None, var_c: Tensor | None, lengths: Tensor | None, count_padding: bool,
    eps: float, keep: bool, way: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """All steps of a layer; the 4H features are ordered as by `layout.interleaved`.

    Args:
        x: (T, B, 4H), BN(W_x x_t) + b.
        mean_hh, var_hh, mean_c, var_c: (rows, features), the statistics to normalise by; None:
            batch statistics.
        keep: save what `backward` needs.

    Returns:
        output (T, B, H); h_n and c_n (B, H); mean and variance of each term normalised by batch
        statistics; the saved tensors: states, cells, normalised recurrent terms, and the moments in
        the accumulation dtype.
    """
    length, batch, hidden = len(x), x.shape[1], weight_hh.shape[1]
    given = mean_hh is not None or mean_c is not None
    tiles, acc = plan.tiles(way, batch, hidden), _acc(x.dtype)
    constants = _constants(
        x, hidden, way, tiles, eps, given, gamma_hh, gamma_c, beta_c, lengths, count_padding
    )
    width = -(-hidden // tiles.block_k) * tiles.block_k
    rows = length + 1 if keep else 2
    states = x.new_zeros(rows, batch, width)
    cells = x.new_empty(rows, batch, hidden, dtype=acc)
    rounded = _to_tf32 if constants["ROUND"] else _unchanged
    states[0, :, :hidden], cells[0] = rounded(h_0), c_0
    output = x.new_empty(length, batch, hidden)
    hats = x.new_empty(length if keep else 1, batch, 4 * hidden)
    weight = rounded(F.pad(weight_hh, (0, width - hidden)))
    product = x.new_empty(batch if way == "alternating" else 0, 4 * hidden, dtype=acc)
    moments = [mean_hh, var_hh, mean_c, var_c]
    for i, gamma in ((0, gamma_hh), (2, gamma_c)):
        if gamma is not None and not given:
            moments[i : i + 2] = [x.new_empty(length, len(gamma), dtype=acc) for _ in range(2)]

    def multiply(t: int) -> None:
        _multiply(states[t if keep else t % 2], weight.t(), product)

    _launch(
        steps.forward_steps, way, tiles, range(length), multiply,
        x=x, weight_hh=weight, product=product, states=states, cells=cells, output=output,
        hats=hats, gamma_hh=gamma_hh, gamma_c=gamma_c, beta_c=beta_c, mean_hh=moments[0],
        var_hh=moments[1], mean_c=moments[2], var_c=moments[3], lengths=lengths, batch=batch,
        hidden=hidden, width=width, **_rows(length, mean_hh, mean_c), keep=int(keep), **constants,
    )  # fmt: skip
    h_n = _last_states(output, h_0, lengths)
    c_n = cells[length if keep else length % 2].to(x.dtype, copy=True)
    own = [] if given else [m for m in moments if m is not None]
    # Return copies: the caller may overwrite the results.
    saved = [states, cells, hats, *own] if keep else []
    return output, h_n, c_n, [m.to(x.dtype, copy=True) for m in own], saved


@torch.library.register_fake("bnrnn_triton::forward")
def _(
    x: Tensor, h_0: Tensor, c_0: Tensor, weight_hh: Tensor, gamma_hh: Tensor | None,
    gamma_c: Tensor | None, beta_c: Tensor | None, mean_hh: Tensor | None, var_hh: Tensor | None,
    mean_c: Tensor | None, var_c: Tensor | None, lengths: Tensor | None, count_padding: bool,
    eps: float, keep: bool, way: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    length, batch, hidden, new = len(x), x.shape[1], weight_hh.shape[1], x.new_empty
    given, acc = mean_hh is not None or mean_c is not None, _acc(x.dtype)
    widths = [len(g) for g in (gamma_hh, gamma_c) if g is not None and not given for _ in range(2)]
    saved = []
    if keep:
        block_k = plan.tiles(way, batch, hidden).block_k
        states = new(length + 1, batch, (hidden + block_k - 1) // block_k * block_k)
        cells = new(length + 1, batch, hidden, dtype=acc)
        own = [new(length, width, dtype=acc) for width in widths]
        saved = [states, cells, new(length, batch, 4 * hidden), *own]
    moments = [new(length, width) for width in widths]
    return new(length, batch, hidden), new(batch, hidden), new(batch, hidden), moments, saved


@_operator
def backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, x: Tensor,
    weight_hh: Tensor, gamma_hh: Tensor | None, gamma_c: Tensor | None, beta_c: Tensor | None,
    var_hh: Tensor | None, mean_c: Tensor | None, var_c: Tensor | None, lengths: Tensor | None,
    count_padding: bool, eps: float, given: bool, way: str, states: Tensor, cells: Tensor,
    hats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, h_0, c_0, weight_hh, gamma_hh, gamma_c, beta_c; empty for a None.

    Args:
        states, cells, hats: as saved by `forward`.
        given: whether the moments are constants rather than batch statistics.
    """
    length, batch, hidden = len(x), x.shape[1], weight_hh.shape[1]
    tiles, acc, width = plan.tiles(way, batch, hidden), _acc(x.dtype), states.shape[2]
    constants = _constants(
        x, hidden, way, tiles, eps, given, gamma_hh, gamma_c, beta_c, lengths, count_padding
    )
    grad_h, grad_c = (
        x.new_zeros(batch, hidden, dtype=acc) if g is None else
        g.to(acc, copy=True, memory_format=torch.contiguous_format)
        for g in (grad_h_n, grad_c_n)
    )  # fmt: skip
    grad_x, grad_a = torch.empty_like(x), x.new_zeros(length, batch, 4 * width)
    rounded = _to_tf32 if constants["ROUND"] else _unchanged
    # If the padding is empty, pad returns the transposed view with its strides.
    weight = rounded(F.pad(weight_hh.t(), (0, 4 * (width - hidden))).contiguous())
    product = x.new_zeros(batch, hidden, dtype=acc)
    of_gamma_hh, of_gamma_c, of_beta_c = parts = [
        x.new_empty(0 if g is None else length, 0 if g is None else len(g), dtype=acc)
        for g in (gamma_hh, gamma_c, beta_c)
    ]

    def multiply(t: int) -> None:
        if t + 1 < length:
            _multiply(grad_a[t + 1], weight.t(), product)

    _launch(
        steps.backward_steps, way, tiles, range(length - 1, -1, -1), multiply,
        x=x, cells=cells, hats=hats, weight_hh=weight, product=product, gamma_hh=gamma_hh,
        gamma_c=gamma_c, beta_c=beta_c, var_hh=var_hh, mean_c=mean_c, var_c=var_c, lengths=lengths,
        grad_output=grad_output, grad_h=grad_h, grad_c=grad_c, grad_x=grad_x, grad_a=grad_a,
        grad_gamma_hh=of_gamma_hh, grad_gamma_c=of_gamma_c, grad_beta_c=of_beta_c, steps=length,
        batch=batch, hidden=hidden, width=width, **_rows(length, var_hh, var_c),
        GRAD_OUTPUT=grad_output is not None, **constants,
    )  # fmt: skip
    # No step depends on the rest.
    grad_weight = grad_a.view(-1, 4 * width).t() @ states[:-1].view(-1, width)
    through = x.new_empty(batch, hidden, dtype=acc)
    _multiply(grad_a[0], weight.t(), through)
    of_gamma_hh, of_gamma_c, of_beta_c = (part.sum(0).to(x.dtype) for part in parts)
    return (
        grad_x, (grad_h + through).to(x.dtype), grad_c.to(x.dtype, copy=True),
        grad_weight[: 4 * hidden, :hidden].contiguous(), of_gamma_hh, of_gamma_c, of_beta_c,
    )  # fmt: skip


@torch.library.register_fake("bnrnn_triton::backward")
def _(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, x: Tensor,
    weight_hh: Tensor, gamma_hh: Tensor | None, gamma_c: Tensor | None, beta_c: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, hidden, new = x.shape[1], weight_hh.shape[1], x.new_empty
    widths = [0 if g is None else len(g) for g in (gamma_hh, gamma_c, beta_c)]
    states = new(batch, hidden), new(batch, hidden)
    return torch.empty_like(x), *states, new(weight_hh.shape), *(new(n) for n in widths)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[-1])
    ctx.count_padding, ctx.eps, _, ctx.way = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Any) -> Any:
    grads = grads[:3]  # of output, h_n and c_n; a loss cannot depend on the other results
    kept = ctx.saved_tensors
    layer, (states, cells, hats, *own) = kept[:_TENSORS], kept[_TENSORS:]
    x, _, _, weight_hh, gamma_hh, gamma_c, beta_c, *given, lengths = layer
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    if torch.is_grad_enabled():  # create_graph
        found = _gradients_by_reference(grads, layer, ctx, needed)
    else:
        moments, by_batch = list(given), len(own) > 0
        for i, gamma in ((0, gamma_hh), (2, gamma_c)):
            if by_batch and gamma is not None:
                moments[i : i + 2], own = own[:2], own[2:]
        contiguous = (None if g is None else g.contiguous() for g in grads)
        found = backward(
            *contiguous, x, weight_hh, gamma_hh, gamma_c, beta_c, *moments[1:], lengths,
            ctx.count_padding, ctx.eps, not by_batch, ctx.way, states, cells, hats,
        )  # fmt: skip
    of_tensors = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    return *of_tensors, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


gradient.register(forward, _save, _gradients)


def _gradients_by_reference(
    grads: Sequence[Tensor | None], layer: Sequence[Any], ctx: Any, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients from the reference kernel's graph, which can be differentiated again.

    The layer has W_x = I and no normalisation of the input term.
    """
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in layer]
    x, h_0, c_0, weight_hh, gamma_hh, gamma_c, beta_c, *given, lengths = aliases
    identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    w = Weights(
        identity, by_gate(weight_hh, 0), gamma_c=gamma_c, beta_c=beta_c,
        gamma_hh=None if gamma_hh is None else by_gate(gamma_hh, 0),
    )  # fmt: skip
    hh, c = ("none" if g is None else "frame" for g in (gamma_hh, gamma_c))
    population = TermMoments(
        hh=None if given[0] is None else Moments(by_gate(given[0], 1), by_gate(given[1], 1)),
        c=None if given[2] is None else Moments(given[2], given[3]),
    )
    results = reference.recurrence(
        by_gate(x, 2), h_0, c_0, w, Normalization("none", hh, c, ctx.eps),
        population=population if any(population) else None,
        lengths=lengths, count_padding=ctx.count_padding,
    )[:3]  # fmt: skip
    return reference.gradients(results, grads, aliases, needed)


def _acc(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums and the cell state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _constants(
    x: Tensor, hidden: int, way: str, tiles: plan.Tiles, eps: float, given: bool,
    gamma_hh: Tensor | None, gamma_c: Tensor | None, beta_c: Tensor | None,
    lengths: Tensor | None, count_padding: bool,
) -> dict[str, Any]:  # fmt: skip
    def kind(gamma: Tensor | None) -> int:
        if gamma is None:
            return steps.NONE
        return steps.GIVEN if given else steps.BATCH

    tf32 = plan.products(x.dtype) == "tf32"
    return {
        "EPS": eps, "NORM_HH": kind(gamma_hh), "NORM_C": kind(gamma_c),
        "BETA_C": beta_c is not None, "LENGTHS": lengths is not None,
        "COUNT_PADDING": count_padding, "PERSISTENT": way == "persistent",
        "PRODUCT": way != "alternating", "PRECISION": "tf32" if tf32 else "ieee",
        "ROUND": tf32 and way != "alternating",  # cuBLAS rounds by itself
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "WIDEN": INTERPRETED and x.dtype == torch.bfloat16,  # it would multiply bit patterns
        "BLOCK_B": tiles.block_b, "BLOCK_U": tiles.block_u, "BLOCK_K": tiles.block_k,
    }  # fmt: skip


def _unchanged(x: Tensor) -> Tensor:
    return x


def _to_tf32(x: Tensor) -> Tensor:
    """See `steps._to_tf32`."""
    return torch.where(x == x, ((x.view(torch.int32) + 0x1000) & -0x2000).view(x.dtype), x)


def _last_states(output: Tensor, h_0: Tensor, lengths: Tensor | None) -> Tensor:
    """h_n (B, H), from the output, because the kernel's states may be rounded for the products."""
    if lengths is None:
        return output[-1].clone()
    last = (lengths - 1).clamp(min=0)[None, :, None].expand(1, *h_0.shape)
    return torch.where((lengths > 0)[:, None], output.gather(0, last)[0], h_0)


def _rows(length: int, of_hh: Tensor | None, of_c: Tensor | None) -> dict[str, int]:
    """The number of rows of moments, as kernel arguments."""
    return {
        "rows_hh": length if of_hh is None else len(of_hh),
        "rows_c": length if of_c is None else len(of_c),
    }


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, without rounding the result to bfloat16."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _launch(
    kernel: Any, way: str, tiles: plan.Tiles, order: range, multiply: Callable[[int], None],
    **arguments: Any,
) -> None:  # fmt: skip
    """Run the steps in `order`, in one launch or in one launch each."""
    device = arguments["x"].device
    grid = (plan.programs(way, -(-arguments["hidden"] // tiles.block_u), device),)
    # Unused arguments must be pointers too.
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = {name: counter if value is None else value for name, value in arguments.items()}
    arguments["counter"] = counter
    if not INTERPRETED:
        arguments["num_warps"], arguments["num_stages"] = tiles.num_warps, tiles.num_stages
    if way == "persistent" and not INTERPRETED:
        arguments["launch_cooperative_grid"] = True
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if way == "persistent":
            kernel[grid](**arguments, first=0, last=len(order))
            return
        for t in order:
            if way == "alternating":
                multiply(t)
            kernel[grid](**arguments, first=t, last=t + 1)
