"""The training loop does not wait for a GPU. These tests treat the CPU as one and count the waits.

Reading a number or an array from a tensor counts as a wait.
"""

import json
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnrnn import job, train
from bnrnn.ahead import TrainingBatches
from bnrnn.optim import clip_gradients
from bnrnn.settings.schema import SGDConfig
from bnrnn.tasks import Batch, base
from tests.test_faults import write_text

RUN = [
    "task=text", "model.hidden_size=8", "task.length=20", "task.batch_size=8", "max_steps=9",
    "validate_every=6", "log_every=4", "calibration_batches=2", "threads=1",
]  # fmt: skip
INDEX_CHECKS = 2 * 9  # in each step, the range of the one-hot indices, which only the CPU checks
READERS = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default, torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(base, "reading_waits", lambda device: True)


@pytest.fixture
def waits(monkeypatch):
    """How often each function of train.py has read from a tensor, directly or in its callees."""
    found = Counter()

    def note():
        names, frame = [], sys._getframe(1)
        while frame is not None:
            names.append(frame.f_code.co_name)
            if frame.f_code.co_filename in (train.__file__, job.__file__):
                break
            frame = frame.f_back
        # Ignore this check: on a GPU it reads only once.
        if frame is not None and "_warn_if_alike" not in names:
            found[names[-1]] += 1

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in READERS:
                note()
            return func(*args, **kwargs or {})

    for name in ("tolist", "numpy", "cpu"):
        method = getattr(torch.Tensor, name)

        def reading(*args, _method=method, **kwargs):
            note()
            return _method(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reading)
    with Watch():
        yield found


def only(folder):
    (path,) = (file.parent for file in folder.glob("**/metrics.jsonl"))
    return path


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.mark.parametrize("model", ["bnlstm", "lstm"])
def test_a_step_waits_for_nothing(bnrnn_here, tmp_path, as_on_a_gpu, waits, model):
    text = write_text(tmp_path)
    assert bnrnn_here(*RUN, f"model={model}", f"task.path={text}").returncode == 0
    assert waits["train"] == INDEX_CHECKS, waits
    # Two lines of metrics, and two validations with their checkpoints.
    assert waits["settle"] == 4, waits


def test_on_the_cpu_each_step_is_read(bnrnn_here, tmp_path, waits):
    """The control: the counter used above does count waits."""
    text = write_text(tmp_path)
    assert bnrnn_here(*RUN, f"task.path={text}").returncode == 0
    assert waits["train"] == INDEX_CHECKS + 9 * 3  # the sums
    assert waits["settle"] == 9


def test_read_later_the_numbers_are_the_same_bits(bnrnn_here, tmp_path, monkeypatch):
    text = write_text(tmp_path)
    command = [*RUN, "task.batch_size=8", f"task.path={text}"]
    assert bnrnn_here(*command, "outputs=at_once").returncode == 0
    monkeypatch.setattr(base, "reading_waits", lambda device: True)
    assert bnrnn_here(*command, "outputs=later").returncode == 0
    once, later = only(tmp_path / "at_once"), only(tmp_path / "later")
    assert lines(once) == lines(later)
    found = [torch.load(run / "last.pt", weights_only=True) for run in (once, later)]
    for name, value in found[0]["model"].items():
        assert torch.equal(value, found[1]["model"][name]), name
    loops = [content["training"]["loop"] for content in found]
    for name in ("sums", "grad_norm", "logged", "step"):
        assert loops[0][name] == loops[1][name], name


@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_reported_and_never_saved(
    bnrnn_here, tmp_path, monkeypatch, as_on_a_gpu, kind
):
    calls, real = [], train.clip_gradients

    def spoil(model, config):
        calls.append(1)
        if len(calls) == 5:  # step 4
            with torch.no_grad():
                for p in model.parameters():
                    p.grad.fill_(torch.nan)
                    if kind == "loss":  # of the next step; this step's norm is replaced by 1
                        p.fill_(torch.nan)
            return real(model, config) if kind == "gradient norm" else torch.tensor(1.0)
        return real(model, config)

    monkeypatch.setattr(train, "clip_gradients", spoil)
    done = bnrnn_here(*RUN, "log_every=100", f"task.path={write_text(tmp_path)}")
    assert done.returncode == 5
    step = 4 if kind == "gradient norm" else 5
    assert f"the {kind} is nan at step {step}; the last good checkpoint is" in done.stderr
    assert len(calls) == 6  # up to the validation
    content = torch.load(only(tmp_path) / "last.pt", weights_only=True)
    assert content["step"] == 0
    assert all(v.isfinite().all() for v in content["model"].values())


def test_a_long_stretch_without_a_line_is_read_in_parts(
    bnrnn_here, tmp_path, monkeypatch, as_on_a_gpu, waits
):
    monkeypatch.setattr(job, "MOST_UNREAD", 3)
    text = write_text(tmp_path)
    settings = ["log_every=100", "validate_every=100", f"task.path={text}"]
    assert bnrnn_here(*RUN, *settings).returncode == 0
    assert waits["train"] == INDEX_CHECKS
    assert waits["settle"] == 3


@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_the_square_root_clip_without_a_wait(scale, monkeypatch):
    """The computation for a GPU gives the same gradients."""
    config = SGDConfig(clip="square_root", max_grad_norm=2.0)
    found = []
    for on_gpu in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape)
        if on_gpu:
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            elsewhere = iter([_NotOnTheCPU(norm)])
            monkeypatch.setattr(nn.utils, "get_total_norm", lambda _, n=elsewhere: next(n))
        clip_gradients(model, config)
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


class _NotOnTheCPU(torch.Tensor):
    """A tensor that claims not to be on the CPU."""

    @staticmethod
    def __new__(cls, value):
        return value.as_subclass(cls)

    @property
    def is_cpu(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return False


def test_batches_are_those_of_the_task_and_plain_values_stay():
    class Two:
        steps_per_epoch = 2

        def train_batch(self, epoch, index):
            return Batch((torch.tensor([epoch]), index == 0), torch.tensor([index]))

    batches = TrainingBatches(Two(), torch.device("cpu"))
    for step in range(5):
        batches.prepare(step + 1)
        (epoch, first), target = batches.take(step)
        assert (epoch.item(), first, target.item()) == (step // 2, step % 2 == 0, step % 2)
