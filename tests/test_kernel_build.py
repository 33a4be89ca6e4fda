"""The compiled kernel's build: once, by one process, or not at all with a line that says why."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bnrnn.kernels import BuildError, build

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


def test_an_instruction_set_that_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build.instruction_sets() == ["avx2", "baseline"]
    widest = build.library_path()
    assert "-mavx2" in build.flags()
    monkeypatch.setenv("BNRNN_KERNEL_ISA", "avx2")
    assert build.library_path() == widest
    monkeypatch.setenv("BNRNN_KERNEL_ISA", "baseline")
    assert not any(flag.startswith("-m") for flag in build.flags())
    assert build.library_path() != widest
    for missing in ("avx512", "native"):
        monkeypatch.setenv("BNRNN_KERNEL_ISA", missing)
        with pytest.raises(BuildError, match=f"'{missing}': here it is one of avx2, baseline"):
            build.load.__wrapped__()


def test_a_library_that_cannot_be_loaded_is_an_error_of_the_build(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = build.library_path()
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    with pytest.raises(BuildError, match="cannot be loaded: delete it"):
        build.load.__wrapped__()
