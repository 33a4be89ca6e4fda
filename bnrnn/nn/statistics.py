"""Population statistics: per time step, averaged over minibatches, and what switches them.

In training a term is normalised by the minibatch's own moments; at test by *population*
statistics, the plain average of the minibatch moments over the training set (Cooijmans et al.,
section 3). Running averages, kept while training, approximate them well enough for monitoring;
`calibrate` computes them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnrnn.kernels import Moments

Source = Literal["auto", "batch", "calibrate"]


class StepStatistics(nn.Module):
    """Average mean and variance of one term, a row for each time step.

    Buffers (T grows to the longest sequence seen, at most `max_length`):
        mean, var: (T, features); the variance is the biased one.
        num_batches: (T,), how many minibatches each row has averaged; 0: nothing yet.

    `source` says what a layer normalises by: "auto" is the batch in training, else the population;
    "batch" is the batch, leaving the averages alone; "calibrate" is the batch, averaging it in.
    """

    mean: Tensor
    var: Tensor
    num_batches: Tensor

    def __init__(
        self,
        features: int,
        max_length: int | None = None,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.max_length, self.momentum = features, max_length, momentum
        self.source: Source = "auto"
        self.register_buffer("mean", torch.empty(0, features, device=device, dtype=dtype))
        self.register_buffer("var", torch.empty(0, features, device=device, dtype=dtype))
        self.register_buffer("num_batches", torch.empty(0, device=device, dtype=torch.long))

    @property
    def uses_batch(self) -> bool:
        return self.training if self.source == "auto" else True

    @property
    def averages(self) -> bool:
        return self.training if self.source == "auto" else self.source == "calibrate"

    @torch.no_grad()
    def update(self, moments: Moments, counts: Tensor | None = None) -> None:
        """Average a minibatch in: its moments (T, features), of which `counts` (T,) are valid."""
        steps = moments.mean.shape[0]
        if self.max_length is not None:
            steps = min(steps, self.max_length)
        self._resize(max(steps, len(self.mean)))
        valid = torch.ones_like(self.num_batches[:steps])
        if counts is not None:
            valid.copy_(counts[:steps])
        seen = self.num_batches[:steps].add_(valid)
        # A plain average at first, so that nothing of the buffers' initial content remains; then
        # a running one, unless this is a calibration.
        valid = valid.to(self.mean.dtype)
        weight = valid / seen.clamp(min=1)
        if self.source != "calibrate":
            weight = torch.maximum(weight, self.momentum * valid)
        self.mean[:steps].lerp_(moments.mean[:steps].to(self.mean.dtype), weight[:, None])
        self.var[:steps].lerp_(moments.var[:steps].to(self.var.dtype), weight[:, None])

    def population(self, first_step: int = 0) -> Moments:
        """The rows from `first_step` on; a step beyond the last row uses the last.

        Raises:
            RuntimeError: no minibatch has been averaged yet.
        """
        # Rows are filled from the front: every sequence has a first step, not every one a last.
        rows = int((self.num_batches > 0).sum())
        if rows == 0:
            raise RuntimeError(
                "no population statistics: train this module or call bnrnn.calibrate(model, "
                "batches) before evaluating it"
            )
        first_step = min(first_step, rows - 1)
        return Moments(self.mean[first_step:rows], self.var[first_step:rows])

    def reset(self) -> None:
        self._resize(0)

    def _resize(self, steps: int) -> None:
        """Keep the first rows; new ones are zero and marked as holding nothing."""
        kept = min(steps, len(self.mean))
        for name in ("mean", "var", "num_batches"):
            old: Tensor = getattr(self, name)
            if steps != len(old):
                new = old.new_zeros(steps, *old.shape[1:])
                new[:kept] = old[:kept]
                setattr(self, name, new)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(prefix + "mean")
        if isinstance(saved, Tensor) and saved.dim() == 2:
            self._resize(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.features}, max_length={self.max_length}, momentum={self.momentum}"


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
    """Within this context `model` normalises by each batch's own moments and averages nothing.

    The paper's validation curves are of this kind: `with torch.no_grad(), batch_statistics(model)`
    on a model in evaluation mode.
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
    evaluation mode (no dropout), normalising by each batch's moments, as in training.

    Args:
        model: any module that contains a `BNLSTM`.
        batches: what the model is called with; a tuple or list is unpacked as `model(*batch)`.
        forward: how to run a batch, if not so.

    Returns:
        the number of batches.

    Raises:
        ValueError: there are no batches. Then, and after any other exception, the statistics are
            as they were.
    """
    statistics = _statistics(model)
    before = [(s, s.mean, s.var, s.num_batches) for s in statistics]
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
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
                n += 1
        if n == 0:
            raise ValueError("calibrate needs at least one batch")
    except BaseException:
        for s, mean, var, num_batches in before:
            s.mean, s.var, s.num_batches = mean, var, num_batches
        raise
    finally:
        for module, mode in training.items():
            module.training = mode
    return n
