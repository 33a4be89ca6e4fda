"""The processes that train one model together; by default there is one.

torchrun or submitit starts them. Each process trains on its share of every batch; only process 0
reads and writes the run's folder. All processes call the functions below in the same order. This is
how they agree on events that one of them sees, such as a signal or a checkpoint that is due.
"""

import contextlib
import datetime
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bnrnn.errors import PeerError
from bnrnn.nn.share import WHOLE, Share

T = TypeVar("T")

# Time for all processes to read their data and compile their kernels.
_START = datetime.timedelta(minutes=20)
# The name of this option depends on the version of PyTorch.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
_rank, _size = 0, 1
_control: Any = None  # a group on the CPU, for everything except the tensors of the model


def count() -> int:
    return _size


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return _rank == 0


def meet(rank: int, size: int, attempt: int, seconds: float) -> None:
    """Join the `size` processes of a run, at the address given in the environment.

    Args:
        attempt: how often the launcher has restarted this run.
        seconds: how long processes wait for one another once all have begun to train.
    """
    global _control, _rank, _size
    if size == 1 or _control is not None:  # a single process, or a later job of a sweep
        return
    _rank, _size = rank, size
    limit = datetime.timedelta(seconds=seconds)
    store, _, _ = next(rendezvous("env://", timeout=limit))
    # The launcher's store may still contain entries of the previous attempt.
    store = PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    _control = dist.new_group(backend="gloo", timeout=limit)


def leave() -> None:
    """Leave the group, and continue as a single process."""
    global _control, _rank, _size
    if _control is not None:
        _control, _rank, _size = None, 0, 1
        dist.destroy_process_group()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """
    Raises:
        PeerError: in place of PyTorch's error when another process has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if _size == 1:
            raise
        if "timed out" in text or "timeout" in text:
            what = "lost contact with another process of this run, which hangs or is cut off"
        elif isinstance(error, dist.DistError) or "by peer" in text or "broken pipe" in text:
            what = "has lost another process of this run"
        else:
            raise
        raise PeerError(f"process {_rank} {what}: continue with resume=auto") from error


def wait_for_all() -> None:
    """Wait for all processes, after work that may take some of them minutes longer."""
    if _control is not None:
        dist.monitored_barrier(_control, _START)


def where_to_load(device: torch.device) -> torch.device:
    """The device on which the first process loads what it sends to all with `from_first`.

    It is the CPU if there are several: not all of them use the first one's GPU.
    """
    return device if count() == 1 else torch.device("cpu")


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in process 0 and send the result to the others.

    If `make` raises an error, process 0 ends, and the others raise an error: see `explained`.
    """
    if _control is None:
        return make()
    made = [make() if is_first() else None]
    dist.broadcast_object_list(made, 0, _control)
    return made[0]  # type: ignore[return-value]


def largest(number: int) -> int:
    """The maximum of a number over all processes."""
    if _control is None:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, _control)
    return int(found)


def add_up(numbers: dict[str, Any]) -> dict[str, Any]:
    """Sum each number over all processes."""
    if _control is None or not numbers:
        return numbers
    tensors = [torch.as_tensor(value).double() for value in numbers.values()]
    device = next((t.device for t in tensors if not t.is_cpu), torch.device("cpu"))
    sums = torch.stack([t.to(device) for t in tensors])
    dist.all_reduce(sums)
    found = sums.unbind() if device.type != "cpu" else sums.tolist()
    return dict(zip(numbers, found, strict=True))


def gather(share: Share, x: Tensor) -> Tensor:
    """Concatenate the shares of a tensor (layers, B, ...) from all processes."""
    if share.is_whole:
        return x
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, x.cpu(), _control)
    return torch.cat(parts, 1).to(x.device)


def share(columns: int) -> Share:
    """This process's share of a batch of `columns` sequences.

    A batch is not split if a process would get fewer than two sequences, because one sequence has
    no batch statistics. Every process then computes the whole batch.
    """
    if _size == 1 or columns < 2 * _size:
        return WHOLE
    return Share(columns * _rank // _size, columns * (_rank + 1) // _size, columns)


def wrapped(model: nn.Module, carries: bool) -> nn.Module:
    """Wrap the model so that its backward pass averages gradients over the processes.

    Args:
        carries: whether the hidden state is carried from batch to batch. A learned initial state
            then has no gradient.
    """
    if _control is None:
        return model
    # Buffers need no synchronisation: the statistics are the same in all processes.
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "find_unused_parameters": carries}
    return DistributedDataParallel(model, **options)
