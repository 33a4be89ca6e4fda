"""Compare the compiled kernel with the reference: values, moments and all gradients."""

import itertools
import random

import pytest
import torch
from torch import nn

from bnrnn import BNLSTM
from bnrnn.kernels import (
    Moments,
    Noise,
    Normalization,
    Request,
    TermMoments,
    Weights,
    choose,
    reference,
)
from bnrnn.kernels import cpu as compiled
from tests.accuracy import assert_as_accurate, assert_rounded

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("built_kernel")]
FRAME = ("frame", "frame", "frame")
NONE = ("none", "none", "none")
SUM = ("none", "sum", "frame")
LAYER = ("layer", "layer", "layer")
BATCH_SLOTS = list(  # those of every kernel
    itertools.product(["none", "frame", "sequence"], ["none", "frame"], ["none", "frame"])
)
SLOTS = [
    *itertools.product(
        ["none", "frame", "sequence", "layer"], ["none", "frame", "layer"],
        ["none", "frame", "layer"],
    ),
    *(("none", "sum", c) for c in ("none", "frame", "layer")),
]  # fmt: skip
NOISES = ("held_cell", "held_hidden", "dropped_candidate", "dropped_hidden")


def problem(steps, batch, features, hidden, norms=FRAME, dtype=torch.float64, **options):
    """Arguments for `recurrence`, all of them leaves.

    The options are one_hot, constant_input, lengths, given, count_padding, bias, beta_c,
    sequence_eps, noise (True or names of masks) and expectation.
    """

    def draw(*shape, scale=1.0):
        values = scale * torch.randn(*shape, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    ih, hh, c = norms
    weights = Weights(
        weight_ih=draw(4 * hidden, features, scale=features**-0.5),
        weight_hh=draw(4 * hidden, hidden, scale=hidden**-0.5),
        bias=draw(4 * hidden) if options.get("bias", True) else None,
        gamma_ih=draw(4 * hidden) if ih != "none" else None,
        gamma_hh=draw(4 * hidden) if hh != "none" else None,
        gamma_c=draw(hidden) if c != "none" else None,
        beta_c=draw(hidden) if c != "none" or options.get("beta_c") else None,
    )
    if options.get("one_hot"):
        input = torch.randint(features, (steps, batch))
    else:
        input = draw(steps, batch, features)
        input.requires_grad_(not options.get("constant_input"))
    population = None
    if options.get("given"):

        def moments(kind, width):
            if kind in ("none", "layer"):
                return None
            rows = 1 if kind == "sequence" else max(1, steps - 2)
            variance = draw(rows, width).detach().square() + 0.5
            return Moments(draw(rows, width).detach(), variance)

        population = TermMoments(
            moments(ih, 4 * hidden), moments(hh, 4 * hidden), moments(c, hidden)
        )
        population = population if any(population) else None
    lengths = None
    if options.get("lengths"):
        # Keep at least two sequences at every step. A single one has no variance, and dividing by
        # the standard deviation would amplify rounding errors by 1 / sqrt(eps).
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[:2] = steps
    noise, masks = Noise(), options.get("noise") or ()
    if masks:
        noise = Noise(
            0.3, 0.1, 0.5, 0.25,
            **{
                name: torch.rand((batch, hidden) if k == 3 else (steps, batch, hidden)) < 0.3
                for k, name in enumerate(NOISES)
                if masks is True or name in masks
            },
        )  # fmt: skip
    elif options.get("expectation"):
        noise = Noise(0.3, 0.1, 0.5, 0.25)
    return {
        "input": input, "h_0": draw(batch, hidden), "c_0": draw(batch, hidden),
        "weights": weights, "population": population,
        "normalization": Normalization(*norms, sequence_eps=options.get("sequence_eps") or None),
        "lengths": lengths, "count_padding": bool(options.get("count_padding")), "noise": noise,
    }  # fmt: skip


def leaves(problem):
    tensors = (problem["input"], problem["h_0"], problem["c_0"], *problem["weights"])
    return [t for t in tensors if t is not None and t.requires_grad]


def run(recurrence, problem):
    """All results by name: values, moments and the gradient of each leaf."""
    output, h_n, c_n, moments = recurrence(**problem)
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    for term, of_term in moments._asdict().items():
        if of_term is not None:
            found |= {"mean_" + term: of_term.mean, "var_" + term: of_term.var}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum()
        for y in (output, h_n, c_n)
    )
    gradients = torch.autograd.grad(loss, leaves(problem))
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def assert_as_accurate_as_the_reference(problem, run=run):
    """Compare what `run(recurrence, problem)` finds with the kernel and with the reference.

    The reference gets one-hot inputs as vectors, so that each number is perturbed separately.
    """
    indices, dtype = problem["input"], problem["h_0"].dtype
    one_hot = not indices.is_floating_point()
    if one_hot:
        features = problem["weights"].weight_ih.shape[1]
        vectors = torch.nn.functional.one_hot(indices, features).to(dtype)
        problem = {**problem, "input": vectors}

    def compute(problem):
        return run(compiled.recurrence, {**problem, "input": indices} if one_hot else problem)

    assert_as_accurate(compute, lambda problem: run(reference.recurrence, problem), problem)


