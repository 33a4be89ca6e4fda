"""The cost of a training step of the recurrence: ours, `nn.LSTM`, our reference, a plain loop.

    python -m bench.recurrence [OUT]         # OUT: results/bench

A training step is the module's forward and backward pass with all gradients, one layer, float32,
and ours also with products in bfloat16 where the processor multiplies fast in it.
All subjects run alternately in one process, so that ratios are meaningful on a shared machine. The
output has the median and the range of the times, and the ratio of the medians and of the minima. If
the two ratios differ, the speed of the machine changed. The floor is the time of the matrix
products alone, at the rate of a large product. Peak memory is that of one step in a separate
process.
"""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench import output
from bench.plain_loop import PlainLoopBNLSTM
from bnrnn import BNLSTM, kernels
from bnrnn.command.allocator import keep_large_blocks
from bnrnn.runs.record import write_json

OURS, TORCH, REFERENCE, PLAIN = "bnrnn", "nn.LSTM", "bnrnn, reference", "plain loop"
SUBJECTS = (OURS, TORCH, REFERENCE, PLAIN)
HALF = "bnrnn, bfloat16"  # under autocast, where the processor multiplies fast in bfloat16


@dataclass(frozen=True)
class Shape:
    steps: int
    batch: int
    features: int  # 1: pixels; more than 1: one-hot characters
    hidden: int
    dense: bool = False  # whether the features are dense vectors with a gradient

    @property
    def flops(self) -> float:
        """Operations of a step's matrix products; a one-hot or narrow input needs no product."""
        forward = 2 * self.steps * self.batch * 4 * self.hidden
        return 3 * forward * (self.hidden + self.features * self.dense)

    def __str__(self) -> str:
        return f"T {self.steps}, B {self.batch}, D {self.features}, H {self.hidden}"


PAPER = {
    "pMNIST": Shape(784, 100, 1, 100),
    "PTB": Shape(100, 64, 50, 1000),
    "text8": Shape(180, 128, 27, 2000),
    "reader": Shape(130, 64, 240, 240, dense=True),
}
_WARM_UP = 2
ROUNDS = {"pMNIST": 15, "PTB": 9, "text8": 3, "reader": 15}
MIDDLE = Shape(200, 64, 50, 256)
GROWTH = {
    "steps": (25, 50, 100, 200, 400, 800),
    "batch": (8, 16, 32, 64, 128, 256),
    "hidden": (32, 64, 128, 256, 512, 1024),
}


@dataclass
class Timing:
    forward: list[float]  # seconds, one number per round
    backward: list[float]

    @property
    def step(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def build(subject: str, shape: Shape) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The module, and a function that runs its forward pass: (T, B, H)."""
    torch.manual_seed(0)
    if shape.features == 1 or shape.dense:
        vectors = torch.randn(shape.steps, shape.batch, shape.features)
        indices = vectors.requires_grad_(shape.dense)
    else:
        indices = torch.randint(shape.features, (shape.steps, shape.batch))
        vectors = F.one_hot(indices, shape.features).float()
    if subject == TORCH:
        module = nn.LSTM(shape.features, shape.hidden)
        return module, lambda: module(vectors)[0]
    if subject == PLAIN:
        module = PlainLoopBNLSTM(shape.features, shape.hidden, shape.steps)
        return module, lambda: module(vectors)
    kernel = "reference" if subject == REFERENCE else "cpu"
    module = BNLSTM(shape.features, shape.hidden, kernel=kernel)
    if subject == HALF:
        return module, lambda: _under_autocast(module, indices)
    return module, lambda: module(indices)[0]


def _under_autocast(module: nn.Module, input: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(input)[0]


def measure(shape: Shape, rounds: int, subjects: tuple[str, ...] = SUBJECTS) -> dict[str, Timing]:
    built = {subject: build(subject, shape) for subject in subjects}
    gradient = torch.randn(shape.steps, shape.batch, shape.hidden)
    timings = {subject: Timing([], []) for subject in subjects}
    for round in range(rounds + _WARM_UP):
        for subject, (module, forward) in built.items():
            module.zero_grad(set_to_none=True)
            gc.collect()
            began = time.perf_counter()
            result = forward()
            middle = time.perf_counter()
            result.backward(gradient)
            end = time.perf_counter()
            del result  # else the next subject's time would include freeing this graph
            if round >= _WARM_UP:
                timings[subject].forward.append(middle - began)
                timings[subject].backward.append(end - middle)
    return timings


def product_rate(size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of the product of square float32 matrices: the best of `repeats`."""
    a = torch.randn(size, size)
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, a)
        took.append(time.perf_counter() - began)
    return 2e-9 * size**3 / min(took)


def peak_memory(subject: str, shape: Shape) -> float:
    """MiB that a training step needs in addition to the module and its data, in a new process."""
    call = f"from bench.recurrence import *; print(peak_here({subject!r}, {shape!r}))"
    done = subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    return float(done.stdout)


