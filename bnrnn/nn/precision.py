"""Training in bfloat16 on a CPU: autocast around the forward pass of a whole model."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

_MARK = "_runs_in_bfloat16"


def run_in_bfloat16(model: nn.Module) -> None:
    """Make the model's forward pass run under autocast to bfloat16; what it returns is in float32.

    Matrix products round their factors to bfloat16. Parameters, batch statistics, the states of
    recurrent layers and the loss stay in float32.
    """
    forward = model.forward

    @functools.wraps(forward)
    def rounded(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            found = forward(*args, **kwargs)
        return tree_map_only(torch.Tensor, _widened, found)

    model.forward = rounded
    setattr(model, _MARK, True)


def autocast_of(model: nn.Module) -> torch.autocast:
    """The autocast that the model's forward pass runs under; disabled if it runs under none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=getattr(model, _MARK, False))


def _widened(found: torch.Tensor) -> torch.Tensor:
    return found.float() if found.dtype == torch.bfloat16 else found
