"""Masks of random booleans that are a function of a key alone, on any device and number of threads.

Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
A block of four 32-bit words is ten rounds of multiplications over a counter and a key, so any part
of a mask can be drawn by itself. The CPU has it in C++ too (`csrc/philox.cpp`), bit for bit the
same and thirty times as fast.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def new_key() -> Tensor:
    """64 bits from PyTorch's generator of the CPU, which a seed sets and a checkpoint holds."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)


def bernoulli(key: Tensor, stream: int, count: int, p: float) -> Tensor:
    """
    Args:
        key: of `new_key`.
        stream: another one draws other numbers with the same key; 0 or more.
        count: how many.
        p: the probability of true, rounded to a multiple of 2^-16.

    Returns:
        (count,) booleans, on the key's device.
    """
    blocks = torch.arange((count + 7) // 8, device=key.device)
    words = _philox(blocks, stream, key)
    halves = torch.stack([words & 0xFFFF, words >> 16], 2)
    return (halves.flatten() < threshold(p))[:count]


def threshold(p: float) -> int:
    """How many of the 2^16 halves of a word mean true."""
    return round(p * 2**16)


def _philox(blocks: Tensor, stream: int, key: Tensor) -> Tensor:
    """The words (blocks, 4) of blocks (n,), as int64."""
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
    """The high and the low half of a product of 32-bit words."""
    # It may pass 2^63: int64 keeps the right bits, and the mask drops the sign that is shifted in.
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