def random_case(seed, family=True):
    """A random problem. `family` adds what some kernels lack: the other slots, and noise."""
    chance = random.Random(seed)
    shape = [chance.randint(*limits) for limits in ((1, 12), (2, 40), (1, 9), (1, 40))]
    options = {
        name: chance.random() < 0.5
        for name in ("one_hot", "constant_input", "lengths", "given", "count_padding", "bias",
                     "beta_c", "sequence_eps")
    }  # fmt: skip
    if family:
        options["noise"] = [name for name in NOISES if chance.random() < 0.4]
        options["expectation"] = chance.random() < 0.5
    slots = chance.choice(SLOTS if family else BATCH_SLOTS)
    if slots[2] == "layer":  # with a single unit, the cell state would equal its mean
        shape[3] += 1
    return shape, slots, chance.choice([1, 2, 3]), options


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        # Two thirds of each run by default.
        pytest.param(k, dtype, marks=pytest.mark.slow if k % 3 == 0 else [])
        for dtype, numbers in ((torch.float64, range(60)), (torch.float32, range(60, 90)))
        for k in numbers
    ],
)
def test_random_problems(number, dtype, seed):
    shape, norms, threads, options = random_case(number + 1000 * seed)
    torch.set_num_threads(threads)
    assert_as_accurate_as_the_reference(problem(*shape, norms, dtype, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [3, 70, 133])
@pytest.mark.parametrize("norms", [FRAME, SUM, LAYER])
def test_a_single_sequence(dtype, hidden, norms):
    assert_as_accurate_as_the_reference(
        problem(6, 1, 5, hidden, norms, dtype, given=True, one_hot=True, noise=norms == LAYER)
    )


# Sizes larger than every block of the kernel: depth, columns, units, steps, groups of threads.
@pytest.mark.parametrize(
    ("shape", "one_hot"),
    [
        ((3, 130, 5, 300), False),
        ((70, 5, 300, 40), False),
        ((4, 33, 70, 261), True),
        ((4, 33, 300, 21), True),  # many symbols: W_x is laid out by symbol
    ],
)
@pytest.mark.parametrize(
    ("norms", "threads"),
    [
        (FRAME, 1), (("sequence", "frame", "none"), 3), (SUM, 3), (LAYER, 1),
        *(
            pytest.param(norms, threads, marks=pytest.mark.slow)
            for norms, threads in (
                (FRAME, 3), (("sequence", "frame", "none"), 1), (SUM, 1), (LAYER, 3)
            )
        ),
    ],
)  # fmt: skip
def test_large_problems(shape, one_hot, norms, threads):
    torch.set_num_threads(threads)
    assert_as_accurate_as_the_reference(
        problem(*shape, norms, one_hot=one_hot, noise=norms == LAYER)
    )


# The kernel computes the statistics and gradients of its term from those of the feature.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "norms",
    [
        FRAME, NONE, SUM, ("frame", "none", "frame"), ("none", "frame", "none"),
        ("layer", "frame", "frame"), ("frame", "layer", "layer"), LAYER, ("layer", "none", "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "options",
    [
        {}, {"given": True}, {"lengths": True}, {"lengths": True, "count_padding": True},
        {"lengths": True, "given": True, "bias": False}, {"noise": True},
    ],
)  # fmt: skip
def test_an_input_of_one_feature(dtype, norms, options):
    torch.set_num_threads(2)
    assert_as_accurate_as_the_reference(
        problem(7, 21, 1, 37, norms, dtype, constant_input=True, **options)
    )


def test_an_input_of_one_feature_with_a_lone_sequence():
    case = problem(7, 5, 1, 37, FRAME, constant_input=True)
    case["lengths"] = torch.tensor([7, 3, 2, 3, 1])
    assert_as_accurate_as_the_reference(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [2, 3, 4, 5, 7, 8, 9, 12, 17, 20, 24, 33, 36, 50])
def test_batches_that_do_not_fill_their_vectors(batch, dtype):
    torch.set_num_threads(1)
    for features, hidden, norms, options in (
        (5, 9, FRAME, {}), (50, 20, FRAME, {"one_hot": True}), (18, 33, LAYER, {}),
        (3, 36, ("sequence", "frame", "frame"), {}), (6, 50, SUM, {"lengths": True}),
    ):  # fmt: skip
        # Few sequences may have hardly a variance, which amplifies rounding errors; with lengths,
        # only two of a small batch may be left.
        options = options | {"given": batch < (16 if "lengths" in options else 4)}
        assert_as_accurate_as_the_reference(
            problem(4, batch, features, hidden, norms, dtype, **options)
        )


def test_a_sequence_that_is_not_finite_leaves_the_others_alone():
    for batch in (3, 7, 20, 24, 37):
        case = problem(5, batch, 6, 20, NONE, torch.float32)
        expected = run(compiled.recurrence, case)["output"]
        with torch.no_grad():
            case["input"][2, batch - 1] = torch.nan
        output = run(compiled.recurrence, case)["output"]
        assert torch.equal(output[:, :-1], expected[:, :-1])
        assert torch.equal(output[:2], expected[:2])
        assert output[2:, -1].isnan().any()


@pytest.mark.parametrize(
    "norms", [FRAME, ("sequence", "frame", "none"), ("none", "none", "frame"), NONE, SUM, LAYER]
)
@pytest.mark.parametrize(
    "options", [{}, {"one_hot": True}, {"constant_input": True, "noise": True}]
)
@pytest.mark.parametrize("features", [1, 2, 50])
def test_the_same_bits_for_any_number_of_threads(norms, options, features):
    case = problem(9, 37, features, 75, norms, torch.float32, lengths=True, **options)
    torch.set_num_threads(1)
    alone = run(compiled.recurrence, case)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        again = run(compiled.recurrence, case)
        for name in alone:
            assert torch.equal(alone[name], again[name]), (name, threads)


@pytest.mark.parametrize("features", [5, 16, 50, 70])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9])
def test_the_input_term_of_a_lone_sequence(steps, features):
    """A few steps and many have products of their own."""
    for norms, options in ((NONE, {}), (FRAME, {"given": True})):
        case = problem(steps, 1, features, 33, norms, **options)
        ours, truth = run(compiled.recurrence, case), run(reference.recurrence, case)
        for name, expected in truth.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-10, msg=name)
        single = problem(steps, 1, features, 33, norms, torch.float32, **options)
        torch.set_num_threads(1)
        alone = run(compiled.recurrence, single)
        torch.set_num_threads(3)
        again = run(compiled.recurrence, single)
        assert all(torch.equal(alone[name], again[name]) for name in alone)


