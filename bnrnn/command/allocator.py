"""Keep glibc from handing large blocks back to the kernel after every operation.

Each temporary of tens of megabytes is otherwise mapped afresh and zeroed page by page, which costs
more than the arithmetic: two to three times the training step of an LSTM over 784 steps.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_large_blocks() -> bool:
    """Set it for this process; False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
