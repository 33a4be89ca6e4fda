"""Test the command: every task, every mode, resuming, and wrong input."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from bnrnn import __version__
from bnrnn.datasets.mnist import MNIST
from bnrnn.runs.find import read_run
from bnrnn.settings import compose
from bnrnn.tasks import CharacterTask, pixels
from tests.accuracy import assert_rounded
from tests.conftest import DATA, InProcess, needs_data
from tests.processes import Forked

TINY = [
    "model.hidden_size=8", "task.length=20", "task.batch_size=8", "max_steps=6",
    "validate_every=3", "log_every=2", "calibration_batches=2",
]  # fmt: skip


def write_text(folder):
    """Write a small corpus, the same on every machine, and return its path."""
    words = "the cell keeps what its gates let in and forgets what they let go"
    words = words.split()
    lines = (" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(150))
    path = folder / "book.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def forked(tmp_path, *arguments, **kwargs):
    """Run the command in a separate process, to test a signal, a limit or a lock."""
    environment = {"BNRNN_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return Forked(tmp_path, *arguments, environment=environment, **kwargs)


@pytest.fixture
def bnrnn(bnrnn_here):
    """Return a function that runs the command in this process; it must succeed if `check`."""

    def run(*arguments, check=True):
        done = bnrnn_here(*arguments)
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run


def only_run(folder):
    (path,) = {file.parent for file in Path(folder).glob("**/metrics.jsonl")}
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a text and a finished run on it, with the TINY settings."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder)
    process = forked(folder, "task=text", f"task.path={text}", *TINY)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return text, only_run(folder)


@pytest.fixture
def run(trained, tmp_path, bnrnn):
    """Copy that run to the default output folder of this test; the text stays where it was."""
    _, original = trained
    copied = tmp_path / "outputs" / "text" / "bnlstm" / original.name
    shutil.copytree(original, copied)
    return copied


def records(run):
    """Return the metrics records without the time, which differs between runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(ours, theirs):
    """Check that the metrics, the weights and the results are bit-identical."""
    assert records(ours) == records(theirs)
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (ours, theirs))
    for part in ("model", "task"):
        for name, value in a[part].items():
            other = b[part][name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
    for key, ours_state in a["training"]["optimizer"]["state"].items():
        for name, value in ours_state.items():
            assert torch.equal(value, b["training"]["optimizer"]["state"][key][name]), (key, name)
    results = [json.loads((run / "result.json").read_text()) for run in (ours, theirs)]
    for key in ("valid", "test", "best_step", "steps"):
        assert results[0][key] == results[1][key]


def assert_error(done, exit_code, *fragments):
    """Check the exit code, and that the error is one line without a traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("bnrnn: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == exit_code, done.stderr
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


# ---------------------------------------------------------------- runs


def test_a_run_directory_holds_what_it_should(bnrnn, tmp_path, text):
    done = bnrnn("task=text", f"task.path={text}", *TINY)
    run = only_run(tmp_path / "outputs" / "text" / "bnlstm")
    assert {entry.name for entry in run.iterdir()} == {
        "run.json", "config.yaml", "bnrnn.log", "metrics.jsonl", "tb", "last.pt", "best.pt",
        "result.json",
    }  # fmt: skip
    assert "test  bpc" in done.stdout
    assert "\r" not in done.stderr  # no progress bar, because stderr is not a terminal
    assert "valid bpc" in (run / "bnrnn.log").read_text()

    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 6
    assert (result["data"].partition(":")[0], result["whole_data"]) == (str(text), True)
    assert result["kernel"] == "cpu"
    assert result["calibrated"] > 2  # the whole training set, not the sample used in a validation
    assert set(result) >= {"seed", "torch", "bnrnn", "commit", "machine", "wall_seconds", "command"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optimizer"] == {
        "name": "adam", "lr": 0.002, "max_grad_norm": 1.0, "clip": "norm",
        "lr_decay_after": None, "lr_decay": None,
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_on": "corrected",
    }  # fmt: skip

    found = records(run)
    assert [r["step"] for r in found if r["split"] == "train"] == [2, 4, 6]
    validations = [(r["step"], r["statistics"]) for r in found if r["split"] == "valid"]
    assert validations == [(s, k) for s in (3, 6) for k in ("population", "batch")]
    last = torch.load(run / "last.pt", weights_only=True)
    assert last["training"]["loop"]["step"] == 6


def test_tensorboard_has_curves_gammas_and_settings(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    tags = events.Tags()
    assert {"bpc/train", "bpc/valid_population", "bpc/valid_batch"} <= set(tags["scalars"])
    gammas = [e.value for e in events.Scalars("gamma_mean/lstm.gamma_hh_l0")]
    assert [round(gamma, 1) for gamma in gammas] == [0.1, 0.1]
    state = torch.load(run / "last.pt", weights_only=True)["model"]
    smallest = state["lstm.statistics.c_l0.var"].min().item()
    found = events.Scalars("population_variance/lstm.statistics.c_l0")[-1].value
    assert found == pytest.approx(smallest, rel=1e-6)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert "gamma/lstm.gamma_hh_l0" in tags["histograms"]
    assert any("config" in tag for tag in tags["tensors"])


@pytest.mark.numeric(repeat=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_losses(bnrnn, tmp_path, text, monkeypatch, dtype):
    """Check the losses of short runs; explain in the commit message why they change.

    The golden losses are from training in float64, with initial weights drawn in float32. The last
    digits of these weights differ between processors; in float32, the last digits of every other
    number differ too. This changes the losses by at most 2e-7; the tolerance of eight roundings is
    4e-6.
    """
    build = CharacterTask.build_model
    monkeypatch.setattr(CharacterTask, "build_model", lambda *settings: build(*settings).to(dtype))
    bnrnn(
        "-m", "task=text", f"task.path={text}", "model=lstm,bnlstm,bn_input", *TINY,
        "optimizer.lr=0.02", "max_steps=12", "log_every=4",
    )  # fmt: skip
    for model, expected in GOLDEN.items():
        run = only_run(tmp_path / "outputs" / "text" / model)
        bpc = torch.tensor([r["bpc"] for r in records(run) if r["split"] == "train"])
        assert_rounded(bpc, torch.tensor(expected), operations=8)


GOLDEN = {
    "lstm": [4.2369177, 3.9259055, 3.6976092],
    "bnlstm": [4.2737908, 4.1103243, 3.9165733],
    "bn_input": [4.1630726, 3.8158281, 3.5413967],
}


# Use large batches: the final test takes the whole training and test set, regardless of max_steps.
TASKS = {
    "mnist": ["task.batch_size=2000", "model.hidden_size=2"],
    "pmnist": ["task.batch_size=2000", "model.hidden_size=2"],
    "ptb": ["task.batch_size=1000", "model.hidden_size=8"],
    "text8": ["task.batch_size=1000", "model.hidden_size=8"],
    "pydocs": ["task.batch_size=500", "model.hidden_size=8"],
}
FOLDERS = {"mnist": "mnist", "pmnist": "mnist", "ptb": "ptb", "text8": "text8"}
MODELS = ["lstm", "bnlstm", "bn_input", "bn_input_sequence"]
FAST = {("pydocs", "bnlstm")}


@pytest.mark.parametrize(
    ("task", "model"),
    [
        pytest.param(
            task,
            model,
            marks=[
                *([needs_data(FOLDERS[task])] if task in FOLDERS else []),
                *([] if (task, model) in FAST else [pytest.mark.slow]),
            ],
        )
        for task in TASKS
        for model in MODELS
    ],
)
def test_every_task_with_every_model_on_real_data(bnrnn, tmp_path, task, model):
    bnrnn(f"task={task}", f"model={model}", f"data_dir={DATA}", "max_steps=2",
        "calibration_batches=2", "max_valid_batches=2", *TASKS[task],
    )  # fmt: skip
    run = only_run(tmp_path / "outputs" / task / model)
    assert json.loads((run / "result.json").read_text())["steps"] == 2


@needs_data("mnist")
def test_some_images_of_mnist(bnrnn, tmp_path, monkeypatch):
    """Use only the first images of each part, because the final test takes all images."""
    load = pixels.load_mnist

    def first_hundreds(data_dir):
        parts = vars(load(data_dir)).items()
        return MNIST(**{name: part[:200] for name, part in parts})

    monkeypatch.setattr(pixels, "load_mnist", first_hundreds)
    arguments = ["task.batch_size=100", "model.hidden_size=4", "max_steps=2"]
    bnrnn("task=pmnist", "model=lstm", f"data_dir={DATA}", *arguments)
    run = read_run(only_run(tmp_path / "outputs" / "pmnist" / "lstm"))
    assert (run.state, run.result.steps) == ("finished", 2)
    assert set(run.result.test) == {"accuracy", "cross_entropy"}


@needs_data("ptb")
def test_data_mode_only_fetches_and_verifies(tmp_path, bnrnn_here):
    done = bnrnn_here("mode=data", "task=ptb", f"data_dir={DATA}")
    assert "5,059,550 / 396,412 / 446,184 characters, 50 symbols" in done.stderr
    assert not list(tmp_path.glob("outputs/**/*.pt"))


def test_a_sweep_leaves_no_state_from_one_job_in_the_next(bnrnn, tmp_path, text):
    arguments = ["task=text", f"task.path={text}", *TINY]
    bnrnn("-m", "model=lstm,bnlstm", "seed=1,0", *arguments)
    bnrnn("model=bnlstm", "seed=0", "outputs=alone", *arguments)
    jobs = (tmp_path / "outputs" / "text" / "bnlstm").iterdir()
    (last_job,) = (
        job for job in jobs if json.loads((job / "result.json").read_text())["seed"] == 0
    )
    assert_same_run(last_job, only_run(tmp_path / "alone"))
    assert not (tmp_path / "outputs" / "sweeps").exists()


def test_evaluate_tests_again_to_the_same_numbers(bnrnn, run):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    done = bnrnn("mode=evaluate", f"run={run}")
    (again,) = (run / "evaluate").glob("*/result.json")
    again, first = json.loads(again.read_text()), json.loads((run / "result.json").read_text())
    assert again["test"] == first["test"]
    assert again["valid"] == first["valid"]
    assert f"{first['test']['bpc']:.4f}" in done.stdout
    assert all(file.read_bytes() == content for file, content in before.items())


def test_sample_writes_text_of_the_corpus(bnrnn, trained, run):
    text, _ = trained
    arguments = ["mode=sample", f"run={run}", "sample.length=40", "sample.prompt=the cell"]
    done = bnrnn(*arguments)
    written = done.stdout.removesuffix("\n")
    assert written.startswith("the cell")
    assert len(written) == len("the cell") + 40
    assert set(written) <= set(text.read_text())
    assert bnrnn(*arguments).stdout == done.stdout
    assert bnrnn(*arguments, "seed=1").stdout != done.stdout
    assert_error(
        bnrnn("mode=sample", f"run={run}", "sample.prompt=Q", check=False),
        3,
        "character 'Q'",
    )


def test_version(bnrnn_here):
    done = bnrnn_here("--version")
    assert (done.returncode, done.stdout) == (0, f"bnrnn {__version__}\n")


def test_help_is_for_a_person(bnrnn_here):
    text = bnrnn_here("--help").stdout
    for fragment in ("bnrnn task=ptb model=bnlstm", "resume=auto", "Exit codes"):
        assert fragment in text
    for group in compose.GROUPS:
        # Match up to the next group, or to the empty line after the last one.
        (listed,) = re.findall(rf"^  {group}=  (.*?)(?=^  \w+=|^$)", text, re.DOTALL | re.MULTILINE)
        assert set(compose.options(group)) <= set(listed.replace("|", " ").split())


def test_help_and_wrong_settings_need_no_torch():
    code = "import sys, bnrnn.command.cli; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- resuming


def test_resumed_equals_uninterrupted(bnrnn, tmp_path, text):
    """Dropout and noise draw random numbers; the runs stop in the middle of an epoch."""
    arguments = [
        "task=text", f"task.path={text}", *TINY, "model.num_layers=2", "model.dropout=0.3",
        "max_steps=40", "validate_every=7", "model.zoneout_cell=0.2", "model.hidden_dropout=0.1",
        "model.weight_dropout=0.1", "model.output_dropout=0.1", "model.stabilizer=1",
    ]  # fmt: skip
    bnrnn(*arguments, "outputs=whole")
    bnrnn(*arguments, "max_steps=17", "outputs=parts")
    first = only_run(tmp_path / "parts")
    bnrnn(f"resume={first}", "max_steps=29")
    bnrnn(*arguments, "outputs=parts", "resume=auto")
    whole = only_run(tmp_path / "whole")
    # A run validates at its last step. The uninterrupted run has no records of these steps.
    ends = {17, 29}
    kept = [r for r in records(first) if r["step"] not in ends]
    assert kept == [r for r in records(whole) if r["step"] not in ends]
    a, b = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (first, whole))
    for name, value in a.items():
        if not name.startswith("lstm.statistics"):  # averaged again in those validations
            assert torch.equal(value, b[name]), name


INTERRUPTED = [
    *TINY, "task=text", "model.num_layers=2", "model.dropout=0.3", "max_steps=120",
    "validate_every=40", "checkpoint_minutes=0.001",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a text and an uninterrupted run on it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    text = write_text(folder)
    process = forked(folder, *INTERRUPTED, f"task.path={text}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return text, only_run(folder)


@pytest.mark.parametrize(
    "signum",
    [  # By default, test_words.py tests the signals that have a handler.
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)  # fmt: skip
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    bnrnn, tmp_path, uninterrupted, signum
):
    text, whole = uninterrupted
    process = forked(tmp_path, *INTERRUPTED, f"task.path={text}", "outputs=parts")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("**/last.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.4))
    assert process.poll() is None, "the run was over before it could be stopped"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    run = only_run(tmp_path / "parts")
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum
        assert "resume with: bnrnn resume=" in errors
        assert "Traceback" not in errors
    assert not (run / "result.json").exists()

    bnrnn(f"resume={run}")
    assert_same_run(run, whole)
    assert not [f for f in run.iterdir() if f.name.startswith(".")]


def test_a_finished_run_that_goes_on_is_unfinished(run, tmp_path):
    assert (run / "result.json").exists()
    process = forked(tmp_path, f"resume={run}", "max_steps=1000000", "max_epochs=1000000")
    deadline = time.monotonic() + 60
    while records(run)[-1]["step"] < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    stopped = read_run(run)
    assert (stopped.state, stopped.result.steps) == ("stopped", 6)


def test_resume_auto_starts_goes_on_and_says_when_finished(bnrnn, tmp_path, text):
    arguments = ["task=text", f"task.path={text}", *TINY, "resume=auto"]
    bnrnn(*arguments, "max_steps=3")
    bnrnn(*arguments)
    run = only_run(tmp_path / "outputs")
    assert json.loads((run / "result.json").read_text())["steps"] == 6
    done = bnrnn(*arguments)
    assert f"{run.name} is finished: test bpc" in done.stderr
    bnrnn(*arguments, "seed=1")  # other settings start a new run
    assert len(list((tmp_path / "outputs" / "text" / "bnlstm").iterdir())) == 2


def test_a_resumed_run_keeps_its_settings(bnrnn, run):
    done = bnrnn(f"resume={run}", "max_steps=9", "optimizer.lr=0.1", check=False)
    assert_error(done, 2, "optimizer.lr is 0.002 in", "not 0.1")


def test_two_processes_cannot_train_in_one_run_directory(bnrnn, run):
    import fcntl

    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = bnrnn(f"resume={run}", "max_steps=9", check=False)
    os.close(descriptor)
    assert_error(done, 6, "another process is training in")
    done = bnrnn(f"resume={run}")  # with its own settings, not with the refused ones
    assert f"{run.name} is finished" in done.stderr


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "exit_code", "fragments"),
    [
        (["task=ptbb"], 2, ["no task=ptbb", "did you mean ptb?", "task may be an4, cnn, cnn4"]),
        (["model=bnlsm"], 2, ["did you mean bnlstm?"]),
        (["optimizer.lrr=1"], 2, ["no setting 'optimizer.lrr'", "did you mean optimizer.lr?"]),
        (["task.lenght=9"], 2, ["did you mean task.length?"]),
        (["lr=1"], 2, ["did you mean optimizer.lr?"]),
        (["+nonsense=1"], 2, ["no setting 'nonsense'"]),
        (["seed=abc"], 2, ["seed must be an integer, got 'abc'"]),
        (["optimizer.lr=-1"], 2, ["optimizer.lr must be positive, got -1.0"]),
        (["model.input_norm=group"], 2, ["one of none, frame, sequence, layer, got 'group'"]),
        (["model.hidden_size=1", "model.cell_norm=layer"], 2, ["model.hidden_size must be 2 or"]),
        (["model.zoneout_cell=1"], 2, ["model.zoneout_cell must be in [0, 1), got 1.0"]),
        (["mode=tarin"], 2, ["mode must be one of train, data, evaluate, sample, answer"]),
        (["nonsense"], 2, ["cannot read 'nonsense'", "key=value"]),
        (["task.batch_size=1"], 2, ["task.batch_size must be 2 or more for model=bnlstm"]),
        (["task=text"], 2, ["add task.path=FILE"]),
        (["mode=evaluate"], 2, ["add run=DIR"]),
        (["device=cuda:99"], 2, ["device=cuda:99: there are", "use device=auto"]),
        (["resume=nowhere"], 4, ["no run directory at nowhere"]),
        (["-m", "resume=nowhere"], 2, ["resume=auto"]),
        (["task=text", "task.path=nowhere.txt"], 3, ["nowhere.txt does not exist"]),
    ],
)
def test_wrong_settings(tmp_path, bnrnn_here, arguments, exit_code, fragments):
    done = bnrnn_here(*arguments)
    assert_error(done, exit_code, *fragments)
    assert not list(tmp_path.glob("outputs/**/*"))  # no run was started


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is empty"),
        (b"caf\xe9 " * 1000, "is not UTF-8: byte 3"),
        (b"too short " * 90, "lower task.length (20) or task.batch_size (64)"),
    ],
)
def test_unusable_text(tmp_path, bnrnn_here, content, fragment):
    (tmp_path / "bad.txt").write_bytes(content)
    done = bnrnn_here("task=text", "task.path=bad.txt", *TINY, "task.batch_size=64")
    assert_error(done, 3, fragment)
    assert not list(tmp_path.glob("outputs/**/*"))


def test_missing_data_without_network(tmp_path, bnrnn_here, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server listens there
    done = bnrnn_here("task=ptb")
    assert_error(done, 3, "ptb.train.txt", "data_dir")
    assert not list(tmp_path.glob("data/**/*.txt"))


def test_data_with_the_wrong_hash_or_cut_short(tmp_path, bnrnn_here):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08\x00 cut short")
    done = bnrnn_here("task=pmnist")
    assert_error(done, 3, "train-images-idx3-ubyte.gz is not the expected file", "delete it")
    assert (folder / "train-images-idx3-ubyte.gz").exists()


def test_a_loss_that_is_not_finite_stops_the_run(bnrnn, tmp_path, text):
    done = bnrnn("task=text", f"task.path={text}", *TINY, "optimizer=sgd", "optimizer.lr=1e30",
        "optimizer.max_grad_norm=1e30", "max_steps=50", check=False,
    )  # fmt: skip
    assert_error(done, 5, "at step", "optimizer.lr")
    run = only_run(tmp_path / "outputs")
    assert not (run / "result.json").exists()


def test_a_kernel_that_cannot_run_the_model_starts_nothing(bnrnn_here, tmp_path, text):
    done = bnrnn_here("task=text", f"task.path={text}", *TINY, "model=bnlstm", "kernel=torch.lstm")
    assert_error(done, 2, "kernel 'torch.lstm' cannot run this: it normalises nothing")
    assert list((tmp_path / "outputs").rglob("*")) == []


def test_a_gradient_of_rounding_errors_is_warned_of_once(bnrnn, tmp_path):
    # Each line is as long as a sequence, so all sequences often begin with the same characters.
    lines = ("-" * 8 + "".join(random.Random(i).choices("abcd", k=11)) for i in range(400))
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    arguments = [*TINY, "log_every=1", "max_steps=60", "max_valid_batches=1"]
    done = bnrnn("task=text", "task.path=lines.txt", *arguments)
    largest = max(
        r["grad_norm"] for r in records(only_run(tmp_path / "outputs")) if "grad_norm" in r
    )
    assert largest > 1e6
    assert done.stderr.count("rounding errors") == 1
    assert done.stderr.count("all sequences of this batch begin with the same frame") == 1
    assert "Try a lower model.gamma_init" in done.stderr


def test_a_disk_that_fills_while_a_checkpoint_is_written(bnrnn, tmp_path, text):
    arguments = ["task=text", f"task.path={text}", *TINY, "max_steps=3", "model.hidden_size=64"]
    bnrnn(*arguments)
    run = only_run(tmp_path / "outputs")
    before = (run / "last.pt").read_bytes()

    # A write beyond this size fails, as it does on a full disk.
    limits = {resource.RLIMIT_FSIZE: len(before) // 2}
    process = forked(tmp_path, f"resume={run}", "max_steps=9", limits=limits)
    out, errors = process.communicate()
    done = InProcess(process.returncode, out, errors)
    assert_error(done, 6, "cannot write", "outputs=DIR")
    assert (run / "last.pt").read_bytes() == before
    assert not [f for f in run.iterdir() if f.name.startswith(".")]
    bnrnn(f"resume={run}", "max_steps=9")  # nothing was lost
    assert json.loads((run / "result.json").read_text())["steps"] == 9


def test_an_output_folder_that_cannot_be_written_to(bnrnn, tmp_path, text):
    (tmp_path / "file").write_text("not a folder")
    done = bnrnn("task=text", f"task.path={text}", *TINY, "outputs=file/outputs", check=False)
    assert_error(done, 6, "cannot write to", "outputs=DIR")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(bnrnn, tmp_path, text):
    (tmp_path / "outputs").mkdir(mode=0o555)
    done = bnrnn("task=text", f"task.path={text}", *TINY, check=False)
    assert_error(done, 6, "cannot write to", "outputs=DIR")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_unusable_checkpoints(bnrnn, tmp_path, run):
    good = (run / "last.pt").read_bytes()
    content = torch.load(run / "last.pt", weights_only=True)

    def resumed():
        return bnrnn(f"resume={run}", "max_steps=9", check=False)

    (run / "last.pt").write_bytes(good[: len(good) // 2])
    assert_error(resumed(), 4, "last.pt is damaged or cut short")
    (run / "last.pt").write_bytes(b"")
    assert_error(resumed(), 4, "last.pt is damaged or cut short")

    torch.save({**content, "format": 99}, run / "last.pt")
    assert_error(resumed(), 4, "has checkpoint format 99, this bnrnn reads format 1")

    torch.save({"format": 1, "config": {}}, run / "last.pt")
    assert_error(resumed(), 4, "lacks calibrated, data, model, step, task")

    other = {k: v for k, v in content["model"].items() if not k.endswith("gamma_hh_l0")}
    torch.save({**content, "model": other}, run / "last.pt")
    assert_error(resumed(), 4, "last.pt is of another model", "gamma_hh_l0")

    for save in (
        lambda x, path: torch.save(x, path),
        lambda x, path: path.write_bytes(pickle.dumps(x)),
    ):
        save({**content, "surprise": Hostile()}, run / "last.pt")
        assert_error(resumed(), 4, "last.pt")
        assert not (tmp_path / "executed").exists()

    (run / "last.pt").write_bytes(good)
    assert resumed().returncode == 0


def test_a_checkpoint_of_other_data(bnrnn, trained, run, text):
    text.write_text(trained[0].read_text().upper())
    done = bnrnn("mode=evaluate", f"run={run}", f"task.path={text}", check=False)
    assert_error(done, 4, "other symbols")
    text.write_text(trained[0].read_text()[::-1])
    done = bnrnn("mode=evaluate", f"run={run}", f"task.path={text}", check=False)
    assert_error(done, 4, "was trained on other data than these")
    assert not (run / "evaluate").exists()


def test_a_failed_job_does_not_stop_the_sweep_but_fails_it(bnrnn, tmp_path, text):
    done = bnrnn("-m", "task=text", f"task.path={text}", *TINY, "task.batch_size=1,8", "seed=0,1",
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr  # Hydra's line
    assert len(list((tmp_path / "outputs").glob("text/*/*/result.json"))) == 2
