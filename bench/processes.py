"""The cost of a training step that is split over processes, with local or synchronised statistics.

    python -m bench.processes [OUT]         # OUT: results/bench

A step is the forward and backward pass of one BN-LSTM under DistributedDataParallel, with all
gradients. Each process has one thread and its part of the batch. The subjects run alternately in
the same processes. The time of a round is that of its slowest process.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from bench import output
from bnrnn import BNLSTM, processes, synchronise
from bnrnn.command.allocator import keep_large_blocks

# T, B, D, H
SHAPES = {"pMNIST": (784, 100, 1, 100), "Penn Treebank": (100, 64, 50, 1000)}
ALONE = "one process"
REFERENCE = "one process, reference kernel"


def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        model(x)[0].square().mean().backward()
        return time.perf_counter() - began

    return step


def work(rank: int, size: int, port: int, rounds: int, results: "mp.SimpleQueue") -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }  # fmt: skip
    torch.set_num_threads(1)
    keep_large_blocks()
    processes.meet(rank, size, 0, 600)
    results.put((rank, time_subjects(rank, size, rounds)))
    dist.barrier()
    processes.leave()  # when all wrapped modules are freed: see examples/distributed.py


def time_subjects(rank: int, size: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """The seconds of each step, by shape and subject."""
    found: dict[str, dict[str, list[float]]] = {}
    bar = tqdm(total=len(SHAPES) * rounds, disable=None if rank == 0 else True)
    for name, (steps, batch, inputs, hidden) in SHAPES.items():
        torch.manual_seed(0)
        x = torch.randn(steps, batch, inputs)
        share = processes.share(batch)

        def module(kernel: str = "auto", shape: tuple[int, int, int] = (inputs, hidden, steps)):
            return BNLSTM(shape[0], shape[1], max_length=shape[2], kernel=kernel)

        subjects = {
            ALONE: (step_of(module(), x), True),
            REFERENCE: (step_of(module("reference"), x), True),
            f"{size} processes, local": (
                step_of(processes.wrapped(module(), False), share.of(x)), False,
            ),
            f"{size} processes, synchronised": (
                step_of(processes.wrapped(synchronise(module()), False), share.of(x)), False,
            ),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
        for number in range(rounds + 1):
            for subject, (step, alone) in subjects.items():
                dist.barrier()
                if rank > 0 and alone:
                    continue
                took = step()
                if number > 0:  # the first round is a warm-up
                    seconds[subject].append(took)
            bar.update(number > 0)
        found[name] = seconds
    return found


def measure(size: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    results = mp.get_context("spawn").SimpleQueue()
    port = 20000 + os.getpid() % 10000
    spawn(work, (size, port, rounds, results), nprocs=size)
    by_rank = dict(results.get() for _ in range(size))
    return {
        name: {
            subject: [
                max(times)
                for times in zip(
                    *(found[name][subject] for found in by_rank.values() if found[name][subject]),
                    strict=True,
                )
            ]
            for subject in subjects
        }
        for name, subjects in by_rank[0].items()
    }


def table(seconds: dict[str, dict[str, list[float]]], rounds: int, where: dict) -> list[str]:
    lines = [
        "# A training step that several processes share", "",
        f"Written by `make bench`. {where['machine']}, one thread a process, PyTorch "
        f"{where['torch']}, commit {where['commit']}. Forward and backward of one BN-LSTM under "
        f"DistributedDataParallel over gloo, with all gradients; median of {rounds}, in "
        "parentheses the range. The batch is the same for all: each process has a part of it. "
        "Local statistics are those of a process's part, on the compiled kernel; synchronised ones "
        "are those of the whole batch, as one process has them, on the reference kernel, with two "
        "messages for each time step and normalised term.",
    ]  # fmt: skip
    for name, subjects in seconds.items():
        steps, batch, inputs, hidden = SHAPES[name]
        lines += [
            "", f"### {name}: T {steps}, B {batch}, D {inputs}, H {hidden}", "",
            "| | training step, ms | of one process |", "|---|---|---|",
        ]  # fmt: skip
        alone = statistics.median(subjects[ALONE])
        for subject, times in subjects.items():
            ms = [round(1000 * t) for t in (statistics.median(times), min(times), max(times))]
            ratio = statistics.median(times) / alone
            lines.append(f"| {subject} | {ms[0]} ({ms[1]} to {ms[2]}) | **{ratio:.2f}** |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = output.command(__doc__)
    parser.add_argument("--processes", type=output.positive, default=2)
    parser.add_argument("--rounds", type=output.positive, default=5)
    options = output.parse(parser, arguments)
    seconds = measure(options.processes, options.rounds)
    where = output.facts() | {"threads": 1}
    text = table(seconds, options.rounds, where)
    output.report(options.out, "processes", text, where | {"seconds": seconds})


if __name__ == "__main__":
    main()
