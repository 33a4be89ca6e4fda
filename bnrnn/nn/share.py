"""A process's share of a batch that is split over several processes.

Within a share, every process draws the random numbers of the whole batch and uses those of its own
sequences, so the result does not depend on the number of processes. Without a share, these
functions do what PyTorch's do.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bnrnn.kernels import Moments


@dataclass(frozen=True)
class Share:
    """Sequences `first` to `stop` of a batch of `total`.

    The defaults represent a batch that is not split.
    """

    first: int = 0
    stop: int = 0
    total: int = 0

    @property
    def is_whole(self) -> bool:
        return self.total == 0

    def of(self, x: Tensor, dim: int | None = None) -> Tensor:
        """This share of a tensor (B,), (T, B, ...) or (layers, B, ...), or along `dim`."""
        if self.is_whole:
            return x
        dim = min(1, x.dim() - 1) if dim is None else dim
        return x.narrow(dim, self.first, self.stop - self.first)

    def whole(self, batch: int) -> int:
        """The size of the whole batch, if this process has `batch` of its sequences."""
        return batch if self.is_whole else self.total


WHOLE = Share()
_current = WHOLE


def current() -> Share:
    return _current


@contextlib.contextmanager
def within(share: Share) -> Iterator[None]:
    """A context in which computations use this share of a batch."""
    global _current
    before, _current = _current, share
    try:
        yield
    finally:
        _current = before


def dropout(x: Tensor, p: float, training: bool, batch_dim: int = 1) -> Tensor:
    """`torch.nn.functional.dropout`; `batch_dim` is the dimension B of x."""
    if _current.is_whole or not training or p == 0:
        return F.dropout(x, p, training)
    # Numbers are drawn in memory order.
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    shape = [_current.total if d == batch_dim else x.shape[d] for d in order]
    factors = F.dropout(x.new_ones(shape), p).permute([order.index(d) for d in range(x.dim())])
    return x * _current.of(factors, batch_dim)


def mean(total: Tensor, count: Tensor | int) -> Tensor:
    """total / count, each summed over all shares, as a term of this process's loss.

    DistributedDataParallel averages gradients over n processes, so this returns n times this
    process's part of the mean.
    """
    if _current.is_whole:
        return total / count
    everywhere = torch.as_tensor(count, device=total.device).double().clamp(min=1)
    dist.all_reduce(everywhere)
    return total * (dist.get_world_size() / everywhere).to(total.dtype)


def average(moments: Moments, counts: Tensor | None) -> tuple[Moments, Tensor | None]:
    """Average moments over the shares.

    Args:
        moments: (T, features).
        counts: (T,) booleans, which of the rows are valid; None: all.

    Returns:
        the averaged moments and counts, equal in all processes.
    """
    if _current.is_whole:
        return moments, counts
    steps, features = moments.mean.shape
    valid = moments.mean.new_ones(steps) if counts is None else counts.to(moments.mean.dtype)
    everywhere = torch.cat([torch.cat(list(moments), 1) * valid[:, None], valid[:, None]], 1)
    dist.all_reduce(everywhere)
    mean, var, n = everywhere.split([features, features, 1], 1)
    found = Moments(mean / n.clamp(min=1), var / n.clamp(min=1))
    return found, None if counts is None else n[:, 0] > 0
