"""The benchmarks run and write their output. No test checks speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import family, few_sequences, gpu, processes, profile, reader, unnormalised
from bench import recurrence as bench
from bench.plain_loop import PlainLoopBNLSTM
from bnrnn import BNLSTM
from bnrnn.nn.attentive_reader import VARIANTS
from tests.accuracy import assert_as_accurate


@pytest.mark.parametrize(
    "benchmark", [bench, family, few_sequences, processes, profile, reader, unnormalised]
)
def test_a_folder_that_cannot_be_made_ends_a_benchmark(benchmark, tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "folder"
    with pytest.raises(SystemExit):
        benchmark.main([str(folder)])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"error: cannot write to {folder}: Not a directory")
    )


@pytest.mark.parametrize(
    "benchmark", [bench, family, few_sequences, processes, reader, unnormalised]
)
@pytest.mark.parametrize("rounds", ["0", "-1", "x"])
def test_the_number_of_rounds_is_checked(benchmark, rounds, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([str(tmp_path), f"--rounds={rounds}"])
    message = f"error: argument --rounds: must be a positive integer, got '{rounds}'"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_the_time_for_the_benchmark_of_a_gpu_is_checked(minutes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), f"--minutes={minutes}"])
    message = f"error: argument --minutes: must be a positive number, got '{minutes}'"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


@pytest.mark.slow
def test_the_benchmark_of_the_recurrence(tmp_path, monkeypatch):
    tiny = bench.Shape(3, 4, 5, 6)
    monkeypatch.setattr(bench, "PAPER", {"pMNIST": bench.Shape(4, 3, 1, 5), "PTB": tiny})
    monkeypatch.setattr(bench, "GROWTH", {"steps": (2, 4), "batch": (3, 5), "hidden": (3, 5)})
    monkeypatch.setattr(bench, "MIDDLE", tiny)
    bench.main([str(tmp_path), "--rounds", "2", "--shapes", "pMNIST", "PTB"])
    written = json.loads((tmp_path / "recurrence.json").read_text())
    for shape in written["shapes"].values():
        assert shape["subjects"].keys() == set(bench.SUBJECTS)
        for row in shape["subjects"].values():
            low, high = row["step_range"]
            assert 0 < low <= row["step"] <= high
            assert row["forward"] > 0 < row["backward"]
    assert [len(points) for points in written["growth"].values()] == [2, 2, 2]
    text = (tmp_path / "README.md").read_text()
    assert text.count("| nn.LSTM |") == 2
    assert "**1.00**" in text
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_benchmark_of_the_reader(tmp_path, monkeypatch):
    for name, value in {"VOCABULARY": 50, "HIDDEN": 4, "LENGTHS": {"a": 9, "b": 12}}.items():
        monkeypatch.setattr(reader, name, value)
    reader.main([str(tmp_path), "--rounds", "1"])
    written = json.loads((tmp_path / "reader.json").read_text())["seconds"]
    assert written.keys() == {"a", "b"}
    assert len(written["a"]) == len(VARIANTS) + 2
    assert all(took > 0 for (took,) in written["a"].values())
    assert (tmp_path / "reader.md").read_text().count("attentive_") == len(VARIANTS) + 2


@pytest.mark.slow
def test_the_benchmark_without_normalisation(tmp_path, monkeypatch):
    for name, value in {"STEPS": 3, "HIDDEN": (4, 5), "BATCH": (2, 3)}.items():
        monkeypatch.setattr(unnormalised, name, value)
    unnormalised.main([str(tmp_path), "--rounds", "1"])
    measured = json.loads((tmp_path / "unnormalised.json").read_text())["measured"]
    assert len(measured) == 2 * 2 * 2 * 2
    assert all(took > 0 for point in measured for took in point["seconds"].values())
    assert (tmp_path / "unnormalised.md").read_text().count("| 4 |") == 2


@pytest.mark.slow
def test_the_benchmark_of_few_sequences(tmp_path, monkeypatch):
    for name, value in {"STEPS": (1, 3), "HIDDEN": (4, 5), "SECONDS": 0.001}.items():
        monkeypatch.setattr(few_sequences, name, value)
    few_sequences.main([str(tmp_path), "--rounds", "1"])
    measured = json.loads((tmp_path / "few_sequences.json").read_text())["measured"]
    assert len(measured) == 2 * 2 * 4
    assert all(took > 0 for point in measured for took in point["seconds"].values())
    assert (tmp_path / "few_sequences.md").read_text().count("| 4 |") == 4


@pytest.mark.slow
def test_the_benchmark_of_the_family(tmp_path, monkeypatch):
    for name, shape in {"one": bench.Shape(3, 4, 1, 6), "symbols": bench.Shape(3, 4, 5, 6)}.items():
        monkeypatch.setitem(family.PAPER, name, shape)
    monkeypatch.setattr(family, "SHAPES", {"one": 2, "symbols": 3})
    family.main([str(tmp_path)])
    seconds = json.loads((tmp_path / "family.json").read_text())["seconds"]
    assert {len(took) for took in seconds["one"].values()} == {2}
    assert {len(took) for took in seconds["symbols"].values()} == {3}
    assert all(s > 0 for models in seconds.values() for took in models.values() for s in took)
    assert (tmp_path / "family.md").read_text().count(" / ") == 1 + 2 * (len(family.MODELS) - 1)


@pytest.mark.slow
def test_the_profile_of_the_kernel(tmp_path):
    """In a process of its own: one process cannot load two builds of the kernel."""
    code = """
