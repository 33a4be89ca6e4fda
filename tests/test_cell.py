"""Compare the recurrence with the papers' equations: values and gradients."""

import functools
import itertools

import numpy as np
import pytest
import torch

from bnrnn import kernels
from bnrnn.kernels import Moments, Noise, Normalization, TermMoments, Weights
from tests.equations import bn_lstm
from tests.gpu import needs_gpu, on_gpu

pytestmark = pytest.mark.numeric
T, B, D, H = 7, 5, 3, 4
NONE, FRAME, LAYER = (("none",) * 3, ("frame",) * 3, ("layer",) * 3)
SLOTS = [
    *itertools.product(["none", "frame", "sequence"], ["none", "frame"], ["none", "frame"]),
    ("none", "sum", "none"),
    ("none", "sum", "frame"),
    ("layer", "layer", "layer"),
    ("frame", "layer", "none"),
    ("layer", "frame", "layer"),
    ("sequence", "none", "layer"),
    ("none", "sum", "layer"),
]
# The slots for which `test_gradients` checks the whole Jacobian by default.
WHOLE = [
    ("frame", "frame", "frame"), ("sequence", "frame", "frame"), ("none", "sum", "frame"),
    ("layer", "layer", "layer"),
]  # fmt: skip


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=needs_gpu)])
def recurrence(request):
    if request.param == "triton":
        return triton_recurrence
    return functools.partial(kernels.recurrence, kernel=request.param)


def triton_recurrence(x, h, c, weights, normalization, **kwargs):
    """Skip what the kernels refuse. In float64, `kernels.recurrence` would use the reference."""
    if normalization.sums or normalization.has_layer or "noise" in kwargs:
        pytest.skip("the Triton kernels do not take these")
    run = on_gpu(functools.partial(kernels.triton.recurrence, way="alternating"))
    return run(x, h, c, weights, normalization, **kwargs)


def make_weights(norms, bias=True, beta_c=False, hidden=H):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    ih, hh, c = norms
    return Weights(
        weight_ih=draw(4 * hidden, D),
        weight_hh=draw(4 * hidden, hidden),
        bias=draw(4 * hidden) if bias else None,
        gamma_ih=draw(4 * hidden) if ih != "none" else None,
        gamma_hh=draw(4 * hidden) if hh != "none" else None,
        gamma_c=draw(hidden) if c != "none" else None,
        beta_c=draw(hidden) if c != "none" or beta_c else None,
    )


def by_term(norms):
    return dict(zip(("ih", "hh", "c"), norms, strict=True))


def in_numpy(weights):
    return {k: v.numpy() for k, v in weights._asdict().items() if v is not None}


def inputs(steps=T, hidden=H):
    shapes = (steps, B, D), (B, hidden), (B, hidden)
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norms", SLOTS)
@pytest.mark.parametrize("padding", ["none", "left out", "counted"])
def test_values_and_moments_are_those_of_the_equations(recurrence, norms, padding):
    x, h, c = inputs()
    weights = make_weights(norms)
    lengths = None if padding == "none" else torch.tensor([T, 2, 4, T - 1, 1])
    counted = padding == "counted"
    output, h_n, c_n, moments = recurrence(
        x, h, c, weights, Normalization(*norms), lengths=lengths, count_padding=counted
    )
    expected = bn_lstm(
        x.numpy(), h.numpy(), c.numpy(), in_numpy(weights), by_term(norms),
        lengths=None if lengths is None else lengths.numpy(), count_padding=counted,
    )  # fmt: skip
    for ours, theirs in zip((output, h_n, c_n), expected[:3], strict=True):
        assert_same(ours, theirs)
    for term, kind in zip(("ih", "hh", "c"), norms, strict=True):
        if kind in ("none", "layer"):
            assert getattr(moments, term) is None
        else:
            assert_same(getattr(moments, term).mean, np.stack(expected[3][term][0]))
            assert_same(getattr(moments, term).var, np.stack(expected[3][term][1]))


@pytest.mark.parametrize("norms", SLOTS)
def test_given_statistics_are_used_and_the_last_row_beyond_them(recurrence, norms):
    x, h, c = inputs()
    weights = make_weights(norms)
    given = {}
    for term, kind, features in zip(("ih", "hh", "c"), norms, (4 * H, 4 * H, H), strict=True):
        if kind not in ("none", "layer"):
            rows = 1 if kind == "sequence" else 3  # fewer than T
            mean = torch.randn(rows, features, dtype=torch.float64)
            var = torch.rand(rows, features, dtype=torch.float64)
            given[term] = Moments(mean, var)
    output, h_n, c_n, _ = recurrence(
        x, h, c, weights, Normalization(*norms), population=TermMoments(**given) if given else None
    )
    expected = bn_lstm(
        x.numpy(), h.numpy(), c.numpy(), in_numpy(weights), by_term(norms),
        population={term: (m.mean.numpy(), m.var.numpy()) for term, m in given.items()},
    )  # fmt: skip
    for ours, theirs in zip((output, h_n, c_n), expected[:3], strict=True):
        assert_same(ours, theirs)