def peak_here(subject: str, shape: Shape) -> float:
    keep_large_blocks()
    # Do not count the code that the first step loads.
    for small in (Shape(2, 2, shape.features, 4), Shape(2, 64, shape.features, 256)):
        build(subject, small)[1]().sum().backward()
    module, forward = build(subject, shape)
    gradient = torch.randn(shape.steps, shape.batch, shape.hidden)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    forward().backward(gradient)
    assert all(parameter.grad is not None for parameter in module.parameters())
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def summary(timings: dict[str, Timing], memory: dict[str, float] | None = None) -> dict[str, Any]:
    return {
        subject: {
            "forward": statistics.median(timing.forward),
            "backward": statistics.median(timing.backward),
            "step": statistics.median(timing.step),
            "step_range": [min(timing.step), max(timing.step)],
            "memory_mib": None if memory is None else round(memory[subject]),
        }
        for subject, timing in timings.items()
    }


def table(name: str, shape: Shape, rows: dict[str, Any], rounds: int, rate: float) -> str:
    floor = 1e-9 * shape.flops / rate
    lines = [
        f"### {name}: {shape}",
        "",
        f"Median of {rounds}; in parentheses the range. The floor: {1000 * floor:.0f} ms, "
        f"{1e-9 * shape.flops:.0f} GFLOP of matrix products at {rate:.0f} GFLOP/s.",
        "",
        "| | forward, ms | backward, ms | training step, ms | of `nn.LSTM`'s | of minima "
        "| of the floor | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for subject, row in rows.items():
        low, high = (1000 * x for x in row["step_range"])
        ratio = row["step"] / rows[TORCH]["step"]
        of_minima = row["step_range"][0] / rows[TORCH]["step_range"][0]
        lines.append(
            f"| {subject} | {1000 * row['forward']:.0f} | {1000 * row['backward']:.0f} "
            f"| {1000 * row['step']:.0f} ({low:.0f} to {high:.0f}) | **{ratio:.2f}** "
            f"| {of_minima:.2f} | {row['step'] / floor:.1f} "
            f"| {row['memory_mib']:,} |"
        )
    return "\n".join(lines) + "\n"


def figure(growth: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from bnrnn.plots.style import plt, save, tidy

    titles = {"steps": "time steps T", "batch": "batch size B", "hidden": "hidden units H"}
    colours = {OURS: "#D55E00", TORCH: "#0072B2", REFERENCE: "#E69F00", PLAIN: "#555555"}
    canvas, panels = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, (what, points) in zip(panels, growth.items(), strict=True):
        sizes = [point[what] for point in points]
        for subject in SUBJECTS:
            cost = [1000 * point["subjects"][subject]["step"] for point in points]
            axes.plot(sizes, cost, color=colours[subject], label=subject, marker="o", markersize=3)
        others = [f"{k[0].upper()} {v}" for k, v in asdict(MIDDLE).items()
                  if k not in (what, "features", "dense")]  # fmt: skip
        others = [text.replace("S ", "T ") for text in others]
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(", ".join(others), fontsize=9, loc="left")
        tidy(axes, titles[what], "training step, ms" if axes is panels[0] else "")
    panels[0].legend(frameon=False)
    save(canvas, path)


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--rounds", type=output.positive, help="instead of 3 to 15")
    parser.add_argument("--no-growth", action="store_true", help="leave out the figure")
    parser.add_argument(
        "--default-allocator", action="store_true",
        help="leave glibc's setting, as a program does that only imports bnrnn",
    )  # fmt: skip
    options = output.parse(parser, arguments)
    if options.default_allocator:
        command, allocator = "python -m bench.recurrence --default-allocator", "glibc's own"
    else:
        command, allocator = "make bench", "the same"
        keep_large_blocks()
    facts = output.facts()
    rate = product_rate()
    shapes: dict[str, Any] = {}
    subjects = (*SUBJECTS, HALF) if kernels.has_bfloat16() else SUBJECTS
    text = [
        "# What a training step of the recurrence costs",
        "",
        f"Written by `{command}`. Forward and backward of one layer with all gradients, float32 "
        "if not said otherwise. "
        f"{facts['machine']}, {facts['threads']} threads, PyTorch {facts['torch']}, commit "
        f"{facts['commit']}. All subjects in turn in one process, with {allocator} setting of the "
        "allocator.",
        "",
    ]
    for name in options.shapes:
        shape, rounds = PAPER[name], options.rounds or ROUNDS[name]
        tqdm.write(f"{name}: {shape}", file=sys.stderr)
        memory = {subject: peak_memory(subject, shape) for subject in subjects}
        rows = summary(measure(shape, rounds, subjects), memory)
        shapes[name] = {**asdict(shape), "rounds": rounds, "subjects": rows}
        text.append(table(name, shape, rows, rounds, rate))
        print(text[-1])
    growth: dict[str, list[dict[str, Any]]] = {}
    if not options.no_growth:
        for what, sizes in GROWTH.items():
            for size in tqdm(sizes, desc=what, leave=False, disable=None):
                shape = Shape(**{**asdict(MIDDLE), what: size})
                timings = summary(measure(shape, options.rounds or 3))
                growth.setdefault(what, []).append({**asdict(shape), "subjects": timings})
        figure(growth, options.out / "growth.png")
        text += ["### How the cost grows", "", "![cost against T, B and H](growth.png)", ""]
    found = {**facts, "gflops": rate, "shapes": shapes, "growth": growth}
    write_json(options.out / "recurrence.json", found)
    output.write(options.out, "README", text)


if __name__ == "__main__":
    main()
