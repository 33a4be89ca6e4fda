"""Initial weights, in any dtype."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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
    identity = torch.eye(hidden_size, device=weight_hh.device).to(weight_hh.dtype)
    return weight_hh.copy_(torch.cat([i_f, identity, o]))


@torch.no_grad()
def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter of a module, which may be parametrised or pruned, to a value.

    A plain tensor that has replaced the parameter is left alone.
    """
    own = module._parameters
    if parametrize.is_parametrized(module, name):
        try:
            setattr(module, name, value)
        except (NotImplementedError, RuntimeError):  # the parametrisation has no inverse
            getattr(module.parametrizations, name).original.copy_(value)
    elif (parameter := own.get(name, own.get(name + "_orig"))) is not None:  # `_orig`: pruned
        parameter.copy_(value)
    elif (direction := own.get(name + "_v")) is not None:  # torch.nn.utils.weight_norm
        length = own[name + "_g"]
        assert length is not None
        direction.copy_(value)
        across = [d for d, size in enumerate(length.shape) if size == 1]
        length.copy_(torch.linalg.vector_norm(value, dim=across, keepdim=True))
