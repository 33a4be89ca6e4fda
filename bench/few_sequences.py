"""The cost of evaluating few sequences, compared with `torch.nn.LSTM`.

    python -m bench.few_sequences [OUT]        # OUT: results/bench

A single step is what a streamed text costs. The rule by which `kernel=auto` chooses between the CPU
kernel and `torch.lstm` (`bnrnn.kernels.cpu.outruns_torch_lstm`) rests on the layer without
normalisation. All subjects alternate in one process.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench import output
from bnrnn import BNLSTM, calibrate

FEATURES = 50
STEPS = (1, 100)
HIDDEN = (32, 64, 128, 256, 512, 1024)
BATCH = (1, 2, 4, 8)
SECONDS = 0.02  # about as long as one measurement takes
BN, PLAIN, TORCH = "BN-LSTM", "without normalisation", "nn.LSTM"


def subjects(hidden: int, steps: int) -> dict[str, nn.Module]:
    none = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")
    modules = {
        BN: BNLSTM(FEATURES, hidden),
        PLAIN: BNLSTM(FEATURES, hidden, kernel="cpu", **none),
        TORCH: nn.LSTM(FEATURES, hidden),
    }
    calibrate(modules[BN], [torch.randn(steps, 8, FEATURES)])
    return {name: module.eval() for name, module in modules.items()}


@torch.inference_mode()
def measure(hidden: int, steps: int, batch: int, rounds: int) -> dict[str, float]:
    """The median seconds of a call of each subject."""
    x = torch.randn(steps, batch, FEATURES)
    state = torch.zeros(1, batch, hidden), torch.zeros(1, batch, hidden)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda module=module: module(x, state)
        for name, module in subjects(hidden, steps).items()
    }
    for call in calls.values():
        call()
    repeats = max(1, round(SECONDS / _time(calls[TORCH], 1)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_time(call, repeats))
    return {name: statistics.median(took) for name, took in seconds.items()}


def _time(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--rounds", type=output.positive, default=9)
    options = output.parse(parser, arguments)
    output.load_kernel(parser)
    facts = output.facts()
    found = []
    for case in tqdm(list(itertools.product(STEPS, HIDDEN, BATCH)), leave=False, disable=None):
        steps, hidden, batch = case
        seconds = measure(hidden, steps, batch, options.rounds)
        found.append({"steps": steps, "hidden": hidden, "batch": batch, "seconds": seconds})
    text = [
        "# Evaluation of few sequences",
        "",
        "Written by `make bench`. The time of a call of `bnrnn.BNLSTM`, divided by that of "
        "`torch.nn.LSTM`; in parentheses its microseconds. The BN-LSTM has population statistics "
        f"for each step. D {FEATURES}, float32, {facts['machine']}, {facts['threads']} threads, "
        f"PyTorch {facts['torch']}, commit {facts['commit']}. Medians of {options.rounds}, in turn "
        "in one process.",
        "",
    ]
    for name, steps in itertools.product((BN, PLAIN), STEPS):
        text += [
            f"## {name}, {'one step' if steps == 1 else f'{steps} steps'}",
            "",
            "| units | " + " | ".join(f"B {batch}" for batch in BATCH) + " |",
            "|---" * (1 + len(BATCH)) + "|",
        ]
        for hidden in HIDDEN:
            row = [
                f"{seconds[name] / seconds[TORCH]:.2f} ({1e6 * seconds[name]:,.0f})"
                for seconds in (
                    point["seconds"] for point in found
                    if (point["steps"], point["hidden"]) == (steps, hidden)
                )
            ]  # fmt: skip
            text.append(f"| {hidden:,} | " + " | ".join(row) + " |")
        text.append("")
    output.report(options.out, "few_sequences", text, {**facts, "measured": found})


if __name__ == "__main__":
    main()
