"""The recurrence in plain PyTorch: short, any device, any dtype, gradients by autograd.

Every other kernel is tested to equal this one. Dimensions: T time, B batch, D input, H hidden.

    z_t = BN(W_x x_t; γ_x, 0) + BN(W_h h_{t-1}; γ_h, 0) + b        split into i, f, g, o
    c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
    h_t = σ(o) ⊙ tanh(BN(c_t; γ_c, β_c))
    BN(y; γ, β) = β + γ ⊙ (y − mean) / sqrt(var + ε)

or, if the sum of the two terms is normalised, per time step,

    z_t = BN(W_h h_{t-1} + W_x x_t; γ_h, b)

These are equations 6 to 8 of Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017. The
sequence-wise statistics of the input term are from Laurent et al., "Batch Normalized Recurrent
Neural Networks", 2015. So is the normalised sum, which they tried first (section "Batch
Normalization for RNNs").

Any BN(y; γ, β) may be replaced by LN(y; γ, β): the same formula, with mean and variance over the
features of y, for each sequence and step separately (Ba et al., "Layer Normalization", 2016,
equations 20 to 22). Their shifts of the first two terms are omitted, because b includes them.

Noise in training, with masks m of zeros and ones and P(m = 1) = p:

    c_t = m_c ⊙ c_{t-1} + (1 − m_c) ⊙ c̃_t          zoneout: c̃_t, h̃_t are the c_t and h_t above,
    h_t = m_h ⊙ h_{t-1} + (1 − m_h) ⊙ h̃_t          h̃_t computed from c̃_t; in evaluation m = p
    c̃_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ (1 − m_g) / (1 − p) ⊙ tanh(g)                recurrent dropout
    W_h ((1 − m) / (1 − p) ⊙ h_{t-1}) for W_h h_{t-1}, same m at all steps        hidden dropout

Sources: Krueger et al., "Zoneout", ICLR 2017, section 3; Semeniuta et al., "Recurrent Dropout
without Memory Loss", 2016, equation 11, but scaled in training rather than in evaluation; Gal and
Ghahramani, "A Theoretically Grounded Application of Dropout in RNNs", 2016, section 4.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnrnn.kernels import synchronised
from bnrnn.kernels.interface import SILENCE, Moments, Noise, Normalization, TermMoments, Weights


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
    steps = input.shape[0]
    live = None if lengths is None else live_rows(lengths, steps)  # (T, B, 1)
    counted = None if count_padding else live
    if counted is not None and input.is_floating_point():
        # Zero the padding: a NaN there would reach the gradients, because 0 * NaN is NaN.
        input = torch.where(counted, input, 0.0)

    w, kinds, eps = weights, normalization, normalization.eps
    given = population or TermMoments()
    b_x, b_h = (None, w.bias) if kinds.sums else (w.bias, None)  # b serves as β
    everywhere = kinds.synchronised
    bn_ih = _Norm(kinds.ih, w.gamma_ih, b_x, kinds.eps_ih, given.ih, everywhere)
    bn_hh = _Norm(kinds.hh, w.gamma_hh, b_h, eps, given.hh, everywhere)
    bn_c = _Norm(kinds.c, w.gamma_c, w.beta_c, eps, given.c, everywhere)

    x_terms = input_term(input, w.weight_ih, bfloat16)  # (T, B, 4H)
    frame_by_frame = kinds.ih == "frame" and not kinds.synchronised
    beforehand = kinds.takes_moments("ih") and given.ih is None and not frame_by_frame
    if beforehand and kinds.ih == "sequence":
        # Padding never counts here: n is the number of real frames.
        frames = None if live is None else live.flatten(0, 1)
        x_terms = bn_ih(x_terms.flatten(0, 1), 0, frames).view_as(x_terms)
    elif beforehand:
        x_terms = bn_ih.all_steps(x_terms, counted)

    h, c, output = h_0, c_0, []
    for t, x in enumerate(x_terms.unbind(0)):
        rows = None if counted is None else counted[t]
        if not beforehand:
            x = bn_ih(x, t, rows)
        y = _dropped(h, noise.dropped_hidden, noise.hidden_dropout)
        y = _product(y, w.weight_hh, bfloat16)
        z = bn_hh(x + y, t, rows) if kinds.sums else x + bn_hh(y, t, rows)
        i, f, g, o = z.chunk(4, dim=1)
        g = _dropped(torch.tanh(g), _at(noise.dropped_candidate, t), noise.recurrent_dropout)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * g
        if live is not None:
            new_c = torch.where(live[t], new_c, c)
        new_h = torch.sigmoid(o) * torch.tanh(bn_c(new_c, t, rows))
        c_t = _zoned(c, new_c, _at(noise.held_cell, t), noise.zoneout_cell)
        h_t = _zoned(h, new_h, _at(noise.held_hidden, t), noise.zoneout_hidden)
        c = c_t if live is None else torch.where(live[t], c_t, c)
        h = h_t if live is None else torch.where(live[t], h_t, h)
        output.append(h_t if live is None else torch.where(live[t], h_t, 0.0))
    moments = TermMoments(bn_ih.moments(), bn_hh.moments(), bn_c.moments())
    return torch.stack(output), h, c, moments


def gradients(
    results: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of those inputs that need one, which can be differentiated again.

    Args:
        results: output, h_n and c_n of `recurrence`.
        grads: their gradients; None for a result that the loss does not depend on.
        needed: whether each input needs a gradient; inputs beyond its end need none.
    """
    used = [i for i, grad in enumerate(grads) if grad is not None]
    wanted = [t for t, need in zip(inputs, needed, strict=False) if need]
    found = iter(
        torch.autograd.grad(
            [results[i] for i in used], wanted, [grads[i] for i in used],
            create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if need else None for need in needed]


def _at(mask: Tensor | None, t: int) -> Tensor | None:
    return None if mask is None else mask[t]


def _dropped(y: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return y if mask is None else torch.where(mask, 0.0, y) / (1 - p)


def _zoned(old: Tensor, new: Tensor, held: Tensor | None, p: float) -> Tensor:
    if held is not None:
        return torch.where(held, old, new)
    return new if p == 0 else p * old + (1 - p) * new


class _Norm:
    """One slot: BN(y; γ, β) or LN(y; γ, β) at step t, or y + β if the slot is empty."""

    def __init__(
        self, kind: str, gamma: Tensor | None, beta: Tensor | None, eps: float,
        given: Moments | None, synchronised: bool,
    ) -> None:  # fmt: skip
        self.synchronised = synchronised
        self.gamma, self.beta, self.eps = gamma, beta, eps
        self.empty, self.layer = kind == "none", kind == "layer"
        self.given = given is not None
        self.seen: list[Moments] = []
        if given is not None:
            # Fold everything into a scale and a shift: one multiply-add per step.
            assert gamma is not None
            self.scale = gamma * torch.rsqrt(given.var + eps)  # (rows, features)
            self.shift = -given.mean * self.scale
            if beta is not None:
                self.shift = self.shift + beta

    def __call__(self, y: Tensor, t: int, rows: Tensor | None) -> Tensor:
        """Normalise y (n, features); `rows` (n, 1) marks those that count in batch statistics."""
        if self.empty:
            return y if self.beta is None else y + self.beta
        if self.layer:
            return F.layer_norm(y, y.shape[-1:], self.gamma, self.beta, self.eps)
        if self.given:
            t = min(t, len(self.scale) - 1)
            return torch.addcmul(self.shift[t], y, self.scale[t])
        assert self.gamma is not None
        if rows is None and not self.synchronised:
            # The fused operator is much faster than the formula below. With momentum 1 it writes
            # the batch mean and the *unbiased* variance into its running statistics.
            n, features = y.shape
            mean, var = y.new_zeros(features), y.new_zeros(features)
            y = F.batch_norm(y, mean, var, self.gamma, self.beta, True, 1.0, self.eps)
            self.seen.append(Moments(mean, var * ((n - 1) / n)))
            return y
        wide = widened(y)
        if self.synchronised:
            mean, var, live = synchronised.moments(wide, rows)
        else:
            assert rows is not None
            live = rows.sum()
            n = live.clamp(min=1)  # T may exceed the longest length
            mean = torch.where(rows, wide, 0.0).sum(0) / n
            var = torch.where(rows, wide - mean, 0.0).square().sum(0) / n
        if self.seen:
            mean = torch.where(live > 1, mean, self.seen[-1].mean)
            var = torch.where(live > 1, var, self.seen[-1].var)
        self.seen.append(Moments(mean.detach(), var.detach()))
        wide = (wide - mean) * (self.gamma * torch.rsqrt(var + self.eps))
        return (wide if self.beta is None else wide + self.beta).to(y.dtype)

    def all_steps(self, y: Tensor, rows: Tensor | None) -> Tensor:
        """Normalise y (T, n, features) with one message for the moments of all steps."""
        assert self.gamma is not None
        wide = widened(y)
        mean, var, live = synchronised.moments(wide, rows)
        steps = torch.arange(len(y), device=y.device)[:, None]
        last = torch.where(live > 1, steps, 0).cummax(0).values[:, 0]
        mean = torch.where(live > 1, mean, mean[last].detach())
        var = torch.where(live > 1, var, var[last].detach())
        self.seen = [Moments(*both) for both in zip(mean.detach(), var.detach(), strict=True)]
        wide = (wide - mean[:, None]) * (self.gamma * torch.rsqrt(var + self.eps))[:, None]
        return (wide if self.beta is None else wide + self.beta).to(y.dtype)

    def moments(self) -> Moments | None:
        if not self.seen:
            return None
        means, variances = zip(*self.seen, strict=True)
        assert self.gamma is not None
        dtype = self.gamma.dtype
        return Moments(torch.stack(means).to(dtype), torch.stack(variances).to(dtype))


def widened(y: Tensor) -> Tensor:
    """Half precision as float32: the gradient of 1 / sqrt(var + ε) exceeds the range of float16."""
    return y.float() if y.dtype in (torch.float16, torch.bfloat16) else y


def input_term(input: Tensor, weight_ih: Tensor, bfloat16: bool = False) -> Tensor:
    """W_x x_t for all t at once, (T, B, 4H); a one-hot x_t selects a column of W_x."""
    if input.is_floating_point():
        return _product(input, weight_ih, bfloat16)
    return F.embedding(input, weight_ih.t())


def _product(x: Tensor, weight: Tensor, bfloat16: bool) -> Tensor:
    """W x for each row of x; with `bfloat16`, as autocast computes it."""
    if bfloat16 and x.dtype == torch.float32:
        return (x.bfloat16() @ weight.bfloat16().t()).to(x.dtype)
    return x @ weight.t()


def live_rows(lengths: Tensor, steps: int) -> Tensor:
    """(T, B, 1) booleans: whether sequence b is still running at step t."""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths)[:, :, None]
