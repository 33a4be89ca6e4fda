"""The recurrence on the CPU in C++: all steps in one call, with a backward pass of its own.

Equal to `bnrnn.kernels.reference` to rounding, and to itself bit for bit whatever the number of
threads. The equations, their gradients and how the work is shared are in `csrc/recurrence.cpp`.

Saved for the backward pass, in elements of the dtype, W being B rounded up to whole vectors (16
floats with AVX-512): W_h h_{t-1}, 4 T H W; the hidden and the cell states, 2 (T + 1) H W; the
moments, 2 T per normalised feature. Gates and normalised terms are computed again. W_x x_t is kept
(4 T B H) only for an input of many features; of one-hot inputs and of few features it is computed
again too. The backward pass overwrites W_h h_{t-1} with its gradient, unless the graph is to be
kept, and allocates no array of this size but the gradient of a W_x x_t that was kept. In float32,
at T 784, B 100, H 100 that is 211 MB; at T 100, B 64, H 1000, 154 MB.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnrnn.kernels.reference import Moments, Normalization, TermMoments, Weights, live_rows

# Up to this many features W_x x_t costs less to compute twice than to keep.
_NARROW = 4
# Multiply-adds below which another thread costs more than it brings.
_WORK_A_THREAD = 100_000


def recurrence(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Weights,
    normalization: Normalization,
    population: TermMoments | None = None,
    lengths: Tensor | None = None,
    count_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
    """As `bnrnn.kernels.reference.recurrence`, for float32 or float64 on the CPU.

    Can be differentiated once, not twice.
    """
    steps, batch = input.shape[:2]
    lanes = torch.ops.bnrnn_cpu.lanes(h_0.dtype == torch.float64)
    width = -(-batch // lanes) * lanes
    live = None if lengths is None else live_rows(lengths, steps)
    if live is not None and not count_padding and input.is_floating_point():
        input = torch.where(live, input, 0.0)
    by_batch = population is None
    sequence = normalization.ih == "sequence" and by_batch

    given = _masks(steps, batch, width, live, count_padding, h_0.dtype)
    term, weight_ih = None, weights.weight_ih
    if not input.is_floating_point():
        if int(input.min()) < 0 or int(input.max()) >= weight_ih.shape[1]:
            raise IndexError(f"one-hot indices must be in 0..{weight_ih.shape[1] - 1}")
        given["index"] = input.long().contiguous()
    elif input.shape[2] <= _NARROW and not sequence and not input.requires_grad:
        given["narrow"] = F.pad(input.transpose(1, 2), (0, width - batch)).contiguous()
    else:
        frames = _InputTerm.apply(input.flatten(0, 1), weight_ih)
        term, weight_ih = frames.view(steps, batch, -1), None
    if sequence:
        given["sequence_weights"] = _sequence_weights(input, weights, live)
    if population is not None:
        for name, moments in population._asdict().items():
            if moments is not None:
                given["mean_" + name] = moments.mean.contiguous()
                given["var_" + name] = moments.var.contiguous()

    call = _Call(steps, batch, width, normalization, by_batch, given)
    tensors = (term, weight_ih, *weights[1:], h_0, c_0)
    differentiable = any(t is not None and t.requires_grad for t in tensors)
    if torch.is_grad_enabled() and differentiable:
        results = _Recurrence.apply(call, *tensors)
    else:
        results = _results(call, _run(call, False, *tensors), False)
    output, h_n, c_n, *moments = results
    pairs = zip(moments[::2], moments[1::2], strict=True)
    found = (None if mean is None else Moments(mean, var) for mean, var in pairs)
    return output, h_n, c_n, TermMoments(*found)


class _Call(NamedTuple):
    """What a call is about, but for the tensors it is differentiated by."""

    steps: int
    batch: int
    width: int
    normalization: Normalization
    by_batch: bool
    given: dict[str, Tensor]


class _InputTerm(torch.autograd.Function):
    """x W_x^T, for x (frames, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ih: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_ih)
        return _multiply(x, weight_ih.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_ih = ctx.saved_tensors
        of_x = _multiply(grad, weight_ih) if ctx.needs_input_grad[0] else None
        of_weight_ih = _multiply(grad.t(), x) if ctx.needs_input_grad[1] else None
        return of_x, of_weight_ih


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.bnrnn_cpu.multiply(a, b, _threads(a.shape[0] * b.numel()))


def _threads(work: int) -> int:
    """How many to use for so many multiply-adds between two waits."""
    return max(1, min(torch.get_num_threads(), work // _WORK_A_THREAD))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Any:
        arrays = _run(call, True, *tensors)
        results = _results(call, arrays, True)
        ctx.mark_non_differentiable(*(moments for moments in results[3:] if moments is not None))
        ctx.set_materialize_grads(False)
        ctx.call = call
        # Nothing but what the backward pass reads.
        del arrays["output"], arrays["packed"], arrays["panels"]
        ctx.names = list(arrays)
        ctx.save_for_backward(*arrays.values())
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _Call = ctx.call
        arrays = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        grad_output, grad_h_n, grad_c_n = grads[:3]
        width = call.width
        weight_hh = arrays["weight_hh"]
        hidden = weight_hh.shape[1]

        if grad_output is not None:
            arrays["grad_output"] = grad_output.contiguous()
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        recurrent = arrays["recurrent"]
        arrays["grad_recurrent"] = torch.empty_like(recurrent) if keep_graph else recurrent
        arrays["grad_state"] = _feature_major(grad_h_n, weight_hh.new_zeros(hidden, width))
        arrays["grad_cell"] = _feature_major(grad_c_n, weight_hh.new_zeros(hidden, width))
        arrays["grad_bias"] = weight_hh.new_zeros(4 * hidden)
        for name in ("gamma_ih", "gamma_hh", "gamma_c", "beta_c"):
            if name in arrays:
                arrays["grad_" + name] = torch.zeros_like(arrays[name])
        if "columns" in arrays:
            arrays["grad_columns"] = torch.zeros_like(arrays["columns"])
        elif "narrow" in arrays:
            arrays["grad_weight_ih"] = torch.zeros_like(arrays["weight_ih"])
        elif ctx.needs_input_grad[1]:
            arrays["grad_term"] = torch.empty_like(arrays["term"])
        lanes = torch.ops.bnrnn_cpu.lanes(weight_hh.dtype == torch.float64)
        columns = -(-hidden // lanes) * lanes
        arrays["grad_weight_hh"] = weight_hh.new_empty(4 * hidden, columns)
        _call_kernel(torch.ops.bnrnn_cpu.backward, call, arrays)

        if "columns" in arrays:
            arrays["grad_weight_ih"] = arrays["grad_columns"].t()
        arrays["grad_weight_hh"] = arrays["grad_weight_hh"][:, :hidden]
        arrays["grad_h_0"] = arrays["grad_state"][:, : call.batch].t()
        arrays["grad_c_0"] = arrays["grad_cell"][:, : call.batch].t()
        wanted = zip(_TENSORS, ctx.needs_input_grad[1:], strict=True)
        return None, *(arrays["grad_" + name] if needed else None for name, needed in wanted)


# What a call is differentiated by, in this order.
_TENSORS = ("term", *Weights._fields, "h_0", "c_0")


def _run(call: _Call, keep: bool, *tensors: Tensor | None) -> dict[str, Tensor]:
    """The forward pass: the arrays it was given, and those it filled."""
    arrays = {n: t.contiguous() for n, t in zip(_TENSORS, tensors, strict=True) if t is not None}
    arrays |= call.given
    h_0, c_0, weight_hh = arrays.pop("h_0"), arrays.pop("c_0"), arrays["weight_hh"]
    hidden, steps, width = weight_hh.shape[1], call.steps, call.width
    if "index" in arrays:
        arrays["columns"] = arrays["weight_ih"].t().contiguous()
    for term, features in (("ih", 4 * hidden), ("hh", 4 * hidden), ("c", hidden)):
        if call.by_batch and "gamma_" + term in arrays:
            rows = 1 if term == "ih" and "sequence_weights" in arrays else steps
            arrays["mean_" + term] = weight_hh.new_empty(rows, features)
            arrays["var_" + term] = weight_hh.new_empty(rows, features)
    arrays["recurrent"] = weight_hh.new_empty(steps if keep else 1, 4 * hidden, width)
    # Without a backward pass the hidden state goes to and fro between two rows.
    for name, state, rows in (("states", h_0, 2), ("cells", c_0, 1)):
        arrays[name] = weight_hh.new_empty(steps + 1 if keep else rows, hidden, width)
        _feature_major(state, arrays[name][0].zero_())
    arrays["output"] = weight_hh.new_empty(steps, call.batch, hidden)
    _call_kernel(torch.ops.bnrnn_cpu.forward, call, arrays, keep)
    return arrays


def _results(call: _Call, arrays: dict[str, Tensor], keep: bool) -> tuple[Any, ...]:
    """output, h_n, c_n and the moments that the pass computed, mean and variance of each term."""
    last_state = call.steps if keep else call.steps % 2
    h_n, c_n = (
        state[:, : call.batch].t().clone(memory_format=torch.contiguous_format)
        for state in (arrays["states"][last_state], arrays["cells"][-1])
    )
    moments: list[Tensor | None] = []
    for term in TermMoments._fields:
        for name in ("mean_", "var_"):
            moments.append(arrays.get(name + term) if call.by_batch else None)
    return arrays["output"], h_n, c_n, *moments


def _call_kernel(operator: Any, call: _Call, arrays: dict[str, Tensor], *keep: bool) -> None:
    weight_hh = arrays["weight_hh"]
    hidden = weight_hh.shape[1]
    threads = min(_threads(weight_hh.numel() * call.width), hidden)
    size = torch.ops.bnrnn_cpu.packed_size(hidden, threads)
    arrays["packed"] = weight_hh.new_empty(size)
    depth = hidden if operator is torch.ops.bnrnn_cpu.forward else 4 * hidden
    arrays["panels"] = weight_hh.new_empty(2, depth, call.width)
    eps = call.normalization.eps, call.normalization.eps_ih
    operator(arrays, call.steps, call.batch, *eps, call.by_batch, *keep, threads)


def _feature_major(state: Tensor | None, to: Tensor) -> Tensor:
    """`to` (H, W), its first columns filled from a state (B, H)."""
    if state is not None:
        to[:, : len(state)] = state.t()
    return to


def _masks(
    steps: int, batch: int, width: int, live: Tensor | None, count_padding: bool,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Which sequences run and which count in statistics: a row for all steps, or one for each."""
    real = torch.zeros(1, width, dtype=dtype)
    real[:, :batch] = 1
    if live is None:
        counted = live_w = real
    else:
        live_w = F.pad(live[:, :, 0].to(dtype), (0, width - batch))
        counted = real.expand(steps, -1).contiguous() if count_padding else live_w
    return {"live": live_w, "counted": counted, "inverse_count": 1 / counted.sum(1).clamp(min=1)}


def _sequence_weights(input: Tensor, weights: Weights, live: Tensor | None) -> Tensor:
    """How often each row counts whose statistics are the whole sequence's: frames, or symbols."""
    dtype = weights.weight_ih.dtype
    if input.is_floating_point():
        return torch.ones(input.shape[:2], dtype=dtype) if live is None else live[:, :, 0].to(dtype)
    symbols = input if live is None else input[live[:, :, 0]]
    return torch.bincount(symbols.flatten(), minlength=weights.weight_ih.shape[1]).to(dtype)