@pytest.mark.parametrize("norms", [FRAME, SUM, LAYER])
def test_without_gradients_the_values_are_the_same_bits(norms):
    for options in (
        {}, {"lengths": True, "count_padding": True}, {"given": True}, {"noise": True},
    ):  # fmt: skip
        for steps in (1, 6, 7):
            case = problem(steps, 9, 3, 20, norms, **options)
            kept = compiled.recurrence(**case)
            with torch.no_grad():
                light = compiled.recurrence(**case)
            for ours, theirs in zip(light[:3], kept[:3], strict=True):
                assert torch.equal(ours, theirs)
                assert not ours.requires_grad


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_loss_on_one_of_the_results_only(used):
    case = problem(4, 5, 3, 6)
    ours, theirs = (
        torch.autograd.grad(recurrence(**case)[used].square().sum(), leaves(case))
        for recurrence in (compiled.recurrence, reference.recurrence)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_graph_that_is_kept_gives_the_same_gradients_twice():
    case = problem(4, 5, 3, 6)
    loss = compiled.recurrence(**case)[0].square().sum()
    first = torch.autograd.grad(loss, leaves(case), retain_graph=True)
    second = torch.autograd.grad(loss, leaves(case))
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves(case))


@pytest.mark.parametrize("norms", [NONE, FRAME, ("sequence", "none", "frame"), SUM])
@pytest.mark.parametrize(
    "options", [{}, {"lengths": True}, {"given": True, "noise": True}, {"one_hot": True}]
)
def test_differentiated_twice(norms, options):
    """Differentiate a penalty on the norm of one gradient with respect to all parameters."""
    case = problem(4, 5, 3, 6, norms, **options)

    def penalty(recurrence):
        output, h_n, _, _ = recurrence(**case)
        loss = output.square().sum() + h_n.sum()
        (gradient,) = torch.autograd.grad(loss, case["h_0"], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves(case))

    for ours, theirs in zip(
        penalty(compiled.recurrence), penalty(reference.recurrence), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "norms", [FRAME, *(pytest.param(norms, marks=pytest.mark.slow) for norms in (SUM, LAYER))]
)
def test_gradgradcheck(norms):
    case = problem(2, 4, 3, 2, norms, noise=norms == LAYER)
    present = [k for k, v in case["weights"]._asdict().items() if v is not None]

    def outputs(*tensors):
        input, h_0, c_0, *rest = tensors
        weights = Weights(**dict(zip(present, rest, strict=True)))
        given = {**case, "input": input, "h_0": h_0, "c_0": c_0, "weights": weights}
        return compiled.recurrence(**given)[:3]

    assert torch.autograd.gradgradcheck(outputs, leaves(case))


