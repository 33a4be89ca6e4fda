"""Compare the CUDA kernels, run in Triton's interpreter on the CPU, with the reference.

`test_triton_compiles.py` tests compilation. `test_gpu.py` tests what only a GPU can show: races
within a program, the rounding of the hardware, speed.
"""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from bnrnn import BNLSTM, kernels
from bnrnn.kernels import Kernel, Normalization, Request, choose, reference
from bnrnn.kernels import triton as ours
from bnrnn.kernels.triton import plan
from tests import test_cell
from tests.accuracy import assert_as_accurate
from tests.test_cpu_kernel import BATCH_SLOTS, FRAME, NONE, leaves, problem, random_case, run

triton = pytest.importorskip("triton", minversion="{}.{}".format(*ours.VERSION))
tl = pytest.importorskip("triton.language")
pytestmark = [
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="triton was imported without TRITON_INTERPRET=1"
    ),
    pytest.mark.skipif(
        TorchVersion(triton.__version__) < (3, 7) and TorchVersion(np.__version__) >= (2, 4),
        reason="the interpreter of this triton reads arrays as numbers, which NumPy 2.4 refuses",
    ),
    # exp overflows if a gate is saturated.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
SMALL = plan.Tiles(block_b=16, block_u=16, block_k=32, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """Use tiles for small problems: the interpreter's time is per program and operation."""
    of_batch = {16: SMALL} | {n: SMALL._replace(block_b=n) for n in (32, 64, 128, 256)}
    monkeypatch.setattr(
        plan, "tiles", lambda way, batch, hidden: of_batch[max(16, 1 << (batch - 1).bit_length())]
    )
    monkeypatch.setattr(plan, "programs", lambda way, blocks, device: blocks)


def recurrence(way):
    return functools.partial(ours.recurrence, way=way)


def assert_equal(problem, way, tolerance=1e-10):
    found, truth = run(recurrence(way), problem), run(reference.recurrence, problem)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        off = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)
        assert off < tolerance, (name, off)


@pytest.mark.parametrize(
    ("number", "way"),
    [
        *((k, "stepwise") for k in (1, 3, 8)),
        *((k, "alternating") for k in (12, 14, 18)),
        *(
            pytest.param(k, way, marks=pytest.mark.slow)
            for k in range(60)
            for way in ("stepwise", "alternating")
        ),
    ],
)
def test_random_problems(number, way, seed):
    shape, norms, _, options = random_case(number + 1000 * seed, family=False)
    assert_equal(problem(*shape, norms, **options), way)


# With 32 units, which fill a block of the product, no column is padded.
@pytest.mark.parametrize(("batch", "hidden"), [(1, 5), (5, 1), (130, 3), (3, 32)])
def test_sizes_at_the_edge(batch, hidden):
    given = batch == 1
    for way in ("stepwise", "alternating"):
        assert_equal(problem(3, batch, 2, hidden, given=given, lengths=not given), way)


# Each slot once, and a lone last sequence, which the random problems do not have.
@pytest.mark.parametrize(
    ("norms", "padding", "way"),
    [
        (FRAME, "none", "stepwise"), (FRAME, "left out", "stepwise"),
        (FRAME, "left out", "alternating"), (FRAME, "counted", "alternating"),
        (("sequence", "none", "frame"), "left out", "alternating"),
        (("frame", "frame", "none"), "left out", "stepwise"),
    ],
)  # fmt: skip
def test_the_equations(norms, padding, way):
    test_cell.test_values_and_moments_are_those_of_the_equations(recurrence(way), norms, padding)


@pytest.mark.parametrize("way", ["alternating", pytest.param("stepwise", marks=pytest.mark.slow)])
def test_the_rest_of_the_cell_suite(way):
    cell = recurrence(way)
    test_cell.test_given_statistics_are_used_and_the_last_row_beyond_them(cell, FRAME)
    test_cell.test_a_cell_bias_without_normalization_is_the_authors_baseline(cell)
    test_cell.test_a_finished_sequence_counts_with_the_cell_it_ended_in(cell)
    test_cell.test_padding_content_never_matters_where_padding_is_not_counted(cell, FRAME)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stepwise", "alternating"])
def test_more_of_the_cell_suite(way):
    cell = recurrence(way)
    test_cell.test_one_hot_indices_are_one_hot_vectors(cell, FRAME)
    test_cell.test_the_cell_of_a_finished_sequence_has_a_gradient_through_the_statistics(cell)
    test_cell.test_sequence_wise_statistics_have_an_eps_of_their_own(cell, "sequence", False)
    test_cell.test_dtype_is_kept(cell, torch.float32)
    test_cell.test_padding_steps_at_the_end_change_nothing(cell)


