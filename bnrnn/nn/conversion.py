"""Conversion between `torch.nn.LSTM` and `BNLSTM`, with equal outputs in evaluation.

A normalised term is γ (y - mean) / sqrt(var + ε). If all time steps have the same population
statistics, this is one affine map of y. It is the identity if γ = sqrt(var + ε) and the mean is
added to b (or β_c). In the other direction, the map can be folded into the weights.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bnrnn.kernels import Moments, Weights, reference
from bnrnn.kernels.reference import live_rows
from bnrnn.nn import checks


def check_source(lstm: nn.LSTM) -> None:
    """
    Raises:
        TypeError: `lstm` is not a `torch.nn.LSTM`.
        ValueError: it has projections.
    """
    if not isinstance(lstm, nn.LSTM):
        raise TypeError(f"lstm must be a torch.nn.LSTM, got {type(lstm).__name__}")
    if lstm.proj_size != 0:
        raise ValueError("an LSTM with proj_size cannot be converted: only one without projections")


def keeping_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context for initial weights that are overwritten: it draws no random numbers."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@torch.no_grad()
def copy_weights(lstm: nn.LSTM, module: Any) -> None:
    """Copy the weights and the sum of the biases to a `BNLSTM`; what is frozen stays frozen.

    The weights of `lstm` may be parametrised or pruned: their present values are copied.
    """
    for _, suffix in module._all_suffixes():
        sources = {name: [getattr(lstm, name + suffix)] for name in ("weight_ih", "weight_hh")}
        if lstm.bias:
            sources["bias"] = [getattr(lstm, f"bias_{term}{suffix}") for term in ("ih", "hh")]
        for name, tensors in sources.items():
            parameter = module.get_parameter(name + suffix)
            parameter.copy_(torch.stack(tensors).sum(0))
            parameter.requires_grad_(any(tensor.requires_grad for tensor in tensors))


@torch.no_grad()
def normalize_as_plain(module: Any, batches: Iterable[Any]) -> None:
    """Set γ, b, β_c and the statistics of a `BNLSTM` so that in evaluation it computes what its
    weights compute without normalisation.

    Raises:
        TypeError, ValueError: see `BNLSTM.from_lstm`.
    """
    checks.check_batches(batches)
    _check_kind(module)
    if module.normalization.is_empty:
        return
    if not module.bias:
        raise ValueError("a module without biases cannot compensate for the means: use bias=True")
    found = {name: _Pooled() for name in module.statistics}

    def observe(
        x: Tensor, h_0: Tensor, c_0: Tensor, suffix: str, lengths: Tensor | None, first_step: int,
        bfloat16: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        weights, sums = module._weights(suffix), module.normalization.sums
        output, h_n, c_n, terms = _plain_terms(x, h_0, c_0, weights, lengths, sums)
        for term, rows in terms.items():
            if term + suffix in found:
                found[term + suffix].add(rows)
        return output, h_n, c_n

    module.eval()
    module._run_direction = observe
    try:
        for batch in batches:
            as_it_is = isinstance(batch, Tensor | PackedSequence)
            module(batch) if as_it_is else module(*batch)
    finally:
        del module._run_direction
    if not all(pooled.n for pooled in found.values()):
        raise ValueError("from_lstm needs at least one batch with sequences to take moments from")
    for name, pooled in found.items():
        term, _, place = name.partition("_")
        gamma = getattr(module, f"gamma_{name}")
        moments = pooled.moments(gamma)
        gamma.copy_(torch.sqrt(moments.var[0] + module.normalization.eps_of(term)))
        shift = getattr(module, f"beta_c_{place}" if term == "c" else f"bias_{place}")
        shift.add_(moments.mean[0])
        module.statistics[name].set(moments, pooled.batches)


def _plain_terms(
    x: Tensor, h: Tensor, c: Tensor, weights: Weights, lengths: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Run the recurrence without normalisation.

    Returns:
        output, h_n, c_n, and the rows (n, features), without padding, of the three terms at all
        steps: W_x x_t; W_h h_{t-1}, or its sum with W_x x_t if `sums`; c_t.
    """
    steps, batch = x.shape[:2]
    live = torch.ones(steps, batch, 1, dtype=torch.bool, device=x.device)
    if lengths is not None:
        live = live_rows(lengths, steps)
    input_term = reference.input_term(x, weights.weight_ih)
    bias = torch.zeros_like(input_term[0, 0]) if weights.bias is None else weights.bias
    output, rows = [], {"ih": [], "hh": [], "c": []}
    for t in range(steps):
        recurrent_term = h @ weights.weight_hh.t()
        total = input_term[t] + recurrent_term
        i, f, g, o = (total + bias).chunk(4, dim=1)
        c = torch.where(live[t], torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g), c)
        h = torch.where(live[t], torch.sigmoid(o) * torch.tanh(c), h)
        output.append(torch.where(live[t], h, 0.0))
        of_hh = total if sums else recurrent_term
        for term, values in (("ih", input_term[t]), ("hh", of_hh), ("c", c)):
            rows[term].append(values[live[t, :, 0]])
    return torch.stack(output), h, c, {term: torch.cat(found) for term, found in rows.items()}


