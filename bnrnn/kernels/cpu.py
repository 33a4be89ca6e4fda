"""The recurrence on the CPU in C++: all steps in one call, with its own backward pass.

It equals `bnrnn.kernels.reference` up to rounding, and its results are bit-identical for any number
of threads. The equations and their gradients are in `csrc/recurrence.cpp`; the schema of the
operators is in `csrc/bindings.cpp`.

Few sequences in evaluation, such as a streamed text, have a pass of their own in float32
(`csrc/evaluation.h`).

The forward pass saves these arrays for the backward pass. Sizes are in elements of the dtype; W is
B rounded up to whole vectors (16 floats with AVX-512).

    W_h h_{t-1}                   4 T H W
    hidden and cell states        2 (T + 1) H W
    moments                       2 T per normalised feature; 2 T W per slot for layer normalisation
    W_x x_t                       4 T H W, only if the input is neither one-hot nor narrow
    masks of the noise            one byte per element

In float32 this is 211 MB at T 784, B 100, H 100, and 154 MB at T 100, B 64, H 1000. If the sum
W_h h_{t-1} + W_x x_t is normalised, or neither of them is, the sum is saved instead of W_h h_{t-1},
and W_x x_t is not saved.

With `bfloat16`, the factors of the products are rounded to bfloat16 (`csrc/bfloat16.h`), except
where that would not pay: in one or two steps, a lone sequence, a narrow input, or an input term
with statistics of the whole sequence.

The backward pass recomputes the gates, the normalised terms, and W_x x_t if it was not saved. It
allocates no array of this size, except where W_x x_t has statistics of the whole sequence: the
gradients of the two products are added to those of W_h and W_x every few steps.
"""

import functools
import logging

import torch
from torch import Tensor

from bnrnn.kernels import operators, reference
from bnrnn.kernels.build import BuildError
from bnrnn.kernels.interface import (
    SILENCE,
    Moments,
    Noise,
    Normalization,
    Request,
    TermMoments,
    Weights,
    in_functorch_transform,
    why_not_transformed,
)

_log = logging.getLogger(__name__)


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
) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
    """See `bnrnn.kernels.interface.Recurrence`.

    Raises:
        ValueError: see `why_not`.
    """
    if reason := _why_unavailable():
        raise ValueError(reason)
    if lengths is not None and not count_padding and input.is_floating_point():
        input = torch.where(reference.live_rows(lengths, len(input)), input, 0.0)
    given = [t for moments in population or TermMoments() for t in moments or (None, None)]
    tensors = (input, h_0, c_0, *weights, *given, lengths, *noise.masks)
    kinds = normalization
    settings = (
        count_padding, kinds.ih, kinds.hh, kinds.c, kinds.eps, kinds.eps_ih, *noise.rates,
        bfloat16 and h_0.dtype == torch.float32,
    )  # fmt: skip
    # A trace is for inference and must not depend on whether gradients are enabled.
    differentiable = torch.is_grad_enabled() and not torch.jit.is_tracing()  # pyright: ignore
    keep = differentiable and any(t is not None and t.requires_grad for t in tensors)
    forward = torch.ops.bnrnn_cpu.forward if keep else operators.forward_without_graph
    output, h_n, c_n, found, _ = forward(*tensors, *settings, keep, keep and input.requires_grad)
    if not found:
        return output, h_n, c_n, TermMoments()
    pairs = iter([m.detach() for m in found])
    moments = TermMoments(
        *(
            Moments(next(pairs), next(pairs))
            if population is None and kinds.takes_moments(term)
            else None
            for term in TermMoments._fields
        )
    )
    return output, h_n, c_n, moments


def why_not(request: Request) -> str | None:
    if request.device != "cpu" or request.dtype not in (torch.float32, torch.float64):
        return f"it is for float32 and float64 on the CPU, not {request.dtype} on {request.device}"
    if reason := why_not_transformed():
        return reason
    if request.is_synchronised:
        return "it cannot compute statistics over several processes"
    return _why_unavailable()


def outruns_torch_lstm(request: Request) -> bool:
    """Whether this kernel is faster than `torch.lstm` on a request that both can run.

    With AVX-512 and 32 to 128 sequences a training step takes 0.59 to 0.96 of its time, at all
    sizes from 32 to 1,024 units; with 16 sequences up to 1.13 (`bench/unnormalised.py`). With AVX2
    and 64 sequences it takes 1.1 at 1,024 units. With AVX-512, evaluation of up to 4 sequences
    takes 0.33 to 0.98 of `torch.nn.LSTM`'s time, of 8 up to 1.09 (`bench/few_sequences.py`).
    """
    is_evaluation_of_few = request.batch <= 4 and not torch.is_grad_enabled()
    return (
        (request.batch >= 32 or is_evaluation_of_few) and request.dtype == torch.float32
        # A trace without this kernel's operators runs where bnrnn is not installed.
        and not torch.jit.is_tracing()  # pyright: ignore
        and why_not(request) is None
        and torch.ops.bnrnn_cpu.lanes(False) >= 16
    )  # fmt: skip


def has_bfloat16() -> bool:
    """Whether products of factors in bfloat16 are faster on this CPU than those in float32. If not,
    the reason is logged once."""
    return _has_bfloat16()


def can_draw() -> bool:
    """Whether `bernoulli` can be called."""
    return not in_functorch_transform() and _why_unavailable() is None


def bernoulli(key: Tensor, stream: int, count: int, p: float) -> Tensor:
    """See `bnrnn.kernels.philox.bernoulli`."""
    return torch.ops.bnrnn_cpu.bernoulli(key, stream, count, p)


def _why_unavailable() -> str | None:
    return _unavailability()


@functools.cache
def _has_bfloat16() -> bool:
    if _unavailability() is not None:
        return False
    if torch.ops.bnrnn_cpu.bfloat16_way() != "portable":
        return True
    _log.warning(
        "This processor has no fast bfloat16 (AMX, or AVX512_BF16 of AMD): the recurrence "
        "multiplies in float32"
    )
    return False


# This is what `torch.compiler.assume_constant_result` does. Calling it would import the compiler,
# which takes twice as long as importing torch itself.
_why_unavailable._dynamo_marked_constant = True  # pyright: ignore
has_bfloat16._dynamo_marked_constant = True  # pyright: ignore


@functools.cache
def _unavailability() -> str | None:
    try:
        operators.load()
    except BuildError as error:
        return str(error)
    return None
