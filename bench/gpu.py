"""`make gpu-check`: test the CUDA kernels on this machine's GPU and measure the cost of a step.

    python -m bench.gpu [OUT] [--minutes 9]          # OUT: results/bench

After the tests, one process measures these, in this order, until the time is up:

1. A training step of one layer at the papers' shapes, for each way of the Triton kernel, `nn.LSTM`
   with the same precision of products, our reference kernel, and the floor.
2. A training step of both ways over H, to find where they cross.

The floor is a lower bound for the time on this GPU. It is the larger of two times: that of all
operations of the products at the rate of one large product, and that of writing and reading once
everything kept for the backward pass at the rate of a copy. Both rates are measured here.
"""

import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import output
from bench.recurrence import PAPER, Shape
from bnrnn import BNLSTM
from bnrnn.kernels.triton import plan

WAYS = {"persistent": "triton persistent", "alternating": "triton alternating"}
TORCH, REFERENCE = "nn.LSTM", "reference"
PRODUCTS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
CROSSING = (64, 128, 256, 384, 512, 700, 1000, 1400)
NO_DEVICE = "bnrnn: error: there is no CUDA device here: run this on a machine with an NVIDIA GPU"
# The largest accepted cost of a step, relative to nn.LSTM and to the reference.
BARS = {TORCH: 1.5, REFERENCE: 0.1}
_ROUNDS, _WARM_UP = 7, 2
_TESTS_MINUTES = 4.5  # the part of the time that the tests may take


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--minutes", type=output.minutes, default=9.0, help="stop after so long")
    parser.add_argument("--only-ask", action="store_true", help="only whether there is a device")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    if options.only_ask:
        return
    output.make_folder(parser, options.out)
    end = time.monotonic() + 60 * options.minutes - 10  # 10 s to write the results
    found: dict[str, Any] = facts() | {"tests": tests(min(_TESTS_MINUTES, options.minutes / 2))}
    found |= {"rates": {}, "shapes": [], "crossing": []}
    for products in PRODUCTS:
        set_products(products)
        found["rates"][products] = rates(products)
    for name, shape in PAPER.items():
        for products in PRODUCTS:
            if time.monotonic() < end:
                row = {"name": name, "products": products, **asdict(shape)}
                row |= costs(shape, products, found["rates"][products], end)
                found["shapes"].append(row)
                print(f"{name} {products}: {row['subjects']}", flush=True)
    for hidden in CROSSING:
        for products in PRODUCTS:
            if time.monotonic() < end:
                shape = Shape(100, 64, 50, hidden)
                row = {"hidden": hidden, "products": products}
                row |= costs(shape, products, found["rates"][products], end, tuple(WAYS))
                found["crossing"].append(row)
    found["complete"] = time.monotonic() < end
    name = re.sub(r"[^A-Za-z0-9]+", "-", found["machine"]).strip("-").lower()
    output.report(options.out, f"gpu-{name}", table(found).splitlines(), found)
    if found["tests"]["status"] != 0:
        raise SystemExit(f"bnrnn: error: {found['tests']['summary']}: see above")


def facts() -> dict[str, Any]:
    import triton

    device = torch.cuda.get_device_properties(0)
    return output.facts("cuda") | {
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
    }


def tests(minutes: float) -> dict[str, Any]:
    """Run `pytest -m gpu`; return its status (None: it took too long) and its last line."""
    # Compilation takes most of the time, so run several processes.
    workers = str(max(1, min(10, (os.cpu_count() or 2) - 2)))
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-q", "-n", workers,
               "-p", "no:benchmark",  # it warns about -n, and warnings are errors
               "tests/test_gpu.py", "tests/test_cell.py"]  # fmt: skip
    lines: list[str] = []
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=60 * minutes,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        status, lines = done.returncode, done.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        status, lines = None, (out.decode() if isinstance(out, bytes) else out).splitlines()
    print("\n".join(lines), flush=True)
    summary = lines[-1] if status is not None and lines else f"unfinished after {minutes:.1f} min"
    return {"status": status, "summary": summary}


def set_products(products: str) -> None:
    """Set the precision of float32 products, the same for all subjects."""
    on = products == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def rates(products: str) -> dict[str, float]:
    """Operations per second of one large product; bytes read and written per second by a copy."""
    dtype, n = PRODUCTS[products], 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    big = torch.empty(2**28, device="cuda")
    other = torch.empty_like(big)
    return {
        "operations": 2 * n**3 / timed(lambda: a @ b),
        "bytes": 2 * big.nbytes / timed(lambda: other.copy_(big)),
    }


