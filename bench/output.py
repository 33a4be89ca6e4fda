"""What the benchmarks have in common: arguments, where they ran, and the files they write."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnrnn.kernels import BuildError, operators
from bnrnn.runs.files import write_atomic
from bnrnn.runs.provenance import provenance
from bnrnn.runs.record import write_json


def command(description: str | None) -> argparse.ArgumentParser:
    """A command that the docstring of its module describes, and that writes to a folder."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", default="results/bench", type=Path)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments and make the folder, or end the command, before anything is measured."""
    options = parser.parse_args(arguments)
    make_folder(parser, options.out)
    return options


def make_folder(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the folder for the output, or end the command."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {path}: {error.strerror}")


def positive(text: str) -> int:
    """The type of a command-line argument that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """The type of a command-line argument that limits the time."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return found


def load_kernel(parser: argparse.ArgumentParser) -> None:
    """Load the CPU kernel, or end the command with the reason that it cannot be."""
    try:
        operators.load()
    except BuildError as error:
        parser.error(str(error))


def facts(device: str = "cpu") -> dict[str, Any]:
    """The machine, the number of threads, and the versions of PyTorch and of the source."""
    found = provenance(torch.device(device))
    return {key: found[key] for key in ("machine", "threads", "torch", "commit")}


def report(out: Path, name: str, text: Sequence[str], numbers: dict[str, Any]) -> None:
    """Print the lines of a page; write them to `name`.md and the numbers to `name`.json."""
    print("\n".join(text))
    write_json(out / f"{name}.json", numbers)
    write(out, name, text)


def write(out: Path, name: str, text: Sequence[str]) -> None:
    """Write the lines of a page to `name`.md."""
    write_atomic(out / f"{name}.md", ("\n".join(text).rstrip() + "\n").encode())
