"""The recurrence on CUDA devices: Triton kernels for the serial part, PyTorch for the rest.

It equals `bnrnn.kernels.reference` up to rounding. Its results are reproducible bit for bit on one
GPU model with one version of torch and triton, because sums have a fixed order and tiles depend
only on sizes. PyTorch computes BN(W_x x_t) + b for all t; the kernels do the rest of each step, see
`steps.py`. They run in one of two ways:

    persistent: one launch runs all steps, including the product W_h h_{t-1}, with a barrier over
        the GPU after each step. It is for small H, where launches would take most of the time.
    alternating: at each step cuBLAS computes the product, then a kernel does the rest. It is for
        large H.

(A third way, "stepwise", launches the persistent kernel once per step. It is for tests.)

In float32, products use TF32 where torch's matrix products do (`torch.backends.cuda.matmul`), with
factors rounded to nearest, as cuBLAS does. In bfloat16, statistics, sums and the cell state are in
float32. The forward pass saves 8 T B H elements (the normalised W_h h_{t-1} and the normalised
W_x x_t) and 2 (T + 1) B H elements of states. If W_x x_t is normalised, PyTorch keeps another
4 T B H.

triton itself is imported only when a CUDA device is first used.
"""

import functools

import torch
from torch import Tensor

from bnrnn.kernels.interface import (
    SILENCE,
    Moments,
    Noise,
    Normalization,
    Request,
    TermMoments,
    Weights,
    why_not_transformed,
)
from bnrnn.kernels.reference import input_term, live_rows
from bnrnn.kernels.triton import plan
from bnrnn.kernels.triton.layout import by_gate, interleaved

DTYPES = (torch.float32, torch.bfloat16)
CAPABILITY = (8, 0)
VERSION = (3, 6)  # of triton, the oldest supported


