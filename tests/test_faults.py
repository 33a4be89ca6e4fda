"""Test damaged files, resource limits, concurrent commands and untrusted files.

No finished run is lost, no incomplete file is used, nothing is executed, and an error is one line.
"""

import errno
import io
import json
import math
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from bnrnn.runs import files
from bnrnn.runs.directory import RunDirectory, claim, is_held
from bnrnn.runs.files import write_atomic
from bnrnn.runs.find import find_runs, read_run
from bnrnn.runs.interrupt import Interruption
from bnrnn.runs.record import read_records
from bnrnn.settings.compose import literal
from bnrnn.train import Job
from tests.processes import Forked

TINY = [
    "task=text", "model=lstm", "model.hidden_size=4", "task.length=20", "task.batch_size=8",
    "max_steps=6", "validate_every=3", "log_every=1", "calibration_batches=2",
]  # fmt: skip


def write_text(folder):
    path = folder / "book.txt"
    words = ["time", "step", "gate", "cell", "state", "batch"]
    path.write_text("\n".join(" ".join(words[k % len(words) :]) for k in range(300)))
    return path


def environment(folder):
    return {"BNRNN_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def forked(folder, *arguments, **kwargs):
    """Run the command in a forked process."""
    return Forked(folder, *arguments, environment=environment(folder), **kwargs)


def started(folder, *arguments, env=(), **kwargs):
    """Run the command in a new interpreter."""
    return subprocess.Popen(
        [sys.executable, "-m", "bnrnn", *map(str, arguments)], cwd=folder,
        env=os.environ | environment(folder) | dict(env),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs,
    )  # fmt: skip


def ended(process):
    out, errors = process.communicate(timeout=200)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a text and a finished run on it."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder)
    code, _, errors = ended(forked(folder, *TINY, f"task.path={text}"))
    assert code == 0, errors
    return folder


@pytest.fixture
def run(trained, tmp_path, bnrnn_here):
    """Copy that run to the folder where `bnrnn_here` works; the text stays where it was."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    return only_run(tmp_path)


@pytest.fixture
def again(trained, bnrnn_here):
    """Return the command that trained the run, for more arguments."""
    return lambda *more: bnrnn_here(*TINY, f"task.path={trained / 'book.txt'}", *more)


def only_run(folder):
    (path,) = (file.parent for file in folder.glob("outputs/text/lstm/*/metrics.jsonl"))
    return path


def fails(done, *fragments):
    """Check that the error is one line, without a traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("bnrnn: error: ")]
    assert len(lines) == 1, done.stderr
    assert done.returncode in (2, 3, 4, 5, 6), done.stderr
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


# ---------------------------------------------------------------- F0, F24: refused commands


def test_a_refused_resume_changes_nothing(run, bnrnn_here):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for arguments in (["max_steps=3"], ["max_steps=9", "seed=1"], ["max_steps=9", "task.length=9"]):
        if arguments == ["max_steps=3"]:
            (run / "result.json").unlink()  # otherwise the run counts as finished: no error
            before.pop(run / "result.json")
        fails(bnrnn_here(f"resume={run}", *arguments))
        assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert bnrnn_here(f"resume={run}").returncode == 0
    assert read_run(run).result.steps == 6


def test_a_finished_run_that_goes_on_and_explodes_keeps_its_result(run, bnrnn_here):
    before = (run / "result.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnrnn.train.clip_gradients", lambda *args: torch.tensor(float("nan")))
        done = bnrnn_here(f"resume={run}", "max_steps=9")
    assert done.returncode == 5
    assert (run / "result.json").read_bytes() == before
    assert read_run(run).state == "failed"
    assert bnrnn_here(f"resume={run}", "max_steps=6").returncode == 0  # still complete at step 6


# ---------------------------------------------------------------- F1, F2: collisions


