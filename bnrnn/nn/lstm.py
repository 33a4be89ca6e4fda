"""`BNLSTM`: `torch.nn.LSTM` with three places for batch normalisation."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bnrnn import kernels
from bnrnn.kernels import Normalization, Request, TermMoments, Weights
from bnrnn.nn.statistics import StepStatistics

InputNorm = Literal["none", "frame", "sequence"]
StepNorm = Literal["none", "frame"]
RecurrentInit = Literal["orthogonal", "identity"]
State = tuple[Tensor, Tensor]


class BNLSTM(nn.Module):
    """A drop-in for `torch.nn.LSTM` that can normalise its input term, recurrent term and cell.

    The equations are in `bnrnn.kernels.reference`. The settings of the literature:

    | | `input_norm` | `recurrent_norm` | `cell_norm` | `gamma_init` |
    |---|---|---|---|---|
    | LSTM | none | none | none | |
    | BN-LSTM, Cooijmans et al. 2017 | frame | frame | frame | 0.1 |
    | BN-e*, ibid., section 5.4 | sequence | frame | frame | 0.1 |
    | Laurent et al. 2015 | frame or sequence | none | none | 1 |

    With all three at "none" it runs on `torch.nn.LSTM`'s own code. In training each term is
    normalised by the minibatch's moments; in evaluation by population statistics, kept for each
    time step: see `bnrnn.calibrate`. Steps beyond the longest training sequence use the
    statistics of its last step.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as in `torch.nn.LSTM`.
        proj_size: must be 0.
        input_norm: statistics of W_x x: "none", "frame" (over the batch, each step by itself) or
            "sequence" (over batch and time, where the whole sequence is known).
        recurrent_norm: statistics of W_h h: "none" or "frame".
        cell_norm: statistics of the cell state before the output tanh: "none" or "frame".
        gamma_init: initial γ of every slot. The paper: 0.1; 1 makes gradients vanish.
        eps: ε, added to the variance.
        sequence_eps: ε of sequence-wise statistics (1e-6 in the authors' code, where per-step ones
            have 1e-5). None: `eps`.
        momentum: weight of a minibatch in the running averages.
        max_length: keep statistics for at most this many steps. None: for as many as training has.
        init_noise: standard deviation of the noise on h_0 where the caller gives no state, in
            training and evaluation. Needed where the first frames are the same in all sequences:
            their variance is 0, each such step multiplies the gradient by up to γ / sqrt(ε), and
            what cancels in the weights' gradient leaves its rounding errors, larger than the rest.
            The paper: 0.1 for MNIST in order.
        learned_state: learn h_0 and c_0 (used where the caller gives none) instead of zeros.
        cell_bias: add a learned β_c to the cell state before the output tanh even where the cell
            is not normalised, as the baseline in the authors' code does.
        count_padding: whether finished sequences count in per-step statistics, with the hidden and
            the cell state they ended in and the input they are padded with (as in the authors'
            code). If not, the content of the padding never matters. Sequence-wise statistics leave
            padding out.
        forget_bias: initial bias of the forget gate.
        recurrent_init: "orthogonal", or "identity": the block of g is the identity and those of
            i, f, o are orthogonal, as in the authors' code for MNIST.
        kernel: "auto", the fastest there is for the device and dtype, or one by name: "cpu",
            compiled on first use, or "reference". Where nothing is normalised "auto" is
            `torch.nn.LSTM`'s own code, unless there are `lengths`.

    Parameters, for layer k, and again with suffix `_reverse` (gates in the order i, f, g, o):
        weight_ih_l{k}: (4H, D), or (4H, num_directions * H) for k > 0; orthogonal.
        weight_hh_l{k}: (4H, H); see `recurrent_init`.
        bias_l{k}: (4H,); 0, `forget_bias` for f. One bias: `torch.nn.LSTM` has two to add.
        gamma_ih_l{k}, gamma_hh_l{k}: (4H,); `gamma_init`. Where that slot normalises.
        gamma_c_l{k}, beta_c_l{k}: (H,); `gamma_init` and 0. Where the cell is normalised.
        initial_hidden, initial_cell: (num_layers * num_directions, H); 0. If `learned_state`.

    Buffers: `statistics.{ih,hh,c}_l{k}`, see `StepStatistics`.

    Raises:
        ValueError: an argument is out of range.

    Example::

        lstm = bnrnn.BNLSTM(28, 100)                        # was: torch.nn.LSTM(28, 100)
        output, (h_n, c_n) = lstm(torch.randn(28, 64, 28))  # (T, B, D) -> (T, B, H)
        bnrnn.calibrate(lstm, training_batches)
        lstm.eval()
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_norm: InputNorm = "frame",
        recurrent_norm: StepNorm = "frame",
        cell_norm: StepNorm = "frame",
        gamma_init: float = 0.1,
        eps: float = 1e-5,
        sequence_eps: float | None = None,
        momentum: float = 0.1,
        max_length: int | None = None,
        init_noise: float = 0.0,
        learned_state: bool = False,
        cell_bias: bool = False,
        count_padding: bool = False,
        forget_bias: float = 1.0,
        recurrent_init: RecurrentInit = "orthogonal",
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers),
            ("max_length", 1 if max_length is None else max_length),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        for name, value in (
            ("eps", eps),
            ("sequence_eps", eps if sequence_eps is None else sequence_eps),
        ):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        if init_noise < 0:
            raise ValueError(f"init_noise must not be negative, got {init_noise}")
        if proj_size != 0:
            raise ValueError("proj_size is not supported: it must be 0")
        for name, value, allowed in (
            ("input_norm", input_norm, ("none", "frame", "sequence")),
            ("recurrent_norm", recurrent_norm, ("none", "frame")),
            ("cell_norm", cell_norm, ("none", "frame")),
            ("recurrent_init", recurrent_init, ("orthogonal", "identity")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self.normalization = Normalization(input_norm, recurrent_norm, cell_norm, eps, sequence_eps)
        self.gamma_init, self.momentum, self.max_length = gamma_init, momentum, max_length
        self.init_noise, self.learned_state = init_noise, learned_state
        self.cell_bias, self.count_padding = cell_bias, count_padding
        self.forget_bias, self.recurrent_init = forget_bias, recurrent_init
        kernels.check_name(kernel)
        self.kernel = kernel

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        four_h = 4 * hidden_size
        self.statistics = nn.ModuleDict()
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * self.num_directions
            for suffix in self._suffixes(layer):
                shapes: dict[str, tuple[int, ...]] = {
                    "weight_ih": (four_h, width),
                    "weight_hh": (four_h, hidden_size),
                }
                if bias:
                    shapes["bias"] = (four_h,)
                for term, kind, features in (
                    ("ih", input_norm, four_h),
                    ("hh", recurrent_norm, four_h),
                    ("c", cell_norm, hidden_size),
                ):
                    if kind != "none":
                        shapes["gamma_" + term] = (features,)
                        self.statistics[term + suffix] = StepStatistics(
                            features, max_length, momentum, **factory
                        )
                if cell_norm != "none" or cell_bias:
                    shapes["beta_c"] = (hidden_size,)
                for name, shape in shapes.items():
                    self.register_parameter(
                        name + suffix, nn.Parameter(torch.empty(shape, **factory))
                    )
        if learned_state:
            states = (num_layers * self.num_directions, hidden_size)
            self.initial_hidden = nn.Parameter(torch.empty(states, **factory))
            self.initial_cell = nn.Parameter(torch.empty(states, **factory))
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def active_kernel(self, padded: bool = False) -> str:
        """The name of the kernel that runs the recurrence where the weights are now.

        Args:
            padded: for batches of sequences of different lengths.

        Raises:
            ValueError: `kernel` cannot run there.
        """
        weight: Tensor = self.weight_hh_l0
        request = Request(
            weight.device.type, weight.dtype, self.normalization, self.cell_bias, padded
        )
        return kernels.choose(self.kernel, request)

    @property
    def normalizes_frames(self) -> bool:
        """Some term needs more than one sequence in a training batch."""
        return "frame" in self.normalization[:3]

    def reset_parameters(self) -> None:
        """Initialise as the class docstring says, and forget all statistics."""
        for name, parameter in self.named_parameters():
            if name.startswith("weight_hh") and self.recurrent_init == "identity":
                _identity_candidate(parameter)
            elif name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            elif name.startswith("gamma"):
                nn.init.constant_(parameter, self.gamma_init)
            else:
                nn.init.zeros_(parameter)
            if name.startswith("bias"):
                _, forget, _, _ = parameter.detach().chunk(4)
                forget.fill_(self.forget_bias)
        for statistics in self._all_statistics():
            statistics.reset()

    def flatten_parameters(self) -> None:
        """Nothing to do; here because code written for `torch.nn.LSTM` calls it."""

    @torch.no_grad()
    def copy_weights(self, lstm: nn.LSTM) -> None:
        """Take over the weights of a `torch.nn.LSTM` of the same shape, its two biases added.

        Raises:
            ValueError: the shapes differ.
        """
        for name in ("input_size", "hidden_size", "num_layers", "bias", "bidirectional"):
            if getattr(self, name) != getattr(lstm, name):
                raise ValueError(
                    f"{name} differs: {getattr(self, name)} here, {getattr(lstm, name)} there"
                )
        for layer in range(self.num_layers):
            for suffix in self._suffixes(layer):
                self.get_parameter("weight_ih" + suffix).copy_(
                    lstm.get_parameter("weight_ih" + suffix)
                )
                self.get_parameter("weight_hh" + suffix).copy_(
                    lstm.get_parameter("weight_hh" + suffix)
                )
                if self.bias:
                    self.get_parameter("bias" + suffix).copy_(
                        lstm.get_parameter("bias_ih" + suffix)
                        + lstm.get_parameter("bias_hh" + suffix)
                    )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: Tensor | None = None,
        first_step: int = 0,
    ) -> tuple[Any, State]:
        """Run all layers over a batch of sequences.

        Args:
            input: (T, B, D), (B, T, D) if `batch_first`, (T, D) for one sequence; or a
                `PackedSequence`; or integers of shape (T, B), (B, T) if `batch_first`: the
                indices of one-hot vectors of size D.
            hx: (h_0, c_0), each (num_layers * num_directions, B, H), without B for (T, D). None:
                zeros, or the learned states, with `init_noise` on h_0.
            lengths: (B,) integers in 1..T, the lengths of padded sequences. A finished sequence
                keeps its state, and its outputs are zero.
            first_step: the time step of the first frame, where a long sequence is streamed in
                pieces: the step at which the population statistics begin.

        Returns:
            output: (T, B, num_directions * H), (B, T, ...) if `batch_first`; packed if the input
                was.
            (h_n, c_n): as hx, the states of the last layer's and every other layer's last step.

        Raises:
            ValueError: shapes, lengths or `first_step` do not fit, or a batch of one sequence is
                to be normalised by its own per-step statistics.
            RuntimeError: evaluation before training or calibration.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, first_step)
        if input.dim() == 2 and input.is_floating_point():
            states = None if hx is None else (hx[0][:, None], hx[1][:, None])
            batch_dim = 0 if self.batch_first else 1
            output, (h_n, c_n) = self(input.unsqueeze(batch_dim), states, lengths, first_step)
            return output.squeeze(batch_dim), (h_n[:, 0], c_n[:, 0])

        x = input.transpose(0, 1) if self.batch_first else input
        self._check(x, hx, lengths, first_step)
        h_0, c_0 = self._initial_state(x.shape[1]) if hx is None else hx
        lengths = None if lengths is None else lengths.to(x.device)
        output, h_n, c_n = self._run_layers(x, h_0, c_0, lengths, first_step)
        return (output.transpose(0, 1) if self.batch_first else output), (h_n, c_n)

    def _run_layers(
        self, x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor | None, first_step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                state = layer * self.num_directions + direction
                y = _reverse(x, lengths) if direction == 1 else x
                output, h, c, moments = kernels.recurrence(
                    y,
                    h_0[state],
                    c_0[state],
                    self._weights(suffix),
                    self.normalization,
                    population=self._population(suffix, first_step),
                    lengths=lengths,
                    count_padding=self.count_padding,
                    kernel=self.kernel,
                )
                self._average(suffix, moments, lengths)
                outputs.append(_reverse(output, lengths) if direction == 1 else output)
                h_n.append(h)
                c_n.append(c)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return x, torch.stack(h_n), torch.stack(c_n)

    def _forward_packed(
        self, input: PackedSequence, hx: State | None, lengths: Tensor | None, first_step: int
    ) -> tuple[PackedSequence, State]:
        if lengths is not None:
            raise ValueError("a PackedSequence has its own lengths: leave out `lengths`")
        padded, lengths = pad_packed_sequence(input, batch_first=self.batch_first)
        output, state = self(padded, hx, lengths, first_step)
        packed = pack_padded_sequence(output, lengths, self.batch_first, enforce_sorted=False)
        if input.sorted_indices is None:  # the caller had sorted; keep that form
            packed = packed._replace(sorted_indices=None, unsorted_indices=None)
        return packed, state

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def _weights(self, suffix: str) -> Weights:
        found = {name: getattr(self, name + suffix, None) for name in Weights._fields}
        return Weights(**found)  # type: ignore[arg-type]

    def _population(self, suffix: str, first_step: int) -> TermMoments | None:
        """What to normalise by; None: the batch's own moments."""
        present = self._present(suffix)
        if any(statistics.uses_batch for statistics in present.values()):
            return None
        moments = {term: s.population(first_step) for term, s in present.items()}
        return TermMoments(**moments)

    def _average(self, suffix: str, moments: TermMoments, lengths: Tensor | None) -> None:
        for term, statistics in self._present(suffix).items():
            term_moments = getattr(moments, term)
            if statistics.averages and term_moments is not None:
                counts = None
                if lengths is not None and not self.count_padding and len(term_moments.mean) > 1:
                    # One live row has no variance: such a step tells nothing of the population.
                    steps = torch.arange(len(term_moments.mean), device=lengths.device)
                    counts = (steps[:, None] < lengths).sum(1) > 1
                statistics.update(term_moments, counts)

    def _all_statistics(self) -> list[StepStatistics]:
        return cast("list[StepStatistics]", list(self.statistics.values()))

    def _present(self, suffix: str) -> dict[str, StepStatistics]:
        return {
            term: cast("StepStatistics", self.statistics[term + suffix])
            for term in TermMoments._fields
            if term + suffix in self.statistics
        }

    def _initial_state(self, batch: int) -> State:
        if self.learned_state:
            h_0 = self.initial_hidden[:, None].expand(-1, batch, -1)
            c_0 = self.initial_cell[:, None].expand(-1, batch, -1)
        else:
            states = (self.num_layers * self.num_directions, batch, self.hidden_size)
            h_0 = c_0 = self.get_parameter("weight_hh_l0").new_zeros(states)
        if self.init_noise > 0:
            h_0 = h_0 + self.init_noise * torch.randn_like(h_0)
        return h_0, c_0

    def _check(self, x: Tensor, hx: State | None, lengths: Tensor | None, first_step: int) -> None:
        if x.dim() != (3 if x.is_floating_point() else 2):
            raise ValueError(
                "input must be (T, B, D), (T, D), or integers (T, B); got shape "
                f"{tuple(x.shape)} of {x.dtype}"
            )
        if x.is_floating_point() and x.shape[2] != self.input_size:
            raise ValueError(f"input has {x.shape[2]} features, input_size is {self.input_size}")
        steps, batch = x.shape[:2]
        if steps == 0 or batch == 0:
            raise ValueError(f"input has {steps} steps and {batch} sequences: nothing to run")
        if hx is not None:
            expected = (self.num_layers * self.num_directions, batch, self.hidden_size)
            for name, state in zip(("h_0", "c_0"), hx, strict=True):
                if tuple(state.shape) != expected:
                    raise ValueError(f"{name} must be {expected}, got {tuple(state.shape)}")
        if lengths is not None:
            if tuple(lengths.shape) != (batch,):
                raise ValueError(f"lengths must be ({batch},), got {tuple(lengths.shape)}")
            if int(lengths.min()) < 1 or int(lengths.max()) > steps:
                raise ValueError(f"lengths must be in 1..{steps}")
        if first_step < 0 or (first_step > 0 and self.bidirectional):
            raise ValueError("first_step must be 0, or positive in a unidirectional module")
        by_batch = any(statistics.uses_batch for statistics in self._all_statistics())
        if batch == 1 and self.normalizes_frames and by_batch:
            raise ValueError(
                "a batch of one sequence has no per-step batch statistics: use at least two, "
                "or evaluation mode with population statistics"
            )

    def extra_repr(self) -> str:
        kinds = self.normalization
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"input_norm={kinds.ih}, recurrent_norm={kinds.hh}, cell_norm={kinds.c}"]
        for name in ("num_layers", "batch_first", "dropout", "bidirectional"):
            value = getattr(self, name)
            if value not in (False, 0) and (name, value) != ("num_layers", 1):
                parts.append(f"{name}={value}")
        return ", ".join(parts)


@torch.no_grad()
def _identity_candidate(weight_hh: Tensor) -> None:
    """The g block of weight_hh (4H, H) the identity; those of i, f, o together orthogonal."""
    hidden_size = weight_hh.shape[1]
    others = nn.init.orthogonal_(weight_hh.new_empty(3 * hidden_size, hidden_size))
    i_f, o = others[: 2 * hidden_size], others[2 * hidden_size :]
    weight_hh.copy_(torch.cat([i_f, torch.eye(hidden_size).to(weight_hh), o]))


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence of x (T, B, ...) backwards, padding left in place."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[index, torch.arange(x.shape[1], device=x.device)]


__all__ = ["BNLSTM"]
