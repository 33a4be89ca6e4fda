"""The compiled kernel against the reference: values, moments, every gradient, and its build."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from bnrnn import BNLSTM
from bnrnn.kernels import (
    BuildError,
    Moments,
    Normalization,
    TermMoments,
    Weights,
    build,
    choose,
    reference,
)
from bnrnn.kernels import cpu as compiled

FRAME = ("frame", "frame", "frame")
SLOTS = list(itertools.product(["none", "frame", "sequence"], ["none", "frame"], ["none", "frame"]))


@pytest.fixture(autouse=True)
def _built_and_threads_as_before():
    build.load()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def problem(steps, batch, features, hidden, norms=FRAME, dtype=torch.float64, seed=0, **options):
    """The arguments of `recurrence`, all leaves; options: one_hot, constant_input, lengths, given,
    count_padding, bias, beta_c, sequence_eps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
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
        input = torch.randint(features, (steps, batch), generator=generator)
    else:
        input = draw(steps, batch, features)
        input.requires_grad_(not options.get("constant_input"))
    population = None
    if options.get("given"):

        def moments(kind, width):
            if kind == "none":
                return None
            rows = 1 if kind == "sequence" else max(1, steps - 2)
            variance = draw(rows, width).detach().square() + 0.5
            return Moments(draw(rows, width).detach(), variance)

        population = TermMoments(
            moments(ih, 4 * hidden), moments(hh, 4 * hidden), moments(c, hidden)
        )
    lengths = None
    if options.get("lengths"):
        # At least two sequences at every step: one alone has no variance, and with none to
        # speak of rounding errors are multiplied by 1 / sqrt(eps).
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
        lengths[:2] = steps
    return {
        "input": input, "h_0": draw(batch, hidden), "c_0": draw(batch, hidden),
        "weights": weights, "population": population,
        "normalization": Normalization(*norms, sequence_eps=options.get("sequence_eps") or None),
        "lengths": lengths, "count_padding": bool(options.get("count_padding")),
    }  # fmt: skip


def leaves(problem):
    tensors = (problem["input"], problem["h_0"], problem["c_0"], *problem["weights"])
    return [t for t in tensors if t is not None and t.requires_grad]


def run(recurrence, problem):
    """Everything that comes out, by name: values, moments and the gradient of each leaf."""
    output, h_n, c_n, moments = recurrence(**problem)
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    for term, of_term in moments._asdict().items():
        if of_term is not None:
            found |= {"mean_" + term: of_term.mean, "var_" + term: of_term.var}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum()
        for y in (output, h_n, c_n)
    )
    gradients = torch.autograd.grad(loss, leaves(problem))
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def distances(ours, truth):
    """By name, the largest difference, relative where the values are large."""
    assert ours.keys() == truth.keys()
    return {
        name: ((ours[name] - truth[name]).abs().max() / (1 + truth[name].abs().max())).item()
        for name in truth
    }


def assert_equal_to_the_reference(problem):
    ours, theirs = run(compiled.recurrence, problem), run(reference.recurrence, problem)
    for name, off in distances(ours, theirs).items():
        assert off < 1e-10, (name, off)


def in_double(problem):
    def double(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, (Weights, TermMoments, Moments)):
            return type(value)(*map(double, value))
        return value

    return {name: double(value) for name, value in problem.items()}


def random_case(seed):
    chance = random.Random(seed)
    shape = [chance.randint(*limits) for limits in ((1, 12), (2, 40), (1, 9), (1, 40))]
    options = {
        name: chance.random() < 0.5
        for name in ("one_hot", "constant_input", "lengths", "given", "count_padding", "bias",
                     "beta_c", "sequence_eps")
    }  # fmt: skip
    return shape, chance.choice(SLOTS), chance.choice([1, 2, 3]), options


@pytest.mark.parametrize("seed", range(60))
def test_random_problems_in_double_precision(seed):
    shape, norms, threads, options = random_case(seed)
    torch.set_num_threads(threads)
    assert_equal_to_the_reference(problem(*shape, norms, seed=seed, **options))