@pytest.mark.slow
@pytest.mark.parametrize("norms", BATCH_SLOTS)
@pytest.mark.parametrize("padding", ["none", "left out", "counted"])
@pytest.mark.parametrize("way", ["stepwise", "alternating"])
def test_the_equations_of_all_slots(norms, padding, way):
    test_cell.test_values_and_moments_are_those_of_the_equations(recurrence(way), norms, padding)


@pytest.mark.parametrize("norms", [FRAME, ("frame", "frame", "none")])
def test_gradients_where_one_sequence_is_left(norms):
    case = problem(5, 4, 3, 6, norms)
    case["lengths"] = torch.tensor([5, 2, 3, 1])
    for way in ("stepwise", "alternating"):
        assert_equal(case, way)


def test_more_steps_than_the_longest_sequence():
    case = problem(5, 4, 3, 6)
    case["lengths"] = torch.tensor([3, 2, 3, 1])
    assert_equal(case, "stepwise")


SINGLE = [{}, {"lengths": True}, {"given": True, "one_hot": True}]


@pytest.mark.numeric(repeat=False)  # each takes seconds
@pytest.mark.parametrize(
    ("way", "options"),
    list(zip(("stepwise", "alternating", "stepwise"), SINGLE, strict=True)),
    ids=str,
)
def test_in_float32_as_accurate_as_the_reference(way, options):
    case = problem(6, 9, 4, 20, dtype=torch.float32, **options)
    assert_as_accurate_as_the_reference(case, way)


# γ is 0.1 here: with γ ~ N(0, 1), any gradient in bfloat16 consists of rounding errors.
@pytest.mark.numeric(repeat=False)  # each takes seconds
@pytest.mark.parametrize("options", SINGLE, ids=str)
def test_in_bfloat16_as_accurate_as_the_reference(options):
    case = problem(4, 9, 4, 20, dtype=torch.bfloat16, **options)
    for name in ("gamma_ih", "gamma_hh", "gamma_c"):
        getattr(case["weights"], name).data.fill_(0.1)
    assert_as_accurate_as_the_reference(case, "alternating" if options else "stepwise")


def assert_as_accurate_as_the_reference(case, way):
    indices = case["input"]
    if not indices.is_floating_point():
        features = case["weights"].weight_ih.shape[1]
        vectors = torch.nn.functional.one_hot(indices, features).to(case["h_0"].dtype)
        case = {**case, "input": vectors}

    def compute(problem):
        return run(
            recurrence(way), {**problem, "input": indices} if indices.dim() == 2 else problem
        )

    assert_as_accurate(compute, lambda problem: run(reference.recurrence, problem), case)


@pytest.fixture
def persistent(monkeypatch):
    """Use fewer programs than blocks, so that some programs have two blocks."""
    monkeypatch.setattr(
        plan, "tiles", lambda way, batch, hidden: SMALL._replace(block_u=4, block_k=16)
    )
    monkeypatch.setattr(plan, "programs", lambda way, blocks, device: min(3, blocks))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((3, 6, 3, 13), {}, marks=pytest.mark.slow),
        ((3, 7, 3, 10), {"lengths": True}),
    ],
)
def test_interleaved_programs_give_the_bits_of_one_launch_a_step(persistent, shape, options, seed):
    from tests.triton_programs import all_programs_at_once

    case = problem(*shape, **options)
    with all_programs_at_once(seed):
        at_once = run(recurrence("persistent"), case)
    stepwise = run(recurrence("stepwise"), case)
    for name in stepwise:
        assert torch.equal(at_once[name], stepwise[name]), name
    assert_equal(case, "stepwise")


def test_interleaved_programs_without_gradients(persistent):
    """The states alternate between two rows: no program may overwrite what another reads."""
    from tests.triton_programs import all_programs_at_once

    case = problem(5, 6, 3, 13)
    with torch.no_grad(), all_programs_at_once():
        output = ours.recurrence(**case, way="persistent")[0]
    assert (output - reference.recurrence(**case)[0]).abs().max() < 1e-10


def test_without_the_barrier_the_result_is_wrong(persistent, monkeypatch):
    from bnrnn.kernels.triton import steps
    from tests.triton_programs import all_programs_at_once

    @triton.jit
    def no_barrier(counter, target):
        tl.debug_barrier()

    monkeypatch.setattr(steps, "grid_barrier", no_barrier)
    case = problem(5, 6, 3, 13)
    with torch.no_grad(), all_programs_at_once():
        output = ours.recurrence(**case, way="persistent")[0]
    assert (output - reference.recurrence(**case)[0]).abs().max() > 1e-3