def test_commands_of_one_second_have_folders_of_their_own(trained, tmp_path):
    text = f"task.path={trained / 'book.txt'}"
    seeds = [0, 0, 1, 2]
    processes = [forked(tmp_path, *TINY, text, f"seed={seed}") for seed in seeds]
    assert [ended(process)[0] for process in processes] == [0] * 4
    runs = find_runs(tmp_path)
    assert sorted(run.seed for run in runs) == seeds
    assert all(run.state == "finished" for run in runs)


def test_claimed_folders_are_never_shared(tmp_path):
    first, second = claim(tmp_path / "runs", "now"), claim(tmp_path / "runs", "now")
    assert (first.path.name, second.path.name) == ("now", "now-2")
    assert is_held(first.path)
    first.discard()
    assert not first.path.exists()
    assert second.path.exists()  # only a folder that this process holds is removed
    second.__exit__()
    second.discard()
    assert second.path.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(number, trained, again, tmp_path, monkeypatch):
    """Some file systems of clusters have none. What another process may be using stays there."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    other = claim(tmp_path / "outputs" / "text" / "lstm", "of-another-process").path
    settings = (only_run(trained) / "config.yaml").read_text()
    (other / "config.yaml").write_text(settings.replace("seed: 0", "seed: 7"))
    half_written = other / f".last.pt{files._TEMPORARY}1"
    half_written.touch()
    for steps in (3, 6):
        done = again(f"max_steps={steps}", "resume=auto")
        assert done.returncode == 0
        assert "has no locks: train in it from one process only" in done.stderr
    assert half_written.exists()
    (run,) = find_runs(tmp_path / "outputs")
    assert (run.state, run.result.max_steps) == ("finished", 6)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_that_cannot_flush_folders(number, again, tmp_path, monkeypatch):
    """Such as VirtualBox's shared folders. A disk that fails is not one of them."""
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    done = again()
    if number == errno.EIO:
        fails(done, "cannot write", "Input/output error")
    else:
        assert done.returncode == 0
        assert read_run(only_run(tmp_path)).state == "finished"


def test_sweeps_of_one_second_share_nothing(trained, tmp_path):
    text = f"task.path={trained / 'book.txt'}"
    processes = [forked(tmp_path, "-m", *TINY, text, f"seed={seeds}") for seeds in ("0,1", "2,3")]
    assert [ended(process)[0] for process in processes] == [0, 0]
    assert sorted(run.seed for run in find_runs(tmp_path)) == [0, 1, 2, 3]
    assert not (tmp_path / "outputs" / "sweeps").exists()


# ---------------------------------------------------------------- F3, F7: the same numbers


@pytest.mark.parametrize("moment", ["final_test", "draw"])
def test_interrupted_between_steps_and_resumed_equals_uninterrupted(
    moment, again, tmp_path, monkeypatch
):
    """Dropout draws random numbers, and so does building a model for the test."""
    arguments = ["model.num_layers=2", "model.dropout=0.4", "validate_every=4"]
    assert again(*arguments, "max_steps=9", "outputs=whole").returncode == 0

    def interrupted(*args, **kwargs):
        torch.rand(7)
        os.kill(os.getpid(), signal.SIGTERM)
        return {} if moment == "draw" else original(*args, **kwargs)

    import bnrnn.train

    original = getattr(bnrnn.train, moment)
    with monkeypatch.context() as patch:
        patch.setattr(f"bnrnn.train.{moment}", interrupted)
        assert again(*arguments, "max_steps=4", "outputs=parts").returncode == 143
    assert again(*arguments, "max_steps=9", "outputs=parts", "resume=auto").returncode == 0
    (whole,), (parts,) = find_runs(Path("whole")), find_runs(Path("parts"))
    assert parts.values("bpc", "train", None) == whole.values("bpc", "train", None)
    a, b = (torch.load(run.path / "last.pt", weights_only=True)["model"] for run in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Gone(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_closed_terminal_stops_the_run_and_saves_it(again, tmp_path, monkeypatch):
    """The kernel and the shell both send SIGHUP, and nothing can be printed any more."""
    advance = Job.advance

    def hang_up(self, *values):
        advance(self, *values)
        if self.state.step == 4:
            patch.setattr(sys, "stderr", Gone())
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, lambda *args: None)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Job, "advance", hang_up)
            assert again("validate_every=100").returncode == 129
    finally:
        signal.signal(signal.SIGHUP, before)
    assert torch.load(only_run(tmp_path) / "last.pt", weights_only=True)["step"] == 4


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_them(again, monkeypatch):
    synced, saved = [], []
    monkeypatch.setattr("bnrnn.runs.metrics.os.fsync", lambda fd: synced.append(len(saved)))
    save = torch.save
    monkeypatch.setattr(
        "torch.save", lambda content, file: (saved.append(len(synced)), save(content, file))
    )
    assert again().returncode == 0
    with_training = saved[1:]  # the first is at step 0, before any record
    assert with_training
    assert sorted(set(with_training)) == sorted(with_training)  # there is a sync before each save


