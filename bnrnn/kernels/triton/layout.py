"""The order of the 4H gate features in the kernels: grouped by unit rather than by gate."""

from torch import Tensor


def interleaved(y: Tensor, dim: int) -> Tensor:
    """Move feature gate * H + u to 4 * u + gate."""
    return y.unflatten(dim, (4, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def by_gate(y: Tensor, dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    return y.unflatten(dim, (-1, 4)).transpose(dim, dim + 1).flatten(dim, dim + 1)
