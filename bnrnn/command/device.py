"""The device, the kernel and the threads of a command."""

import fcntl
import os
import tempfile
from pathlib import Path

import torch

from bnrnn import kernels
from bnrnn.command import allocator
from bnrnn.errors import ConfigError
from bnrnn.settings.schema import Config

_THREADS = torch.get_num_threads()
_gpu: int | None = None  # the lock on the one that this process uses


def set_up(config: Config, local_rank: int | None = None) -> torch.device:
    """
    Args:
        local_rank: of several processes on a machine, which each take a GPU of their own; None:
            there is one.

    Raises:
        ConfigError: there is no such device or kernel here, or it cannot train in this precision.
    """
    allocator.keep_large_blocks()
    device = choose_device(config.device, local_rank)
    if device.index is not None:
        torch.cuda.set_device(device)
    check_kernel(config.kernel, device)
    set_precision(config, device)
    torch.set_num_threads(config.threads or _THREADS)  # a job of a sweep leaves it to the next
    # use_deterministic_algorithms does the same, but imports the compiler: two seconds.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    # It comes with the line above and costs an eighth of a training step: every array written once
    # more before it is used.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    return device


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """
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
        raise ConfigError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


def _unused_gpu() -> int:
    """The first GPU that no other command of this user trains on, so that the jobs of a sweep take
    one each; the first of all where every one is in use."""
    global _gpu
    if _gpu is not None:  # of the last job of a sweep
        os.close(_gpu)
        _gpu = None
    for number in range(torch.cuda.device_count()):
        uuid = torch.cuda.get_device_properties(number).uuid
        lock = Path(tempfile.gettempdir()) / f"bnrnn-{os.getuid()}-gpu-{uuid}.lock"
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError:  # somebody else has put it there
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
    """
    Raises:
        ConfigError: training in TF32 on a CPU, which has none. Its results may be evaluated there.
    """
    tf32 = config.precision == "tf32"
    if tf32 and device.type != "cuda" and config.mode == "train":
        raise ConfigError("precision=tf32 is for GPUs: set precision=float32, or device=cuda")
    if device.type == "cuda":
        # TF32 is the default of cuDNN, but not of matrix products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def check_kernel(name: str, device: torch.device) -> None:
    """
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
