"""Set up the device, the kernel and the threads of a command."""

import fcntl
import os
import tempfile
from pathlib import Path

import torch

from bnrnn import cpus, kernels
from bnrnn.command import allocator
from bnrnn.errors import ConfigError
from bnrnn.settings.schema import Config


def _default_threads() -> int:
    """PyTorch's choice: what the environment says, or the number of cores; within a container's
    limit."""
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ:
        return threads
    return min(threads, cpus.available())


_THREADS = _default_threads()
_gpu: int | None = None  # file descriptor of the lock on the GPU that this process uses


def set_up(config: Config, local_rank: int | None = None) -> torch.device:
    """Set up the device, kernel, precision and threads, and return the device.

    Args:
        local_rank: number of this process among those on this machine, each of which takes its
            own GPU; None if there is only one process.

    Raises:
        ConfigError: there is no such device or kernel here, or it cannot train in this precision.
    """
    allocator.keep_large_blocks()
    device = choose_device(config.device, local_rank)
    if device.index is not None:
        torch.cuda.set_device(device)
    check_kernel(config.kernel, device)
    set_precision(config, device)
    torch.set_num_threads(config.threads or _THREADS)  # the last job of a sweep may have set it
    # use_deterministic_algorithms does the same, but imports the compiler, which takes two seconds.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    # Deterministic mode also fills every new array before its use, which adds an eighth to the cost
    # of a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    return device


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device that `name` selects.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 1:
        number = _unused_gpu() if local_rank is None else local_rank % torch.cuda.device_count()
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device={name}: there are {count} CUDA devices here; use device=auto")
    return torch.device("cpu") if device.type == "cpu" else device  # cpu:0 is the CPU


def _unused_gpu() -> int:
    """Return the number of the first GPU that no other command of this user trains on; 0 if all are
    in use. Each job of a sweep thus takes its own GPU."""
    global _gpu
    if _gpu is not None:  # locked by the last job of a sweep
        os.close(_gpu)
        _gpu = None
    for number in range(torch.cuda.device_count()):
        uuid = torch.cuda.get_device_properties(number).uuid
        lock = Path(tempfile.gettempdir()) / f"bnrnn-{os.getuid()}-gpu-{uuid}.lock"
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError:  # the lock file belongs to another user
            return number
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue
        _gpu = descriptor
        return number
    return 0


def set_precision(config: Config, device: torch.device) -> None:
    """Allow TF32 in matrix products and cuDNN if `config.precision` is tf32; forbid it otherwise.

    Raises:
        ConfigError: training in TF32 on a CPU, which lacks it, or in bfloat16 on a GPU, where it is
            not implemented; such a run may be evaluated there, in float32.
    """
    tf32 = config.precision == "tf32"
    if tf32 and device.type != "cuda" and config.mode == "train":
        raise ConfigError("precision=tf32 is for GPUs: set precision=float32, or device=cuda")
    if config.precision == "bfloat16" and device.type == "cuda" and config.mode == "train":
        raise ConfigError("precision=bfloat16 is for CPUs: set precision=tf32, or device=cpu")
    if device.type == "cuda":
        # By default, PyTorch uses TF32 in cuDNN but not in matrix products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def check_kernel(name: str, device: torch.device) -> None:
    """Check that the kernel `name` exists and can run on the device.

    Raises:
        ConfigError: there is no such kernel, or it cannot run anything here.
    """
    if name == "auto":
        return  # chosen when it is needed
    plain = kernels.Normalization("none", "none", "none")
    padded = name == "torch.lstm packed"
    request = kernels.Request(device.type, torch.float32, plain, padded=padded)
    try:
        kernels.choose(name, request)
    except ValueError as error:
        raise ConfigError(str(error)) from error
