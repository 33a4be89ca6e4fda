"""The recurrence of one layer and direction: a reference, and fast versions equal to it.

`recurrence` is what the rest of the library calls. It takes the arguments of
`bnrnn.kernels.reference.recurrence` and the name of a kernel.
"""

from collections.abc import Callable

from torch import Tensor

from bnrnn.kernels import reference
from bnrnn.kernels.reference import Moments, Normalization, TermMoments, Weights

KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, TermMoments]]] = {
    "reference": reference.recurrence,
}


def choose(kernel: str) -> str:
    """The name of the kernel that serves `kernel`, which may be "auto".

    Raises:
        ValueError: no kernel of this name.
    """
    if kernel == "auto":
        return "reference"
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of auto, {', '.join(KERNELS)}; got {kernel!r}")
    return kernel


def recurrence(*args, kernel: str = "auto", **kwargs) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
    return KERNELS[choose(kernel)](*args, **kwargs)


__all__ = ["KERNELS", "Moments", "Normalization", "TermMoments", "Weights", "choose", "recurrence"]
