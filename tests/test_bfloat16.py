"""Products of factors rounded to bfloat16: CPU kernel, module under autocast, runner."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bnrnn import BNLSTM, kernels
from bnrnn.command.device import set_precision
from bnrnn.errors import ConfigError
from bnrnn.evaluate import build_model
from bnrnn.kernels import Request, reference
from bnrnn.kernels import cpu as compiled
from bnrnn.tasks import build_task
from tests.accuracy import assert_as_accurate, assert_rounded, in_double
from tests.test_cpu_kernel import FRAME, LAYER, NONE, SUM, leaves, problem
from tests.test_operators import arguments

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("built_kernel")]
SEQUENCE = ("sequence", "none", "frame")
# Steps, batch, features and units: within one tile and block, beyond several, and a narrow input.
SHAPES = [(5, 7, 9, 6), (40, 40, 33, 37), (12, 100, 3, 50)]
WAYS = ("avx512_bf16", "amx")  # beside the portable one


def results(kernel, bfloat16=True):
    """From a problem to the kernel's outputs and all gradients."""

    def compute(case):
        output, h_n, c_n, _ = kernel.recurrence(**case, bfloat16=bfloat16)
        found = [output, h_n, c_n]
        generator = torch.Generator().manual_seed(0)
        loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in found)
        grads = torch.autograd.grad(loss, leaves(case), allow_unused=True)
        return [*found, *(grad for grad in grads if grad is not None)]

    return compute


@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"lengths": True}, {"noise": True}])
@pytest.mark.parametrize("norms", [FRAME, NONE, SEQUENCE, SUM, LAYER])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_the_reference(shape, norms, options):
    torch.manual_seed(0)
    case = problem(*shape, norms, torch.float32, **options)
    assert_as_accurate(results(compiled), results(reference), case, torch.bfloat16)


@pytest.mark.parametrize("norms", [FRAME, ("none", "sum", "frame")])
@pytest.mark.parametrize("options", [{}, {"lengths": True}])
def test_gradients_that_sum_to_zero_still_do(norms, options):
    """Behind batch normalisation, the gradients of h_0 and of each x_t sum to zero over the batch.
    Otherwise, steps whose sequences are nearly alike would amplify the sum."""
    torch.manual_seed(0)
    case = problem(6, 50, 40, 60, norms, torch.float32, **options)
    output, *_ = compiled.recurrence(**case, bfloat16=True)
    for gradient in torch.autograd.grad(output.square().sum(), [case["h_0"], case["input"]]):
        total, size = gradient.sum(-2), gradient.abs().sum(-2)
        # A remainder is held with 16 bits and spread over 50 sequences, each in 24 bits.
        assert (total.abs() <= size.max() * 2**-16).all()


def rounded(values):
    """The nearest numbers with 8 significant bits, ties to even, in float64."""
    bits = np.ascontiguousarray(values.detach().numpy()).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_rounded_to_nearest_and_sums_are_not(shape):
    """The moments of c_1 show the products before other steps amplify their rounding errors."""
    case = problem(*shape, ("none", "none", "frame"), torch.float32)
    _, _, _, moments = compiled.recurrence(**case, bfloat16=True)
    w, (_, _, features, hidden) = case["weights"], shape
    narrow = features <= torch.ops.bnrnn_cpu.narrow() and not case["input"].requires_grad
    factor = (lambda values: values.detach().double().numpy()) if narrow else rounded
    z = (
        rounded(case["h_0"]) @ rounded(w.weight_hh).T
        + factor(case["input"][0]) @ factor(w.weight_ih).T
    )
    i, f, g, _ = np.split(z + w.bias.detach().double().numpy(), 4, axis=1)
    sigmoid = lambda y: 1 / (1 + np.exp(-y))  # noqa: E731
    c = sigmoid(f) * case["c_0"].detach().double().numpy() + sigmoid(i) * np.tanh(g)
    operations = features + hidden + 16  # of the sums, and of the gates
    assert_rounded(moments.c.mean[0], torch.tensor(c.mean(0)), operations)
    assert_rounded(moments.c.var[0], torch.tensor(c.var(0)), operations)


@pytest.mark.parametrize("norms", [FRAME, ("none", "sum", "frame")])
def test_small_differences_between_sequences_survive(norms):
    """Batch normalisation sees only the differences between sequences, which must keep eight bits
    even where they are smaller than the rounding errors of the values."""
    case = problem(3, 50, 40, 60, norms, torch.float32)
    with torch.no_grad():
        case["h_0"].copy_(1 + 1e-3 * torch.randn(50, 60))
        case["input"].copy_(2 + 1e-3 * torch.randn(3, 50, 40))
    exact = results(reference)(in_double(case))
    for found, truth, plain in zip(
        results(compiled)(case), exact, results(reference)(case), strict=True
    ):
        error, usual = ((y - truth).norm() / truth.norm() for y in (found, plain))
        assert error < 0.05
        assert error < usual / 4


