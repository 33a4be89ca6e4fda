"""The interface that every kernel of the recurrence implements."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Moments(NamedTuple):
    """Mean and biased variance of one term: (T, features), or (1, features) if sequence-wise."""

    mean: Tensor
    var: Tensor


class TermMoments(NamedTuple):
    """The moments of the three terms that can be normalised; None for a term that is not.

    If `Normalization.hh` is "sum", `hh` holds the moments of W_h h + W_x x.
    """

    ih: Moments | None = None
    hh: Moments | None = None
    c: Moments | None = None


class Weights(NamedTuple):
    """The parameters of one layer and direction; γ and β are None if their slot is empty."""

    weight_ih: Tensor  # (4H, D), gates in the order i, f, g, o
    weight_hh: Tensor  # (4H, H)
    bias: Tensor | None = None  # (4H,)
    gamma_ih: Tensor | None = None  # (4H,)
    gamma_hh: Tensor | None = None  # (4H,); γ of the sum if the sum is normalised
    gamma_c: Tensor | None = None  # (H,)
    beta_c: Tensor | None = None  # (H,)


class Normalization(NamedTuple):
    """The kind of normalisation in each slot: "none", "frame" (batch statistics per time step),
    "sequence" (batch statistics over all steps) or "layer" (statistics over the features, per
    sequence and step).

    `hh` may also be "sum": the sum of both terms is normalised per time step, with `gamma_hh` as
    γ and the bias as β; `ih` must then be "none".
    """

    ih: str = "frame"
    hh: str = "frame"
    c: str = "frame"
    eps: float = 1e-5
    sequence_eps: float | None = None  # ε of sequence-wise statistics; None: eps
    synchronised: bool = False  # take batch statistics over the batches of all processes

    @property
    def sums(self) -> bool:
        """Whether W_h h + W_x x is normalised as one term."""
        return self.hh == "sum"

    @property
    def eps_ih(self) -> float:
        if self.ih != "sequence" or self.sequence_eps is None:
            return self.eps
        return self.sequence_eps

    def eps_of(self, term: str) -> float:
        return self.eps_ih if term == "ih" else self.eps

    @property
    def is_empty(self) -> bool:
        return (self.ih, self.hh, self.c) == ("none", "none", "none")

    @property
    def has_layer(self) -> bool:
        return "layer" in (self.ih, self.hh, self.c)

    @property
    def by_batch(self) -> bool:
        """Whether any slot uses batch statistics."""
        return any(self.takes_moments(term) for term in TermMoments._fields)

    def takes_moments(self, term: str) -> bool:
        """Whether a slot uses batch statistics, which population statistics can replace."""
        return getattr(self, term) not in ("none", "layer")


@dataclass(frozen=True)
class Noise:
    """Zoneout and dropout in one pass over one layer and direction; none by default.

    Each mask, used in training, is true with the probability of its option. Without a mask (in
    evaluation), zoneout takes the expectation and dropout does nothing. The equations are in
    `reference.py`.
    """

    zoneout_cell: float = 0.0
    zoneout_hidden: float = 0.0
    recurrent_dropout: float = 0.0
    hidden_dropout: float = 0.0
    held_cell: Tensor | None = None  # (T, B, H): where c_{t-1} is kept
    held_hidden: Tensor | None = None  # (T, B, H): where h_{t-1} is kept
    dropped_candidate: Tensor | None = None  # (T, B, H): where tanh(g) is zeroed
    dropped_hidden: Tensor | None = None  # (B, H): where h_{t-1} is zeroed in W_h h_{t-1}

    @property
    def rates(self) -> tuple[float, ...]:
        return (
            self.zoneout_cell, self.zoneout_hidden, self.recurrent_dropout, self.hidden_dropout
        )  # fmt: skip

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        return self.held_cell, self.held_hidden, self.dropped_candidate, self.dropped_hidden

    @property
    def is_random(self) -> bool:
        return any(mask is not None for mask in self.masks)

    @property
    def is_silent(self) -> bool:
        """Whether this noise changes nothing."""
        return self.zoneout_cell == self.zoneout_hidden == 0 and not self.is_random


SILENCE = Noise()


class Recurrence(Protocol):
    """One layer in one direction."""

    def __call__(
        self,
        input: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weights: Weights,
        normalization: Normalization,
        *,
        population: TermMoments | None = None,
        lengths: Tensor | None = None,
        count_padding: bool = False,
        noise: Noise = SILENCE,
        bfloat16: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
        """Run all time steps.

        Args:
            input: (T, B, D), or (T, B) integers: the indices of one-hot vectors of size D.
            h_0, c_0: (B, H).
            population: the statistics to normalise by; step t uses row min(t, rows - 1). None:
                normalise by batch statistics.
            lengths: (B,) int64 on the input's device, each in 1..T. A finished sequence keeps its
                state and its output is zero. None: all sequences have T steps.
            count_padding: whether finished sequences count in frame-wise batch statistics. If so,
                their final h and c enter the statistics of the recurrent term and the cell.
            noise: zoneout and dropout of the states.
            bfloat16: whether products may round their factors to bfloat16, in both passes. Sums,
                statistics and states stay in the dtype of the weights, float32. In float64 it has
                no effect.

        Returns:
            output (T, B, H); h_n, c_n (B, H); the batch's moments, detached (empty if `population`
            was given).

        If padding does not count and one sequence is left at a step, its variance is undefined. It
        is then normalised by the statistics of the last step with at least two sequences, treated
        as constants. The moments returned for such a step are those of that earlier step.
        """
        ...


class Request(NamedTuple):
    """The properties of a call that decide which kernels can run it."""

    device: str  # the device type
    dtype: torch.dtype
    normalization: Normalization
    cell_bias: bool = False  # there is a β_c although the cell is not normalised
    padded: bool = False  # sequences have different lengths
    by_batch: bool = True  # statistics, if any, are batch statistics
    noisy: bool = False  # there is `Noise`
    random: bool = False  # the noise has masks
    bfloat16: bool = False  # round the factors of products
    batch: int = 1  # number of sequences

    @property
    def is_synchronised(self) -> bool:
        """Whether batch statistics are taken over several processes."""
        return self.normalization.synchronised and self.by_batch and self.normalization.by_batch

    @property
    def is_plain(self) -> bool:
        """Whether `torch.nn.LSTM` computes the same recurrence."""
        return self.normalization.is_empty and not self.cell_bias and not self.noisy


def in_functorch_transform() -> bool:
    """Whether a `torch.func` transform is active; always false while compiling."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active()  # pyright: ignore


def why_not_transformed() -> str | None:
    """Why an operator that only has a backward pass cannot run now; None: it can."""
    if in_functorch_transform():
        return "torch.func cannot transform it"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    return None


@dataclass(frozen=True)
class Kernel:
    """A way to run the recurrence."""

    run: Recurrence
    why_not: Callable[[Request], str | None]  # the reason it cannot run a request; None: it can
    rounds_products: bool = False  # whether it can round the factors of products to bfloat16
    fast_on: str | None = None  # the device type on which the kernels after it are slower