def test_lost_records_are_noticed(run, bnrnn_here):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-3]))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    fails(bnrnn_here(f"resume={run}", "max_steps=9"), "metrics.jsonl has lost 2 of the 8 records")
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "bnrnn.log"}
    assert after.items() <= before.items()
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    assert "is finished" in bnrnn_here(f"resume={run}").stderr


def test_a_lost_best_model_is_noticed_before_training_goes_on(run, bnrnn_here):
    (run / "best.pt").unlink()
    before = (run / "config.yaml").read_bytes()
    fails(bnrnn_here(f"resume={run}", "max_steps=9"), "has lost its best.pt, the model of step ")
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("how", ["resume={run}", "resume=auto"])
def test_a_finished_run_without_its_checkpoint_is_not_trained_again(how, run, again, bnrnn_here):
    (run / "last.pt").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    call = again if how == "resume=auto" else bnrnn_here
    assert "is finished" in call(how.format(run=run)).stderr
    fails(call(how.format(run=run), "max_steps=9"), "last.pt")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_torn_last_line_is_mended(run, again):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "spl')
    assert again("resume=auto", "max_steps=9").returncode == 0
    assert len(find_runs(run.parent)) == 1
    steps = [record.step for record in read_records(run / "metrics.jsonl")]
    assert sorted(steps) == sorted([*range(1, 10), 3, 6, 9, 9])


# ---------------------------------------------------------------- F4: untrusted folders


EVIL = {
    "hydra": {"callbacks": {"x": {"_target_": "os.system", "command": "touch executed"}}},
    "+hydra.callbacks.x": "{_target_: os.system, command: touch executed}",
    "hydra.run.dir": "../escaped",
    "unknown": 1,
    "task.name": "../../../escaped",
}


@pytest.mark.parametrize("key", EVIL)
@pytest.mark.parametrize("how", ["mode=evaluate run=", "resume="])
def test_settings_from_a_stranger_are_data(key, how, run, tmp_path, bnrnn_here):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    if key == "task.name":
        settings["task"]["name"] = EVIL[key]
    else:
        settings[key] = EVIL[key]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    *flags, last = how.split()
    fails(bnrnn_here(*flags, f"{last}{run}"), "config.yaml")
    assert not list(tmp_path.rglob("executed"))
    assert not list(tmp_path.rglob("escaped*"))


