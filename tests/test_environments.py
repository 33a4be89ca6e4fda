"""The command where the environment is not what it should be: one line, and the right exit code."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_cli import TINY, write_text

COMMAND = [sys.executable, "-m", "bnrnn"]


def one_line(done):
    (line,) = done.stderr.splitlines()
    assert line.startswith("bnrnn: error: ")
    return line


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TORCHELASTIC_RESTART_COUNT": "abc"}, "TORCHELASTIC_RESTART_COUNT must be 0 or more"),
        ({"SLURM_RESTART_COUNT": "-1"}, "SLURM_RESTART_COUNT must be 0 or more, got '-1'"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "RANK must be 0 or more, got ''"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE must be 0 or more"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"SUBMITIT_EXECUTOR": "x"}, "SUBMITIT_EXECUTOR is set, but this is no job of submitit"),
    ],
    ids=str,
)
def test_variables_of_a_launcher_that_make_no_sense(bnrnn_here, monkeypatch, variables, message):
    if "WORLD_SIZE" in variables:
        variables = {**variables, "TORCHELASTIC_RUN_ID": "x"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = bnrnn_here("mode=data", "task=pydocs")
    assert done.returncode == 2
    assert message in one_line(done)


def test_a_deleted_working_directory(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for arguments in (["--help"], ["mode=data"]):
        done = subprocess.run(
            ["sh", "-c", f'cd "{gone}" && rmdir "{gone}" && exec "$@"', "sh", *COMMAND, *arguments],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        gone.mkdir()
        assert done.returncode == 2
        assert "the current folder cannot be used (No such file or directory)" in one_line(done)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebooks_backend(tmp_path, backend):
    """Notebooks set MPLBACKEND for their shells, where that backend cannot be imported."""
    run = [f"task.path={write_text(tmp_path)}", f"outputs={tmp_path / 'runs'}", *TINY]
    for arguments in (["task=text", *run], ["mode=report", f"outputs={tmp_path / 'runs'}"]):
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True,
            env=os.environ | {"MPLBACKEND": backend},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("runs/text/*/*/result.json")
    assert json.loads(result.read_text())["test"]
    assert (tmp_path / "runs" / "report" / "report.html").exists()


def test_tensorflow_is_not_imported(tmp_path):
    (tmp_path / "tensorflow.py").write_text("print('TensorFlow is here')")
    done = subprocess.run(
        [*COMMAND, "task=text", f"task.path={write_text(tmp_path)}", *TINY,
         f"outputs={tmp_path / 'runs'}"],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])},
    )  # fmt: skip
    assert list(tmp_path.glob("runs/text/*/*/tb/*"))
    assert "TensorFlow" not in done.stdout


def test_the_first_cpu_is_the_cpu(bnrnn_here, tmp_path):
    text = f"task.path={write_text(tmp_path)}"
    assert bnrnn_here("task=text", text, *TINY, "device=cpu:0").returncode == 0
