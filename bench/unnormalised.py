"""The cost of a layer without normalisation: the CPU kernel, compared with `torch.lstm`.

    python -m bench.unnormalised [OUT]         # OUT: results/bench

The rule by which `kernel=auto` chooses between them, `bnrnn.kernels.cpu.outruns_torch_lstm`, rests
on this table. Both run alternately in one process, with the same allocator setting.
"""

import itertools
import statistics
import time

import torch
from torch import Tensor
from tqdm import tqdm

from bench import output
from bnrnn import BNLSTM
from bnrnn.command.allocator import keep_large_blocks

STEPS, FEATURES = 200, 50
HIDDEN = (32, 64, 128, 256, 512, 1024)
BATCH = (16, 32, 64, 128)
KERNELS = ("cpu", "torch.lstm")
INPUTS = ("vectors", "symbols")


def measure(hidden: int, batch: int, input: str, training: bool, rounds: int) -> dict[str, float]:
    """The median seconds of each kernel's training step, or of its evaluation."""
    x = torch.randn(STEPS, batch, FEATURES)
    if input == "symbols":
        x = torch.randint(FEATURES, (STEPS, batch))
    gradient = torch.randn(STEPS, batch, hidden)
    none = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")
    modules = {name: BNLSTM(FEATURES, hidden, kernel=name, **none) for name in KERNELS}
    seconds: dict[str, list[float]] = {name: [] for name in KERNELS}
    for _ in range(rounds + 1):
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            seconds[name].append(_time(module, x, gradient if training else None))
    return {name: statistics.median(took[1:]) for name, took in seconds.items()}


def _time(module: BNLSTM, x: Tensor, gradient: Tensor | None) -> float:
    began = time.perf_counter()
    with torch.set_grad_enabled(gradient is not None):
        result = module(x)[0]
        if gradient is not None:
            result.backward(gradient)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--rounds", type=output.positive, default=5)
    options = output.parse(parser, arguments)
    keep_large_blocks()
    facts = output.facts()
    output.load_kernel(parser)
    lanes = torch.ops.bnrnn_cpu.lanes(False)
    text = [
        "# A layer without normalisation",
        "",
        "Written by `make bench`. The time of the CPU kernel divided by that of `torch.lstm`: "
        f"T {STEPS}, D {FEATURES}, float32, {facts['machine']}, vectors of {lanes} numbers, "
        f"{facts['threads']} threads, PyTorch {facts['torch']}, commit {facts['commit']}. Medians "
        f"of {options.rounds}, in turn in one process.",
        "",
    ]
    found = []
    columns = list(itertools.product(INPUTS, BATCH))
    for training in (True, False):
        text += [
            f"## {'A training step' if training else 'Evaluation'}",
            "",
            "| units | " + " | ".join(f"B {batch}, {input}" for input, batch in columns) + " |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for hidden in tqdm(HIDDEN, leave=False, disable=None):
            row = []
            for input, batch in columns:
                seconds = measure(hidden, batch, input, training, options.rounds)
                row.append(f"{seconds['cpu'] / seconds['torch.lstm']:.2f}")
                found.append({"hidden": hidden, "batch": batch, "input": input,
                              "training": training, "seconds": seconds})  # fmt: skip
            text.append(f"| {hidden:,} | " + " | ".join(row) + " |")
        text.append("")
    output.report(options.out, "unnormalised", text, {**facts, "lanes": lanes, "measured": found})


if __name__ == "__main__":
    main()