def test_a_barrier_that_waits_for_one_program_too_many_never_ends(persistent, monkeypatch):
    from bnrnn.kernels.triton import steps
    from tests.triton_programs import all_programs_at_once

    @triton.jit
    def too_high(counter, target):
        tl.atomic_add(counter, 1)
        while tl.atomic_add(counter, 0) < target + 1:
            pass

    monkeypatch.setattr(steps, "grid_barrier", too_high)
    with pytest.raises(Exception, match="wait for each other"), all_programs_at_once():
        ours.recurrence(**problem(3, 6, 3, 13), way="persistent")


@pytest.mark.parametrize("options", [{}, {"lengths": True, "count_padding": True}, {"given": True}])
def test_without_gradients_the_values_are_the_same_bits(options):
    for way, steps in (("stepwise", 2), ("alternating", 3)):
        case = problem(steps, 5, 3, 10, **options)
        kept = ours.recurrence(**case, way=way)
        with torch.no_grad():
            light = ours.recurrence(**case, way=way)
        for values, again in zip(light[:3], kept[:3], strict=True):
            assert torch.equal(values, again)
            assert not values.requires_grad


@pytest.mark.parametrize("lengths", [None, [3, 1, 2]])
def test_with_tf32_the_factors_are_rounded_and_the_results_are_not(lengths, monkeypatch):
    """h_t and W_h are rounded to the nearest number with 10 fraction bits, as cuBLAS does."""
    monkeypatch.setattr(plan, "products", lambda dtype: "tf32")
    case = problem(3, 3, 2, 5, NONE, torch.float32)
    lengths = None if lengths is None else torch.tensor(lengths)
    output, h_n, _, _ = ours.recurrence(**case | {"lengths": lengths}, way="stepwise")

    def rounded(x):
        fraction, exponent = torch.frexp(x.double())
        return torch.ldexp((fraction * 2**11).round() / 2**11, exponent).float()

    weights = case["weights"]
    weights = weights._replace(weight_hh=rounded(weights.weight_hh))
    h, c = case["h_0"], case["c_0"]
    for t in range(3):
        shorter = None if lengths is None else (lengths - t).clamp(min=0, max=1)
        step, h, c, _ = reference.recurrence(
            case["input"][t : t + 1], rounded(h), c, weights, case["normalization"],
            lengths=shorter,
        )  # fmt: skip
        torch.testing.assert_close(output[t : t + 1], step, rtol=0, atol=2e-6)
    last = (lengths - 1).tolist() if lengths is not None else [2, 2, 2]
    torch.testing.assert_close(h_n, torch.stack([output[t, b] for b, t in enumerate(last)]))


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_loss_on_one_of_the_results_only(used):
    case = problem(3, 5, 3, 6)
    found, truth = (
        torch.autograd.grad(recurrence(**case)[used].square().sum(), leaves(case))
        for recurrence in (recurrence("alternating"), reference.recurrence)
    )
    torch.testing.assert_close(found, truth)


def test_a_graph_that_is_kept_gives_the_same_gradients_twice():
    case = problem(3, 5, 3, 6)
    output, h_n, c_n, _ = ours.recurrence(**case, way="alternating")
    loss = output.square().sum()
    with torch.no_grad():  # overwriting the results must not change the gradients
        h_n.zero_()
        c_n.zero_()
    first = torch.autograd.grad(loss, leaves(case), retain_graph=True)
    second = torch.autograd.grad(loss, leaves(case))
    for gradient, again in zip(first, second, strict=True):
        assert torch.equal(gradient, again)
    truth = torch.autograd.grad(reference.recurrence(**case)[0].square().sum(), leaves(case))
    torch.testing.assert_close(first, truth)


@pytest.mark.parametrize(
    ("norms", "options"),
    [(NONE, {}), (FRAME, {"lengths": True}), (("sequence", "none", "frame"), {"given": True})],
)
def test_differentiated_twice(norms, options):
    case = problem(3, 4, 3, 5, norms, **options)

    def penalty(recurrence):
        output, h_n, _, _ = recurrence(**case)
        loss = output.square().sum() + h_n.sum()
        (gradient,) = torch.autograd.grad(loss, case["h_0"], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves(case))

    torch.testing.assert_close(penalty(recurrence("alternating")), penalty(reference.recurrence))