@pytest.mark.parametrize("norms", [FRAME, NONE, ("sequence", "frame", "frame"), SUM, LAYER])
def test_the_same_bits_for_any_number_of_threads(norms):
    case, found = problem(14, 70, 65, 137, norms, torch.float32), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(compiled)(case))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("steps", "batch", "dtype"),
    [(9, 1, torch.float32), (2, 5, torch.float32), (9, 5, torch.float64)],
)
def test_a_lone_sequence_two_steps_and_float64_are_not_rounded(steps, batch, dtype):
    case = problem(steps, batch, 6, 8, NONE, dtype)
    for a, b in zip(results(compiled)(case), results(compiled, False)(case), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_finite_shows():
    case = problem(4, 5, 6, 8, NONE, torch.float32)
    with torch.no_grad():
        case["h_0"][2, 3] = float("nan")
        case["weights"].weight_hh[7, 2] = float("inf")
        output = compiled.recurrence(**case, bfloat16=True)[0]
    assert output[0, 2].isnan().all()
    assert output[0, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("norms", [FRAME, LAYER])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # in PyTorch 2.14's opcheck
def test_opcheck(norms):
    case = problem(5, 7, 9, 6, norms, torch.float32)
    layer = (*arguments(case)[:-1], True)
    torch.library.opcheck(torch.ops.bnrnn_cpu.forward.default, (*layer, True, True))


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_multiplying(way, tmp_path):
    """All ways of this processor agree with the portable one within the roundings of the sums."""
    program = (
        "import sys, torch; from bnrnn.kernels import operators; operators.load();"
        "from tests.test_bfloat16 import *;"
        "torch.manual_seed(0); case = problem(4, 40, 33, 70, NONE, torch.float32);"
        "torch.save((torch.ops.bnrnn_cpu.bfloat16_way(), results(compiled)(case)), sys.argv[1])"
    )
    found = {}
    for name in (way, "portable"):
        path = tmp_path / name
        environment = {**os.environ, "BNRNN_KERNEL_BFLOAT16": name}
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
        took, found[name] = torch.load(path)
        if took != name:
            pytest.skip(f"this processor has no {name}")
    # A sum may round to the other side of a factor of the next step: 8 bits.
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-8 * b.abs().max().item())


# ------------------------------------------------------------------ the module and the runner


@pytest.fixture
def fast(monkeypatch):
    """Pretend that this processor multiplies fast in bfloat16; the kernel is the real one."""
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)


@pytest.mark.parametrize("norms", [{}, {"input_norm": "none", "recurrent_norm": "none",
                                        "cell_norm": "none"}], ids=["frame", "plain"])  # fmt: skip
def test_the_module_rounds_under_autocast(norms, fast):
    module, x = BNLSTM(6, 20, **norms), torch.randn(7, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x)
    h_0 = torch.zeros(5, 20)
    weights, kinds = module._weights("_l0"), module.normalization
    expected = compiled.recurrence(x, h_0, h_0, weights, kinds, bfloat16=True)[0]
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    assert not torch.equal(output, module(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast_to", [torch.float16, torch.bfloat16])
def test_only_float32_under_autocast_to_bfloat16(dtype, autocast_to, fast):
    module, x = BNLSTM(6, 20, dtype=dtype), torch.randn(7, 5, 6, dtype=dtype)
    exact = module(x)[0]
    with torch.autocast("cpu", autocast_to):
        found = module(x)[0]
    assert torch.equal(found, exact) == ((dtype, autocast_to) != (torch.float32, torch.bfloat16))


def test_a_processor_without_bfloat16_says_so_and_stays_in_float32(monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.bnrnn_cpu, "bfloat16_way", lambda: "portable")
    compiled._has_bfloat16.cache_clear()
    module, x = BNLSTM(6, 20), torch.randn(7, 5, 6)
    exact = module(x)[0]
    try:
        with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.bfloat16):
            found = [module(x)[0] for _ in range(2)]
    finally:
        compiled._has_bfloat16.cache_clear()
    assert all(torch.equal(y, exact) for y in found)
    assert [r.message for r in caplog.records] == [
        "This processor has no fast bfloat16 (AMX, or AVX512_BF16 of AMD): the recurrence "
        "multiplies in float32"
    ]


def test_other_kernels_leave_it_to_the_cpu_kernel():
    plain = kernels.Normalization("none", "none", "none")
    assert kernels.choose("auto", Request("cpu", torch.float32, plain)) == "torch.lstm"
    assert kernels.choose("auto", Request("cpu", torch.float32, plain, bfloat16=True)) == "cpu"
    with pytest.raises(ValueError, match=r"kernel 'torch.lstm' cannot run this: it does not round"):
        kernels.choose("torch.lstm", Request("cpu", torch.float32, plain, bfloat16=True))


def test_a_run_in_bfloat16_rounds_the_products_of_the_whole_model(composed, fast):
    found = {}
    for precision in ("float32", "bfloat16"):
        config = composed("task=pydocs", f"precision={precision}", "model.hidden_size=20")
        torch.manual_seed(0)
        model = build_model(config, build_task(config), torch.device("cpu"))
        symbols = torch.randint(9, (7, 5), generator=torch.Generator().manual_seed(0))
        found[precision] = model(symbols)[0]
    plain, rounded = found.values()
    assert plain.dtype == rounded.dtype == torch.float32
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, rtol=0, atol=2**-6 * plain.abs().max().item())
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("model", ["lstm", "bnlstm"])
def test_a_run_in_bfloat16_records_the_kernel_that_rounds(model, composed, fast):
    config = composed("task=pydocs", "precision=bfloat16", "model.hidden_size=20", f"model={model}")
    task = build_task(config)
    assert task.kernel(build_model(config, task, torch.device("cpu"))) == "cpu"


def test_a_gpu_does_not_train_in_bfloat16_but_tests_what_was(composed):
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match="precision=bfloat16 is for CPUs: set precision=tf32"):
        set_precision(composed("precision=bfloat16"), gpu)
    set_precision(composed("precision=bfloat16", "mode=evaluate", "run=outputs"), gpu)
