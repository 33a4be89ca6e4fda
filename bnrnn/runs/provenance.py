"""The provenance of a result: versions, commit, machine and command."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

import bnrnn


def provenance(device: torch.device) -> dict[str, Any]:
    return {
        "bnrnn": bnrnn.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # torch has its own string class for it
        "numpy": numpy.__version__,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "command": " ".join(["bnrnn", *sys.argv[1:]]),
    }


def commit() -> str | None:
    """Return the git commit of the source tree, with "+changes" if edited; None if installed."""
    root = Path(bnrnn.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine(device: torch.device) -> str:
    """Describe the processor or GPU and the number of cores, without the host name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
