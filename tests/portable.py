"""Run the numeric tests as other processors would: `make test-portable`.

The compiled kernel is built for each instruction set, and PyTorch is limited to each of its own.
Every value of each of the three factors is tested, but not every combination.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import NamedTuple

from bnrnn.kernels import build


class Row(NamedTuple):
    isa: str  # BNRNN_KERNEL_ISA
    aten: str  # ATEN_CPU_CAPABILITY, which also limits the kernel; "" is no limit
    threads: int

    def __str__(self) -> str:
        return f"kernel {self.isa}, PyTorch {self.aten or 'unlimited'}, {self.threads} threads"


ROWS = [
    Row("avx512", "", 2),
    Row("avx2", "", 1),
    Row("baseline", "", 3),
    Row("avx2", "avx2", 2),
    Row("baseline", "default", 1),
]


def run(row: Row, seeds: int, jobs: int) -> str:
    """Run the tests and return the outcome in a few words."""
    if row.isa not in build.instruction_sets():
        return "skipped, this machine has " + ", ".join(build.instruction_sets())
    settings = {
        "BNRNN_KERNEL_ISA": row.isa, "OMP_NUM_THREADS": str(row.threads),
        # The threads of all jobs share the cores: if they spun while waiting, the tests would take
        # ten times as long.
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    if row.aten:
        settings["ATEN_CPU_CAPABILITY"] = row.aten
    began = time.monotonic()
    # Leave out finite differences, which are slow and far coarser than rounding, and Triton's
    # interpreter, whose arithmetic is NumPy's.
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "not test_gradients and not triton"]
    done = subprocess.run(
        [*tests, "-m", "numeric and not slow", "-n", str(jobs), "--seeds", str(seeds)],
        env={**os.environ, **settings},
    )
    return f"{'failed' if done.returncode else 'passed'} in {time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--once", action="store_true", help="each instruction set once")
    arguments = parser.parse_args()
    rows = {row.isa: row for row in reversed(ROWS)}.values() if arguments.once else ROWS
    outcomes = {}
    for row in rows:
        print(f"--- {row}", flush=True)
        outcomes[row] = run(row, arguments.seeds, arguments.jobs)
    print(f"--- the numeric tests with {arguments.seeds} seeds")
    for row, outcome in outcomes.items():
        print(f"{row}: {outcome}")
    sys.exit(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