def test_what_the_user_does_to_the_results_does_not_change_the_gradients():
    case = problem(4, 5, 3, 6)
    expected = torch.autograd.grad(compiled.recurrence(**case)[0].square().sum(), leaves(case))
    output, h_n, c_n, _ = compiled.recurrence(**case)
    loss = output.square().sum()
    with torch.no_grad():
        h_n.zero_()
        c_n.zero_()
    for ours, theirs in zip(torch.autograd.grad(loss, leaves(case)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range(index):
    lstm = BNLSTM(3, 4)
    indices = torch.tensor([[0, 1]] * 5)
    indices[2, 1] = index
    with pytest.raises(IndexError, match=r"one-hot indices must be in 0\.\.2"):
        lstm(indices)


def test_what_is_not_finite_shows():
    for norms in (FRAME, ("none", "none", "none"), SUM):
        case = problem(4, 5, 3, 6, norms, torch.float32)
        with torch.no_grad():
            case["input"][1, 2, 0] = torch.nan
            output = compiled.recurrence(**case)[0]
        assert output[0].isfinite().all()
        assert output[1, 2].isnan().all()


def test_saturated_gates_are_exact():
    """The arguments are far beyond the overflow of exp."""
    case = problem(1, 2, 1, 2, ("none", "none", "none"), torch.float32)
    weights = case["weights"]
    with torch.no_grad():
        for tensor in (weights.weight_ih, weights.weight_hh):
            tensor.zero_()
        # i is open, f closed, tanh(g) = 1 and o open, so c = 1 and h = tanh(1).
        weights.bias.copy_(torch.tensor([1e4, 1e4, -1e4, -1e4, 1e4, 1e4, 1e4, 1e4]))
        output, _, c_n, _ = compiled.recurrence(**case)
    assert torch.equal(c_n, torch.ones(2, 2))
    assert_rounded(output[0], torch.ones(2, 2, dtype=torch.float64).tanh(), operations=4)


def test_statistics_are_updated_the_same():
    lengths = torch.tensor([6, 5, 5, 4, 3, 2, 2, 1])

    def statistics_and_evaluation(problem, kernel):
        x = problem["x"]
        module = BNLSTM(3, 5, bidirectional=True, kernel=kernel, dtype=x.dtype)
        module.load_state_dict(problem["weights"], strict=False)
        for _ in range(3):
            module(x, lengths=lengths)
        found = {name: v for name, v in module.named_buffers() if v.is_floating_point()}
        assert len(found) == 2 * 3 * 2
        return found | {"evaluation": module.eval()(problem["longer"])[0]}

    assert_as_accurate(
        lambda problem: statistics_and_evaluation(problem, "cpu"),
        lambda problem: statistics_and_evaluation(problem, "reference"),
        {
            "weights": dict(BNLSTM(3, 5, bidirectional=True).named_parameters()),
            "x": torch.randn(6, 8, 3),
            "longer": torch.randn(9, 2, 3),
        },
    )


def test_from_32_plain_sequences_on_it_replaces_torchs_code_where_it_is_faster():
    none = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")

    def results(module, problem):
        x = problem["x"].clone().requires_grad_()
        module = module.to(x.dtype)
        module.load_state_dict(problem["weights"])
        output, (h_n, c_n) = module(x)
        (output * problem["gradient"]).sum().backward()
        gradients = [p.grad for name, p in module.named_parameters() if "bias_hh" not in name]
        return [output, h_n, c_n, x.grad, *gradients]

    problem = {
        "weights": nn.LSTM(5, 20).state_dict(),
        "x": torch.randn(9, 32, 5),
        "gradient": torch.randn(9, 32, 20),
    }
    module = BNLSTM(5, 20, **none)
    faster = "cpu" if torch.ops.bnrnn_cpu.lanes(False) == 16 else "torch.lstm"
    assert module.active_kernel(batch=32) == faster
    assert module.active_kernel(batch=31) == "torch.lstm"
    with torch.profiler.profile(acc_events=True) as profile:  # else PyTorch 2.11 warns
        module(problem["x"])
    ran = {event.key for event in profile.key_averages()}
    assert ("bnrnn_cpu::forward" in ran) == (faster == "cpu") == ("aten::lstm" not in ran)
    assert_as_accurate(
        lambda problem: results(BNLSTM(5, 20, **none), problem),
        lambda problem: results(nn.LSTM(5, 20), problem),
        problem,
    )


def test_which_kernel_serves():
    def request(device="cpu", dtype=torch.float32, norms=FRAME, **rest):
        return Request(device, dtype, Normalization(*norms), **rest)

    assert choose("auto", request()) == "cpu"
    assert choose("auto", request(dtype=torch.float64)) == "cpu"
    assert choose("auto", request(dtype=torch.bfloat16)) == "reference"
    assert choose("auto", request("meta")) == "reference"
    assert choose("auto", request(norms=NONE)) == "torch.lstm"
    assert choose("auto", request("cuda", norms=NONE, batch=64)) == "torch.lstm"
    assert choose("auto", request(dtype=torch.float64, norms=NONE, batch=64)) == "torch.lstm"
    assert choose("torch.lstm", request(norms=NONE, batch=64)) == "torch.lstm"
    assert choose("auto", request(norms=NONE, padded=True)) == "cpu"
    assert choose("auto", request("xpu", norms=NONE, padded=True)) == "torch.lstm packed"
    assert choose("auto", request("meta", norms=NONE, padded=True)) == "reference"
    assert choose("auto", request(norms=NONE, cell_bias=True)) == "cpu"
    assert choose("reference", request(norms=NONE)) == "reference"
    for kernel, refused, reason in (
        ("cpu", request(dtype=torch.bfloat16), "it is for float32 and float64 on the CPU"),
        ("torch.lstm", request(), "it normalises nothing"),
        ("torch.lstm packed", request(norms=NONE, cell_bias=True), "it normalises nothing"),
        ("torch.lstm", request(norms=NONE, padded=True), "it does not support padding"),
        ("gpu", request(), "kernel must be one of auto, scan, torch.lstm"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose(kernel, refused)
    assert BNLSTM(3, 4).active_kernel() == "cpu"
    none = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")
    assert BNLSTM(3, 4, **none).active_kernel() == "torch.lstm"
    assert BNLSTM(3, 4, **none).active_kernel(padded=True) == "cpu"
    assert BNLSTM(3, 4, **none).bfloat16().active_kernel(padded=True) == "torch.lstm packed"
    assert BNLSTM(3, 4, **none, kernel="reference").active_kernel() == "reference"