def test_places_of_a_stranger_are_not_used(run, tmp_path, bnrnn_here):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"outputs": str(tmp_path / "x"), "data_dir": str(tmp_path / "y"), "mode": "train"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert bnrnn_here("mode=evaluate", f"run={run}").returncode == 0
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_data_of_a_strangers_run_are_only_read(tmp_path, bnrnn_here):
    arguments = ["data.synthetic=150", "max_steps=2", "calibration_batches=2", "threads=1"]
    arguments += ["task=cnn4", "model=attentive_lstm", "model.hidden_size=4", "task.batch_size=10"]
    (tmp_path / "there").mkdir()
    assert bnrnn_here(*arguments, "data_dir=there").returncode == 0
    (run,) = tmp_path.glob("outputs/cnn4/attentive_lstm/*")
    assert bnrnn_here("mode=evaluate", f"run={run}").returncode == 0
    shutil.move(tmp_path / "there" / "cnn_synthetic", tmp_path)
    (tmp_path / "there" / "cnn_synthetic").mkdir()
    left = tmp_path / "there" / "cnn_synthetic" / ".cnn-synthetic-150.tgz.x.partial"
    left.mkdir()
    for command in (["mode=evaluate", f"run={run}"], [f"resume={run}", "max_steps=3"]):
        done = bnrnn_here(*command)
        fails(done, "there/cnn_synthetic/cnn-synthetic-150.tgz", "is only read; add data_dir=DIR")
        assert done.returncode == 3
        assert list(left.parent.iterdir()) == [left]
    assert bnrnn_here("mode=evaluate", f"run={run}", "data_dir=there").returncode == 0
    assert [path.name for path in left.parent.iterdir()] == ["cnn-synthetic-150.tgz"]

    # The usual folder is not the run's choice.
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"data_dir": "data"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "data").mkdir()
    assert bnrnn_here("mode=evaluate", f"run={run}").returncode == 0
    assert list(tmp_path.glob("data/*/*.tgz"))


@pytest.mark.parametrize("backslashes", range(4))
def test_interpolations_of_a_stranger_are_text(backslashes, run, bnrnn_here, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    text = "\\" * backslashes + "${oc.env:SECRET}"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["sample"]["prompt"] = settings["model"]["title"] = text
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    done = bnrnn_here("mode=sample", f"run={run}")
    fails(done, f"character {text[0]!r}")
    assert "hunter2" not in done.stderr
    assert bnrnn_here(f"resume={run}", "max_steps=9").returncode == 0
    assert "hunter2" not in (run / "config.yaml").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["title"] == text


@pytest.mark.parametrize(
    ("name", "how"),
    [("bnrnn.log", how) for how in ("file", "nowhere", "itself", "FIFO")]
    + [(name, how) for name in ("tb", "evaluate") for how in ("folder", "nowhere", "itself")],
)
def test_a_strangers_links_are_not_followed(name, how, run, tmp_path, bnrnn_here):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    if (run / name).exists():
        (run / name).rename(tmp_path / f"old {name}")
    if how == "FIFO":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(name if how == "itself" else tmp_path / how)
    for arguments in ([f"resume={run}", "max_steps=9"], ["mode=evaluate", f"run={run}"]):
        done = bnrnn_here(*arguments)
        fails(done, str(run / name), "not a regular file" if how == "FIFO" else "is a link")
        assert done.returncode == 4
    assert not (tmp_path / "nowhere").exists()
    assert not list((tmp_path / "folder").iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_may_be_a_link(run, tmp_path, bnrnn_here):
    (run / "best.pt").rename(tmp_path / "best.pt")
    (run / "best.pt").symlink_to(tmp_path / "best.pt")
    before = (tmp_path / "best.pt").read_bytes()
    assert bnrnn_here("mode=evaluate", f"run={run}").returncode == 0
    assert bnrnn_here(f"resume={run}", "max_steps=9").returncode == 0
    assert (tmp_path / "best.pt").read_bytes() == before


@pytest.mark.parametrize(("section", "name"), [("data", "name"), ("model", "title")])
def test_names_of_a_stranger_are_one_line(section, name, run, bnrnn_here):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    before = (run / "bnrnn.log").read_bytes()
    settings[section][name] = "x\ntouch executed\n#"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    fails(bnrnn_here(f"resume={run}", "max_steps=9"), f"{section}.{name} must be one line")
    assert (run / "bnrnn.log").read_bytes() == before


def test_the_log_of_a_run_has_no_control_characters(run, bnrnn_here):
    folder = run.rename(run.with_name("a\x1b[31mb"))
    assert bnrnn_here(f"resume={literal(str(folder))}").returncode == 0
    assert "a\\x1b[31mb is finished" in (folder / "bnrnn.log").read_text()


def test_outputs_that_link_to_nowhere_are_an_error(tmp_path, bnrnn_here):
    (tmp_path / "outputs").symlink_to("nowhere")
    fails(bnrnn_here("mode=tanh_derivative"), "cannot write to outputs/tanh_derivative")


@pytest.mark.parametrize("name", ["7", "007", "1_0", "1e3", "true"])
def test_a_folder_whose_name_hydra_reads_as_a_number_is_a_run(name, run, bnrnn_here):
    folder = run.rename(name)
    done = bnrnn_here("mode=evaluate", f"run={name}")
    assert done.returncode == 0, done.stderr  # with its own settings: others would not load
    assert len(list(folder.glob("evaluate/*/result.json"))) == 1
    assert bnrnn_here(f"resume={name}", "max_steps=9").returncode == 0
    assert read_run(folder).result.steps == 9
    fails(bnrnn_here(f"resume={name}0"), f"no run directory at {name}0")


# ---------------------------------------------------------------- F6, F21: damaged run folders


def nested_aliases():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 60)]
    return "\n".join(lines).encode()


