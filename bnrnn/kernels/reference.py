"""The recurrence in plain PyTorch: short, any device, any dtype, gradients by autograd.

Every other kernel is tested to equal this one. Dimensions: T time, B batch, D input, H hidden.

    z_t = BN(W_x x_t; γ_x, 0) + BN(W_h h_{t-1}; γ_h, 0) + b        split into i, f, g, o
    c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
    h_t = σ(o) ⊙ tanh(BN(c_t; γ_c, β_c))
    BN(y; γ, β) = β + γ ⊙ (y − mean) / sqrt(var + ε)

Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017, equations 6 to 8; the sequence-wise
statistics of the input term are those of Laurent et al., "Batch Normalized Recurrent Neural
Networks", 2015.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Moments(NamedTuple):
    """Mean and biased variance of one term: (T, features), or (1, features) if sequence-wise."""

    mean: Tensor
    var: Tensor


class TermMoments(NamedTuple):
    """The moments of the three terms that can be normalised; None where a term is not."""

    ih: Moments | None = None
    hh: Moments | None = None
    c: Moments | None = None


class Weights(NamedTuple):
    """The parameters of one layer and direction; a γ or β is None where its slot is empty."""

    weight_ih: Tensor  # (4H, D), gates in the order i, f, g, o
    weight_hh: Tensor  # (4H, H)
    bias: Tensor | None = None  # (4H,)
    gamma_ih: Tensor | None = None  # (4H,)
    gamma_hh: Tensor | None = None  # (4H,)
    gamma_c: Tensor | None = None  # (H,)
    beta_c: Tensor | None = None  # (H,)


class Normalization(NamedTuple):
    """What the three slots hold: "none", "frame" (each step by itself) or "sequence"."""

    ih: str = "frame"
    hh: str = "frame"
    c: str = "frame"
    eps: float = 1e-5


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
    """Run one layer in one direction.

    Args:
        input: (T, B, D), or (T, B) integers: the indices of one-hot vectors of size D.
        h_0, c_0: (B, H).
        population: normalise by these; step t uses row min(t, rows - 1). None: by the batch's own.
        lengths: (B,) on the input's device, each in 1..T. A finished sequence keeps its state and
            puts zeros out. None: all are T long.
        count_padding: whether finished sequences count in frame-wise batch statistics.

    Returns:
        output (T, B, H); h_n, c_n (B, H); the batch's moments, detached (empty if given).
    """
    kinds, eps = normalization, normalization.eps
    given = population if population is not None else TermMoments()
    steps = range(input.shape[0])
    live = None if lengths is None else _live_rows(lengths, len(steps))  # (T, B, 1)
    counted = None if count_padding else live
    if counted is not None and input.is_floating_point():
        # Whatever lies in the padding, even NaN, must not reach a gradient through a zero factor.
        input = torch.where(counted, input, 0.0)

    if kinds.ih == "sequence" and population is None:
        # Padding never counts here: n is the number of real frames (Laurent et al., section 3).
        ih, moments_ih = _normalize_sequence(_input_term(input, weights), weights, eps, live)
        input_terms, frame_ih = ih.unbind(0), []
    else:
        input_terms, frame_ih = _input_term(input, weights).unbind(0), []
        moments_ih = None

    h, c = h_0, c_0
    outputs, frame_hh, frame_c = [], [], []
    for t in steps:
        rows = None if counted is None else counted[t]

        ih = input_terms[t]
        if kinds.ih == "none":
            ih = ih if weights.bias is None else ih + weights.bias
        elif moments_ih is None:
            ih, moments = _normalize(
                ih, weights.gamma_ih, weights.bias, eps, _row(given.ih, t), rows
            )
            frame_ih.append(moments)

        hh = h @ weights.weight_hh.t()
        if kinds.hh != "none":
            hh, moments = _normalize(hh, weights.gamma_hh, None, eps, _row(given.hh, t), rows)
            frame_hh.append(moments)

        i, f, g, o = (ih + hh).chunk(4, dim=1)
        c_t = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)

        cell = c_t
        if kinds.c != "none":
            cell, moments = _normalize(
                c_t, weights.gamma_c, weights.beta_c, eps, _row(given.c, t), rows
            )
            frame_c.append(moments)
        elif weights.beta_c is not None:
            cell = c_t + weights.beta_c
        h_t = torch.sigmoid(o) * torch.tanh(cell)

        if live is None:
            h, c = h_t, c_t
            outputs.append(h_t)
        else:
            h, c = torch.where(live[t], h_t, h), torch.where(live[t], c_t, c)
            outputs.append(torch.where(live[t], h_t, 0.0))

    if population is not None:
        return torch.stack(outputs), h, c, TermMoments()
    moments_ih = moments_ih or _stack(frame_ih)
    return torch.stack(outputs), h, c, TermMoments(moments_ih, _stack(frame_hh), _stack(frame_c))


def _input_term(input: Tensor, weights: Weights) -> Tensor:
    """W_x x_t for all t at once, (T, B, 4H); of a one-hot x_t it is a column of W_x."""
    if input.is_floating_point():
        return input @ weights.weight_ih.t()
    return F.embedding(input, weights.weight_ih.t())


def _normalize(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    given: Moments | None,
    rows: Tensor | None,
) -> tuple[Tensor, Moments]:
    """BN(y; γ, β) of y (B, features) by the given moments or by those of its counted rows."""
    assert gamma is not None
    if given is None and rows is None:
        # The fused operator: five times faster than the formula below. With momentum 1 it leaves
        # the batch's mean and *unbiased* variance in the two tensors it takes for running ones.
        mean, var = y.new_zeros(y.shape[1]), y.new_zeros(y.shape[1])
        out = F.batch_norm(y, mean, var, gamma, beta, training=True, momentum=1.0, eps=eps)
        return out, Moments(mean, var * ((y.shape[0] - 1) / y.shape[0]))
    mean, var = given if given is not None else _moments(y, rows)
    scale = gamma * torch.rsqrt(var + eps)
    shift = -mean * scale if beta is None else beta - mean * scale
    # Given moments: one multiply-add. The batch's own: subtract first, as the formula does, since
    # a mean large against the deviation would leave little of it.
    if given is not None:
        out = torch.addcmul(shift, y, scale)
    else:
        out = (y - mean) * scale if beta is None else torch.addcmul(beta, y - mean, scale)
    return out, Moments(mean.detach(), var.detach())


def _normalize_sequence(
    y: Tensor, weights: Weights, eps: float, live: Tensor | None
) -> tuple[Tensor, Moments]:
    """BN of y (T, B, 4H) by one mean and variance over all its real frames."""
    flat_live = None if live is None else live.flatten(0, 1)
    out, moments = _normalize(y.flatten(0, 1), weights.gamma_ih, weights.bias, eps, None, flat_live)
    return out.view_as(y), Moments(moments.mean[None], moments.var[None])


def _moments(y: Tensor, rows: Tensor | None) -> Moments:
    if rows is None:
        mean = y.mean(0)
        return Moments(mean, (y - mean).square().mean(0))
    # A step at which nobody is live cannot occur (T is the longest length), but T may be longer.
    n = rows.sum().clamp(min=1)
    mean = torch.where(rows, y, 0.0).sum(0) / n
    return Moments(mean, torch.where(rows, y - mean, 0.0).square().sum(0) / n)


def _live_rows(lengths: Tensor, steps: int) -> Tensor:
    """(T, B, 1) booleans: is sequence b still running at step t?"""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths)[:, :, None]


def _row(moments: Moments | None, t: int) -> Moments | None:
    if moments is None:
        return None
    t = min(t, moments.mean.shape[0] - 1)
    return Moments(moments.mean[t], moments.var[t])


def _stack(moments: list[Moments]) -> Moments | None:
    if not moments:
        return None
    return Moments(torch.stack([m.mean for m in moments]), torch.stack([m.var for m in moments]))