def timed(run: Callable[[], Any], rounds: int = _ROUNDS, end: float | None = None) -> float:
    """Median seconds; it runs fewer rounds if `end` has passed."""
    found = []
    for k in range(_WARM_UP + rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        if k >= _WARM_UP:
            found.append(before.elapsed_time(after) / 1000)
        if found and end is not None and time.monotonic() > end:
            break
    return statistics.median(found)


def build(subject: str, shape: Shape, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if subject == TORCH:
        module: nn.Module = nn.LSTM(shape.features, shape.hidden)
    else:
        kernel = WAYS.get(subject, subject)
        module = BNLSTM(shape.features, shape.hidden, kernel=kernel, max_length=shape.steps)
    x = torch.randn(shape.steps, shape.batch, shape.features)
    return module.to("cuda", dtype), x.to("cuda", dtype)


def costs(
    shape: Shape, products: str, rate: dict[str, float], end: float,
    subjects: tuple[str, ...] = (*WAYS, TORCH, REFERENCE),
) -> dict[str, Any]:  # fmt: skip
    """The result of `cost`, or the error, for each subject; and the floor."""
    set_products(products)
    rows: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        try:
            rows[subject] = cost(subject, shape, products, end)
        except Exception as error:  # continue with the other subjects
            rows[subject] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(f"{subject}, {shape}, {products}: {rows[subject]['error']}", flush=True)
        torch.cuda.empty_cache()
    return {"subjects": rows, "floor": floor(shape, PRODUCTS[products], rate)}


def cost(subject: str, shape: Shape, products: str, end: float) -> dict[str, Any]:
    module, x = build(subject, shape, PRODUCTS[products])
    gradient = torch.randn(shape.steps, shape.batch, shape.hidden, device="cuda", dtype=x.dtype)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    began = time.monotonic()
    step()  # compiles
    torch.cuda.synchronize()
    first = time.monotonic() - began
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rounds = 2 if subject == REFERENCE else _ROUNDS
    seconds = timed(step, rounds, end)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = timed(lambda: module(x), rounds, end)
    return {
        "step": seconds, "forward_without_gradients": forward, "first_call": round(first, 2),
        "memory_mib": round(peak),
    }  # fmt: skip


def floor(shape: Shape, dtype: torch.dtype, rate: dict[str, float]) -> float:
    """A lower bound, in seconds, for the time of a training step."""
    rows, hidden = shape.steps * shape.batch, shape.hidden
    # W_h h and the gradients of h and W_h; W_x x and the gradient of W_x.
    operations = 2 * rows * 4 * hidden * (3 * hidden + 2 * shape.features)
    size = torch.empty((), dtype=dtype).element_size()
    # The two terms of 4H, h, c, and the gradient of a term, each written and read once.
    numbers = rows * 2 * (4 + 4 + 1 + 1 + 4) * hidden
    return max(operations / rate["operations"], numbers * size / rate["bytes"])


def table(found: dict[str, Any]) -> str:
    lines = [
        f"# A training step on one {found['machine']}",
        "",
        "The floor is a lower bound from products and memory. The bars: at most "
        f"{BARS[TORCH]:g} times `nn.LSTM`'s time and {BARS[REFERENCE]:g} times the reference's. "
        "The README uses the way that `plan` chooses.",
        "",
        "Written by `make gpu-check`. Forward and backward of one layer with all gradients, in ms, "
        f"median of {_ROUNDS}. PyTorch {found['torch']}, triton {found['triton']}, commit "
        f"{found['commit']}. Tests: {found['tests']['summary']}."
        + ("" if found["complete"] else " The time limit was reached; the last rows are missing."),
        "",
        "| | products | persistent | alternating | `nn.LSTM` | reference | floor "
        "| best of `nn.LSTM`'s | of the reference's | bars met |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["shapes"]:
        steps = step_times(row)
        best = min((steps[way] for way in WAYS if steps[way] > 0), default=math.nan)
        ratios = {of: best / steps[of] for of in (TORCH, REFERENCE)}
        met = all(ratios[of] <= bar for of, bar in BARS.items())
        shape = Shape(row["steps"], row["batch"], row["features"], row["hidden"])
        cells = [f"{1000 * steps[s]:.1f}" for s in (*WAYS, TORCH, REFERENCE)]
        cells += [f"{1000 * row['floor']:.1f}", f"**{ratios[TORCH]:.2f}**"]
        cells += [f"{ratios[REFERENCE]:.3f}", "yes" if met else "no"]
        lines.append(f"| {row['name']}: {shape} | {row['products']} | {' | '.join(cells)} |")
    ways = ", ".join(f"{h} ({products})" for products, h in plan.PERSISTENT_HIDDEN.items())
    lines += [
        "",
        f"Over H, at T 100, B 64, D 50; the plan takes the persistent one up to {ways}:",
        "",
        "| H | products | persistent | alternating |",
        "|---|---|---|---|",
    ]
    for row in found["crossing"]:
        cells = [f"{1000 * step:.1f}" for step in step_times(row).values()]
        lines.append(f"| {row['hidden']} | {row['products']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def step_times(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of each subject; nan if it failed."""
    return {subject: values.get("step", math.nan) for subject, values in row["subjects"].items()}


if __name__ == "__main__":
    main()
