"""Random boolean masks that depend only on a key, not on the device or the number of threads.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3", 2011). It computes each block of four 32-bit words from a counter and a key, in ten rounds
of multiplications, so any part of a mask can be drawn independently. `csrc/philox.cpp` is the same
generator for the CPU: bit-identical, and with AVX-512 ninety times as fast.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def new_key() -> Tensor:
    """Draw 64 bits from PyTorch's CPU generator, which is seeded and saved in checkpoints."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")


def bernoulli(key: Tensor, stream: int, count: int, p: float) -> Tensor:
    """
    Args:
        key: from `new_key`.
        stream: 0 or more; each stream has different numbers for the same key.
        count: the number of booleans.
        p: the probability of true, rounded to a multiple of 2^-16.

    Returns:
        (count,) booleans, on the key's device.
    """
    blocks = torch.arange((count + 7) // 8, device=key.device)
    words = _philox(blocks, stream, key)
    halves = torch.stack([words & 0xFFFF, words >> 16], 2)
    return (halves.flatten() < threshold(p))[:count]


def threshold(p: float) -> int:
    """The number of 16-bit values, out of 2^16, that mean true."""
    return round(p * 2**16)


def _philox(blocks: Tensor, stream: int, key: Tensor) -> Tensor:
    """The words (n, 4) of blocks (n,), as int64."""
    a, b = blocks & _WORD, (blocks >> 32) & _WORD
    c, d = torch.full_like(a, stream), torch.zeros_like(a)
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_c, low_c) = (
            _product(word, m) for word, m in zip((a, c), _MULTIPLIERS, strict=True)
        )
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([a, b, c, d], 1)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low halves of a product of 32-bit words."""
    # The product may exceed 2^63. int64 keeps the right bits; the mask drops the shifted-in sign.
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
