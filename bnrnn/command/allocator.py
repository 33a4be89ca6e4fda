"""Keep glibc from handing large blocks back to the kernel after every operation.

By default glibc returns each temporary of tens of megabytes to the kernel, which maps and zeroes
new pages for the next one. This costs more than the arithmetic: a training step of an LSTM over 784
time steps takes two to three times as long.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def keep_large_blocks() -> bool:
    """Keep large blocks in this process; return False if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # Older versions, such as 2.31, refuse a threshold above 32 MiB. They map no block at all then.
    maps_less = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_MAX, 0)
    return bool(maps_less and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
