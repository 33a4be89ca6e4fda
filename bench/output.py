"""What the benchmarks have in common: where they ran, and the files that they write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnrnn.runs.files import write_atomic
from bnrnn.runs.provenance import provenance
from bnrnn.runs.record import write_json


def facts() -> dict[str, Any]:
    """The machine, the number of threads, and the versions of PyTorch and of the source."""
    found = provenance(torch.device("cpu"))
    return {key: found[key] for key in ("machine", "threads", "torch", "commit")}


def write(out: Path, name: str, text: Sequence[str], numbers: dict[str, Any]) -> None:
    """Print the lines of a table; write them to `name`.md and the numbers to `name`.json."""
    print("\n".join(text))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", numbers)
    write_atomic(out / f"{name}.md", ("\n".join(text) + "\n").encode())
