"""Population statistics per time step, averaged over minibatches, and the choice of statistics.

In training, a term is normalised by the moments of the minibatch. In evaluation it is normalised by
*population* statistics: the plain average of the minibatch moments over the training set (Cooijmans
et al., section 3). The running averages of training approximate them well enough for monitoring;
`calibrate` computes them.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bnrnn.kernels import Moments
from bnrnn.nn import checks, share
from bnrnn.nn.checks import can_read

Source = Literal["auto", "batch", "calibrate"]


def recomputes() -> bool:
    """Whether this forward pass is part of a backward pass, as in a checkpointed segment."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


_BUFFERS = ("mean", "var", "num_batches")


class StepStatistics(nn.modules.batchnorm._BatchNorm):
    """Average mean and variance of one term, one row per time step.

    It derives from PyTorch's batch normalisation so that `torch.optim.swa_utils.update_bn` finds
    it, resets it and averages it over a loader.

    Args:
        features: the number of features of the term.
        max_length: the fixed number of rows; later steps are not kept. None: the rows grow from 0
            to the number of steps in the longest sequence seen.
        momentum: weight of a minibatch in the running averages; None: plain averages.

    Buffers (T rows, see `max_length`):
        mean, var: (T, features), with biased variance. A row that has averaged no minibatch repeats
            the last row before it that has.
        num_batches: (T,), the number of minibatches averaged in each row.

    `source` selects the statistics a layer normalises by. "auto": batch statistics in training,
    population statistics in evaluation. "batch": batch statistics, without updating the averages.
    "calibrate": batch statistics, which are also averaged.
    """

    __constants__ = ()  # torch.jit would read those of the base class
    # What code for all kinds of batch normalisation reads; there is nothing of the kind here.
    affine = track_running_stats = False
    weight = bias = running_mean = running_var = num_batches_tracked = None

    mean: Tensor
    var: Tensor
    num_batches: Tensor
    # The counts, and their version, that are known to contain a minibatch.
    _known: tuple[Tensor | None, int] = (None, 0)

    def __init__(
        self,
        features: int,
        max_length: int | None = None,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.features, self.max_length, self.momentum = features, max_length, momentum
        self.source: Source = "auto"
        rows = max_length or 0
        self.register_buffer("mean", torch.zeros(rows, features, device=device, dtype=dtype))
        self.register_buffer("var", torch.zeros(rows, features, device=device, dtype=dtype))
        self.register_buffer("num_batches", torch.zeros(rows, device=device, dtype=torch.long))

    @property
    def uses_batch(self) -> bool:
        return self.training if self.source == "auto" else True

    @property
    def averages(self) -> bool:
        if recomputes():
            return False
        return self.training if self.source == "auto" else self.source == "calibrate"

    @torch.no_grad()
    def update(self, moments: Moments, counts: Tensor | None = None, first_step: int = 0) -> None:
        """Include a minibatch in the averages.

        Args:
            moments: (T, features), for the time steps from `first_step` on.
            counts: (T,) booleans, which of the rows are valid; None: all.

        Raises:
            RuntimeError: there are too few rows, and they are shared with other processes.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.update(moments, counts, first_step)
        steps = moments.mean.shape[0]
        if self.max_length is not None:
            steps = max(0, min(steps, self.max_length - first_step))
        elif first_step + steps > len(self.mean):
            self._grow(first_step + steps)
        rows = slice(first_step, first_step + steps)
        seen = self.num_batches[rows].add_(1 if counts is None else counts[:steps])
        # Start with a plain average, which removes the buffers' initial content. Later, take a
        # running average, except in calibration.
        weight = 1 / seen.clamp(min=1).to(self.mean.dtype)
        if self.source != "calibrate" and self.momentum is not None:
            weight = weight.clamp(min=self.momentum)
        if counts is not None:
            weight = weight * counts[:steps]
        for average, found in ((self.mean, moments.mean), (self.var, moments.var)):
            average[rows].lerp_(found[:steps].to(average.dtype), weight[:, None])
        if self.max_length is not None or counts is not None or first_step > 0:
            self._fill()

    def population(self, first_step: int = 0, dtype: torch.dtype | None = None) -> Moments:
        """The rows from `first_step` on; steps beyond the last row use the last row.

        Args:
            dtype: of the result; None: that of the buffers. It may be another, because mixed
                precision of FSDP2 leaves buffers in float32.

        Raises:
            RuntimeError: no minibatch has been averaged yet.
        """
        buffers = cast("dict[str, Tensor]", self._buffers)  # getattr takes 0.9 us
        mean, var = buffers["mean"], buffers["var"]
        if not self._has_averages(buffers["num_batches"]):
            raise RuntimeError(
                "no population statistics: train this module or call bnrnn.calibrate(model, "
                "batches) before evaluating it"
            )
        if dtype is not None and mean.dtype != dtype:
            mean, var = mean.to(dtype), var.to(dtype)
        if first_step == 0:  # no views: a streamed text pays for each
            return Moments(mean, var)
        first_step = min(first_step, len(mean) - 1)
        return Moments(mean[first_step:], var[first_step:])

    def _has_averages(self, counts: Tensor) -> bool:
        """Whether a minibatch has been averaged, as far as the counts can be read."""
        if torch.compiler.is_compiling():
            return len(counts) > 0
        # A streamed text would pay for reading the counts at every step. Tensors of inference mode
        # have no version, and a trace must not depend on what was read before.
        remembers = not (counts.is_inference() or torch.jit.is_tracing())  # pyright: ignore
        known, version = self._known
        if remembers and known is counts and version == counts._version:
            return True
        any_batch = counts.any()
        if not can_read(any_batch):
            return len(counts) > 0
        if remembers and bool(any_batch):
            self._known = counts, counts._version
        return bool(any_batch)

    @torch.no_grad()
    def set(self, moments: Moments, num_batches: int) -> None:
        """Replace the averages by the given moments; later rows repeat the last of them."""
        self.reset()
        rows = len(moments.mean)
        if self.max_length is None:
            self._grow(rows)
        self.mean[:rows], self.var[:rows] = moments
        self.num_batches[:rows] = num_batches
        self._fill()

    def reset(self) -> None:
        """Discard all averages."""
        self._resize(self.max_length or 0)
        for buffer in (self.mean, self.var, self.num_batches):
            buffer.zero_()

    def reset_running_stats(self) -> None:
        """Call `reset`; `torch.optim.swa_utils.update_bn` uses this name."""
        self.reset()

    def reset_parameters(self) -> None:
        """Call `reset`; code that initialises every module of a model uses this name."""
        self.reset()

    def __getattr__(self, name: str) -> Any:
        if name == "num_features":  # SyncBatchNorm.convert_sync_batchnorm reads it to replace this
            raise AttributeError(
                "the statistics of BNLSTM cannot be turned into SyncBatchNorm: convert the other "
                "modules one by one"
            )
        return super().__getattr__(name)

    def _grow(self, rows: int) -> None:
        """Add empty rows."""
        processes = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Shares of one batch have the same number of steps in all processes.
        alone = (
            not processes or torch.distributed.get_world_size() == 1 or not share.current().is_whole
        )
        # On a GPU is_shared is always true.
        is_replica = getattr(self, "_is_replica", False)  # of DataParallel
        if is_replica or (self.mean.is_cpu and self.mean.is_shared()) or not alone:
            raise RuntimeError(
                f"population statistics would grow to {rows} time steps here, but other processes "
                "or replicas share them: give the module max_length=..., the longest sequence"
            )
        self._resize(rows)

    def _resize(self, rows: int) -> None:
        """Change the number of rows; new rows are empty."""
        for name in _BUFFERS:
            old: Tensor = getattr(self, name)
            if len(old) != rows or old.is_inference():
                setattr(self, name, _with_rows(old, rows))

    @torch.no_grad()
    def _fill(self) -> None:
        """Replace each row without averages by the last earlier row that has some."""
        steps = torch.arange(len(self.mean), device=self.mean.device)
        last = torch.where(self.num_batches > 0, steps, 0).cummax(0).values
        for average in (self.mean, self.var):
            average.copy_(average[last])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load averages with any number of rows: see `max_length`."""
        saved = state_dict.get(prefix + "mean")
        if isinstance(saved, Tensor) and saved.dim() == 2:
            rows = self.max_length or len(saved)
            self._resize(rows)
            for key in (prefix + name for name in _BUFFERS):
                if isinstance(state_dict.get(key), Tensor):
                    state_dict[key] = _with_rows(state_dict[key], rows)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        self._fill()

    def extra_repr(self) -> str:
        return f"{self.features}, max_length={self.max_length}, momentum={self.momentum}"


def _with_rows(old: Tensor, rows: int) -> Tensor:
    """A copy with this number of rows; new rows are zero."""
    kept = min(rows, len(old))
    new = torch.zeros(rows, *old.shape[1:], dtype=old.dtype, device=old.device)
    new[:kept] = old[:kept]
    return new


def _statistics(model: nn.Module) -> list[StepStatistics]:
    return [module for module in model.modules() if isinstance(module, StepStatistics)]


@contextlib.contextmanager
def _source(model: nn.Module, source: Source) -> Iterator[None]:
    present = _statistics(model)
    before: list[Source] = [statistics.source for statistics in present]
    for statistics in present:
        statistics.source = source
    try:
        yield
    finally:
        for statistics, old in zip(present, before, strict=True):
            statistics.source = old


def batch_statistics(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which `model` normalises by batch statistics without updating the averages.

    The paper's validation curves use these statistics: `with torch.no_grad(),
    batch_statistics(model)` on a model in evaluation mode.
    """
    return _source(model, "batch")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Replace all population statistics of `model` by plain averages over `batches`.

    The batches should be training minibatches of the training batch size. The model runs in
    evaluation mode (without dropout) but normalises by batch statistics, as in training.

    Args:
        model: any module that contains a `BNLSTM`.
        batches: the model's inputs. A tuple or list is unpacked, `model(*batch)`, if the model
            takes that many arguments; otherwise its first element is the input, as in
            (input, target).
        forward: a function that runs the model on a batch, instead of the above.

    Returns:
        the number of batches.

    Raises:
        ValueError: there are no batches, or only empty ones. After this or any other exception, the
            statistics are unchanged.
        TypeError: `batches` is a single tensor.
    """
    checks.check_batches(batches)
    statistics = _statistics(model)
    before = [(s, [getattr(s, name).clone() for name in _BUFFERS]) for s in statistics]
    training = {module: module.training for module in model.modules()}
    n = 0
    try:
        model.eval()
        for s in statistics:
            s.reset()
        with _source(model, "calibrate"):
            for batch in batches:
                if forward is not None:
                    forward(batch)
                else:
                    _run(model, batch)
                n += 1
        if n == 0 or (statistics and not any(bool(s.num_batches.any()) for s in statistics)):
            raise ValueError("calibrate needs at least one batch with sequences")
    except BaseException:
        for s, buffers in before:
            s._resize(len(buffers[0]))
            for name, buffer in zip(_BUFFERS, buffers, strict=True):
                getattr(s, name).copy_(buffer)
        raise
    finally:
        for module, mode in training.items():
            module.training = mode
    return n


def _run(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch from a data loader."""
    arguments = list(batch) if type(batch) in (tuple, list) else [batch]
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        arguments = arguments[:1]
    try:
        model(*arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if len(arguments) > 1 or not isinstance(batch, Tensor):
            error.add_note("calibrate called model(*batch); say how to run one with forward=...")
        raise
