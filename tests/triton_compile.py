"""Compile the CUDA kernels with Triton's own launcher, without a GPU, and print their resources.

    python -m tests.triton_compile "ARCH/SHAPE/WAY/PRODUCTS[/OPTION ...]" ...

This needs a separate process, because the interpreter must be off before triton is imported. It
prints one line of JSON per kernel: registers per thread, bytes spilled, bytes of shared memory and
threads per program. PRODUCTS is float32, tf32 or bfloat16; `compile_all` defines the options.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bnrnn.kernels import Moments, Normalization, TermMoments, Weights
from bnrnn.kernels import triton as ours
from bnrnn.kernels.triton import operators, plan, steps

SHAPES = {  # T, B, D, H
    "pmnist": (784, 100, 1, 100), "ptb": (100, 64, 50, 1000), "text8": (180, 128, 27, 2000),
    "one sequence": (3, 1, 2, 20), "one unit": (3, 5, 2, 1),
    "largest batch": (3, 512, 2, 100), "half of it": (3, 256, 2, 600),
    "largest persistent": (3, 128, 2, 1400),
}  # fmt: skip
KERNELS = steps.forward_steps, steps.backward_steps
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGPU:
    """A driver with the methods that the launcher calls before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled, but not run, when it is launched."""

    def __init__(self, kernel: Any, found: dict[str, Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            compiled = self.kernel.warmup(grid=grid, **arguments)
            self.found.setdefault(self.kernel.__name__, compiled)

        return launch


def compile_all(arch: int, shape: str, way: str, dtype: torch.dtype, options: set[str]) -> Any:
    """Compile both passes (only the forward pass with the option "values"); return them by name."""
    driver.set_active(NoGPU(arch))  # pyright: ignore
    found: dict[str, Any] = {}
    steps.forward_steps, steps.backward_steps = (Compiled(k, found) for k in KERNELS)
    plan.programs = lambda way, blocks, device: min(blocks, 108)
    _, batch, features, hidden = SHAPES[shape]
    length = 3  # arbitrary, but Triton would make 1 a constant
    new = functools.partial(torch.zeros, dtype=dtype)
    norms = ("none", "none", "none") if "plain" in options else ("frame", "frame", "frame")
    gammas: Any = [None] * 4
    if "plain" not in options:
        gammas = new(4 * hidden), new(4 * hidden), new(hidden), new(hidden)
    weights = Weights(
        new(4 * hidden, features).requires_grad_("values" not in options), new(4 * hidden, hidden),
        new(4 * hidden), *gammas,
    )  # fmt: skip
    population = None
    if "given" in options:
        widths = 4 * hidden, 4 * hidden, hidden
        population = TermMoments(*(Moments(new(1, n), new(1, n)) for n in widths))
    output, h_n, _, _ = ours.recurrence(
        new(length, batch, features), new(batch, hidden), new(batch, hidden), weights,
        Normalization(*norms), population=population, way=way,
        lengths=torch.full((batch,), length) if "lengths" in options else None,
        count_padding="count_padding" in options,
    )  # fmt: skip
    if "values" not in options:
        (h_n if "no output" in options else output).sum().backward()
    return found


def resources(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOL, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return {
        "kernel": compiled.metadata.name, "registers": int(match[1]), "spilled": int(match[2]),
        "shared": compiled.metadata.shared, "threads": 32 * compiled.metadata.num_warps,
        "cooperative": compiled.metadata.launch_cooperative_grid,
    }  # fmt: skip


def main() -> None:
    assert not operators.INTERPRETED
    for case in sys.argv[1:]:
        arch, shape, way, products, *options = case.split("/")
        torch.backends.cuda.matmul.allow_tf32 = products == "tf32"
        dtype = torch.bfloat16 if products == "bfloat16" else torch.float32
        for compiled in compile_all(int(arch), shape, way, dtype, set(options)).values():
            print(json.dumps({"case": case} | resources(compiled)), flush=True)


if __name__ == "__main__":
    main()