from bench import profile
profile.PAPER["pMNIST"] = profile.Shape(40, 12, 1, 50)
profile.main(["OUT", "--shapes", "pMNIST"])
"""
    command = [sys.executable, "-c", code.replace("OUT", str(tmp_path))]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "profile.md").read_text().split("\n")]
    parts = {row[0].strip(): float(row[1]) for row in rows if len(row) == 3 and "." in row[1]}
    assert {"outside the kernel", "waiting for other threads"} < parts.keys()
    assert len(parts) == 15
    assert all(milliseconds >= 0 for milliseconds in parts.values())
    assert parts["forward: W_h h_{t-1}"] > 0 < parts["backward: the gradient of W_h"]


@pytest.mark.numeric
def test_the_plain_loop_is_a_bn_lstm():
    """The loop that we compare with computes the same as `BNLSTM`."""

    def by_the_loop(problem):
        plain = PlainLoopBNLSTM(5, 6, steps=7)
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias"):
                getattr(plain, name).copy_(problem["weights"][name + "_l0"])
        return plain(problem["x"])

    def by_ours(problem):
        lstm = BNLSTM(5, 6, kernel="reference", dtype=problem["x"].dtype)
        lstm.load_state_dict(problem["weights"], strict=False)
        return lstm(problem["x"])[0]

    weights = dict(BNLSTM(5, 6).named_parameters())
    assert_as_accurate(by_the_loop, by_ours, {"weights": weights, "x": torch.randn(7, 4, 5)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("arguments", [[], ["--only-ask"]])
def test_the_check_of_a_gpu_without_one(arguments):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == gpu.NO_DEVICE
    assert "\n" not in gpu.NO_DEVICE


def test_the_floor_of_a_training_step():
    shape, rate = bench.Shape(2, 3, 5, 7), {"operations": 10.0, "bytes": 1e9}
    # W_h h and the gradients of h and W_h are three products of (6 x 7) by (7 x 28). W_x x and the
    # gradient of W_x are two of (6 x 5) by (5 x 28). A multiply-add is two operations.
    assert gpu.floor(shape, torch.float32, rate) == (3 * 6 * 7 * 28 + 2 * 6 * 5 * 28) * 2 / 10
    rate = {"operations": 1e12, "bytes": 2.0}
    kept = 6 * (4 * 7 + 4 * 7 + 7 + 7) + 6 * 4 * 7
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert gpu.floor(shape, dtype, rate) == 2 * kept * size / 2


def test_the_table_of_a_gpu():
    steps = {"persistent": 0.012, "alternating": 0.02, "nn.LSTM": 0.01, "reference": 0.24}
    subjects = {subject: {"step": seconds} for subject, seconds in steps.items()}
    row = {"name": "pMNIST", "products": "tf32", "steps": 784, "batch": 100, "features": 1,
           "hidden": 100, "floor": 0.002, "subjects": subjects}  # fmt: skip
    failed = {**row, "subjects": subjects | {"persistent": {"error": "OutOfResources: ..."}}}
    text = gpu.table({
        "machine": "Some GPU", "torch": "2.13.0", "triton": "3.7.1", "commit": "abc",
        "tests": {"status": 0, "summary": "9 passed"}, "complete": False, "shapes": [row, failed],
        "crossing": [{"hidden": 64, "products": "tf32", "subjects": {
            way: {"step": steps[way]} for way in gpu.WAYS}}],
    })  # fmt: skip
    start = "| pMNIST: T 784, B 100, D 1, H 100 | tf32 | "
    assert f"{start}12.0 | 20.0 | 10.0 | 240.0 | 2.0 | **1.20** | 0.050 | yes |" in text
    assert f"{start}nan | 20.0 | 10.0 | 240.0 | 2.0 | **2.00** | 0.083 | no |" in text
    assert "| 64 | tf32 | 12.0 | 20.0 |" in text
    assert "The time limit was reached; the last rows are missing." in text
