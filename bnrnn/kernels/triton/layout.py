"""How the kernels order the 4H features of gates: those of a unit together, not those of a gate."""

from torch import Tensor


def interleaved(y: Tensor, dim: int) -> Tensor:
    """Feature gate H + u is put at 4 u + gate."""
    return y.unflatten(dim, (4, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def by_gate(y: Tensor, dim: int) -> Tensor:
    """Undoes `interleaved`."""
    return y.unflatten(dim, (-1, 4)).transpose(dim, dim + 1).flatten(dim, dim + 1)