@pytest.mark.parametrize("seed", range(60, 90))
def test_random_problems_in_single_precision(seed):
    shape, norms, threads, options = random_case(seed)
    torch.set_num_threads(threads)
    case = problem(*shape, norms, torch.float32, seed, **options)
    truth = run(reference.recurrence, in_double(case))
    ours = distances(run(compiled.recurrence, case), truth)
    theirs = distances(run(reference.recurrence, case), truth)
    for name in truth:
        # A variance near zero multiplies rounding errors, whoever makes them.
        assert ours[name] < 1e-5 + 3 * theirs[name], (name, ours[name], theirs[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [3, 70, 133])
def test_a_single_sequence(dtype, hidden):
    case = problem(6, 1, 5, hidden, dtype=dtype, given=True, one_hot=True)
    truth = run(reference.recurrence, in_double(case))
    for name, off in distances(run(compiled.recurrence, case), truth).items():
        assert off < (1e-10 if dtype == torch.float64 else 1e-5), (name, off)


# Beyond every block that the kernel works in: depth, columns, units, steps, groups of threads.
@pytest.mark.parametrize(
    ("shape", "one_hot"),
    [((3, 130, 5, 300), False), ((70, 5, 300, 40), False), ((4, 33, 70, 261), True)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_large_problems(shape, one_hot, threads):
    torch.set_num_threads(threads)
    for norms in (FRAME, ("sequence", "frame", "none")):
        assert_equal_to_the_reference(problem(*shape, norms, one_hot=one_hot))


@pytest.mark.parametrize("norms", [FRAME, ("sequence", "frame", "none"), ("none", "none", "frame")])
@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"constant_input": True}])
@pytest.mark.parametrize("features", [2, 50])
def test_the_same_bits_for_any_number_of_threads(norms, options, features):
    case = problem(9, 37, features, 75, norms, torch.float32, lengths=True, **options)
    torch.set_num_threads(1)
    alone = run(compiled.recurrence, case)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        again = run(compiled.recurrence, case)
        for name in alone:
            assert torch.equal(alone[name], again[name]), (name, threads)


def test_without_gradients_the_values_are_the_same_bits():
    for options in ({}, {"lengths": True, "count_padding": True}, {"given": True}):
        for steps in (1, 6, 7):
            case = problem(steps, 9, 3, 20, **options)
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


