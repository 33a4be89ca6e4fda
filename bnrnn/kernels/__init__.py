"""The recurrence of one layer and direction: a reference, and fast versions equal to it.

`recurrence` is what the rest of the library calls. It takes the arguments of
`bnrnn.kernels.reference.recurrence` and the name of a kernel.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bnrnn.kernels import build, cpu, reference
from bnrnn.kernels.build import BuildError
from bnrnn.kernels.reference import Moments, Normalization, TermMoments, Weights

_log = logging.getLogger(__name__)

KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, TermMoments]]] = {
    "reference": reference.recurrence,
    "cpu": cpu.recurrence,
}


def choose(kernel: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The name of the kernel that serves tensors of this kind.

    Args:
        kernel: a name in `KERNELS`, or "auto": the fastest there is. Where the compiled one cannot
            be had, one line of the log says why, once, and the reference serves.

    Raises:
        ValueError: the kernel does not serve such tensors.
        BuildError: "cpu", and it cannot be compiled.
    """
    served = torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64)
    if kernel == "auto":
        return "cpu" if served and _compiled() else "reference"
    if kernel == "cpu":
        if not served:
            raise ValueError(
                f"kernel 'cpu' serves float32 and float64 on the CPU, not {dtype} on {device}: "
                "use 'auto'"
            )
        build.load()
    return kernel


def recurrence(*args, kernel: str = "auto", **kwargs) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
    h_0 = args[1]
    return KERNELS[choose(kernel, h_0.device, h_0.dtype)](*args, **kwargs)


@functools.cache
def _compiled() -> bool:
    try:
        build.load()
    except BuildError as error:
        _log.warning("No compiled CPU kernel, so the slower reference serves; %s", error)
        return False
    return True


__all__ = [
    "KERNELS",
    "BuildError",
    "Moments",
    "Normalization",
    "TermMoments",
    "Weights",
    "choose",
    "recurrence",
]