CONTENT = {
    "empty": b"",
    "half": None,
    "flipped": None,
    "not UTF-8": b"\xff\xfe\x00\x80" * 9,
    "a list": b"[]\n",
    "a number": b"5\n",
    "an object": b"{}\n",
    "NaN": b'{"step": NaN, "seed": .nan}\n',
    "nested": b"[" * 100_000 + b"\n",
    "nested objects": b'{"a":' * 20_000 + b"\n",
    "aliases": nested_aliases(),
    "words": b"to be, or not to be: that is the question\n",
}
PLACES = ["missing", "a folder", "a FIFO", "a link to itself", "a dangling link"]
FILES = ["config.yaml", "run.json", "metrics.jsonl", "result.json", "last.pt", "best.pt"]
COMMANDS = ["resume=auto max_steps=9", "resume={run} max_steps=9", "mode=evaluate run={run}"]


def damage(path, how):
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a link to itself":
        path.symlink_to(path.name)
    elif how == "a dangling link":
        path.symlink_to("nowhere")
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
    elif how != "missing":
        path.write_bytes(CONTENT[how])


DAMAGES = [*CONTENT, *PLACES]
# By default, test every sixth of the 306 combinations of damage, file and command. Each damage is
# tested on one file, and each file with two or three of the commands.
CASES = [
    pytest.param(
        file, how, command, id=f"{file}-{how}-{command.split()[0]}",
        marks=[] if (i + j) % 6 == 1 and j // 6 == k else pytest.mark.slow,
    )
    for i, file in enumerate(FILES)
    for j, how in enumerate(DAMAGES)
    for k, command in enumerate(COMMANDS)
]  # fmt: skip


@pytest.mark.parametrize(("file", "how", "command"), CASES)
def test_a_damaged_file_is_named_and_nothing_else_is_begun(
    file, how, command, run, again, bnrnn_here
):
    damage(run / file, how)
    words = command.format(run=run).split()
    began = time.monotonic()
    done = again(*words) if words[0] == "resume=auto" else bnrnn_here(*words)
    assert time.monotonic() - began < 60
    assert "Traceback" not in done.stderr
    if done.returncode:
        fails(done)
    others = [path for path in run.parent.iterdir() if path != run]
    assert not others  # it resumed, or reported an error, but never started a second run
    if words[0] == "resume=auto" and done.returncode == 0:
        assert read_run(run).result.steps == 9


