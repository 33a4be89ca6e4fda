"""The benchmark runs and writes what it should; how fast anything is, no test says."""

import json

import pytest
import torch

from bench import reader
from bench import recurrence as bench
from bench.plain_loop import PlainLoopBNLSTM
from bnrnn import BNLSTM
from bnrnn.nn.attentive_reader import VARIANTS
from tests.accuracy import assert_as_accurate


@pytest.mark.slow
def test_the_benchmark_of_the_recurrence(tmp_path, monkeypatch):
    tiny = bench.Shape(3, 4, 5, 6)
    monkeypatch.setattr(bench, "PAPER", {"pMNIST": bench.Shape(4, 3, 1, 5), "PTB": tiny})
    monkeypatch.setattr(bench, "GROWTH", {"steps": (2, 4), "batch": (2, 3), "hidden": (3, 5)})
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


@pytest.mark.numeric
def test_the_plain_loop_is_a_bn_lstm():
    """The peer that we measure against computes the same thing."""

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
