"""How a problem is divided into programs. This depends only on its size, never on a measurement.

A resumed run must use the same tiles, because different tiles sum in a different order.
"""

from typing import NamedTuple

import torch

MAX_BATCH = 512  # because one program holds the whole batch
# Up to this H a persistent launch is faster, on an H200: results/bench/gpu-nvidia-h200.md.
PERSISTENT_HIDDEN = {"float32": 700, "tf32": 1400, "bfloat16": 1400}
WAYS = ("persistent", "alternating", "stepwise")


class Tiles(NamedTuple):
    block_b: int  # the batch, rounded up
    block_u: int  # hidden units per block
    block_k: int  # depth of one step of the product
    num_warps: int
    num_stages: int  # pipeline stages of the product's loads


def products(dtype: torch.dtype) -> str:
    """How the factors of a product are rounded: one of PERSISTENT_HIDDEN's keys."""
    if dtype == torch.bfloat16:
        return "bfloat16"
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "float32"


products._dynamo_marked_constant = True  # pyright: ignore (torch.compile cannot trace the setting)


def way(hidden: int, products: str) -> str:
    """The faster way for a problem of this size."""
    return "persistent" if hidden <= PERSISTENT_HIDDEN[products] else "alternating"


def tiles(way: str, batch: int, hidden: int) -> Tiles:
    """The tile sizes for B = `batch`, H = `hidden`.

    `tests/test_triton_compiles.py` lists the registers and spills of each choice.
    """
    block_b = max(16, _power_of_two(batch))
    if way == "alternating":
        block_u = 8 if hidden >= 512 and block_b <= 128 else 4
        return Tiles(block_b, block_u, 32, max(4, block_b * block_u // 128), 1)
    block_u = 4 if hidden <= 400 or block_b > 128 else 8 if hidden <= 1000 else 16
    # All stages, of (block_b + 4 block_u) x block_k numbers each, must fit into 99 KB, the shared
    # memory of the smallest supported GPUs.
    return Tiles(block_b, block_u, 32 if block_b <= 256 else 16, max(4, block_b * block_u // 128),
                 3 if block_b <= 128 else 2)  # fmt: skip


def programs(way: str, blocks: int, device: torch.device) -> int:
    """The number of programs in a launch; persistent ones must all be resident, one per SM."""
    if way != "persistent":
        return blocks
    return min(blocks, torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
