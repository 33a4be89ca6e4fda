"""Prefetch training batches, so that the training loop can run ahead of a GPU.

For the same purpose, `Job.measured` and `Job.settle` in `job.py` read the metrics with a delay.
"""

import torch
from torch import Tensor

from bnrnn.nn.share import WHOLE
from bnrnn.tasks import Batch, Task


class TrainingBatches:
    """The training batches of a task on a device, indexed by step."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: tuple[int, Batch] | None = None
        self.share = WHOLE  # this process's share of the batch

    def take(self, step: int) -> Batch:
        if self._stream is None:
            return self._load(step).to(self.device)
        if self._next is None or self._next[0] != step:
            self.prepare(step)
        assert self._next is not None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._stream)

        def hand_over(x: Tensor) -> Tensor:
            x.record_stream(stream)  # keep the memory until this stream has used it
            return x

        return self._next[1].map(hand_over)

    def prepare(self, step: int) -> None:
        """Start copying the batch of `step` to a GPU while it computes; do nothing on a CPU."""
        if self._stream is None:
            return
        batch = self._load(step).map(lambda x: x.pin_memory())  # required for an asynchronous copy
        with torch.cuda.stream(self._stream):
            self._next = step, batch.map(lambda x: x.to(self.device, non_blocking=True))

    def _load(self, step: int) -> Batch:
        whole = self.task.train_batch(*divmod(step, self.task.steps_per_epoch))
        batch, self.share = whole.part()
        return batch
