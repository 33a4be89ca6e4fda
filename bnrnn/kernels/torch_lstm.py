"""PyTorch's own LSTM, for a layer without normalisation."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bnrnn.kernels.interface import (
    SILENCE,
    Noise,
    Normalization,
    Request,
    TermMoments,
    Weights,
    why_not_transformed,
)


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
    """See `bnrnn.kernels.interface.Recurrence`."""
    if not input.is_floating_point():
        # Not torch.nn.functional.one_hot, which reads the indices to check them.
        vectors = h_0.new_zeros(*input.shape, weights.weight_ih.shape[1])
        input = vectors.scatter(-1, input.long()[..., None], 1)
    flat = [weights.weight_ih, weights.weight_hh]
    has_bias = weights.bias is not None
    if weights.bias is not None:
        flat += [weights.bias, torch.zeros_like(weights.bias)]  # it takes two biases
    state = h_0[None].contiguous(), c_0[None].contiguous()
    # Tells cuDNN to save for the backward pass. A trace must not depend on it.
    keep = torch.is_grad_enabled() and not torch.jit.is_tracing()  # pyright: ignore
    settings = has_bias, 1, 0.0, keep, False  # one layer, no dropout, one direction
    if lengths is None:
        output, h_n, c_n = torch.lstm(input, state, flat, *settings, False)
        return output, h_n[0], c_n[0], TermMoments()
    packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert back is not None
    state = state[0][:, order], state[1][:, order]
    data, h_n, c_n = torch.lstm(packed.data, packed.batch_sizes, state, flat, *settings)
    output, _ = pad_packed_sequence(packed._replace(data=data), total_length=len(input))
    return output, h_n[0, back], c_n[0, back], TermMoments()


def why_not_padded(request: Request) -> str | None:
    if reason := why_not_transformed():
        return reason
    if request.padded and request.device == "meta":
        return "it reads the lengths, and the meta device has no values"
    if request.bfloat16:
        return "it does not round only the factors of products"
    if not request.is_plain:
        return "it normalises nothing, and has no cell bias, zoneout or dropout of states"
    return None


def why_not(request: Request) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile would unroll it over the time steps"
    return "it does not support padding" if request.padded else why_not_padded(request)
