"""A run of several processes: it gives the results of one process, and survives losing one."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bnrnn.command import device
from tests import every_task
from tests.conftest import ROOT
from tests.processes import Forked
from tests.test_cli import TINY, assert_same_run, only_run, records, write_text
from tests.together import finished, ranks, workers_of

# Tolerance for a different order of sums in float64, over a few steps; no error exceeded 2e-14.
EXACT = 1e-10
SLOWLY = [*TINY, "max_steps=100000", "validate_every=50", "log_every=1", "max_valid_batches=2"]


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def train_every_task(folder, n, names):
    code = (
        "from pathlib import Path; from tests import every_task; "
        f"every_task.main(Path({str(folder / str(n))!r}), *{names!r})"
    )
    variables = {"PYTHONPATH": str(ROOT)}
    finished(ranks(folder, n, code=f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}",
                   environment=variables))  # fmt: skip


def assert_close_records(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, str):
                assert one[name] == value
            else:
                assert one[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def assert_close_runs(ours, theirs, tolerance):
    assert_close_records(records(ours), records(theirs), tolerance)
    mine, its = (torch.load(run / "best.pt", weights_only=True)["model"] for run in (ours, theirs))
    for name, value in mine.items():
        torch.testing.assert_close(value, its[name], rtol=tolerance, atol=tolerance)


FEW = ["noise", "words", "questions without padding"]


@pytest.mark.parametrize(
    ("n", "names"),
    [
        (2, FEW),
        pytest.param(2, [n for n in every_task.TASKS if n not in FEW], marks=pytest.mark.slow),
        pytest.param(3, list(every_task.TASKS), marks=pytest.mark.slow),
    ],
)
def test_processes_with_synchronised_statistics_train_as_one(tmp_path, n, names):
    for processes in (1, n):
        train_every_task(tmp_path, processes, names)
    for name in names:
        alone, together = (only_run(tmp_path / str(k) / name.replace(" ", "_")) for k in (1, n))
        assert_close_runs(together, alone, EXACT)
        result = json.loads((together / "result.json").read_text())
        assert result["processes"] == n


def test_local_statistics_are_of_each_part(tmp_path, text):
    """A process normalises by its own moments; population statistics average all processes."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from bnrnn import BNLSTM, processes
from bnrnn.command.launch import launched
from bnrnn.nn.share import within
here = launched()
processes.meet(here.rank, here.size, 0, 20)
torch.manual_seed(0)
lstm, x = BNLSTM(3, 4, max_length=5), torch.randn(5, 7, 3)
share = processes.share(7)
with within(share):
    output, _ = lstm(share.of(x))
torch.save([output, lstm.state_dict()], f"{{here.rank}}.pt")
"""
    finished(ranks(tmp_path, 2, code=code))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    from bnrnn import BNLSTM

    torch.manual_seed(0)
    lstm, x = BNLSTM(3, 4, max_length=5), torch.randn(5, 7, 3)
    parts = x[:, :3], x[:, 3:]
    moments = []
    for part, (output, _) in zip(parts, found, strict=True):
        alone = BNLSTM(3, 4, max_length=5)
        alone.load_state_dict(lstm.state_dict())
        torch.testing.assert_close(alone(part)[0], output)
        moments.append(alone.state_dict())
    for _, state in found:
        for name in state:
            if name.startswith("statistics") and not name.endswith("num_batches"):
                mean = (moments[0][name] + moments[1][name]) / 2
                torch.testing.assert_close(state[name], mean, rtol=1e-5, atol=1e-6)


def test_fully_sharded_processes_train_as_one(tmp_path):
    """FSDP2, `fully_shard`, with synchronised statistics; in mixed precision, too, it evaluates."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import copy, torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from bnrnn import BNLSTM, processes
from bnrnn.command.launch import launched

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = BNLSTM(3, 4, 2, max_length=5, synchronised=True, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.lstm(x)[0])

here = launched()
processes.meet(here.rank, here.size, 0, 20)
torch.manual_seed(0)
model, batches = Model(), torch.randn(3, 5, 8, 3, dtype=torch.float64)
mixed = copy.deepcopy(model)
for module in (model.lstm, model):
    fully_shard(module)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for x in batches:
    optimizer.zero_grad()
    model(x.chunk(here.size, 1)[here.rank]).square().mean().backward()
    optimizer.step()