@torch.no_grad()
def folded(module: Any) -> nn.LSTM:
    """See `BNLSTM.to_lstm`."""
    _check_kind(module)
    if module.options.learned_state or module.options.init_noise > 0:
        raise ValueError("torch.nn.LSTM starts from zeros: no learned_state, no init_noise")
    weight = module.weight_hh_l0
    with keeping_random_state(weight.device):
        lstm = nn.LSTM(
            module.input_size, module.hidden_size, module.num_layers,
            bias=module.bias or not module.normalization.is_empty, batch_first=module.batch_first,
            dropout=module.dropout, bidirectional=module.bidirectional,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
    for name, parameter in lstm.named_parameters():
        place = name.split("_", 2)[2]
        if name.startswith("bias"):
            parameter.zero_()
            if module.bias:
                bias = getattr(module, f"bias_{place}")
                parameter.requires_grad_(bias.requires_grad)
                parameter.add_(bias if name.startswith("bias_ih") else 0)
    for name, parameter in lstm.named_parameters():
        kind, term, place = name.split("_", 2)
        if kind != "weight":
            continue
        scale, shift = _affine(module, term, place)
        if term == "ih" and module.normalization.sums:
            scale, _ = _affine(module, "hh", place)  # the shift is added once, for "hh"
        weight = getattr(module, name)
        parameter.copy_(weight * scale[:, None]).requires_grad_(weight.requires_grad)
        if lstm.bias:
            getattr(lstm, f"bias_ih_{place}").add_(shift)
        if term == "hh":
            _check_cell(module, place)
    return lstm.train(module.training)


def _check_kind(module: Any) -> None:
    """
    Raises:
        ValueError: no LSTM computes what the module computes in evaluation.
    """
    if module.normalization.has_layer:
        raise ValueError(
            "layer normalisation divides by each sequence's own deviation, which torch.nn.LSTM "
            "cannot do"
        )
    if module.options.zoneout_cell > 0 or module.options.zoneout_hidden > 0:
        raise ValueError("zoneout keeps a part of the last state, which torch.nn.LSTM cannot do")


def _affine(module: Any, term: str, place: str) -> tuple[Tensor, Tensor]:
    """The scale and the shift that normalisation applies to a term; (features,) each.

    Raises:
        ValueError: they differ between time steps, or there are no statistics yet.
    """
    name = f"{term}_{place}"
    if name not in module.statistics:
        like = module.weight_hh_l0
        features = like.shape[1] if term == "c" else like.shape[0]
        return like.new_ones(features), like.new_zeros(features)
    try:
        mean, var = module.statistics[name].population()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if any(not torch.equal(rows, rows[:1].expand_as(rows)) for rows in (mean, var)):
        raise ValueError(
            f"statistics.{name} differ between time steps, and torch.nn.LSTM is the same at all of "
            "them: only a module from BNLSTM.from_lstm, or with max_length=1, can be converted"
        )
    scale = getattr(module, f"gamma_{name}") * torch.rsqrt(
        var[0] + module.normalization.eps_of(term)
    )
    return scale, -mean[0] * scale


def _check_cell(module: Any, place: str) -> None:
    """
    Raises:
        ValueError: the cell state is scaled or shifted before its tanh; no LSTM does that.
    """
    scale, shift = _affine(module, "c", place)
    if (beta := getattr(module, f"beta_c_{place}", None)) is not None:
        shift = shift + beta
    rounding = 8 * torch.finfo(scale.dtype).eps
    largest = max(1.0, 0.0 if beta is None else float(beta.abs().max()))
    if float((scale - 1).abs().max()) > rounding or float(shift.abs().max()) > rounding * largest:
        raise ValueError(
            f"the cell state of layer {place.removeprefix('l')} is normalised to another scale, "
            "which torch.nn.LSTM cannot do"
        )


class _Pooled:
    """Mean and variance over the rows of several batches, in float64."""

    def __init__(self) -> None:
        self.batches = self.n = 0
        self.mean: Any = 0.0
        self.square: Any = 0.0

    def add(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        rows, self.batches = rows.double(), self.batches + 1
        mean, n = rows.mean(0), self.n + len(rows)
        off = mean - self.mean
        self.square = (
            self.square + (rows - mean).square().sum(0) + off.square() * (self.n * len(rows) / n)
        )
        self.mean, self.n = self.mean + off * (len(rows) / n), n

    def moments(self, like: Tensor) -> Moments:
        """(1, features) each, with the dtype and device of `like`."""
        return Moments(self.mean[None].to(like), (self.square / self.n)[None].to(like))
