"""The CUDA kernels compile for GPUs that are not here, and need what a GPU has.

By Triton's own launcher, for the interpreter does not know what it makes of the arguments, such as
a constant of an integer 1.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.conftest import ROOT

# Of one multiprocessor of the smallest GPUs of compute capability 8.0 and up.
REGISTERS, SHARED = 65536, 99 * 1024

EDGES = [
    "90/one sequence/persistent/float32/given",
    "80/one sequence/alternating/float32/given/values",
    "90/one unit/persistent/tf32/lengths",
    "80/one unit/alternating/float32/plain/no output",
]
PAPER = ["80/pmnist/persistent/bfloat16", "90/ptb/alternating/bfloat16/lengths"]
REST = [  # with the paper's other shapes
    f"{arch}/{shape}/{way}/{products}"
    for arch in (80, 90)
    for shape, way in (
        ("pmnist", "persistent"), ("pmnist", "alternating"), ("ptb", "alternating"),
        ("text8", "alternating"), ("largest persistent", "persistent"),
        ("half of it", "persistent"), ("half of it", "alternating"),
        ("largest batch", "persistent"), ("largest batch", "alternating"),
    )
    for products in ("float32", "tf32", "bfloat16")
]  # fmt: skip
# Bytes a thread, in the backward pass: 40 for batches of 512, 8 for pMNIST without TF32.
SPILLED = 64


@pytest.mark.parametrize(
    "cases",
    [EDGES + PAPER, pytest.param(REST, marks=pytest.mark.slow)],
    ids=["edges and paper", "rest"],
)
def test_compiles_and_fits(cases):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_compile", *cases], cwd=ROOT,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        print(line)
    assert len(lines) == sum(1 if "values" in case else 2 for case in cases)
    for line in lines:
        assert line["registers"] * line["threads"] <= REGISTERS, line
        assert line["shared"] <= SHARED, line
        assert line["spilled"] <= SPILLED, line
        assert line["cooperative"] == ("persistent" in line["case"].split("/")), line
