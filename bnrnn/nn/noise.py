"""The random masks of a training pass: zoneout, and the dropouts of a recurrence."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnrnn import kernels
from bnrnn.kernels import SILENCE, Noise
from bnrnn.nn import share

if TYPE_CHECKING:
    from bnrnn.nn.options import NoiseOptions

# The streams of the masks, see philox.bernoulli.
_CELL, _HIDDEN, _CANDIDATE, _STATE, _WEIGHT = range(5)


def draw(
    options: "NoiseOptions", shape: tuple[int, int, int], key: Tensor | None, device: torch.device
) -> Noise:
    """Draw the noise of one layer and direction.

    Args:
        shape: (T, B, H).
        key: from `kernels.new_key`. None: for evaluation, where zoneout takes its expectation.
    """
    o, (steps, batch, hidden) = options, shape
    if not o.is_noisy:
        return SILENCE
    if key is None:
        return Noise(o.zoneout_cell, o.zoneout_hidden)
    key = key.to(device, non_blocking=True)
    size = batch, hidden
    return Noise(
        o.zoneout_cell, o.zoneout_hidden, o.recurrent_dropout, o.hidden_dropout,
        _mask(key, _CELL, o.zoneout_cell, size, steps),
        _mask(key, _HIDDEN, o.zoneout_hidden, size, steps),
        _mask(key, _CANDIDATE, o.recurrent_dropout, size, steps),
        _mask(key, _STATE, o.hidden_dropout, size),
    )  # fmt: skip


def _mask(key: Tensor, stream: int, p: float, size: tuple[int, int], *steps: int) -> Tensor | None:
    """A mask (*steps, B, H) whose batch dimension is last in memory, as the CPU kernel reads it."""
    if p == 0:
        return None
    (batch, hidden), part = size, share.current()
    whole = part.whole(batch)
    drawn = kernels.bernoulli(key, stream, math.prod((*steps, hidden, whole)), p)
    return part.of(drawn.view(*steps, hidden, whole), len(steps) + 1).contiguous().mT


def drop_weights(weight: Tensor, p: float, key: Tensor | None) -> Tensor:
    """DropConnect: drop elements of the weight itself; without a key, return it unchanged."""
    if key is None or p == 0:
        return weight
    key = key.to(weight.device, non_blocking=True)
    dropped = kernels.bernoulli(key, _WEIGHT, weight.numel(), p).view_as(weight)
    return torch.where(dropped, 0.0, weight) / (1 - p)