def test_a_damaged_run_of_another_task_is_in_nobodys_way(run, again):
    shutil.copytree(run, run.parents[2] / "ptb" / "bnlstm" / "old")
    other = run.parents[2] / "ptb" / "bnlstm" / "old"
    (other / "config.yaml").write_bytes(b"\xff")
    subject = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(subject | {"task": "ptb"}))
    assert again("resume=auto").returncode == 0


PARTS = {
    "model": [None, [], {"x": 1}, {"lstm.weight_ih_l0": "text"}],
    "task": [None, [], {}, {"symbols": [1]}],
    "data": [5, {}],
    "step": [None, "3", -1],
    "calibrated": ["many", -1],
    "training": [
        None, [], {}, {"loop": {}}, {"optimizer": {}, "loop": {"step": "x"}, "random": {}},
        {"optimizer": {"state": {0: 1}, "param_groups": []}, "loop": {}, "random": {"cpu": 1}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "value"),
    [
        # By default, test the last value of each part, which is the most realistic.
        pytest.param(p, v, marks=[] if v == PARTS[p][-1] else pytest.mark.slow)
        for p in PARTS
        for v in PARTS[p]
    ],
)
def test_a_checkpoint_with_parts_of_a_wrong_kind(part, value, run, bnrnn_here):
    content = torch.load(run / "last.pt", weights_only=True)
    torch.save(content | {part: value}, run / "last.pt")
    fails(bnrnn_here(f"resume={run}", "max_steps=9"))


def zeros(shape=(), dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda o, loop: o["state"].clear(), "its optimizer has lost its state"),
        (lambda o, loop: o["state"].update({99: {}}), "its optimizer is of another model"),
        (lambda o, loop: o["state"][1].pop("exp_avg"), "its optimizer is of another kind"),
        (lambda o, loop: o["state"][1].update(more=zeros()), "its optimizer is of another kind"),
        (lambda o, loop: o["state"][1].update(exp_avg=None), "exp_avg of its optimizer"),
        (lambda o, loop: o["state"][1].update(exp_avg=1.0), "exp_avg of its optimizer"),
        (lambda o, loop: o["state"][1].update(exp_avg=zeros()), "exp_avg of its optimizer"),
        (lambda o, loop: o["state"][1].update(step=zeros((1,))), "step of its optimizer"),
        (lambda o, loop: o["state"][1].update(exp_avg=o["state"][1]["exp_avg"].double()),
         "exp_avg of its optimizer"),
        (lambda o, loop: loop.update(step=5), "its loop is at step 5, not 6"),
        (lambda o, loop: loop.update(best_step=7), "its loop is at step 6"),
        (lambda o, loop: loop.update(stale=-1), "$.stale"),
        (lambda o, loop: loop.update(best=math.nan), "$.best"),
        (lambda o, loop: loop.update(seconds=math.nan), "$.seconds"),
        (lambda o, loop: loop["sums"].update(nll=math.inf), "$.sums"),
    ],
)  # fmt: skip
def test_an_optimizer_or_a_loop_that_no_run_has_saved(change, expected, run, bnrnn_here):
    content = torch.load(run / "last.pt", weights_only=True)
    change(content["training"]["optimizer"], content["training"]["loop"])
    torch.save(content, run / "last.pt")
    fails(bnrnn_here(f"resume={run}", "max_steps=9"), "last.pt is damaged: ", expected)


def test_a_sparse_state_of_the_optimizer(run, bnrnn_here):
    content = torch.load(run / "last.pt", weights_only=True)
    state = content["training"]["optimizer"]["state"][1]
    state["exp_avg"] = state["exp_avg"].to_sparse()
    torch.save(content, run / "last.pt")
    try:
        torch.load(run / "last.pt", weights_only=True)
        message = "last.pt is damaged: exp_avg of its optimizer"
    except Exception:  # PyTorch 2.14 loads no sparse tensors
        message = "last.pt holds more than tensors and plain data"
    fails(bnrnn_here(f"resume={run}", "max_steps=9"), message)


