"""`BNLSTM`: `torch.nn.LSTM` with three normalisation slots, and noise."""

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bnrnn import kernels
from bnrnn.kernels import Normalization, Request, TermMoments, Weights, synchronised
from bnrnn.nn import checks, conversion, share
from bnrnn.nn.checks import State, can_read
from bnrnn.nn.initialization import assign, identity_candidate_, orthogonal_
from bnrnn.nn.noise import draw, drop_weights
from bnrnn.nn.options import LSTMOptions, NoiseOptions, spell_out_options, take_options
from bnrnn.nn.statistics import StepStatistics


class AlikeWarning(UserWarning):
    """All sequences of a batch begin with the same frame."""


class BNLSTM(nn.Module):
    """A drop-in for `torch.nn.LSTM` that can normalise its input term, recurrent term and cell.

    The equations are in `bnrnn.kernels.reference`. These settings are from the literature:

    | | `input_norm` | `recurrent_norm` | `cell_norm` | `gamma_init` |
    |---|---|---|---|---|
    | LSTM | none | none | none | |
    | BN-LSTM, Cooijmans et al. 2017 | frame | frame | frame | 0.1 |
    | BN-e*, ibid., section 5.4 | sequence | frame | frame | 0.1 |
    | Laurent et al. 2015 | frame or sequence | none | none | 1 |
    | ibid., their first attempt, the sum | none | sum | none | 1 |
    | Layer normalisation, Ba et al. 2016, equations 20 to 22 | layer | layer | layer | 1 |

    With all three at "none" it computes what `torch.nn.LSTM` computes, on that module's own code
    where no kernel of ours is faster. In training, each term is normalised by the moments of the
    minibatch. In evaluation it is normalised by population statistics, which are kept per time
    step: see `bnrnn.calibrate`. Steps beyond the longest training sequence use the statistics of
    its last step.

    If one sequence of a padded batch is longer than all others, its variance is undefined at the
    steps where it is alone. It is then normalised by the statistics of the last step with at least
    two sequences, treated as constants. A batch of one sequence raises an error.

    As a drop-in, its `load_state_dict` accepts the state of a `torch.nn.LSTM`, and `from_lstm` and
    `to_lstm` convert. Weights may be parametrised, pruned or replaced. Autocast, `torch.compile`,
    `torch.export`, ONNX, double differentiation and both kinds of checkpointing work. `proj_size`,
    quantisation, and TorchScript other than tracing are not supported.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as in `torch.nn.LSTM`.
        proj_size: must be 0.
        input_norm: statistics of W_x x: "none", "frame" (over the batch, per time step),
            "sequence" (over batch and time, if the whole sequence is known) or "layer" (over the
            features, per sequence and step; it needs neither a batch nor population statistics).
        recurrent_norm: statistics of W_h h: "none", "frame" or "layer". With "sum", W_h h + W_x x
            is normalised over the batch, per time step, as BN(W_h h + W_x x; γ, b) with one γ and
            the bias as β; `input_norm` must then be "none".
        cell_norm: statistics of the cell state before the output tanh: "none", "frame" or "layer".
        gamma_init: initial γ of every slot: 0.1 in the paper; with 1, gradients vanish.
        eps: ε, added to the variance.
        sequence_eps: ε of sequence-wise statistics; the authors' code has 1e-6, and 1e-5 for
            per-step statistics. None: `eps`.
        momentum: weight of a minibatch in the running averages.
        max_length: keep statistics for this many steps, in buffers of constant shape, which
            DistributedDataParallel, averages over buffers and `torch.compile` in training need.
            None: for the length of the longest training sequence.
        init_noise: standard deviation of the noise added to h_0, in training and evaluation, if the
            caller gives no state. It is needed if the first frames are the same in all sequences:
            their variance is 0, each such step multiplies the gradient by up to γ / sqrt(ε), and
            the rounding errors of terms that cancel in the weights' gradient exceed the gradient
            itself. The paper uses 0.1 for sequential MNIST.
        learned_state: learn h_0 and c_0, used if the caller gives no state, instead of zeros.
        cell_bias: add a learned β_c to the cell state before the output tanh even if the cell is
            not normalised, as the baseline in the authors' code does.
        count_padding: whether finished sequences count in per-step statistics, with their final
            hidden and cell states and the input of the padding, as in the authors' code. If not,
            the content of the padding has no effect. Sequence-wise statistics never count padding.
        forget_bias: initial bias of the forget gate.
        zoneout_cell, zoneout_hidden: probability that a unit of c_t, or of h_t, keeps its previous
            value; in evaluation the expectation is used (Krueger et al. 2017, section 3).
        recurrent_dropout: probability of dropping a unit of tanh(g), which a step adds to the cell
            state; drawn for each step (Semeniuta et al. 2016, equation 11). This dropout and the
            next two scale by 1 / (1 - p) in training and do nothing in evaluation.
        hidden_dropout: probability of dropping a unit of h in W_h h, the same units at all steps of
            a call (Gal and Ghahramani 2016, section 4).
        weight_dropout: probability of dropping an element of W_h, the same elements at all steps of
            a call: DropConnect (Merity et al. 2018, section 2). The equations of the other options
            for noise are in `bnrnn.kernels.reference`. All random numbers depend only on one draw
            per layer and direction from PyTorch's CPU generator, so they are the same for every
            kernel and number of threads.
        recurrent_init: "orthogonal", or "identity": the block of g is the identity and those of
            i, f, o are orthogonal, as in the authors' code for MNIST.
        synchronised: take batch statistics over all processes of `torch.distributed`'s default
            group. Under DistributedDataParallel, n processes with equal parts of a batch then train
            like one process with the whole batch. All processes must call the module in the same
            order with the same number of time steps. It runs on the reference kernel.
        kernel: "auto" for the fastest kernel that supports the call, or the name of one in
            `bnrnn.kernels.KERNELS`: "cpu", compiled on first use; "torch.lstm", without
            normalisation, and "torch.lstm packed", the same with `lengths`; "triton", for CUDA,
            which chooses between "triton persistent" and "triton alternating"; "reference".

    Parameters, for layer k, and again with suffix `_reverse` (gates in the order i, f, g, o):
        weight_ih_l{k}: (4H, D), or (4H, num_directions * H) for k > 0; orthogonal.
        weight_hh_l{k}: (4H, H); see `recurrent_init`.
        bias_l{k}: (4H,); 0, or `forget_bias` for f. `torch.nn.LSTM` has two biases; this is their
            sum.
        gamma_ih_l{k}, gamma_hh_l{k}: (4H,); `gamma_init`. Only if that slot normalises; the γ of
            the sum is gamma_hh_l{k}.
        gamma_c_l{k}, beta_c_l{k}: (H,); `gamma_init` and 0. Only if the cell is normalised.
        initial_hidden, initial_cell: (num_layers * num_directions, H); 0. Only if `learned_state`.

    Buffers: `statistics.{ih,hh,c}_l{k}`, see `StepStatistics`.

    Raises:
        ValueError: an argument is out of range.

    Example::

        lstm = bnrnn.BNLSTM(28, 100)                        # was: torch.nn.LSTM(28, 100)
        output, (h_n, c_n) = lstm(torch.randn(28, 64, 28))  # (T, B, D) -> (T, B, H)
        bnrnn.calibrate(lstm, training_batches)
        lstm.eval()
    """

    mode = "LSTM"  # as in `torch.nn.LSTM`, where it distinguishes the kinds of recurrent modules

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
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = take_options(LSTMOptions, type(self).__name__, options)
        kernels.check_name(self.options.kernel)
        checks.check_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout)
        if hidden_size == 1 and self.options.cell_norm == "layer":
            raise ValueError(
                "hidden_size must be 2 or more with cell_norm=layer: one unit is its mean"
            )
        if proj_size != 0:
            raise ValueError(
                "proj_size must be 0: project the outputs with torch.nn.Linear instead"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self._seen_first_batch = False

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kinds = self.normalization
        self.statistics = nn.ModuleDict()
        for layer, suffix in self._all_suffixes():
            width = input_size if layer == 0 else hidden_size * self.num_directions
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (4 * hidden_size, width),
                "weight_hh": (4 * hidden_size, hidden_size),
            }
            if bias:
                shapes["bias"] = (4 * hidden_size,)
            for term, kind, features in (
                ("ih", kinds.ih, 4 * hidden_size),
                ("hh", kinds.hh, 4 * hidden_size),
                ("c", kinds.c, hidden_size),
            ):
                if kind != "none":
                    shapes["gamma_" + term] = (features,)
                if kinds.takes_moments(term):
                    rows = 1 if kind == "sequence" else self.options.max_length
                    self.statistics[term + suffix] = StepStatistics(
                        features, rows, self.options.momentum, **factory
                    )
            if kinds.c != "none" or self.options.cell_bias:
                shapes["beta_c"] = (hidden_size,)
            for name, shape in shapes.items():
                self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, **factory)))
            self._weight_names = tuple(shapes)  # the fields of `Weights` that are present
        if self.options.learned_state:
            states = (num_layers * self.num_directions, hidden_size)
            self.initial_hidden = nn.Parameter(torch.empty(states, **factory))
            self.initial_cell = nn.Parameter(torch.empty(states, **factory))
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def normalization(self) -> Normalization:
        o = self.options
        return Normalization(
            o.input_norm, o.recurrent_norm, o.cell_norm, o.eps, o.sequence_eps, o.synchronised
        )

    @property
    def needs_batch(self) -> bool:
        """Whether some term needs more than one sequence in a training batch."""
        return self.options.needs_batch

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, in the form of `torch.nn.LSTM`."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _all_weights(self) -> list[list[str]]:
        """Their names. Programs read this attribute of `torch.nn.LSTM` to initialise its biases."""
        return [
            [name + suffix for name, value in self._weights(suffix)._asdict().items()
             if value is not None]
            for _, suffix in self._all_suffixes()
        ]  # fmt: skip

    def active_kernel(self, padded: bool = False, batch: int = 1) -> str:
        """The name of the kernel that runs the recurrence on the current device and dtype.

        Under autocast, it is the kernel that runs under it.

        Args:
            padded: whether sequences in a batch have different lengths.
            batch: number of sequences in a batch.

        Raises:
            ValueError: the chosen `kernel` cannot run on them.
        """
        weight = self._weight
        request = Request(
            weight.device.type, weight.dtype, self.normalization, self.options.cell_bias, padded,
            noisy=self.options.is_noisy,
            bfloat16=_in_autocast(weight) and self._rounds_products(), batch=batch,
        )  # fmt: skip
        return kernels.choose(self.options.kernel, request)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters as documented above and reset all statistics.

        What a subclass, or a parametrisation, has added stays as it is.
        """
        names = [name + suffix for _, suffix in self._all_suffixes() for name in Weights._fields]
        for name in (*names, "initial_hidden", "initial_cell"):
            present = getattr(self, name, None)
            if present is not None:
                assign(self, name, self._initial(name, torch.empty_like(present)))
        for statistics in self._all_statistics():
            statistics.reset()

    def _initial(self, name: str, tensor: Tensor) -> Tensor:
        """Fill a tensor with the initial values of the parameter or buffer `name`; return it."""
        if name.startswith("weight_hh") and self.options.recurrent_init == "identity":
            return identity_candidate_(tensor)
        if name.startswith("weight"):
            return orthogonal_(tensor)
        if name.startswith("gamma"):
            return tensor.fill_(self.options.gamma_init)
        tensor.zero_()
        if name.startswith("bias"):
            _, forget, _, _ = tensor.chunk(4)
            forget.fill_(self.options.forget_bias)
        return tensor

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith(("bias_ih_l", "bias_hh_l")):
                own = name.replace("_ih", "").replace("_hh", "")
                raise AttributeError(
                    f"BNLSTM has no {name}: its {own} is the sum of torch.nn.LSTM's two biases"
                ) from error
            raise

    def flatten_parameters(self) -> None:
        """Do nothing; code written for `torch.nn.LSTM` calls this."""

    @classmethod
    def from_lstm(
        cls, lstm: nn.LSTM, batches: Iterable[Any] | None = None, **options: Any
    ) -> "BNLSTM":
        """Create a module that in evaluation computes what a `torch.nn.LSTM` computes.

        Args:
            batches: inputs of `lstm`, from which the moments of the normalised terms are taken:
                tensors, `PackedSequence`s or tuples of arguments. The statistics are taken over all
                time steps together, γ is sqrt(var + ε), and b and β_c compensate for the means.
                Without batches, only the weights are copied: γ stays `gamma_init`, and the outputs
                equal those of `lstm` only if nothing is normalised.
            options: those of `BNLSTM`.

        Raises:
            TypeError: `lstm` is not a `torch.nn.LSTM`, or `batches` is a single tensor.
            ValueError: `lstm` has projections; a normalised module has no bias to compensate with;
                there are no batches to take moments from; or the options include layer
                normalisation or zoneout, which cannot reproduce an LSTM.
        """
        conversion.check_source(lstm)
        weight = cast("Tensor", lstm.weight_hh_l0)  # no Parameter, if parametrised or pruned
        with conversion.keeping_random_state(weight.device):
            module = cls(
                lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bias, lstm.batch_first,
                lstm.dropout, lstm.bidirectional,
                device=weight.device, dtype=weight.dtype, **options,
            )  # fmt: skip
        conversion.copy_weights(lstm, module)
        if batches is not None:
            conversion.normalize_as_plain(module, batches)
        return module.train(lstm.training)

    def to_lstm(self) -> nn.LSTM:
        """Create a `torch.nn.LSTM` that computes what this module computes in evaluation.

        Raises:
            ValueError: no LSTM does: the cell is scaled or shifted, the population statistics
                differ between time steps or are missing, there is layer normalisation or zoneout,
                or the initial state is learned or noisy.
        """
        return conversion.folded(self)

    def __prepare_scriptable__(self) -> "BNLSTM":
        raise RuntimeError(
            "torch.jit.script cannot compile BNLSTM: use torch.export or, in evaluation, "
            "torch.jit.trace"
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: Tensor | Sequence[int] | None = None,
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
                keeps its state, and its outputs are zero. On a GPU they are clamped rather than
                checked, because a check would wait for the device.
            first_step: the time step of the first frame, for a long sequence that is processed in
                pieces. The population statistics are used, or updated, from this step on.

        Returns:
            output: (T, B, num_directions * H), (B, T, ...) if `batch_first`; packed if the input
                was.
            (h_n, c_n): shaped like hx, the states of all layers after their last step.

        An empty batch gives empty results, as in `torch.nn.LSTM`. Under autocast the recurrence
        runs in the dtype of the weights, and the results have the dtype of hx, or of the input if
        hx is None. Under autocast to bfloat16 on a CPU that has AVX512_BF16 or AMX, the matrix
        products round their factors to bfloat16; sums, statistics and states stay in float32.

        Raises:
            RuntimeError: shapes or devices do not match (with the messages of `torch.nn.LSTM`), or
                the module is evaluated before it was trained or calibrated.
            ValueError: the dtype, `lengths` or `first_step` is invalid, or per-step batch
                statistics are requested for a batch of one sequence.
            IndexError: an index of a one-hot vector is not in 0..D - 1; checked like `lengths`.
        """
        if isinstance(input, torch.fx.Proxy):
            raise TypeError(
                "torch.fx.symbolic_trace cannot look into BNLSTM: use torch.export, or a Tracer "
                "whose is_leaf_module leaves it whole"
            )
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise RuntimeError("hx must be a tuple of two tensors: (h_0, c_0)")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("a PackedSequence has its own lengths: leave out `lengths`")
            padded, lengths = pad_packed_sequence(input)
            checks.check_states(self, hx, padded.shape[1])
            output, state = self._run(padded, hx, lengths, first_step)
            # Not enforce_sorted=False: sequences of equal length could change places.
            order, back = input.sorted_indices, input.unsorted_indices
            if order is not None:
                output, lengths = output[:, order], lengths[order.to(lengths.device)]
            packed = pack_padded_sequence(output, lengths)
            return packed._replace(sorted_indices=order, unsorted_indices=back), state
        lengths = checks.as_lengths(lengths)
        batched = checks.is_batched(input, hx)
        input = input if input.is_floating_point() else input.long()
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        x = x.transpose(0, 1) if self.batch_first else x
        if hx is not None and not batched:
            hx = hx[0][:, None], hx[1][:, None]
        checks.check_states(self, hx, x.shape[1])
        output, (h_n, c_n) = self._run(x, hx, lengths, first_step)
        output = output.transpose(0, 1) if self.batch_first else output
        if batched:
            return output, (h_n, c_n)
        return output.squeeze(batch_dim), (h_n[:, 0], c_n[:, 0])

    def _run(
        self, x: Tensor, hx: State | None, lengths: Tensor | None, first_step: int
    ) -> tuple[Tensor, State]:
        """Run all layers over x (T, B, D) or (T, B)."""
        weight = self._weight
        in_autocast = _in_autocast(weight)
        checks.check_call(self, weight, x, hx, lengths, first_step, in_autocast)
        dtype = (x if hx is None else hx[0]).dtype
        if not dtype.is_floating_point:
            dtype = weight.dtype
        context, bfloat16 = contextlib.nullcontext(), False
        if in_autocast:
            bfloat16 = self._rounds_products()
            context = torch.autocast(weight.device.type, enabled=False)
            x = x.to(weight.dtype) if x.is_floating_point() else x
            hx = None if hx is None else (hx[0].to(weight.dtype), hx[1].to(weight.dtype))
        with context:
            if hx is None:
                self._warn_if_alike(x)
            h_0, c_0 = self._initial_state(x.shape[1]) if hx is None else hx
            if lengths is not None and not lengths.is_cpu:
                lengths = lengths.clamp(1, len(x))
            lengths = None if lengths is None else lengths.to(x.device, torch.long)
            output, h_n, c_n = self._run_layers(x, h_0, c_0, lengths, first_step, bfloat16)
        if in_autocast:
            return output.to(dtype), (h_n.to(dtype), c_n.to(dtype))
        return output, (h_n, c_n)

    def _rounds_products(self) -> bool:
        """Whether products round their factors to bfloat16 under the present autocast."""
        weight = self._weight
        return (
            weight.is_cpu and weight.dtype == torch.float32
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and kernels.rounds_products(self.options.kernel)
            and kernels.has_bfloat16()
        )  # fmt: skip

    def _run_layers(
        self, x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor | None, first_step: int,
        bfloat16: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = share.dropout(x, self.dropout, self.training)
            outputs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                state = layer * self.num_directions + direction
                y = _reverse(x, lengths) if direction == 1 else x
                output, h, c = self._run_direction(
                    y, h_0[state], c_0[state], suffix, lengths, first_step, bfloat16
                )
                outputs.append(_reverse(output, lengths) if direction == 1 else output)
                h_n.append(h)
                c_n.append(c)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        if len(h_n) == 1:  # a streamed text pays for each copy
            return x, h_n[0][None], c_n[0][None]
        return x, torch.stack(h_n), torch.stack(c_n)

    def _run_direction(
        self, x: Tensor, h_0: Tensor, c_0: Tensor, suffix: str, lengths: Tensor | None,
        first_step: int, bfloat16: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kinds, kernel = self.normalization, self.options.kernel
        population = self._population(suffix, first_step)
        if population is None:
            checks.check_batch(self, x.shape[1])
        draws = self.training and (self.options.is_noisy or self.options.weight_dropout > 0)
        key = kernels.new_key() if draws else None
        shape = (x.shape[0], x.shape[1], self.hidden_size)
        noise = draw(self.options, shape, key, x.device)
        weights = self._weights(suffix, key)
        if x.shape[1] == 0:  # an empty batch: nothing to normalise, and any kernel will do
            weights = Weights(*weights[:3], beta_c=weights.beta_c)
            kinds, kernel = Normalization("none", "none", "none"), "reference"
            population = None
        output, h, c, moments = kernels.recurrence(
            x, h_0, c_0, weights, kinds,
            population=population, lengths=lengths,
            count_padding=self.options.count_padding, noise=noise, bfloat16=bfloat16, kernel=kernel,
        )  # fmt: skip
        if population is None:
            self._average(suffix, moments, lengths, first_step)
        return output, h, c

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def _all_suffixes(self) -> list[tuple[int, str]]:
        return [(k, suffix) for k in range(self.num_layers) for suffix in self._suffixes(k)]

    @property
    def _weight(self) -> Tensor:
        # Not get_parameter: the weight may be parametrised, pruned or replaced by a tensor.
        return self.weight_hh_l0  # type: ignore[return-value]

    def _weights(self, suffix: str, key: Tensor | None = None) -> Weights:
        """The parameters of a layer and direction; with a key, after the dropout of weights."""
        # A streamed text pays for each getattr. Only replaced weights need it.
        found: dict[str, Any] = dict.fromkeys(Weights._fields)
        for name in self._weight_names:
            parameter = self._parameters.get(name + suffix)
            found[name] = getattr(self, name + suffix) if parameter is None else parameter
        found["weight_hh"] = drop_weights(found["weight_hh"], self.options.weight_dropout, key)
        return Weights(**found)

    def _population(self, suffix: str, first_step: int) -> TermMoments | None:
        """The population statistics to normalise by; None: use batch statistics."""
        present = self._present(suffix)
        if not present or any(statistics.uses_batch for statistics in present.values()):
            return None
        dtype = self._weight.dtype
        moments = {term: s.population(first_step, dtype) for term, s in present.items()}
        return TermMoments(**moments)

    def _average(
        self, suffix: str, moments: TermMoments, lengths: Tensor | None, first_step: int
    ) -> None:
        for term, statistics in self._present(suffix).items():
            term_moments = getattr(moments, term)
            if not statistics.averages or term_moments is None:
                continue
            counts, by_step = None, getattr(self.normalization, term) != "sequence"
            if by_step and lengths is not None and not self.options.count_padding:
                # A step with one live row has no variance, so it is not averaged.
                steps = torch.arange(len(term_moments.mean), device=lengths.device)
                live = (steps[:, None] < lengths).sum(1)
                counts = (synchronised.total(live) if self.options.synchronised else live) > 1
            if not self.options.synchronised:
                term_moments, counts = share.average(term_moments, counts)
            statistics.update(term_moments, counts, first_step if by_step else 0)

    def _all_statistics(self) -> list[StepStatistics]:
        return cast("list[StepStatistics]", list(self.statistics.values()))

    def _present(self, suffix: str) -> dict[str, StepStatistics]:
        modules = cast("dict[str, StepStatistics]", self.statistics._modules)
        return {
            term: modules[term + suffix] for term in TermMoments._fields if term + suffix in modules
        }

    def _initial_state(self, batch: int) -> State:
        part = share.current()
        batch = part.whole(batch)
        if self.options.learned_state:
            h_0 = self.initial_hidden[:, None].expand(-1, batch, -1)
            c_0 = self.initial_cell[:, None].expand(-1, batch, -1)
        else:
            states = (self.num_layers * self.num_directions, batch, self.hidden_size)
            h_0 = c_0 = self._weight.new_zeros(states)
        if self.options.init_noise > 0:
            h_0 = h_0 + self.options.init_noise * torch.randn_like(h_0)
        return part.of(h_0), part.of(c_0)

    def _warn_if_alike(self, x: Tensor) -> None:
        """Warn once if all sequences begin with the same state and the same frame."""
        if (
            self._seen_first_batch or not self.training or self.options.init_noise > 0
            or not self.needs_batch or x.shape[1] < 2 or torch.compiler.is_compiling()
        ):  # fmt: skip
            return
        alike = (x[0] == x[0, :1]).all()
        if not can_read(alike):
            return
        alike = bool(alike)
        # On devices other than the CPU, check only once: each check waits for the device.
        self._seen_first_batch = alike or x.device.type != "cpu"
        if alike:
            warnings.warn(
                "all sequences of this batch begin with the same frame, whose variance is 0: the "
                "gradient grows by gamma / sqrt(eps) for each such step; init_noise=0.1 prevents "
                "that",
                AlikeWarning,
                stacklevel=6,
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also accept the state of a `torch.nn.LSTM`: sum its two biases, keep the rest."""
        extra = tuple(prefix + name for name in ("statistics.", "gamma_", "beta_", "initial_"))
        weight = state_dict.get(prefix + "weight_ih_l0")
        if prefix + "bias_ih_l0" in state_dict or (
            not self.bias and weight is not None
            and not any(key.startswith(extra) for key in state_dict)
        ):  # fmt: skip
            for _, suffix in self._all_suffixes() if self.bias else ():
                both = [f"{prefix}bias_{term}{suffix}" for term in ("ih", "hh")]
                if all(name in state_dict for name in both):
                    first, second = (state_dict.pop(name) for name in both)
                    state_dict[f"{prefix}bias{suffix}"] = first + second
            for name, own in nn.Module.state_dict(self).items():
                if name.startswith(("weight", "bias")):
                    continue
                if isinstance(weight, Tensor):  # with assign=True, device and dtype are the state's
                    kind = weight.dtype if own.is_floating_point() else own.dtype
                    if own.is_meta:
                        own = torch.empty_like(own, device=weight.device, dtype=kind)
                        self._initial(name, own)
                    own = own.to(weight.device, kind)
                state_dict.setdefault(prefix + name, own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def qconfig(self) -> Any:
        """`torch.ao.quantization` sets this on every module before it converts some of them."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, config: Any) -> None:
        raise ValueError(
            "BNLSTM cannot be quantised: quantise the other modules one by one, or what to_lstm() "
            "returns"
        )

    def extra_repr(self) -> str:
        kinds = self.normalization
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"input_norm={kinds.ih}, recurrent_norm={kinds.hh}, cell_norm={kinds.c}"]
        for name, usual in (
            ("num_layers", 1), ("bias", True), ("batch_first", False), ("dropout", 0.0),
            ("bidirectional", False),
        ):  # fmt: skip
            if (value := getattr(self, name)) != usual:
                parts.append(f"{name}={value}")
        noise = ((f.name, getattr(self.options, f.name)) for f in fields(NoiseOptions))
        parts += [f"{name}={p}" for name, p in noise if p > 0]
        return ", ".join(parts)


spell_out_options(BNLSTM.__init__, LSTMOptions)
# Lets torch.load read a pickled module with weights_only=True, which executes no foreign code.
torch.serialization.add_safe_globals([BNLSTM, LSTMOptions, StepStatistics, nn.ModuleDict])


def _in_autocast(weight: Tensor) -> bool:
    kind = weight.device.type
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# See kernels/cpu.py. PyTorch 2.11 cannot trace the function.
_has_autocast._dynamo_marked_constant = True  # pyright: ignore


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse each sequence of x (T, B, ...), leaving padding in place."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[index, torch.arange(x.shape[1], device=x.device)]


__all__ = ["BNLSTM"]