def make_noise(random):
    """All kinds of noise together: with masks if `random`, else with expectations."""
    p = {"zoneout_cell": 0.3, "zoneout_hidden": 0.1, "recurrent_dropout": 0.25,
         "hidden_dropout": 0.5}  # fmt: skip
    if not random:
        return Noise(**p)
    return Noise(
        **p,
        **{
            name: torch.rand(T, B, H) < 0.4
            for name in ("held_cell", "held_hidden", "dropped_candidate")
        },
        dropped_hidden=torch.rand(B, H) < 0.4,
    )


@pytest.mark.parametrize("norms", [NONE, FRAME, LAYER, ("none", "sum", "layer")])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_noise_is_that_of_the_equations(recurrence, norms, padded, random):
    x, h, c = inputs()
    weights, noise = make_weights(norms), make_noise(random)
    lengths = torch.tensor([T, 2, 4, T - 1, 1]) if padded else None
    ours = recurrence(x, h, c, weights, Normalization(*norms), lengths=lengths, noise=noise)
    expected = bn_lstm(
        x.numpy(), h.numpy(), c.numpy(), in_numpy(weights), by_term(norms),
        lengths=None if lengths is None else lengths.numpy(),
        noise={k: v.numpy() if isinstance(v, torch.Tensor) else v
               for k, v in vars(noise).items()},
    )  # fmt: skip
    for result, truth in zip(ours[:3], expected[:3], strict=True):
        assert_same(result, truth)