def recurrence(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Weights,
    normalization: Normalization,
    *,
    population: TermMoments | None = None,
    lengths: Tensor | None = None,
    count_padding: bool = False,
    noise: Noise = SILENCE,
    bfloat16: bool = False,
    way: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
    """See `bnrnn.kernels.interface.Recurrence`.

    Args:
        way: one of `plan.WAYS`; None: the size of the problem decides.
    """
    from bnrnn.kernels.triton import operators

    steps, hidden = len(input), weights.weight_hh.shape[1]
    live = None if lengths is None else live_rows(lengths, steps)
    counted = None if count_padding else live
    if counted is not None and input.is_floating_point():
        input = torch.where(counted, input, 0.0)
    given = population or TermMoments()
    w, by_batch = _with_units_first(weights), population is None

    x, of_x = _normalized_input(
        input_term(input, w.weight_ih), w, normalization, _units_first(given.ih), live, counted
    )
    tensors = (x, h_0, c_0, w.weight_hh, w.gamma_hh, w.gamma_c, w.beta_c)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    hh, c = _units_first(given.hh) or (None, None), given.c or (None, None)
    output, h_n, c_n, found, _ = operators.forward(
        *(None if t is None else t.contiguous() for t in (*tensors, *hh, *c, lengths)),
        count_padding, normalization.eps, keep, way or plan.way(hidden, plan.products(x.dtype)),
    )  # fmt: skip
    if not by_batch:
        return output, h_n, c_n, TermMoments()
    pairs = iter([m.detach() for m in found])
    of_h, of_c = (
        None if gamma is None else Moments(next(pairs), next(pairs))
        for gamma in (weights.gamma_hh, weights.gamma_c)
    )
    return output, h_n, c_n, TermMoments(_gates_first(of_x), _gates_first(of_h), of_c)


def why_not(request: Request) -> str | None:
    if request.device != "cuda":
        return f"it is for CUDA devices, not for {request.device}"
    if reason := why_not_transformed():
        return reason
    if request.bfloat16:
        return "it takes bfloat16 from the dtype of the weights"
    if request.normalization.sums:
        return "it does not normalise the sum of both terms"
    if request.normalization.has_layer or request.noisy:
        return "it has no layer normalisation, zoneout or dropout of states"
    if request.is_synchronised:
        return "it cannot compute statistics over several processes"
    if request.dtype not in DTYPES:
        return f"it is for float32 and bfloat16, not {request.dtype}"
    if request.batch > plan.MAX_BATCH:
        return f"it takes {plan.MAX_BATCH} sequences at most"
    return _why_unavailable()


def _why_unavailable() -> str | None:
    return _unavailability(torch.cuda.current_device())


_why_unavailable._dynamo_marked_constant = True  # pyright: ignore (see kernels/cpu.py)


@functools.cache
def _unavailability(device: int) -> str | None:
    if torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        found, wanted = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability {wanted}, and {name} has {found}"
    wanted = ".".join(map(str, VERSION))
    try:
        import triton
    except ImportError:
        return f"it needs the package triton {wanted} or later, which torch's CUDA builds include"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < VERSION:
        return f"it needs triton {wanted} or later, not {triton.__version__}"
    return None


def _normalized_input(
    term: Tensor, w: Weights, kinds: Normalization, given: Moments | None,
    live: Tensor | None, counted: Tensor | None,
) -> tuple[Tensor, Moments | None]:  # fmt: skip
    """BN(W_x x_t) + b for all t, (T, B, 4H); the moments, (T, 4H), or (1, 4H) if sequence-wise."""
    dtype, found = term.dtype, None
    if kinds.ih != "none":
        assert w.gamma_ih is not None
        term = term.double() if dtype == torch.float64 else term.float()
        steps = torch.arange(len(term), device=term.device)
        if given is not None:
            row = steps.clamp(max=len(given.mean) - 1)
            mean, var = given.mean[row][:, None], given.var[row][:, None]
        elif kinds.ih == "sequence":
            mean, var = _mean_and_variance(term, (0, 1), live)
        else:
            mean, var = _mean_and_variance(term, (1,), counted)
            if counted is not None:
                # Later steps use those of the last step with two sequences, as constants.
                last = ((counted.sum(1) > 1).sum() - 1).clamp(min=0)
                alone, source = (steps > last)[:, None, None], steps.minimum(last)
                mean = torch.where(alone, mean.detach()[source], mean)
                var = torch.where(alone, var.detach()[source], var)
        if given is None:
            found = Moments(mean[:, 0].detach().to(dtype), var[:, 0].detach().to(dtype))
        term = (term - mean) * (w.gamma_ih * torch.rsqrt(var + kinds.eps_ih))
    if w.bias is not None:
        term = term + w.bias
    return term.to(dtype), found


def _mean_and_variance(
    y: Tensor, dims: tuple[int, ...], rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims`, of the rows that `rows` (T, B, 1) marks; None: all."""
    if rows is None:
        var, mean = torch.var_mean(y, dims, correction=0, keepdim=True)
        return mean, var
    n = rows.sum(dims, keepdim=True).clamp(min=1)
    mean = torch.where(rows, y, 0.0).sum(dims, keepdim=True) / n
    var = torch.where(rows, y - mean, 0.0).square().sum(dims, keepdim=True) / n
    return mean, var


def _with_units_first(w: Weights) -> Weights:
    """The weights with their 4H features in the order of the kernels: see `interleaved`."""

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else interleaved(value, 0)

    return Weights(
        interleaved(w.weight_ih, 0), interleaved(w.weight_hh, 0), move(w.bias), move(w.gamma_ih),
        move(w.gamma_hh), w.gamma_c, w.beta_c,
    )  # fmt: skip


def _units_first(moments: Moments | None) -> Moments | None:
    return None if moments is None else Moments(*(interleaved(m, 1) for m in moments))


def _gates_first(moments: Moments | None) -> Moments | None:
    return None if moments is None else Moments(*(by_gate(m, 1) for m in moments))
