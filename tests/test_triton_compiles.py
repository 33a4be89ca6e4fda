"""The CUDA kernels compile without a GPU, and their resources fit one.

They are compiled by Triton's own launcher, because the interpreter does not specialise arguments;
the launcher makes an integer 1 a constant, for example.
"""

import json
import os
import subprocess
import sys

import pytest

from bnrnn.kernels.triton import VERSION
from tests.conftest import ROOT

pytest.importorskip("triton", minversion="{}.{}".format(*VERSION))

# The resources of one multiprocessor of the smallest GPUs with compute capability 8.0 or more.
REGISTERS, SHARED = 65536, 99 * 1024

EDGES = [
    "90/one sequence/persistent/float32/given",
    "80/one sequence/alternating/float32/given/values",
    "90/one unit/persistent/tf32/lengths",
    "80/one unit/alternating/float32/plain/no output",
]
PAPER = ["80/pmnist/persistent/bfloat16", "90/ptb/alternating/bfloat16/lengths"]
REST = [  # including the paper's other shapes
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
# Bytes per thread. In the backward pass, batches of 512 need 40, and pMNIST without TF32 needs 8.
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