@pytest.mark.parametrize("norms", [("frame", "frame", "frame"), ("none", "sum", "frame")])
def test_one_hot_indices_are_one_hot_vectors(recurrence, norms):
    _, h, c = inputs()
    weights = make_weights(norms)
    indices = torch.randint(D, (T, B))
    vectors = torch.nn.functional.one_hot(indices, D).double()
    for ours, theirs in zip(
        recurrence(indices, h, c, weights, Normalization(*norms))[:3],
        recurrence(vectors, h, c, weights, Normalization(*norms))[:3],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_cell_bias_without_normalization_is_the_authors_baseline(recurrence):
    x, h, c = inputs()
    weights = make_weights(("none", "none", "none"), beta_c=True)
    norms = {"ih": "none", "hh": "none", "c": "none"}
    ours = recurrence(x, h, c, weights, Normalization("none", "none", "none"))
    expected = bn_lstm(x.numpy(), h.numpy(), c.numpy(), in_numpy(weights), norms)
    assert_same(ours[0], expected[0])


def halving_cells(recurrence):
    """With zero weights all gates are 1/2, and c halves at each step of a running sequence."""
    zero = torch.zeros(4, 1, dtype=torch.float64)
    weights = Weights(zero, zero, gamma_c=zero[0] + 1, beta_c=zero[0])
    c = torch.tensor([[8.0], [4.0], [-4.0]], dtype=torch.float64, requires_grad=True)
    # c is (8, 4, -4), then (4, 2, -2), then (2, 2, -1), because the second sequence has ended.
    output, h_n, c_n, moments = recurrence(
        c.new_zeros(2, 3, 1), c.new_zeros(3, 1), c, weights,
        Normalization("none", "none", "frame", eps=1e-30),  # ε is negligible
        lengths=torch.tensor([2, 1, 2]), count_padding=True,
    )  # fmt: skip
    return c, output, h_n, c_n, moments.c


def test_a_finished_sequence_counts_with_the_cell_it_ended_in(recurrence):
    _, output, h_n, c_n, (mean, var) = halving_cells(recurrence)
    assert c_n.flatten().tolist() == [2, 2, -1]
    assert_same(mean, [[4 / 3], [1]])
    assert_same(var, [[56 / 9], [2]])
    first = np.tanh(np.array([8, 2, -10]) / np.sqrt(56)) / 2
    second = np.tanh(np.array([1, 1, -2]) / np.sqrt(2)) / 2
    assert_same(output[:, :, 0].detach(), [first, [second[0], 0, second[2]]])
    assert_same(h_n[:, 0].detach(), [second[0], first[1], second[2]])


def test_the_cell_of_a_finished_sequence_has_a_gradient_through_the_statistics(recurrence):
    c, output, *_ = halving_cells(recurrence)
    (gradient,) = torch.autograd.grad(output[1, 0, 0], c)
    # h = tanh(y_0) / 2, where y = (c - mean) / std = (1, 1, -2) / sqrt(2) over three sequences.
    # dy_0 / dc_k = ((k = 0) - 1/3 - y_0 y_k / 3) / std, and c_k was halved twice or once.
    of_y = (1 - np.tanh(1 / np.sqrt(2)) ** 2) / 2
    of_c = np.array([1 - 1 / 3 - 1 / 6, -1 / 3 - 1 / 6, -1 / 3 + 1 / 3]) / np.sqrt(2)
    assert_same(gradient[:, 0], of_y * of_c * [1 / 4, 1 / 2, 1 / 4])


@pytest.mark.parametrize("ih", ["frame", "sequence"])
@pytest.mark.parametrize("given", [False, True])
def test_sequence_wise_statistics_have_an_eps_of_their_own(recurrence, ih, given):
    x, h, c = inputs()
    norms = (ih, "frame", "frame")
    weights = make_weights(norms)
    population = None
    if given:
        rows = torch.full((1, 4 * H), 0.5, dtype=torch.float64)
        population = TermMoments(*(Moments(rows[:, :n], rows[:, :n]) for n in (4 * H, 4 * H, H)))
    kinds = Normalization(*norms, eps=0.01, sequence_eps=2.0)
    output, *_ = recurrence(x, h, c, weights, kinds, population=population)
    expected, *_ = bn_lstm(
        x.numpy(), h.numpy(), c.numpy(), in_numpy(weights), by_term(norms), eps=0.01,
        sequence_eps=2.0,
        population=None if population is None else {
            term: (m.mean.numpy(), m.var.numpy()) for term, m in population._asdict().items()
        },
    )  # fmt: skip
    assert_same(output, expected)


@pytest.mark.numeric(repeat=False)  # errors of finite differences are far above rounding
@pytest.mark.parametrize(
    ("norms", "padding", "whole"),
    [
        # Some take seconds. By default, each slot has one kind of padding; those in WHOLE check the
        # whole Jacobian, the others products of it with vectors.
        pytest.param(
            norms, padding, whole,
            marks=[] if (i + j) % 3 == 0 and whole == (norms in WHOLE) else pytest.mark.slow,
        )
        for i, norms in enumerate(SLOTS)
        for j, padding in enumerate(["none", "left out", "counted"])
        for whole in (False, True)
    ],
    ids=str,
)  # fmt: skip
def test_gradients(recurrence, norms, padding, whole):
    x, h, c = inputs(steps=3, hidden=2)  # small: gradcheck perturbs each number
    lengths = None if padding == "none" else torch.tensor([3, 2, 3, 2, 1])
    counted = padding == "counted"
    weights = make_weights(norms, hidden=2)
    present = {k: v for k, v in weights._asdict().items() if v is not None}

    def run(x, h, c, *parameters):
        named = Weights(**dict(zip(present, parameters, strict=True)))
        kinds = Normalization(*norms)
        return recurrence(x, h, c, named, kinds, lengths=lengths, count_padding=counted)[:3]

    leaves = [v.requires_grad_() for v in (x, h, c, *present.values())]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6, rtol=1e-4, fast_mode=not whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(recurrence, dtype):
    x, h, c = (v.to(dtype) for v in inputs())
    weights = Weights(*(v.to(dtype) for v in make_weights(("frame", "frame", "frame"))))
    output, _, _, moments = recurrence(x, h, c, weights, Normalization())
    assert output.dtype == dtype
    assert moments.hh.mean.dtype == dtype


@pytest.mark.parametrize(
    "norms",
    [("frame", "frame", "frame"), ("sequence", "frame", "frame"), ("none", "sum", "frame")],
)
def test_padding_content_never_matters_where_padding_is_not_counted(recurrence, norms):
    x, h, c = inputs()
    weights = make_weights(norms)
    lengths = torch.tensor([T, 2, 4, T - 1, 1])
    weights.weight_hh.requires_grad_()
    results = []
    for content in (0.0, 1e6, float("nan")):
        other = x.clone()
        for b, length in enumerate(lengths):
            other[length:, b] = content
        output = recurrence(other, h, c, weights, Normalization(*norms), lengths=lengths)
        (gradient,) = torch.autograd.grad(output[0].sum(), weights.weight_hh)
        results.append((*output[:3], gradient))
    for zeros, millions, nans in zip(*results, strict=True):
        assert torch.equal(zeros, millions)
        assert torch.equal(zeros, nans)


def test_padding_steps_at_the_end_change_nothing(recurrence):
    x, h, c = inputs()
    weights = make_weights(("frame", "frame", "frame"))
    lengths = torch.tensor([4, 2, 4, 3, 1])
    short = recurrence(x[:4], h, c, weights, Normalization(), lengths=lengths)
    long = recurrence(x, h, c, weights, Normalization(), lengths=lengths)
    assert torch.equal(long[0][:4], short[0])
    assert not long[0][4:].any()
    assert torch.equal(long[1], short[1])