state = model.state_dict()
whole = {{k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}}
fully_shard(mixed, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
mixed(batches[0])
assert mixed.eval()(batches[0]).dtype == torch.bfloat16
torch.save(whole, f"{{here.size}}-{{here.rank}}.pt")
"""
    for n in (1, 2):
        finished(ranks(tmp_path, n, code=code))
    alone, *together = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for state in together:
        for name, value in state.items():
            torch.testing.assert_close(value, alone[name], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    "statistics", ["local", pytest.param("synchronised", marks=pytest.mark.slow)]
)
def test_stopped_and_resumed_by_any_number(tmp_path, text, statistics):
    """Resuming with the same number of processes is bit-identical. With another number and
    synchronised statistics, results agree up to rounding."""
    common = ["task=text", f"task.path={text}", *TINY, f"statistics={statistics}", "max_steps=12"]
    finished(ranks(tmp_path, 2, *common, "outputs=whole"))
    whole = only_run(tmp_path / "whole")
    finished(ranks(tmp_path, 2, *common, "max_steps=6", "outputs=part"))
    part = only_run(tmp_path / "part")
    assert not (tmp_path / "part" / "text" / "bnlstm").joinpath("1").exists()
    copy = tmp_path / "copy"
    shutil.copytree(part, copy)
    finished(ranks(tmp_path, 2, *common, "outputs=part", "resume=auto"))
    assert_same_run(part, whole)
    if statistics == "synchronised":
        one = Forked(tmp_path, f"resume={copy}", "max_steps=12")
        _, errors = one.communicate()
        assert one.returncode == 0, errors
        assert_close_records(records(copy), records(whole), 1e-3)


def wait_for_step(run_folder, step, processes):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for file in Path(run_folder).glob("**/metrics.jsonl"):
            lines = file.read_text().splitlines()
            if any(f'"step": {step},' in line for line in lines):
                return file.parent
        assert all(p.returncode is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.05)
    raise AssertionError("no such step within a minute")


def the_line(errors, start):
    """The one line that a process prints when it ends with an error."""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("bnrnn")]
    assert line.startswith(start), errors
    return line


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, text, killed):
    common = ["task=text", f"task.path={text}", *SLOWLY]
    processes = ranks(tmp_path, 2, *common)
    wait_for_step(tmp_path, 60, processes)
    processes[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    other = processes[1 - killed]
    _, errors = other.communicate()
    assert time.monotonic() - began < 20
    assert other.returncode == 8
    the_line(errors, f"bnrnn, process {1 - killed}: error: process {1 - killed} has lost another")
    finished(ranks(tmp_path, 2, *common, "max_steps=150", "resume=auto"))
    finished(ranks(tmp_path, 2, *common, "max_steps=150", "outputs=whole"))
    assert_same_run(only_run(tmp_path / "outputs"), only_run(tmp_path / "whole"))


def test_a_process_that_hangs_is_noticed(tmp_path, text):
    processes = ranks(tmp_path, 2, "task=text", f"task.path={text}", *SLOWLY, "timeout=3")
    wait_for_step(tmp_path, 60, processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        _, errors = processes[0].communicate(30)
    finally:
        processes[1].send_signal(signal.SIGKILL)
    assert processes[0].returncode == 8
    assert "lost contact with another" in the_line(errors, "bnrnn, process 0: error: ")


def test_a_signal_to_one_process_stops_all_in_the_same_step(tmp_path, text):
    processes = ranks(tmp_path, 2, "task=text", f"task.path={text}", *SLOWLY)
    run = wait_for_step(tmp_path, 55, processes)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [143] * 2
    assert "resume with: bnrnn resume=" in the_line(errors[0], "bnrnn: SIGTERM")
    assert not any("bnrnn" in text for text in errors[1:])
    saved = torch.load(run / "last.pt", weights_only=True)["training"]["loop"]
    assert saved["step"] == records(run)[-1]["step"]


def test_a_full_disk_of_the_first_process_ends_all(tmp_path, text):
    common = ["task=text", f"task.path={text}", *TINY, "model.hidden_size=64"]
    finished(ranks(tmp_path, 2, *common, "max_steps=3"))
    run = only_run(tmp_path / "outputs")
    before = (run / "last.pt").read_bytes()
    full = {resource.RLIMIT_FSIZE: len(before) // 2}
    processes = ranks(tmp_path, 2, f"resume={run}", "max_steps=9", limits=full)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [6, 8]
    the_line(errors[0], "bnrnn, process 0: error: cannot write")
    the_line(errors[1], "bnrnn, process 1: error: process 1 has lost another")
    assert (run / "last.pt").read_bytes() == before


def test_what_is_refused(tmp_path, text):
    processes = ranks(tmp_path, 2, "mode=report")
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "runs in one process" in the_line(errors[0], "bnrnn, process 0: error")
    assert errors[1] == ""
    processes = ranks(tmp_path, 2, "task=text", f"task.path={text}", *TINY, "task.batch_size=3")
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "task.batch_size must be 4 or more" in the_line(errors[0], "bnrnn, process 0: error")
    assert not (tmp_path / "outputs").exists()


def test_commands_take_a_gpu_each(monkeypatch, tmp_path):
    """Without a GPU, this tests only which GPU a command chooses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"gpu{number}")
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def chosen(rank=None):
        """The choice of another process, which holds the GPU while the descriptor is open."""
        monkeypatch.setattr(device, "_gpu", None)
        return str(device.choose_device("auto", rank)), device._gpu

    (first, held), (second, _), (third, _) = chosen(), chosen(), chosen()
    assert (first, second, third) == ("cuda:0", "cuda:1", "cuda:0")  # two jobs share a GPU
    os.close(held)
    assert chosen()[0] == "cuda:0"
    assert [chosen(rank)[0] for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_the_runs_of_many_machines_are_one_report(tmp_path, bnrnn_here, text):
    for node, seed in (("node0", 0), ("node1", 1)):
        done = bnrnn_here("task=text", f"task.path={text}", *TINY, f"seed={seed}",
                          f"outputs={tmp_path / node}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        shutil.copytree(tmp_path / node, tmp_path / "outputs" / node)
    done = bnrnn_here("mode=report")
    assert done.returncode == 0, done.stderr
    (row,) = [
        line for line in (tmp_path / "outputs" / "report" / "report.md").read_text().splitlines()
        if line.startswith("| BN-LSTM")
    ]  # fmt: skip
    assert [cell.strip() for cell in row.split("|")][-3] == "2"  # seeds
    done = bnrnn_here("task=text", f"task.path={text}", *TINY, "seed=1", "resume=auto")
    assert "is finished" in done.stderr


# ---------------------------------------------------------------- torchrun itself


def torchrun(folder, *arguments, options=()):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options,
        "-m", "bnrnn", *map(str, arguments),
    ]  # fmt: skip
    variables = os.environ | {"OMP_NUM_THREADS": "1", "BNRNN_CACHE_DIR": str(folder / "cache")}
    variables |= {"MASTER_PORT": "0"}
    return subprocess.Popen(
        command, cwd=folder, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_starts_a_lost_process_again(tmp_path, text):
    common = ["task=text", f"task.path={text}", *SLOWLY, "max_steps=400"]
    launcher = torchrun(tmp_path, *common, options=["--standalone", "--max-restarts=1"])
    wait_for_step(tmp_path, 60, [launcher])
    os.kill(workers_of(launcher.pid)[1], signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, printed
    assert re.search(r"Resuming at step \d+ of", printed)
    finished(ranks(tmp_path, 2, *common, "outputs=whole"))
    assert_same_run(only_run(tmp_path / "outputs"), only_run(tmp_path / "whole"))


@pytest.mark.slow
def test_no_process_outlives_torchrun(tmp_path, text):
    launcher = torchrun(tmp_path, "task=text", f"task.path={text}", *SLOWLY)
    run = wait_for_step(tmp_path, 60, [launcher])
    workers = workers_of(launcher.pid)
    assert set(workers) == {0, 1}
    launcher.kill()
    printed, _ = launcher.communicate(timeout=60)  # returns when the last process ends
    for pid in workers.values():
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    assert "bnrnn: SIGTERM: resume with" in printed
    saved = torch.load(run / "last.pt", weights_only=True)["training"]["loop"]
    assert saved["step"] == records(run)[-1]["step"]


@pytest.mark.slow
def test_torchrun_ends_a_process_that_hangs(tmp_path, text):
    launcher = torchrun(tmp_path, "task=text", f"task.path={text}", *SLOWLY)
    wait_for_step(tmp_path, 60, [launcher])
    os.kill(workers_of(launcher.pid)[0], signal.SIGSTOP)
    began = time.monotonic()
    printed, _ = launcher.communicate(timeout=100)
    assert time.monotonic() - began < 60
    assert launcher.returncode == 1
    assert "bnrnn, process 1: error: process 1 lost contact with another process" in printed


# ---------------------------------------------------------------- two machines


@pytest.fixture
def two_machines():
    """Two connected network namespaces: the address of the first, and (namespace, device) of each.

    This requires root.
    """
    names = [f"bnrnn{os.getpid()}{end}" for end in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    if shutil.which("ip") is None or ip("netns", "add", names[0]).returncode != 0:
        pytest.skip("no network namespaces here: they take iproute2 and the rights of root")
    try:
        ip("netns", "add", names[1])
        devices = [f"v{os.getpid()}{end}" for end in "ab"]
        ip("link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for number, (name, device) in enumerate(zip(names, devices, strict=True), start=1):
            ip("link", "set", device, "netns", name)
            within = ["-n", name]
            ip(*within, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            for one in (device, "lo"):
                assert ip(*within, "link", "set", one, "up").returncode == 0
        yield "10.77.0.1", list(zip(names, devices, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_a_cable_that_is_cut_and_mended(tmp_path, text, two_machines):
    address, machines = two_machines

    def start(*more):
        return [
            subprocess.Popen(
                [
                    "ip", "netns", "exec", name,
                    sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    f"--node-rank={number}", f"--master-addr={address}", "--master-port=29511",
                    "-m", "bnrnn", "task=text", f"task.path={text}", *SLOWLY, *more,
                ],
                cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | {
                    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device,
                    "BNRNN_CACHE_DIR": str(tmp_path / "cache"),
                },
            )
            for number, (name, device) in enumerate(machines)
        ]  # fmt: skip

    launchers = start("timeout=5")
    wait_for_step(tmp_path, 60, launchers)
    name, device = machines[1]
    cable = ["ip", "-n", name, "link", "set", device]
    subprocess.run([*cable, "down"], check=True)
    began = time.monotonic()
    for number, launcher in enumerate(launchers):
        printed, _ = launcher.communicate(timeout=100)
        assert launcher.returncode == 1
        (line,) = [line for line in printed.splitlines() if line.startswith("bnrnn, process")]
        assert f"process {number} lost contact with another process" in line
    assert time.monotonic() - began < 60

    subprocess.run([*cable, "up"], check=True)
    for launcher in start("max_steps=400", "resume=auto"):
        printed, _ = launcher.communicate(timeout=100)
        assert launcher.returncode == 0, printed
    finished(ranks(tmp_path, 2, "task=text", f"task.path={text}", *SLOWLY, "max_steps=400",
                   "outputs=whole"))  # fmt: skip
    assert_same_run(only_run(tmp_path / "outputs"), only_run(tmp_path / "whole"))


# ---------------------------------------------------------------- submitit, by its local executor


@pytest.mark.slow
def test_a_sweep_of_jobs_of_two_processes_is_preempted_and_queued_again(tmp_path, text):
    """The shortest time limit of a job is a minute; the signal comes after half of it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    common = ["task=text", f"task.path={text}", *SLOWLY, "resume=auto"]
    command = [
        sys.executable, "-m", "bnrnn", "-m", "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=1", *common,
        "max_steps=5000", "max_epochs=1000", "seed=0,1",
    ]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "BNRNN_CACHE_DIR": str(tmp_path / "cache")}
    variables |= {"SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True)
    jobs = list(tmp_path.glob("outputs/sweeps/.submitit/[0-9]*"))
    logs = ["".join(p.read_text() for p in sorted(job.glob("*_0_log.*"))) for job in jobs]
    assert len(logs) == 2
    for log in logs:
        assert "bnrnn: SIGUSR1: resume with" in log
        assert re.search(r"Requeued job \d+", log)
        assert re.search(r"Resuming at step \d+ of", log)
