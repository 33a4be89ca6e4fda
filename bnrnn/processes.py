"""The processes that train one model together; by default there is one.

torchrun or submitit starts them. Each trains on its share of every batch, and process 0 alone reads
and writes the run's folder. All processes call the functions below in the same order, and so agree
on what one of them finds: that a signal has come, or that a checkpoint is due.
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

# Until all have read their data and compiled their kernels.
_START = datetime.timedelta(minutes=20)
# By its name in this version of PyTorch.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
_rank, _size = 0, 1
_control: Any = None  # a group on the CPU, for all but the tensors of the model


def count() -> int:
    return _size


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _rank == 0


def meet(rank: int, size: int, attempt: int, seconds: float) -> None:
    """Join the other processes of a run of `size`, at the address that the environment has.

    Args:
        attempt: counts how often the launcher has started this run again.
        seconds: how long they wait for one another, once all have begun to train.
    """
    global _control, _rank, _size
    if size == 1 or _control is not None:  # alone, or in the next job of a sweep
        return
    _rank, _size = rank, size
    limit = datetime.timedelta(seconds=seconds)
    store, _, _ = next(rendezvous("env://", timeout=limit))
    # The launcher's store may still have what processes of the last attempt wrote into it.
    store = PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    _control = dist.new_group(backend="gloo", timeout=limit)


def leave() -> None:
    """Be the only process again."""
    global _control, _rank, _size
    if _control is not None:
        _control, _rank, _size = None, 0, 1
        dist.destroy_process_group()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """
    Raises:
        PeerError: for what PyTorch raises when another process has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if _size == 1:
            raise
        if "timed out" in text or "timeout" in text:
            what = "hears nothing from another process of this run, which hangs or is cut off"
        elif isinstance(error, dist.DistError) or "by peer" in text or "broken pipe" in text:
            what = "has lost another process of this run"
        else:
            raise
        raise PeerError(f"process {_rank} {what}: go on with resume=auto") from error


def wait_for_all() -> None:
    """Wait until every process gets here, after work that takes some of them minutes longer."""
    if _control is not None:
        dist.monitored_barrier(_control, _START)


def from_first(make: Callable[[], T]) -> T:
    """Have process 0 make something and send it to the others.

    If that raises an error, process 0 ends, and the others lose it: see `explained`.
    """
    if _control is None:
        return make()
    made = [make() if is_first() else None]
    dist.broadcast_object_list(made, 0, _control)
    return made[0]  # type: ignore[return-value]


def largest(number: int) -> int:
    """The largest of the numbers that the processes have."""
    if _control is None:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, _control)
    return int(found)


def add_up(numbers: dict[str, Any]) -> dict[str, Any]:
    """Sum numbers over all processes, name by name."""
    if _control is None or not numbers:
        return numbers
    tensors = [torch.as_tensor(value).double() for value in numbers.values()]
    device = next((t.device for t in tensors if not t.is_cpu), torch.device("cpu"))
    sums = torch.stack([t.to(device) for t in tensors])
    dist.all_reduce(sums)
    found = sums.unbind() if device.type != "cpu" else sums.tolist()
    return dict(zip(numbers, found, strict=True))


def gather(share: Share, x: Tensor) -> Tensor:
    """The whole of a tensor (layers, B, ...) of which each process has its share."""
    if share.is_whole:
        return x
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, x.cpu(), _control)
    return torch.cat(parts, 1).to(x.device)


def share(columns: int) -> Share:
    """This process's share of a batch of so many sequences.

    A batch that would leave a process fewer than two sequences, which have no batch statistics, is
    not shared: every process computes all of it.
    """
    if _size == 1 or columns < 2 * _size:
        return WHOLE
    return Share(columns * _rank // _size, columns * (_rank + 1) // _size, columns)


def wrapped(model: nn.Module, carries: bool) -> nn.Module:
    """The model with a backward pass that averages gradients over the processes.

    Args:
        carries: the hidden state is carried from batch to batch; a learned initial state has no
            gradient then.
    """
    if _control is None:
        return model
    # The statistics are the same in all processes already.
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "find_unused_parameters": carries}
    return DistributedDataParallel(model, **options)
