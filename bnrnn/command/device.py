"""The device, the kernel and the threads of a command."""

import torch

from bnrnn import kernels
from bnrnn.command import allocator
from bnrnn.errors import ConfigError
from bnrnn.settings.schema import Config

_THREADS = torch.get_num_threads()


def set_up(config: Config) -> torch.device:
    """
    Raises:
        ConfigError: there is no such device or kernel here.
    """
    allocator.keep_large_blocks()
    device = choose_device(config.device)
    check_kernel(config.kernel, device)
    torch.set_num_threads(config.threads or _THREADS)  # a job of a sweep leaves it to the next
    # use_deterministic_algorithms does the same, but imports the compiler: two seconds.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    # It comes with the line above and costs an eighth of a training step: every array written once
    # more before it is used.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    return device


def choose_device(name: str) -> torch.device:
    """
    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


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
