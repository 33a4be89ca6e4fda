"""Initial weights, in any dtype."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonal_(weight: Tensor) -> Tensor:
    """`torch.nn.init.orthogonal_` in any dtype: it computes in float32 for half precision."""
    if weight.dtype in (torch.float32, torch.float64):
        return nn.init.orthogonal_(weight)
    return weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32)))


@torch.no_grad()
def identity_candidate_(weight_hh: Tensor) -> Tensor:
    """Set the g block of weight_hh (4H, H) to the identity; make i, f, o orthogonal together."""
    hidden_size = weight_hh.shape[1]
    others = orthogonal_(weight_hh.new_empty(3 * hidden_size, hidden_size))
    i_f, o = others[: 2 * hidden_size], others[2 * hidden_size :]
    return weight_hh.copy_(torch.cat([i_f, torch.eye(hidden_size).to(weight_hh), o]))
