"""The recurrence as one `scan`, which ONNX export turns into a loop over any number of steps.

It is for evaluation only: normalisation by population statistics is an affine map per time step,
and zoneout takes its expectation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnrnn.kernels.interface import (
    SILENCE,
    Moments,
    Noise,
    Normalization,
    Request,
    TermMoments,
    Weights,
)
from bnrnn.kernels.reference import input_term, live_rows


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
    """See `bnrnn.kernels.interface.Recurrence`; without batch statistics and masks."""
    # Imported here because it imports the compiler, which takes seconds.
    from torch._higher_order_ops.scan import scan

    w, given, steps = weights, population or TermMoments(), input.shape[0]

    def standardized(term: str, y: Tensor) -> Tensor:
        """y normalised over its features if the slot is "layer", else y."""
        if getattr(normalization, term) != "layer":
            return y
        return F.layer_norm(y, y.shape[-1:], eps=normalization.eps)

    def affine(term: str, gamma: Tensor | None, beta: Tensor | None, like: Tensor) -> list[Tensor]:
        """Scale and shift of a term at each step, (T, features)."""
        moments: Moments | None = getattr(given, term)
        if moments is None or gamma is None:
            scale = (torch.ones_like(like) if gamma is None else gamma)[None]
            shift = torch.zeros_like(like)[None]
        else:
            scale = gamma * torch.rsqrt(moments.var + normalization.eps_of(term))
            shift = -moments.mean * scale
        shift = shift if beta is None else shift + beta
        rows = torch.arange(steps, device=input.device).clamp(max=len(scale) - 1)
        return [scale[rows], shift[rows]]

    sums = normalization.sums
    b_x, b_h = (None, w.bias) if sums else (w.bias, None)
    scale, shift = affine("ih", w.gamma_ih, b_x, w.weight_hh[:, 0])
    x = standardized("ih", input_term(input, w.weight_ih)) * scale[:, None] + shift[:, None]
    live = torch.ones_like(x[:, :, :1]) > 0 if lengths is None else live_rows(lengths, steps)
    by_step = (
        x, live, *affine("hh", w.gamma_hh, b_h, w.weight_hh[:, 0]),
        *affine("c", w.gamma_c, w.beta_c, w.weight_hh[0]),
    )  # fmt: skip

    def step(
        state: tuple[Tensor, Tensor], now: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        (h, c), (x, live, scale_h, shift_h, scale_c, shift_c) = state, now
        y = standardized("hh", h @ w.weight_hh.t())
        z = (x + y) * scale_h + shift_h if sums else x + y * scale_h + shift_h
        i, f, g, o = z.chunk(4, dim=1)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(standardized("c", new_c) * scale_c + shift_c)
        new_c = torch.lerp(new_c, c, noise.zoneout_cell) if noise.zoneout_cell else new_c
        new_h = torch.lerp(new_h, h, noise.zoneout_hidden) if noise.zoneout_hidden else new_h
        output = torch.where(live, new_h, 0.0)
        return (torch.where(live, new_h, h), torch.where(live, new_c, c)), output

    (h_n, c_n), output = scan(step, (h_0.clone(), c_0.clone()), by_step)
    return output, h_n, c_n, TermMoments()


def why_not(request: Request) -> str | None:
    if not torch.onnx.is_in_onnx_export():
        return "it is for export to ONNX"
    if request.bfloat16:
        return "it does not round the factors of products"
    if (request.by_batch and request.normalization.by_batch) or request.random:
        return "it takes no batch statistics and no noise: call eval() first"
    return None
