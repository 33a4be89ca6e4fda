"""`FeatureNorm`: batch normalisation of a term outside the recurrence."""

import torch
from torch import Tensor, nn

from bnrnn.kernels import Moments, synchronised
from bnrnn.kernels.reference import widened
from bnrnn.nn import share
from bnrnn.nn.statistics import StepStatistics


class FeatureNorm(nn.Module):
    """BN(y; γ, β) = β + γ ⊙ (y − mean) / sqrt(var + ε), with one mean and variance per feature.

    Unlike `torch.nn.BatchNorm1d`, it can leave padding out of the statistics, and
    `bnrnn.calibrate` and `bnrnn.batch_statistics` control its population statistics as they do
    those of `BNLSTM`. This is equation 5 of Cooijmans et al., "Recurrent Batch Normalization",
    ICLR 2017; their section 5.4 normalises the terms of the attention with it.

    Args:
        features: the size of the last dimension.
        beta: learn a shift β. Otherwise β = 0, for a term whose bias is added elsewhere.
        gamma_init: initial γ.
        eps: ε, added to the variance.
        momentum: weight of a minibatch in the running averages.

    Parameters:
        gamma: (features,); `gamma_init`.
        beta: (features,); 0. Only if `beta`.

    Buffers: `statistics`, a `StepStatistics` with one row.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        features: int,
        *,
        beta: bool = False,
        gamma_init: float = 0.1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.features, self.gamma_init, self.eps = features, gamma_init, eps
        self.synchronised = False  # see `synchronise`
        self.gamma = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.beta = (
            nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if beta else None
        )
        self.statistics = StepStatistics(features, 1, momentum, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise γ and β as documented above and reset the statistics."""
        nn.init.constant_(self.gamma, self.gamma_init)
        if self.beta is not None:
            nn.init.zeros_(self.beta)
        self.statistics.reset()

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise over all dimensions but the last.

        Args:
            y: (..., features).
            mask: (...) booleans, which vectors count in batch statistics. The others are normalised
                by the same statistics, but their values, even NaN, do not affect them. None: all
                vectors count.

        Returns:
            (..., features).

        Raises:
            ValueError: shapes do not match, or fewer than two vectors count in batch statistics
                (with a mask, this is checked on the CPU only).
            RuntimeError: the module is evaluated before it was trained or calibrated.
        """
        if y.dim() < 2 or y.shape[-1] != self.features:
            raise ValueError(f"y must be (..., {self.features}), got shape {tuple(y.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != y.shape[:-1]):
            raise ValueError(
                f"mask must be booleans of shape {tuple(y.shape[:-1])}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        wide = widened(y)
        if self.statistics.uses_batch:
            rows, flat = None if mask is None else mask.flatten(), wide.flatten(0, -2)
            moments = self._everywhere(flat, rows) if self.synchronised else _moments(flat, rows)
            if self.statistics.averages:
                population = moments if self.synchronised else share.average(moments, None)[0]
                self.statistics.update(population)
        else:
            moments = self.statistics.population()
        mean, var = moments.mean[0], moments.var[0]
        normalized = (wide - mean) * (self.gamma * torch.rsqrt(var + self.eps))
        return (normalized if self.beta is None else normalized + self.beta).to(y.dtype)

    def _everywhere(self, y: Tensor, mask: Tensor | None) -> Moments:
        mean, var, _ = synchronised.moments(y, None if mask is None else mask[:, None])
        return Moments(mean[None], var[None])

    def extra_repr(self) -> str:
        return f"{self.features}, beta={self.beta is not None}, eps={self.eps}"


def _moments(y: Tensor, mask: Tensor | None) -> Moments:
    """Mean and biased variance, (1, features) each, of the rows of y (n, features) in `mask`."""
    n = len(y)
    if mask is not None:  # int() would wait for a device other than the CPU
        n = int(mask.sum()) if mask.is_cpu else mask.sum()
    if isinstance(n, int) and n < 2:
        raise ValueError(
            f"batch statistics need at least two vectors, got {n}: use more, or evaluation mode "
            "with population statistics"
        )
    if mask is None:
        mean = y.mean(0, keepdim=True)
        return Moments(mean, (y - mean).square().mean(0, keepdim=True))
    # Do not multiply by the mask: NaN * 0 is NaN.
    rows = mask[:, None]
    mean = torch.where(rows, y, 0.0).sum(0, keepdim=True) / n
    var = torch.where(rows, y - mean, 0.0).square().sum(0, keepdim=True) / n
    return Moments(mean, var)


__all__ = ["FeatureNorm"]
