"""The cost of the normalisers and regularisers: a training step, compared with the BN-LSTM's.

    python -m bench.family [OUT]         # OUT: results/bench

One layer with all gradients, float32, at the papers' sizes. All models run alternately in one
process, with the same allocator setting.
"""

import gc
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from bench import output
from bench.recurrence import PAPER, Shape
from bnrnn import BNLSTM
from bnrnn.command.allocator import keep_large_blocks

SHAPES = {"pMNIST": 9, "reader": 9, "PTB": 5}  # number of rounds
_PLAIN = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")
_ZONEOUT = {"zoneout_cell": 0.5, "zoneout_hidden": 0.05}
MODELS: dict[str, dict[str, Any]] = {
    "BN-LSTM": {},
    "LN-LSTM": dict.fromkeys(_PLAIN, "layer"),
    "zoneout": _PLAIN | _ZONEOUT,
    "BN-LSTM, zoneout": _ZONEOUT,
    "recurrent dropout": _PLAIN | {"recurrent_dropout": 0.25},
    "one mask per sequence on h": _PLAIN | {"hidden_dropout": 0.25},
    "BN-LSTM, DropConnect": {"weight_dropout": 0.25},
}


def measure(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step of each model, one number per round."""
    if shape.features == 1 or shape.dense:
        x = torch.randn(shape.steps, shape.batch, shape.features)
    else:
        x = torch.randint(shape.features, (shape.steps, shape.batch))
    gradient = torch.randn(shape.steps, shape.batch, shape.hidden)
    modules = {
        name: BNLSTM(shape.features, shape.hidden, kernel="cpu", **options)
        for name, options in MODELS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    for round in tqdm(range(rounds + 2), leave=False, disable=None):  # two warm up
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            gc.collect()
            began = time.perf_counter()
            result = module(x)[0]
            result.backward(gradient)
            end = time.perf_counter()
            del result  # else the next model's time would include freeing this graph
            if round >= 2:
                seconds[name].append(end - began)
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--rounds", type=output.positive, help="instead of 5 to 9")
    options = output.parse(parser, arguments)
    keep_large_blocks()
    facts = output.facts()
    found = {
        name: measure(PAPER[name], options.rounds or rounds) for name, rounds in SHAPES.items()
    }
    text = [
        "# The cost of normalisers and regularisers",
        "",
        "Written by `make bench`. A training step as a multiple of the BN-LSTM's, medians / minima "
        f"of {' and '.join(str(options.rounds or n) for n in sorted(set(SHAPES.values())))} rounds "
        f"in turn in one process, float32, on the CPU kernel. {facts['machine']}, "
        f"{facts['threads']} threads, PyTorch {facts['torch']}, commit {facts['commit']}.",
        "",
        "| | " + " | ".join(f"{name}: {PAPER[name]}" for name in SHAPES) + " |",
        "|---" * (1 + len(SHAPES)) + "|",
    ]
    base = {shape: seconds["BN-LSTM"] for shape, seconds in found.items()}
    for name in list(MODELS)[1:]:
        cells = [
            f"{statistics.median(seconds[name]) / statistics.median(base[shape]):.2f} / "
            f"{min(seconds[name]) / min(base[shape]):.2f}"
            for shape, seconds in found.items()
        ]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    output.report(options.out, "family", text, {**facts, "seconds": found})


if __name__ == "__main__":
    main()
