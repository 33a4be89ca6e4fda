"""Tests on a CUDA device: `pytest -m gpu` runs these and those of the cell in `test_cell.py`."""

import functools
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnrnn import BNLSTM, calibrate
from bnrnn.kernels import reference
from bnrnn.kernels import triton as ours
from bnrnn.kernels.triton import plan
from tests.accuracy import assert_as_accurate, in_double, mapped
from tests.gpu import needs_gpu, on_gpu
from tests.test_cpu_kernel import FRAME, NONE, problem, random_case, run
from tests.test_faults import write_text

pytestmark = [
    *needs_gpu,
    pytest.mark.filterwarnings("ignore:.*cudnn.*:UserWarning"),  # weights are not one chunk
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tf32():
    """A switch for TF32, initially off, which is torch's default for matrix products."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32

    def switch(on):
        matmul.allow_tf32 = cudnn.allow_tf32 = on

    switch(False)
    yield switch
    matmul.allow_tf32, cudnn.allow_tf32 = before


def by(way):
    return functools.partial(ours.recurrence, way=way)


def leaves_on_gpu(case):
    moved = mapped(case, lambda x: x.cuda())  # all floating-point tensors
    integers = {n: case[n] for n in ("input", "lengths") if case[n] is not None}
    integers = {n: x.cuda() for n, x in integers.items() if not x.is_floating_point()}
    return moved | integers


@pytest.mark.parametrize(
    ("number", "way"),
    [*itertools.product(range(8), ("persistent", "alternating")), (0, "stepwise"), (3, "stepwise")],
)
def test_random_problems(number, way, seed):
    shape, norms, _, options = random_case(number + 1000 * seed, family=False)
    case = problem(*shape, norms, torch.float32, **options)
    compare(case, way)


@pytest.mark.parametrize("way", plan.WAYS)
@pytest.mark.parametrize("options", [{}, {"lengths": True}, {"given": True}], ids=str)
def test_bfloat16(way, options):
    case = problem(6, 33, 5, 40, dtype=torch.bfloat16, **options)
    for name in ("gamma_ih", "gamma_hh", "gamma_c"):
        getattr(case["weights"], name).data.fill_(0.1)
    compare(case, way)


def compare(case, way):
    """Compare with the reference on the CPU, in the same dtype and in float64."""
    indices = case["input"]
    one_hot = not indices.is_floating_point()
    if one_hot:
        vectors = F.one_hot(indices, case["weights"].weight_ih.shape[1]).to(case["h_0"].dtype)
        case = {**case, "input": vectors}
    recurrence = on_gpu(by(way))

    def compute(case):
        return run(recurrence, {**case, "input": indices} if one_hot else case)

    assert_as_accurate(compute, lambda case: run(reference.recurrence, case), case)


PAPER = {"pMNIST": (784, 100, 1, 100), "PTB": (100, 64, 50, 1000), "text8": (180, 128, 27, 2000)}


@pytest.mark.parametrize("shape", list(PAPER))
@pytest.mark.parametrize("products", ["float32", "tf32", "bfloat16"])
def test_the_papers_shapes(shape, products, tf32):
    """Both ways, over a few steps, are as close to float64 as the reference on the GPU."""
    tf32(products == "tf32")
    dtype = torch.bfloat16 if products == "bfloat16" else torch.float32
    _, *sizes = PAPER[shape]
    case = problem(6, *sizes, dtype=dtype)
    for name in ("gamma_ih", "gamma_hh", "gamma_c"):
        getattr(case["weights"], name).data.fill_(0.1)
    case = leaves_on_gpu(case)
    truth = run(reference.recurrence, in_double(case))
    theirs = run(reference.recurrence, case)
    for way in ("persistent", "alternating"):
        for name, value in run(by(way), case).items():
            off, allowed = (
                ((v.double() - truth[name]).norm() / truth[name].norm()).item()
                for v in (value, theirs[name])
            )
            assert off <= 4 * allowed + 1e-6, (way, name, off, allowed)


@pytest.mark.parametrize(
    "sizes", [(9, 100, 1, 100), (9, 64, 50, 600), (5, 200, 3, 70), (5, 20, 3, 128)]
)
@pytest.mark.parametrize("options", [{}, {"lengths": True}], ids=str)
def test_the_same_bits_twice_and_by_one_launch_or_many(sizes, options):
    case = leaves_on_gpu(problem(*sizes, dtype=torch.float32, **options))
    found = {way: run(by(way), case) for way in plan.WAYS}
    for way, first in found.items():
        for name, value in run(by(way), case).items():
            assert torch.equal(value, first[name]), (way, name)
    for name, value in found["stepwise"].items():
        assert torch.equal(value, found["persistent"][name]), name


@pytest.mark.parametrize("way", plan.WAYS)
def test_without_gradients_the_values_are_the_same_bits(way):
    case = leaves_on_gpu(problem(7, 20, 3, 50, dtype=torch.float32))
    kept = ours.recurrence(**case, way=way)
    with torch.no_grad():
        light = ours.recurrence(**case, way=way)
    for values, again in zip(light[:3], kept[:3], strict=True):
        assert torch.equal(values, again)


def test_more_blocks_than_multiprocessors(monkeypatch):
    """Programs with several blocks give bit-identical results to programs with one."""
    case = leaves_on_gpu(problem(6, 20, 3, 100, dtype=torch.float32))
    alone = run(by("persistent"), case)
    for programs in (1, 3):
        monkeypatch.setattr(plan, "programs", lambda way, blocks, device, n=programs: n)
        for name, value in run(by("persistent"), case).items():
            assert torch.equal(value, alone[name]), name


def test_which_kernel_runs():
    lstm = BNLSTM(3, 4).cuda()
    assert lstm.active_kernel() == lstm.active_kernel(padded=True) == "triton"
    assert lstm.bfloat16().active_kernel() == "triton"
    assert lstm.double().active_kernel() == "reference"
    none = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")
    assert BNLSTM(3, 4, **none).cuda().active_kernel() == "torch.lstm"
    assert BNLSTM(3, 4, **none, cell_bias=True).cuda().active_kernel() == "triton"


@pytest.mark.parametrize("norms", [NONE, FRAME], ids=str)
def test_a_module_on_the_gpu_is_the_module_on_the_cpu(norms):
    lengths = torch.tensor([7, 7, 3, 2, 1])

    def everything(problem, device, kernel):
        names = ("input_norm", "recurrent_norm", "cell_norm")
        lstm = BNLSTM(
            3, 20, 2, bidirectional=True, cell_bias=True, kernel=kernel,
            dtype=problem["x"].dtype, **dict(zip(names, norms, strict=True)),
        )  # fmt: skip
        lstm.load_state_dict(problem["weights"], strict=False)
        lstm, x = lstm.to(device), problem["x"].to(device)
        output, (h_n, c_n) = lstm(x, lengths=lengths.to(device))
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        found = {"output": output, "h_n": h_n, "c_n": c_n}
        found |= {name: p.grad for name, p in lstm.named_parameters()}
        found |= {name: b for name, b in lstm.named_buffers() if b.is_floating_point()}
        calibrate(lstm, [x])
        found["evaluation"] = lstm.eval()(x)[0]
        return {name: value.cpu() for name, value in found.items()}

    lstm = BNLSTM(3, 20, 2, bidirectional=True, cell_bias=True)
    weights = {n: p for n, p in lstm.named_parameters() if norms == FRAME or "gamma" not in n}
    assert_as_accurate(
        lambda problem: everything(problem, "cuda", "triton"),
        lambda problem: everything(problem, "cpu", "reference"),
        {"weights": weights, "x": torch.randn(7, 5, 3)},
    )


def test_in_a_cuda_graph_of_the_user():
    lstm = BNLSTM(5, 40, max_length=8).cuda()
    x = torch.randn(8, 16, 5, device="cuda")

    def step():
        lstm.zero_grad(set_to_none=False)
        output, _ = lstm(x)
        output.square().sum().backward()
        return output.detach()  # the graph would keep the gradients on this step's stream

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile first, because compilation cannot be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [captured.clone(), *(p.grad.clone() for p in lstm.parameters())]
        eager = [step(), *(p.grad for p in lstm.parameters())]
        for a, b in zip(replayed, eager, strict=True):
            assert torch.equal(a, b)


def test_autocast():
    lstm = BNLSTM(3, 20).cuda()
    x = torch.randn(6, 8, 3, device="cuda")
    plain, _ = lstm(x)
    with torch.autocast("cuda", torch.bfloat16):
        output, (h_n, _) = lstm(x)
        half, _ = lstm(x.bfloat16())
    assert output.dtype == h_n.dtype == torch.float32
    assert torch.equal(output, plain)
    assert half.dtype == torch.bfloat16
    output.sum().backward()
    assert lstm.weight_hh_l0.grad.isfinite().all()


def test_torch_compile():
    lstm = BNLSTM(3, 20, max_length=6).cuda()
    x = torch.randn(6, 8, 3, device="cuda")
    eager, _ = lstm(x)
    compiled, _ = torch.compile(lstm, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(eager, compiled)
    found = [torch.autograd.grad(y.sum(), list(lstm.parameters())) for y in (eager, compiled)]
    torch.testing.assert_close(*found)


def test_differentiated_twice():
    case = leaves_on_gpu(problem(4, 6, 3, 8, dtype=torch.float32))
    found = []
    for recurrence in (by("persistent"), reference.recurrence):
        output = recurrence(**case)[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), case["h_0"], create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), case["weights"].weight_hh))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_distributed_on_one_device(tmp_path):
    """Averaging over one process does not change the gradients of the module."""
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        lstm = BNLSTM(3, 20, max_length=6).cuda()
        wrapped = nn.parallel.DistributedDataParallel(
            lstm, device_ids=[torch.cuda.current_device()]
        )
        x = torch.randn(6, 8, 3, device="cuda")
        wrapped(x)[0].square().sum().backward()
        found = [p.grad.clone() for p in lstm.parameters()]
        lstm.zero_grad()
        lstm(x)[0].square().sum().backward()
        torch.testing.assert_close(found, [p.grad for p in lstm.parameters()])
        del wrapped  # before its group: see examples/distributed.py
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- the runner

RUN = [
    "task=text", "model=bnlstm", "model.hidden_size=16", "task.length=20", "task.batch_size=8",
    "validate_every=4", "log_every=2", "calibration_batches=2",
]  # fmt: skip


def only(folder):
    (path,) = (file.parent for file in folder.glob("**/metrics.jsonl"))
    return path


def weights(run):
    return torch.load(run / "last.pt", weights_only=True, map_location="cpu")["model"]


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.fixture
def command(bnrnn_here, tmp_path):
    text = write_text(tmp_path)

    def train(outputs, steps, device="cuda", *more):
        resume = [f"resume={only(tmp_path / outputs)}"] if (tmp_path / outputs).exists() else []
        settings = [] if resume else [*RUN, f"task.path={text}", f"outputs={outputs}"]
        done = bnrnn_here(*resume, *settings, f"max_steps={steps}", f"device={device}", *more)
        assert done.returncode == 0, done.stderr
        return only(tmp_path / outputs)

    return train


def test_a_run(command):
    run = command("run", 8)
    result = json.loads((run / "result.json").read_text())
    assert result["kernel"] == "triton"
    assert result["machine"] == torch.cuda.get_device_name()


def test_the_same_run_twice_and_resumed_is_the_same_to_the_bit(command):
    whole, again = command("whole", 10), command("again", 10)
    command("parts", 3)
    parts = command("parts", 10)
    for other in (again, parts):
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(other)[name]), name
    assert lines(whole) == lines(again)
    at_end = [line for line in lines(whole) if line["step"] == 10]
    assert at_end == [line for line in lines(parts) if line["step"] == 10]


def test_checkpoints_go_from_cpu_to_gpu_and_back(command):
    command("there", 4, "cpu")
    command("there", 8, "cuda")
    mixed, alone = lines(command("there", 12, "cpu")), lines(command("cpu", 12, "cpu"))
    losses = [
        [line["bpc"] for line in found if line["split"] == "train"] for found in (mixed, alone)
    ]
    assert len(losses[0]) == 6
    # Adam's steps do not scale with the gradient, so rounding decides the direction of a step whose
    # gradient is near zero.
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=0)


def test_a_step_that_is_not_finite_is_reported_and_never_saved(bnrnn_here, tmp_path, monkeypatch):
    from bnrnn import train

    calls, real = itertools.count(), train.clip_gradients

    def spoil(model, config):
        if next(calls) == 3:
            for p in model.parameters():
                p.grad.fill_(torch.nan)
        return real(model, config)

    monkeypatch.setattr(train, "clip_gradients", spoil)
    settings = [*RUN, f"task.path={write_text(tmp_path)}", "max_steps=9", "device=cuda"]
    done = bnrnn_here(*settings, "log_every=100")
    assert done.returncode == 5
    assert "the gradient norm is nan at step 3; the last good checkpoint is" in done.stderr
    assert all(value.isfinite().all() for value in weights(only(tmp_path)).values())


@pytest.mark.parametrize(
    "settings",
    [
        ["model=bnlstm"],
        ["model=lstm", "optimizer.clip=square_root"],
        ["task=cnn4", "model=attentive_bne_star", "data.synthetic=150", "model.hidden_size=8"],
    ],
    ids=str,
)
def test_a_training_step_does_not_wait(composed, tmp_path, monkeypatch, settings):
    """CUDA's synchronisation debug mode raises an error on any wait."""
    from bnrnn.ahead import TrainingBatches
    from bnrnn.optim import build_optimizer, clip_gradients
    from bnrnn.tasks import build_task

    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path))
    text = ["task=text", "task.length=20", f"task.path={write_text(tmp_path)}"]
    of_task = [] if "task=cnn4" in settings else text
    config = composed(*settings, *of_task, "task.batch_size=8", f"data_dir={tmp_path}")
    task, device = build_task(config), torch.device("cuda")
    model = task.build_model(config.model, "auto").to(device)
    optimizer, batches = build_optimizer(config.optimizer, model), TrainingBatches(task, device)

    def step(index):
        loss, sums, _ = task.loss(model, batches.take(index), None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(model, config.optimizer)
        optimizer.step()
        batches.prepare(index + 1)
        return [loss, norm, *sums.values()]

    for index in range(2):  # one-time work may wait
        step(index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in found)


SMALL_CASE = """
import functools, torch
from bnrnn.kernels import triton as ours
from tests.test_cpu_kernel import problem, run
from tests.gpu import on_gpu
for way in ("stepwise", "alternating", "persistent"):
    for options in ({}, {"lengths": True}, {"given": True}):
        case = problem(3, 20, 3, 24, dtype=torch.float32, **options)
        run(on_gpu(functools.partial(ours.recurrence, way=way)), case)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer", path="/usr/local/cuda/bin") or shutil.which(
        "compute-sanitizer"
    )
    if program is None:
        pytest.skip("no compute-sanitizer here")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_CASE],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
