"""The random masks of a training pass: zoneout, and the dropouts of a recurrence."""

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

    def mask(stream: int, p: float, *rows: int) -> Tensor | None:
        """A mask whose batch dimension is last in memory, as the CPU kernel reads it."""
        if p == 0:
            return None
        whole = share.current().whole(batch)
        count = whole * hidden * (rows[0] if rows else 1)
        drawn = kernels.bernoulli(key, stream, count, p).view(*rows, hidden, whole)
        return share.current().of(drawn, len(rows) + 1).contiguous().mT

    return Noise(
        o.zoneout_cell, o.zoneout_hidden, o.recurrent_dropout, o.hidden_dropout,
        mask(_CELL, o.zoneout_cell, steps), mask(_HIDDEN, o.zoneout_hidden, steps),
        mask(_CANDIDATE, o.recurrent_dropout, steps), mask(_STATE, o.hidden_dropout),
    )  # fmt: skip


def drop_weights(weight: Tensor, p: float, key: Tensor | None) -> Tensor:
    """DropConnect: drop elements of the weight itself; without a key, return it unchanged."""
    if key is None or p == 0:
        return weight
    key = key.to(weight.device, non_blocking=True)
    dropped = kernels.bernoulli(key, _WEIGHT, weight.numel(), p).view_as(weight)
    return torch.where(dropped, 0.0, weight) / (1 - p)
