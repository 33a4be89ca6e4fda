"""The recurrence of one layer and direction: a reference and fast kernels that equal it.

The rest of the library calls `recurrence`, which runs one of the kernels in `KERNELS`.
"""

import functools
import logging

from torch import Tensor

from bnrnn.kernels import cpu, philox, reference, scan, torch_lstm, triton
from bnrnn.kernels.build import BuildError
from bnrnn.kernels.cpu import has_bfloat16
from bnrnn.kernels.interface import (
    SILENCE,
    Kernel,
    Moments,
    Noise,
    Normalization,
    Recurrence,
    Request,
    TermMoments,
    Weights,
)
from bnrnn.kernels.philox import new_key

# Fastest first, except that "scan" only runs during an export, and that "cpu" outruns "torch.lstm"
# on the requests of `cpu.outruns_torch_lstm`.
KERNELS: dict[str, Kernel] = {
    "scan": Kernel(scan.recurrence, scan.why_not),
    "torch.lstm": Kernel(torch_lstm.recurrence, torch_lstm.why_not),
    "cpu": Kernel(cpu.recurrence, cpu.why_not, rounds_products=True, fast_on="cpu"),
    "torch.lstm packed": Kernel(torch_lstm.recurrence, torch_lstm.why_not_padded),
    "triton": Kernel(triton.recurrence, triton.why_not, fast_on="cuda"),
    **{
        f"triton {way}": Kernel(functools.partial(triton.recurrence, way=way), triton.why_not)
        for way in ("persistent", "alternating")
    },
    "reference": Kernel(reference.recurrence, lambda _: None, rounds_products=True),
}


def check_name(kernel: str) -> None:
    """
    Raises:
        ValueError: the name is neither "auto" nor in `KERNELS`.
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of auto, {', '.join(KERNELS)}, got {kernel!r}")


def rounds_products(kernel: str) -> bool:
    """Whether a kernel can round the factors of products to bfloat16; "auto" can choose one."""
    return kernel == "auto" or KERNELS[kernel].rounds_products


def choose(kernel: str, request: Request) -> str:
    """Return the name of the kernel that runs a request.

    Args:
        kernel: a name in `KERNELS`, or "auto" for the fastest kernel that can run the request. If
            that is a slower one because the device's fast kernel cannot, the reason is logged
            once.

    Raises:
        ValueError: there is no such kernel, or it cannot run the request.
    """
    check_name(kernel)
    if kernel == "auto":
        for name, entry in KERNELS.items():
            reason = entry.why_not(request)
            if reason is None:
                outrun = name == "torch.lstm" and cpu.outruns_torch_lstm(request)
                return "cpu" if outrun else name
            if entry.fast_on == request.device:
                _log_slower(name, reason)
    reason = KERNELS[kernel].why_not(request)
    if reason is not None:
        raise ValueError(f"kernel {kernel!r} cannot run this: {reason}; use 'auto'")
    return kernel


def _log_slower(name: str, reason: str) -> None:
    _log_slower_once(name, reason)


_log_slower._dynamo_marked_constant = True  # pyright: ignore (see kernels/cpu.py)


@functools.cache
def _log_slower_once(name: str, reason: str) -> None:
    logging.getLogger(__name__).warning(
        "Kernel %r cannot run this, so a slower one does: %s", name, reason
    )


def recurrence(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Weights,
    normalization: Normalization,
    *,
    population: TermMoments | None = None,
    lengths: Tensor | None = None,
    count_padding: bool = False,
    noise: Noise = SILENCE,
    bfloat16: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
    """See `bnrnn.kernels.interface.Recurrence`; `kernel` is as in `choose`."""
    cell_bias = normalization.c == "none" and weights.beta_c is not None
    request = Request(
        h_0.device.type, h_0.dtype, normalization, cell_bias,
        padded=lengths is not None, by_batch=population is None, noisy=not noise.is_silent,
        random=noise.is_random, bfloat16=bfloat16, batch=input.shape[1],
    )  # fmt: skip
    run = KERNELS[choose(kernel, request)].run
    return run(
        input, h_0, c_0, weights, normalization,
        population=population, lengths=lengths, count_padding=count_padding, noise=noise,
        bfloat16=bfloat16,
    )  # fmt: skip


def bernoulli(key: Tensor, stream: int, count: int, p: float) -> Tensor:
    """`bnrnn.kernels.philox.bernoulli`, drawn by the C++ kernel where it is available."""
    if key.is_cpu and cpu.can_draw():
        return cpu.bernoulli(key, stream, count, p)
    return philox.bernoulli(key, stream, count, p)


__all__ = [
    "KERNELS",
    "SILENCE",
    "BuildError",
    "Kernel",
    "Moments",
    "Noise",
    "Normalization",
    "Recurrence",
    "Request",
    "TermMoments",
    "Weights",
    "bernoulli",
    "check_name",
    "choose",
    "has_bfloat16",
    "new_key",
    "recurrence",
    "rounds_products",
]
