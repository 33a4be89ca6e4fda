"""What every kernel of the recurrence takes, returns and says about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and biased variance of one term: (T, features), or (1, features) if sequence-wise."""

    mean: Tensor
    var: Tensor


class TermMoments(NamedTuple):
    """The moments of the three terms that can be normalised; None where a term is not.

    With `Normalization.hh` "sum", `hh` has those of W_h h + W_x x.
    """

    ih: Moments | None = None
    hh: Moments | None = None
    c: Moments | None = None


class Weights(NamedTuple):
    """The parameters of one layer and direction; a γ or β is None where its slot is empty."""

    weight_ih: Tensor  # (4H, D), gates in the order i, f, g, o
    weight_hh: Tensor  # (4H, H)
    bias: Tensor | None = None  # (4H,)
    gamma_ih: Tensor | None = None  # (4H,)
    gamma_hh: Tensor | None = None  # (4H,); of the sum, where that is normalised
    gamma_c: Tensor | None = None  # (H,)
    beta_c: Tensor | None = None  # (H,)


class Normalization(NamedTuple):
    """What the three slots hold: "none", "frame" (batch statistics of each step by itself),
    "sequence" (of all steps) or "layer" (statistics over the features of each sequence and step).

    `hh` may also be "sum": the sum of both terms is normalised, each step by itself, with
    `gamma_hh` as γ and the bias as β; `ih` is "none" then.
    """

    ih: str = "frame"
    hh: str = "frame"
    c: str = "frame"
    eps: float = 1e-5
    sequence_eps: float | None = None  # of sequence-wise statistics; None: eps
    synchronised: bool = False  # the batch is what all processes hold together

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
        """Whether any slot takes moments."""
        return any(self.takes_moments(term) for term in TermMoments._fields)

    def takes_moments(self, term: str) -> bool:
        """Whether a slot's statistics are those of a batch, which a population's can replace."""
        return getattr(self, term) not in ("none", "layer")


class Noise(NamedTuple):
    """What regularises one pass over one layer and direction; by default nothing does.

    Probabilities, and in training masks of booleans that are true with them. Without its mask
    (in evaluation) a zoneout takes the expectation, and a dropout does nothing. See
    `reference.py` for the equations.
    """

    zoneout_cell: float = 0.0
    zoneout_hidden: float = 0.0
    recurrent_dropout: float = 0.0
    hidden_dropout: float = 0.0
    held_cell: Tensor | None = None  # (T, B, H): keeps c_{t-1}
    held_hidden: Tensor | None = None  # (T, B, H): keeps h_{t-1}
    dropped_candidate: Tensor | None = None  # (T, B, H): adds nothing to c_t
    dropped_hidden: Tensor | None = None  # (B, H): left out of W_h h_{t-1} at every step

    @property
    def is_random(self) -> bool:
        return any(mask is not None for mask in self[4:])

    @property
    def is_silent(self) -> bool:
        """Whether a pass with this equals one without."""
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
    ) -> tuple[Tensor, Tensor, Tensor, TermMoments]:
        """Run all time steps.

        Args:
            input: (T, B, D), or (T, B) integers: the indices of one-hot vectors of size D.
            h_0, c_0: (B, H).
            population: normalise by these; step t uses row min(t, rows - 1). None: by the batch's
                own.
            lengths: (B,) int64 on the input's device, each in 1..T. A finished sequence keeps its
                state and its output is zero. None: all are T long.
            count_padding: whether finished sequences count in frame-wise batch statistics, those
                of the two states with h and c as they ended.
            noise: zoneout and dropout of the states.

        Returns:
            output (T, B, H); h_n, c_n (B, H); the batch's moments, detached (empty if given).

        Where padding does not count and a single sequence is left, it has no variance: it is left
        out of the statistics and normalised by those of the last step with two, taken as
        constants. The moments of such a step repeat theirs.
        """
        ...


@dataclass(frozen=True)
class Request:
    """What is to be run, as far as a kernel may not be able to run it."""

    device: str  # its type
    dtype: torch.dtype
    normalization: Normalization
    cell_bias: bool = False  # β_c without a normalised cell
    padded: bool = False  # sequences of different lengths
    by_batch: bool = True  # statistics, if any, are the batch's own
    noisy: bool = False  # some `Noise`
    random: bool = False  # with masks

    @property
    def is_synchronised(self) -> bool:
        """Some statistics are those of several processes."""
        return self.normalization.synchronised and self.by_batch and self.normalization.by_batch

    @property
    def is_plain(self) -> bool:
        """Nothing is normalised or added to the LSTM of `torch.nn.LSTM`."""
        return self.normalization.is_empty and not self.cell_bias and not self.noisy


def in_functorch_transform() -> bool:
    """Whether `torch.func` maps or differentiates what runs now; never while it is compiled."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active()  # pyright: ignore


@dataclass(frozen=True)
class Kernel:
    run: Recurrence
    why_not: Callable[[Request], str | None]  # why it cannot run a request, in words; None: it can
