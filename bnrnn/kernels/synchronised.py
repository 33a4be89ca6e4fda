"""Moments of a batch that is split over several processes, and their gradient.

With n rows over all processes,

    mean = Σ y / n        var = Σ (y − mean)² / n

and the gradient of the sum of all processes' losses with respect to row i of this process is

    dy_i = (Σ_p dmean + 2 (y_i − mean) Σ_p dvar) / n

where Σ_p sums over the processes. The forward pass and the backward pass each send one message.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def moments(y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over the rows of all processes of the default group.

    All processes must call this, and its backward pass, in the same order. The gradient is that of
    the sum of all processes' losses.

    Args:
        y: (..., n, features), this process's rows; n may differ between processes.
        rows: (..., n, 1) booleans that mark the rows that count; None: all.

    Returns:
        mean and var, (..., features), 0 if no row of any process counts; the number of rows that
        count, (..., 1).
    """
    return _Moments.apply(y, rows)  # type: ignore[return-value]


def total(counts: Tensor) -> Tensor:
    """The sum over all processes."""
    return _everywhere(counts).sum(0)


def _everywhere(ours: Tensor) -> Tensor:
    """The values of all processes, (processes, ...); their sum is bit-identical in all of them.

    This sends one message to each process. `torch.distributed.all_reduce` sends two in sequence,
    and latency matters more than size here.
    """
    parts = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, ours)
    return torch.stack(parts)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        features = y.shape[-1]
        if rows is None:
            n = y.new_full((*y.shape[:-2], 1), y.shape[-2])
            mean = y.sum(-2) / n.clamp(min=1)
            squares = (y - mean.unsqueeze(-2)).square().sum(-2)
        else:
            n = rows.sum(-2).to(y.dtype)
            mean = torch.where(rows, y, 0.0).sum(-2) / n.clamp(min=1)
            squares = torch.where(rows, y - mean.unsqueeze(-2), 0.0).square().sum(-2)
        parts = _everywhere(torch.cat([n, mean, squares], -1))

        # Chan, Golub and LeVeque, "Updating Formulae", 1979: avoids cancellation.
        counts, means, squares = parts.split([1, features, features], -1)
        n = counts.sum(0)
        divisor = n.clamp(min=1)
        mean = (counts * means).sum(0) / divisor
        var = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / divisor
        ctx.save_for_backward(y, rows, mean, divisor)
        ctx.mark_non_differentiable(n)
        return mean, var, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, rows, mean, n = ctx.saved_tensors
        d_mean, d_var = (
            d.unsqueeze(-2) for d in _everywhere(torch.stack(gradients[:2])).sum(0).unbind()
        )
        d_y = (d_mean + 2 * (y - mean.unsqueeze(-2)) * d_var) / n.unsqueeze(-2)
        return (d_y if rows is None else torch.where(rows, d_y, 0.0)), None
