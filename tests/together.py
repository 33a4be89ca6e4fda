"""Several processes that train one model, started as by torchrun but without its own process."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from tests.processes import Forked


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


def ranks(
    folder: Path,
    n: int,
    *arguments: object,
    code: str = "",
    limits: Mapping[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Forked]:
    """Start processes 0..n - 1 of one run of the command, or of `code`.

    Args:
        limits: resource limits of process 0 only.
    """
    common = {
        "OMP_NUM_THREADS": "1", "BNRNN_CACHE_DIR": str(folder / "cache"),
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n), **(environment or {}),
    }  # fmt: skip
    return [
        Forked(
            folder, *arguments, code=code, limits=limits if rank == 0 else None,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    ]  # fmt: skip


def finished(processes: list[Forked], timeout: float = 200) -> list[str]:
    """Assert that all end without an error; return what each printed to standard error."""
    errors = [process.communicate(timeout)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return errors


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def workers_of(launcher: int) -> dict[int, int]:
    """The ids of the processes that torchrun has started, by rank."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for pid in (task / "children").read_text().split():
            found[int(environment_of(int(pid)).get("RANK", -1))] = int(pid)
    return found
