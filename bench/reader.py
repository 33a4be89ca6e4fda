"""Questions per second in training the Attentive Reader, compared with one on `torch.nn.LSTM`.

    python -m bench.reader [OUT]         # OUT: results/bench

A training step is the forward and backward pass with all gradients, at the paper's sizes. The
passages have 70 to 100 % of the longest length. All models run alternately in one process, with the
same allocator setting.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import output
from bnrnn.command.allocator import keep_large_blocks
from bnrnn.nn.attentive_reader import VARIANTS, AttentiveReader

BATCH, QUESTION = 64, 30
# The paper: 240 units, a vocabulary of 65,829 words; four sentences, or a whole article.
VOCABULARY, HIDDEN = 65_829, 240
LENGTHS = {"four sentences": 130, "whole passages": 800}
BASELINE = "attentive_lstm on torch.nn.LSTM"


def batch(length: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    def padded(longest: int) -> list[Tensor]:
        lengths = torch.randint(longest * 7 // 10, longest + 1, (BATCH,))
        lengths[0] = longest
        return [torch.randint(4, vocabulary, (longest, BATCH)), lengths]

    return [*padded(length), *padded(QUESTION)], torch.randint(4, vocabulary, (BATCH,))


def measure(length: int, rounds: int, vocabulary: int, hidden: int) -> dict[str, list[float]]:
    """Seconds of a training step of each model, one number per round."""
    torch.manual_seed(0)
    input, answers = batch(length, vocabulary)

    def reader(variant: str, bidirectional: bool, kernel: str = "auto") -> Callable[[], float]:
        settings = VARIANTS[variant] | {"bidirectional": bidirectional, "kernel": kernel}
        model = AttentiveReader(vocabulary=vocabulary, hidden_size=hidden, **settings)

        def step() -> float:
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            F.cross_entropy(model(*input)[0], answers).backward()
            return time.perf_counter() - began

        return step

    steps = {name: reader(name, settings["bidirectional"]) for name, settings in VARIANTS.items()}
    for ways in ("", ", both directions"):
        steps[BASELINE + ways] = reader("attentive_lstm", bool(ways), "torch.lstm packed")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in tqdm(range(rounds + 1), leave=False, disable=None):  # the first is a warm-up
        for name, step in steps.items():
            took = step()
            if round > 0:
                seconds[name].append(took)
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--rounds", type=output.positive, default=3)
    options = output.parse(parser, arguments)
    keep_large_blocks()
    facts = output.facts()
    found = {name: measure(T, options.rounds, VOCABULARY, HIDDEN) for name, T in LENGTHS.items()}
    text = [
        "# Questions per second in training",
        "",
        "Written by `make bench`. The Attentive Reader at the paper's sizes: "
        f"{HIDDEN} units, {VOCABULARY:,} words, batches of {BATCH}; forward and backward pass with "
        f"all gradients, float32. {facts['machine']}, {facts['threads']} threads, PyTorch "
        f"{facts['torch']}, commit {facts['commit']}. Median of {options.rounds}.",
        "",
        "| | " + " | ".join(f"{name}, T {T}" for name, T in LENGTHS.items()) + " |",
        "|---|" + "---|" * len(LENGTHS),
    ]
    for model in next(iter(found.values())):
        rates = [BATCH / statistics.median(seconds[model]) for seconds in found.values()]
        text.append(f"| {model} | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |")
    output.report(options.out, "reader", text, {**facts, "seconds": found})


if __name__ == "__main__":
    main()
