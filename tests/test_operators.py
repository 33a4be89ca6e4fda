"""The C++ operators under PyTorch's autograd, compiler and `vmap`."""

import pytest
import torch
import torch._dynamo.testing

from bnrnn import kernels
from bnrnn.kernels import Normalization, Weights, operators
from bnrnn.kernels import cpu as compiled
from bnrnn.kernels.gradient import register
from tests.test_cpu_kernel import FRAME, LAYER, NONE, SUM, leaves, problem

OPTIONS = [
    {}, {"constant_input": True}, {"one_hot": True}, {"lengths": True}, {"given": True},
    {"lengths": True, "count_padding": True, "one_hot": True}, {"noise": True},
]  # fmt: skip
NORMS = [FRAME, NONE, ("sequence", "none", "frame"), SUM, LAYER]


@pytest.fixture(autouse=True)
def _built():
    operators.load()


def arguments(case):
    """The arguments of the operators for a case."""
    given = [t for moments in case["population"] or (None,) * 3 for t in moments or (None, None)]
    kinds = case["normalization"]
    return (
        case["input"], case["h_0"], case["c_0"], *case["weights"], *given, case["lengths"],
        *case["noise"].masks, case["count_padding"], kinds.ih, kinds.hh, kinds.c, kinds.eps,
        kinds.eps_ih, *case["noise"].rates, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "features", "norms", "options"),
    [
        # By default each value is tested once, in different combinations; lengths and indices are
        # tested together.
        pytest.param(
            dtype, features, norms, options,
            marks=[] if (i + 2 * j + 4 * k + m) % 12 == 0 and m not in (2, 3) else pytest.mark.slow,
        )
        for i, dtype in enumerate([torch.float32, torch.float64])
        for j, features in enumerate([3, 9])
        for k, norms in enumerate(NORMS)
        for m, options in enumerate(OPTIONS)
    ] + [(torch.float32, 1, NONE, {})],  # the term of one feature is kept
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # in PyTorch 2.14's opcheck
def test_opcheck(norms, options, features, dtype):
    case = problem(5, 7, features, 6, norms, dtype, **options)
    needs_input = case["input"].requires_grad
    torch.library.opcheck(
        torch.ops.bnrnn_cpu.forward.default, (*arguments(case), True, needs_input)
    )
    for tensor in leaves(case):
        tensor.requires_grad_(False)
    layer = arguments(case)
    torch.library.opcheck(torch.ops.bnrnn_cpu.forward.default, (*layer, False, False))
    output, h_n, _, moments, saved = torch.ops.bnrnn_cpu.forward(*layer, True, needs_input)
    by_batch, tensors = bool(moments), list(layer[:21])
    for i, term in enumerate(("ih", "hh", "c")):
        if moments and case["normalization"].takes_moments(term):
            tensors[10 + 2 * i : 12 + 2 * i] = moments[:2]
            del moments[:2]
    backward = (
        torch.randn_like(output), torch.randn_like(h_n), None, *tensors, *layer[21:],
        by_batch, *saved, needs_input, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bnrnn_cpu.backward.default, backward)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch's own compiler
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        # All backends compile the operators in the same way.
        pytest.param("inductor", {}, marks=pytest.mark.slow),
        ("aot_eager", {"lengths": True}),
        pytest.param("aot_eager", {"one_hot": True}, marks=pytest.mark.slow),
    ],
)
def test_compiled_at_any_length(backend, options):
    """There is one graph without breaks, and one compilation for all lengths."""

    def loss(input, h_0, c_0, lengths, *weights):
        output, h_n, c_n, _ = kernels.recurrence(
            input, h_0, c_0, Weights(*weights), Normalization(), lengths=lengths
        )
        return output.square().sum() + (h_n * c_n).sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    faster = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for steps, batch in ((5, 7), (9, 4), (12, 20)):
        case = problem(steps, batch, 9, 6, FRAME, **options)
        inputs = (case["input"], case["h_0"], case["c_0"], case["lengths"], *case["weights"])
        expected = loss(*inputs)
        found = faster(*inputs)
        torch.testing.assert_close(found, expected)
        wanted = leaves(case)
        for ours, theirs in zip(
            torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_batched_gradients():
    """Apply `vmap` to the backward pass, as `torch.autograd.functional.jacobian` does."""
    case = problem(4, 5, 3, 6)
    output = compiled.recurrence(**case)[0]
    directions = torch.randn(3, *output.shape, dtype=output.dtype)
    batched = torch.autograd.grad(
        output, leaves(case), directions, retain_graph=True, is_grads_batched=True
    )
    for i, direction in enumerate(directions):
        each = torch.autograd.grad(output, leaves(case), direction, retain_graph=True)
        for ours, theirs in zip(batched, each, strict=True):
            assert torch.equal(ours[i], theirs)


def test_gradients_are_contiguous():
    case = problem(4, 5, 9, 7, dtype=torch.float32)
    output, h_n, _, _ = compiled.recurrence(**case)
    for gradient in torch.autograd.grad(output.sum() + h_n.sum(), leaves(case)):
        assert gradient.is_contiguous()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("h_0", torch.zeros(5, 7), r"h_0 must be \[5, 6\], got \[5, 7\]"),
        ("c_0", torch.zeros(5, 6, dtype=torch.double), "c_0 must be Float, got Double"),
        ("lengths", torch.zeros(4, dtype=torch.long), r"lengths must be \(5,\)"),
        ("input", torch.zeros(4, 5, 2), r"input must be \[4, 5, 3\]"),
        ("input", torch.zeros(4, 5), r"input must be \(T, B, D\)"),
    ],
)
def test_what_does_not_fit_is_refused(name, wrong, message):
    case = problem(4, 5, 3, 6, dtype=torch.float32) | {name: wrong, "count_padding": True}
    with pytest.raises((ValueError, TypeError), match=message):
        compiled.recurrence(**case)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # in PyTorch 2.14's opcheck
def test_a_registered_gradient_of_tensors_and_lists():
    """Of x^2, [s x, x^3] and [], for which autograd knows the gradients."""

    def results(x, s):
        return x.square(), [s * x, x**3], []

    def save(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1][1])
        ctx.s = inputs[1]

    def backward(ctx, of_square, of_scaled, of_cube, *_):
        x, cube = ctx.saved_tensors
        return 2 * x * of_square + ctx.s * of_scaled + 3 * cube / x * of_cube, None, None, None

    with torch.library._scoped_library("bnrnn_test", "FRAGMENT") as library:
        library.define("powers(Tensor x, float s) -> (Tensor, Tensor[], Tensor[])")
        library.impl("powers", results, "CPU")
        library.impl("powers", results, "Meta")
        powers = torch.ops.bnrnn_test.powers.default
        register(powers, save, backward)
        x = torch.randn(5, requires_grad=True)
        square, (scaled, cube), empty = powers(x, 2.0)
        assert empty == []
        expected = x.square() * 3 + 2.0 * x + x**3
        torch.testing.assert_close(square * 3 + scaled + cube, expected)
        for of, kept in ((square * 3 + scaled + cube, expected), (cube, x**3)):
            (found,) = torch.autograd.grad(of.sum(), x, retain_graph=True)
            torch.testing.assert_close(found, torch.autograd.grad(kept.sum(), x)[0])
        with torch.no_grad():
            assert not powers(x, 2.0)[0].requires_grad
        torch.library.opcheck(powers, (x.detach().requires_grad_(), 2.0))
