"""How many processors this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def available() -> int:
    """The number of processors that this process's affinity and control groups leave it.

    A container whose processor time is limited (Kubernetes, `docker run --cpus=2`) sees all
    processors of its machine. With a thread on each of them it would wait for most of the time.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = (limit for folder in _folders() if (limit := _limit(folder)) is not None)
    return min([found or 1, *map(math.ceil, limits)])


def _folders() -> Iterator[Path]:
    """The folders of this process's control groups and of those that contain them."""
    try:
        groups = os.fsdecode(_GROUPS.read_bytes()).split("\n")
    except OSError:  # not Linux
        return
    for group in filter(None, groups):
        _, controllers, path = group.split(":", 2)
        if controllers == "":  # version 2
            top = _ROOT
        elif "cpu" in controllers.split(","):
            top = _ROOT / "cpu"
        else:
            continue
        # A container may see its own group as the top, and its path as that on the machine.
        folder = top / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top))


def _limit(folder: Path) -> float | None:
    """Processor time per time of a group; None if it is not limited."""
    try:
        if (version_2 := folder / "cpu.max").exists():
            quota, period = version_2.read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        limit = int(quota) / int(period)
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None
    return limit if limit > 0 else None