def test_the_operators_are_what_their_schemas_say():
    from bnrnn.kernels.triton import operators

    case = problem(2, 4, 3, 5)
    w = case["weights"]
    x = torch.randn(2, 4, 20, dtype=torch.float64, requires_grad=True)
    layer = (
        x, case["h_0"], case["c_0"], w.weight_hh, w.gamma_hh, w.gamma_c, w.beta_c,
        None, None, None, None, torch.tensor([2, 2, 1, 1]), False, 1e-5,
    )  # fmt: skip
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for keep in (True, False):
        arguments = (*layer, keep, "stepwise")
        torch.library.opcheck(operators.forward, arguments, test_utils=utilities)
    *_, saved = operators.forward(*layer, True, "stepwise")
    states, cells, hats, _, var_hh, mean_c, var_c = (t.detach() for t in saved)
    detached = [t.detach() for t in (x, *layer[3:7])]
    torch.library.opcheck(
        operators.backward,
        (
            torch.randn(2, 4, 5, dtype=torch.float64), None, None, *detached, var_hh, mean_c, var_c,
            layer[11], False, 1e-5, False, "stepwise", states, cells, hats,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.fixture
def by_table(monkeypatch):
    """Make `kernel="triton"` available to modules on the CPU."""
    entry = Kernel(recurrence("alternating"), lambda _: None)
    monkeypatch.setitem(kernels.KERNELS, "triton", entry)


def test_layers_directions_and_statistics(by_table):
    lengths = torch.tensor([4, 4, 3, 1])

    def everything(kernel):
        torch.manual_seed(0)
        module = BNLSTM(3, 5, 2, bidirectional=True, kernel=kernel, dtype=torch.float64)
        x = torch.randn(4, 4, 3, dtype=torch.float64)
        output, (h_n, c_n) = module(x, lengths=lengths)
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        gradients = [p.grad for p in module.parameters()]
        statistics = [b for b in module.buffers() if b.is_floating_point()]
        return [output, h_n, c_n, *gradients, *statistics, module.eval()(x)[0]]

    torch.testing.assert_close(everything("triton"), everything("reference"), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_torch_compile(by_table):
    module = BNLSTM(3, 5, kernel="triton", max_length=4)
    x = torch.randn(3, 4, 3)
    eager = module(x)[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0]
    assert torch.equal(eager, compiled)
    truth = torch.autograd.grad(eager.sum(), list(module.parameters()))
    found = torch.autograd.grad(compiled.sum(), list(module.parameters()))
    torch.testing.assert_close(found, truth)


def test_which_devices_it_serves(monkeypatch, caplog):
    def request(dtype=torch.float32, device="cuda", norms=FRAME, **rest):
        return Request(device, dtype, Normalization(*norms), **rest)

    def on(capability=(8, 0), cuda="13.0", version="3.7.1"):
        ours._unavailability.cache_clear()
        kernels._log_slower_once.cache_clear()
        caplog.clear()
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(triton, "__version__", version)

    on()
    for dtype in (torch.float32, torch.bfloat16):
        assert choose("auto", request(dtype)) == "triton"
        assert choose("auto", request(dtype, padded=True)) == "triton"
    assert choose("triton alternating", request()) == "triton alternating"
    on((9, 0))
    assert choose("auto", request()) == "triton"
    assert choose("auto", request(device="cpu")) == "cpu"
    assert not caplog.records
    for where, dtype, reason in (
        ({}, torch.float64, "it is for float32 and bfloat16, not torch.float64"),
        (
            {"capability": (7, 5)},
            torch.float32,
            "needs compute capability 8.0, and Some GPU has 7.5",
        ),
        ({"cuda": None}, torch.float32, "it needs an NVIDIA GPU"),
        ({"version": "3.5.1"}, torch.float32, "it needs triton 3.6 or later, not 3.5.1"),
    ):
        on(**where)
        for _ in range(2):
            assert choose("auto", request(dtype)) == "reference"
        (record,) = caplog.records
        assert reason in record.getMessage()
        with pytest.raises(ValueError, match=reason):
            choose("triton", request(dtype))
    on()
    assert choose("auto", request(batch=512)) == "triton"
    with pytest.raises(ValueError, match="it takes 512 sequences at most"):
        choose("triton", request(batch=513))
    with pytest.raises(ValueError, match="it does not normalise the sum of both terms"):
        choose("triton", request(norms=("none", "sum", "none")))
    ours._unavailability.cache_clear()
    with pytest.raises(ValueError, match="it is for CUDA devices, not for cpu"):
        choose("triton", request(device="cpu"))


def test_importing_the_library_does_not_import_triton():
    code = "import sys, bnrnn; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plan():
    for batch, hidden in itertools.product(
        (1, 2, 100, 128, 129, 256, 512), (1, 100, 512, 1000, 2000)
    ):
        for way in plan.WAYS:
            t = REAL_TILES(way, batch, hidden)
            assert t.block_b >= batch
            assert t.block_b * t.block_u <= 2048
            shared = (t.block_b + 4 * t.block_u) * t.block_k * 4 * t.num_stages
            assert way == "alternating" or shared <= 99 * 1024
    assert plan.way(100, "float32") == plan.way(1000, "tf32") == "persistent"
    assert plan.way(1000, "float32") == plan.way(2000, "tf32") == "alternating"


REAL_TILES = plan.tiles
