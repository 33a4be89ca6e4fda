"""Find out how this process was started: alone, or as one of several by torchrun or Slurm.

This module does not import torch, so that a wrong setting is reported before torch is imported.
"""

import os
import signal
import threading
import time
import zlib
from dataclasses import dataclass

from bnrnn.errors import ConfigError

_ADVICE = "start the processes with torchrun, or unset its variables"


@dataclass(frozen=True)
class Launch:
    rank: int = 0
    local_rank: int = 0  # the rank on its machine
    size: int = 1  # total number of processes
    attempt: int = 0  # how many times the launcher has restarted the run

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> Launch:
    """Read the launch from the environment variables. For submitit, also set the variables that
    torchrun sets: the address where the processes meet.

    Raises:
        ConfigError: the variables are not those that a launcher sets.
    """
    variables = os.environ
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    attempt = sum(_number(name) for name in restarts if variables.get(name))
    if "TORCHELASTIC_RUN_ID" in variables:
        rank, local_rank, size = (_number(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if rank >= size:
            raise ConfigError(f"RANK is {rank} of WORLD_SIZE {size}: {_ADVICE}")
        for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
            if not variables.get(name):
                raise ConfigError(f"{name} is not set: {_ADVICE}")
        return Launch(rank, local_rank, size, attempt)
    if "SUBMITIT_EXECUTOR" in variables:
        try:
            from submitit import JobEnvironment  # pyright: ignore[reportMissingImports] (an extra)

            job = JobEnvironment()
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"SUBMITIT_EXECUTOR is set, but this is no job of submitit ({error}): unset it, or "
                "start the command as a sweep with hydra/launcher=submitit_slurm"
            ) from error
        if job.num_tasks > 1:
            port = 20000 + zlib.crc32(job.job_id.encode()) % 10000
            variables.setdefault("MASTER_ADDR", job.hostnames[0])
            variables.setdefault("MASTER_PORT", str(port))
            variables |= {"RANK": str(job.global_rank), "WORLD_SIZE": str(job.num_tasks)}
        return Launch(job.global_rank, job.local_rank, job.num_tasks, attempt)
    return Launch(attempt=attempt)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isascii() or not value.isdigit():
        raise ConfigError(f"{name} must be 0 or more, got {value!r}: {_ADVICE}")
    return int(value)


def hand_over(signum: int) -> None:
    """Pass a scheduler's signal to submitit, which requeues the job; the run must be saved first.
    Without submitit, do nothing."""
    handler = signal.getsignal(signum)
    if "SUBMITIT_EXECUTOR" in os.environ and callable(handler):
        handler(signum, None)  # does not return in process 0, which requeues the job
        time.sleep(10)  # Slurm may end process 0 when another one ends with an error


def end_with_launcher() -> None:
    """Send SIGTERM to this process when torchrun ends: after kill -9, torchrun cannot send it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    # Linux's PR_SET_PDEATHSIG sends it twice, and the second ends the process before it saves.
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
