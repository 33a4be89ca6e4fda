"""Where the time of a training step of the CPU kernel goes, and what bounds it.

    python -m bench.profile [OUT]        # OUT: results/bench

It builds the kernel with counters, which cost one or two per cent. A part's time is that of the
fastest step of all rounds, averaged over the threads. Beside it stand two bounds: the matrix
products at the rate of a large product, and the bytes that a step streams through memory at the
bandwidth of a large copy.
"""

import os
import sys
import time

import torch
from tqdm import tqdm

from bench import output
from bench.recurrence import OURS, PAPER, Shape, build, product_rate
from bnrnn.command.allocator import keep_large_blocks

ROUNDS = 12
SHAPES = ("pMNIST", "reader", "PTB")


def measure(shape: Shape, rounds: int = ROUNDS) -> tuple[float, dict[str, float]]:
    """Seconds of the fastest step, and of each part of the kernel in its fastest step."""
    module, forward = build(OURS, shape)
    gradient = torch.randn(shape.steps, shape.batch, shape.hidden)
    steps: list[float] = []
    parts: dict[str, float] = {}
    for round in range(rounds + 1):
        module.zero_grad(set_to_none=True)
        began = time.perf_counter()
        forward().backward(gradient)
        took = time.perf_counter() - began
        names, spent = torch.ops.bnrnn_cpu.spent()
        if round == 0:  # it touches fresh memory
            continue
        steps.append(took)
        for name, nanoseconds in zip(names, spent, strict=True):
            seconds = 1e-9 * nanoseconds / torch.get_num_threads()
            parts[name] = min(parts.get(name, seconds), seconds)
    return min(steps), parts


def streamed(shape: Shape) -> float:
    """Bytes that a step reads and writes of arrays of all time steps, in float32.

    Forward: W_h h_{t-1}, h, c and the output are written, and a dense input's W_x x_t. Backward:
    all of these are read, but the gradient of the output instead of the output.
    """
    state = 4.0 * shape.steps * shape.batch * shape.hidden
    dense = 4 * state if shape.dense else 0
    return 2 * (4 * state + 2 * state + state + dense)


def bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes a second of a large copy, read and written: the best of `repeats`."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)

    def seconds() -> float:
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began

    return 2 * source.numel() / min(seconds() for _ in range(repeats))


def table(name: str, shape: Shape, rate: float, bytes_a_second: float) -> str:
    step, parts = measure(shape)
    rows = [*parts.items(), ("outside the kernel", max(0.0, step - sum(parts.values())))]
    floor, bound = 1e-9 * shape.flops / rate, streamed(shape) / bytes_a_second
    lines = [
        f"### {name}: {shape}",
        "",
        f"The fastest of {ROUNDS} steps: {1000 * step:.0f} ms. Its {1e-9 * shape.flops:.0f} GFLOP "
        f"of products would take {1000 * floor:.0f} ms, and the {1e-6 * streamed(shape):.0f} MB "
        f"that it streams {1000 * bound:.0f} ms.",
        "",
        "| part | ms | of all |",
        "|---|---|---|",
        *(f"| {part} | {1000 * s:.1f} | {100 * s / step:.0f} % |" for part, s in rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(PAPER))
    options = output.parse(parser, arguments)
    os.environ["BNRNN_KERNEL_PROFILE"] = "1"
    output.load_kernel(parser)
    keep_large_blocks()
    facts = output.facts()
    rate, bytes_a_second = product_rate(), bandwidth()
    text = [
        "# Where the time of a training step goes",
        "",
        "Written by `python -m bench.profile`. Forward and backward of one BN-LSTM layer with all "
        f"gradients, float32. {facts['machine']}, {facts['threads']} threads, PyTorch "
        f"{facts['torch']}, commit {facts['commit']}. A large product runs at {rate:.0f} GFLOP/s, "
        f"a large copy at {1e-9 * bytes_a_second:.0f} GB/s.",
        "",
    ]
    for name in options.shapes:
        tqdm.write(f"{name}: {PAPER[name]}", file=sys.stderr)
        text.append(table(name, PAPER[name], rate, bytes_a_second))
        print(text[-1])
    output.write(options.out, "profile", text)


if __name__ == "__main__":
    main()