def test_the_options_of_the_optimizer_are_those_of_the_settings(run, bnrnn_here):
    whole = shutil.copytree(run, run.with_name("whole"))
    content = torch.load(run / "last.pt", weights_only=True)
    content["training"]["optimizer"]["param_groups"][0] |= {
        "betas": 5, "eps": "x", "amsgrad": True, "differentiable": True, "maximize": True,
        "weight_decay": 1e9,
    }  # fmt: skip
    torch.save(content, run / "last.pt")
    for folder in (run, whole):
        assert bnrnn_here(f"resume={folder}", "max_steps=9").returncode == 0
    ours, theirs = (
        torch.load(f / "last.pt", weights_only=True)["training"]["optimizer"] for f in (run, whole)
    )
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in ours["state"].items():
        assert all(torch.equal(v, theirs["state"][number][name]) for name, v in state.items())


@pytest.mark.parametrize(
    ("command", "value", "expected"),
    [
        ("resume=", math.nan, "best.pt is not finite in head.bias"),
        ("mode=sample run=", math.nan, "best.pt is not finite in head.bias"),
        ("mode=population run=", math.nan, "best.pt is not finite in head.bias"),
        # The cross-entropy is the difference of two logits, which overflows.
        ("resume=", 3e38, "the valid bpc of the best model is inf"),
        ("mode=evaluate run=", 3e38, "the valid bpc of the best model is inf"),
        ("mode=lengths lengths.lengths=[20] run=", 3e38, "result.json was not written"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_no_result(command, value, expected, run, bnrnn_here):
    content = torch.load(run / "best.pt", weights_only=True)
    content["model"]["head.bias"][::2] = value
    content["model"]["head.bias"][1::2] = -value
    torch.save(content, run / "best.pt")
    (run / "result.json").unlink()
    done = bnrnn_here(*f"{command}{run}".split())
    fails(done, expected)
    assert done.returncode == 5
    assert not list(run.rglob("result.json"))


def test_a_checkpoint_that_expands_is_not_loaded(run, bnrnn_here):
    import zipfile

    content = {"format": 1, "model": {"w": torch.zeros(10_000_000)}}
    torch.save(content, run / "big.pt")
    source = zipfile.ZipFile(run / "big.pt")
    with zipfile.ZipFile(run / "last.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    (run / "big.pt").unlink()
    assert (run / "last.pt").stat().st_size < 1_000_000
    fails(bnrnn_here(f"resume={run}", "max_steps=9"), "last.pt is damaged or cut short")


# ---------------------------------------------------------------- F9 to F12: limits and streams


@pytest.mark.parametrize(
    "most", [0, 4096, *(pytest.param(most, marks=pytest.mark.slow) for most in (512, 20_000))]
)
def test_a_disk_that_is_full_from_some_byte_on(most, trained, again, tmp_path):
    arguments = [*TINY, f"task.path={trained / 'book.txt'}", "kernel=reference"]
    code, _, errors = ended(forked(tmp_path, *arguments, limits={resource.RLIMIT_FSIZE: most}))
    lines = errors.splitlines()
    assert (code, [line for line in lines if "error: cannot write" in line] != []) == (6, True)
    assert "Traceback" not in errors
    done = again("kernel=reference", "resume=auto")
    assert done.returncode == 0, done.stderr
    assert len(find_runs(tmp_path)) == 1


def test_a_disk_that_fills_up_with_metrics_prints_no_traceback(trained, tmp_path):
    arguments = [*TINY, f"task.path={trained / 'book.txt'}", "kernel=reference", "max_steps=400"]
    process = forked(
        tmp_path, *arguments, "validate_every=2", limits={resource.RLIMIT_FSIZE: 25_000}
    )
    code, _, errors = ended(process)
    assert code == 6
    assert "error: cannot write" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("closed", [pytest.param((2,), marks=pytest.mark.slow), (0, 1, 2)])
def test_streams_that_are_closed(closed, trained, tmp_path):
    def close():
        for descriptor in closed:
            os.close(descriptor)

    process = started(
        tmp_path, *TINY, f"task.path={trained / 'book.txt'}",
        stdout=None, stderr=None, preexec_fn=close,
    )  # fmt: skip
    assert process.wait(200) == 0
    assert read_run(only_run(tmp_path)).state == "finished"


def test_a_pipe_that_nobody_reads_and_a_full_terminal(trained, tmp_path):
    process = started(tmp_path, "--help")
    process.stdout.close()
    assert process.wait(100) == 141
    assert process.communicate()[1] == ""
    arguments = [*TINY, f"task.path={trained / 'book.txt'}"]
    code, _, errors = ended(forked(tmp_path, *arguments, stdout=Path("/dev/full")))
    assert code == 6
    assert "cannot write to standard output" in errors
    assert "Traceback" not in errors
    assert read_run(only_run(tmp_path)).state == "finished"  # the run itself is intact


@pytest.mark.parametrize(
    ("kilobytes", "hidden"), [(4_000_000, 20_000), (600_000, 4)], ids=["training", "importing"]
)
def test_out_of_memory_is_one_line(kilobytes, hidden, trained, tmp_path):
    most = kilobytes * 1024

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    arguments = [*TINY, f"task.path={trained / 'book.txt'}", f"model.hidden_size={hidden}"]
    if hidden > 4:
        process = forked(tmp_path, *arguments, limits={resource.RLIMIT_AS: most})
    else:  # before torch is imported
        process = started(tmp_path, *arguments, preexec_fn=limit)
    code, _, errors = ended(process)
    assert code == 7
    (line,) = [line for line in errors.splitlines() if line.startswith("bnrnn: error:")]
    assert "out of memory" in line
    assert "Traceback" not in errors


# ---------------------------------------------------------------- F13: leftover files


def test_what_killed_processes_left_is_cleaned_at_the_next_start(run, again):
    (run / ".last.pt.tmp-0123abcd").write_bytes(b"half")
    empty = run.parent / "2020-01-01_00-00-00"
    empty.mkdir()
    shutil.copy(run / "config.yaml", empty)
    (empty / "bnrnn.log").write_text("")
    held = run.parent / "2020-01-01_00-00-01"
    held.mkdir()
    shutil.copy(run / "config.yaml", held)
    foreign = run.parent / "notes"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    settings = yaml.safe_load((held / "config.yaml").read_text())
    (held / "config.yaml").write_text(yaml.safe_dump(settings | {"seed": 77}))
    with RunDirectory(held):
        assert again("resume=auto", "max_steps=9").returncode == 0
    assert not (run / ".last.pt.tmp-0123abcd").exists()
    assert not empty.exists()
    assert held.exists()  # another process is training there
    assert (foreign / "mine.txt").exists()


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a", b"")
        os.umask(0o022)
        write_atomic(tmp_path / "b", b"")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o600, 0o644]


# ---------------------------------------------------------------- F15: unprintable characters


def test_names_that_the_terminal_cannot_print(trained, tmp_path):
    folder = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9-\xc3\xa9")
    os.mkdir(folder)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [*TINY, f"task.path={trained / 'book.txt'}"]
    code, _, errors = ended(started(Path(folder), *arguments, env=locale))
    assert code == 0, errors
    assert read_run(only_run(Path(folder))).state == "finished"


@pytest.mark.slow
def test_text_for_a_terminal_of_ascii(trained, tmp_path):
    folder = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9-\xc3\xa9")
    shutil.copytree(trained / "outputs", Path(folder) / "outputs")
    run = os.path.relpath(only_run(Path(folder)), folder)
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    assert ended(started(Path(folder), "mode=sample", f"run={run}", env=ascii_only))[0] == 0