def test_only_once_differentiable():
    case = problem(4, 5, 3, 6)
    loss = compiled.recurrence(**case)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, case["h_0"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
    indices = torch.zeros(5, 2, dtype=torch.long)
    indices[2, 1] = index
    with pytest.raises(IndexError, match=r"one-hot indices must be in 0\.\.2"):
        lstm(indices)


def test_what_is_not_finite_shows():
    for norms in (FRAME, ("none", "none", "none")):
        case = problem(4, 5, 3, 6, norms, torch.float32)
        with torch.no_grad():
            case["input"][1, 2, 0] = torch.nan
            output = compiled.recurrence(**case)[0]
        assert output[0].isfinite().all()
        assert output[1, 2].isnan().all()


def test_saturated_gates_are_exact():
    """Arguments far beyond where exp overflows."""
    case = problem(1, 2, 1, 2, ("none", "none", "none"), torch.float32)
    weights = case["weights"]
    with torch.no_grad():
        for tensor in (weights.weight_ih, weights.weight_hh):
            tensor.zero_()
        # i open, f closed, g at 1, o open: c = 1 and h = tanh(1).
        weights.bias.copy_(torch.tensor([1e4, 1e4, -1e4, -1e4, 1e4, 1e4, 1e4, 1e4]))
        output, _, c_n, _ = compiled.recurrence(**case)
    assert torch.equal(c_n, torch.ones(2, 2))
    torch.testing.assert_close(output[0], torch.ones(2, 2).tanh())


def test_statistics_are_updated_the_same():
    x, lengths = torch.randn(6, 8, 3), torch.tensor([6, 5, 5, 4, 3, 2, 2, 1])
    modules = [BNLSTM(3, 5, bidirectional=True, kernel=kernel) for kernel in ("cpu", "reference")]
    modules[1].load_state_dict(modules[0].state_dict())
    for _ in range(3):
        for module in modules:
            module(x, lengths=lengths)
    for ours, theirs in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for module in modules:
        module.eval()
    with torch.no_grad():
        longer = torch.randn(9, 2, 3)
        torch.testing.assert_close(modules[0](longer)[0], modules[1](longer)[0])


def test_which_kernel_serves():
    assert choose("auto", "cpu", torch.float32) == "cpu"
    assert choose("auto", "cpu", torch.float64) == "cpu"
    assert choose("auto", "cpu", torch.bfloat16) == "reference"
    assert choose("auto", "meta", torch.float32) == "reference"
    assert choose("reference", "cpu", torch.float32) == "reference"
    with pytest.raises(ValueError, match="kernel 'cpu' serves float32 and float64 on the CPU"):
        choose("cpu", "cpu", torch.bfloat16)
    assert BNLSTM(3, 4).active_kernel() == "cpu"
    none = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
    assert BNLSTM(3, 4, **none).active_kernel() == "torch.lstm"
    assert BNLSTM(3, 4, **none).active_kernel(padded=True) == "cpu"
    assert BNLSTM(3, 4, **none).bfloat16().active_kernel(padded=True) == "torch.lstm"
    assert BNLSTM(3, 4, **none, kernel="reference").active_kernel() == "reference"


USE = """
import torch, bnrnn
lstm = bnrnn.BNLSTM(3, 4)
lstm(torch.randn(5, 2, 3))
print(lstm.active_kernel())
"""


def in_a_clean_cache(folder, *command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "cache"), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip


def test_two_processes_build_at_once_in_a_clean_cache(tmp_path):
    both = [in_a_clean_cache(tmp_path, "-c", USE) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "cpu\n", "")
    built = [path.suffix for path in (tmp_path / "cache" / "bnrnn").iterdir()]
    assert sorted(built) == [".lock", ".so"]  # one library, and nothing left of the building


@pytest.fixture
def no_compiler(tmp_path):
    return {"CXX": str(tmp_path / "no-such-compiler")}


def test_without_a_compiler_the_reference_serves(tmp_path, no_compiler):
    process = in_a_clean_cache(tmp_path, "-c", USE, **no_compiler)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "reference\n")
    (line,) = err.splitlines()
    assert line.startswith("No compiled CPU kernel, so the slower reference serves; it takes a C++")
    assert "no-such-compiler" in line


def test_a_run_without_a_compiler(tmp_path, no_compiler):
    tiny = ("-m", "bnrnn", "max_steps=2", "model.hidden_size=4", "calibration_batches=2",
            "threads=1", "max_valid_batches=2", "task.length=5")  # fmt: skip
    process = in_a_clean_cache(tmp_path, *tiny, **no_compiler)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert err.count("slower reference") == 1
    (result,) = tmp_path.glob("outputs/pydocs/bnlstm/*/result.json")
    assert json.loads(result.read_text())["kernel"] == "reference"

    process = in_a_clean_cache(tmp_path, *tiny, "kernel=cpu", **no_compiler)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("bnrnn: error: kernel=cpu: it takes a C++ compiler")
    assert "Traceback" not in err


def test_a_cached_library_is_for_one_instruction_set(monkeypatch):
    keys = set()
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert not any("native" in flag for flag in build.flags())
        keys.add(build.library_path())
    assert len(keys) == 3


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_narrower_vectors(tmp_path, capability):
    """The same tests on the library that a lesser machine would build."""
    keyword = "random_problems or large_problems or same_bits"
    process = in_a_clean_cache(
        tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", keyword, __file__,
        ATEN_CPU_CAPABILITY=capability.lower(),
    )  # fmt: skip
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err


def test_a_library_that_cannot_be_loaded_is_an_error_of_the_build(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = build.library_path()
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    with pytest.raises(BuildError, match="cannot be loaded: delete it"):
        build.load.__wrapped__()
