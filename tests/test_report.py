"""Tables from run directories, with exact numbers, and the shipped results."""

import json
from pathlib import Path

import pytest
import yaml

from bnrnn.errors import CheckpointError
from bnrnn.report import compare, results
from bnrnn.report.runs import find_runs, read_run

ROOT = Path(__file__).parent.parent


def make_run(folder, model, values, finished=True, task="ptb", seed=0):
    folder.mkdir(parents=True)
    config = {
        "model": {"name": model},
        "task": {"name": task, "kind": "pixels" if "mnist" in task else "characters"},
        "seed": seed,
        "max_valid_batches": None,
        "data_dir": "/somewhere",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metric = "accuracy" if "mnist" in task else "bpc"
    lines = [
        {"step": 100 * k, "split": "valid", "statistics": kind, metric: value + shift, "seconds": k}
        for k, value in enumerate(values, start=1)
        for kind, shift in (("population", 0.0), ("batch", 0.25))
        if kind == "population" or model != "lstm"
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {
            "test": {metric: values[-1] - 0.125},
            "best_step": 100 * len(values), "steps": 100 * len(values), "epochs": 2.0,
            "wall_seconds": 90.0, "train_seconds": 60.0, "kernel": "reference", "commit": "abc",
            "machine": "a machine", "threads": 2,
            "command": f"bnrnn task={task} model={model} data_dir=/somewhere threads=1",
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))


def test_the_comparison_table(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [2.0, 1.75, 1.5, 1.25])
    make_run(tmp_path / "b", "lstm", [3.0, 2.5])
    make_run(tmp_path / "c", "bn_input", [2.25], finished=False)
    runs = sorted(find_runs(tmp_path), key=lambda run: run.model)
    assert compare.table(runs).splitlines() == [
        "ptb: validation and test, bits per character; population statistics",
        "",
        "                             step 100         test   seconds   ms a step",
        "------------------------------------------------------------------------",
        "LSTM, BN on the input term      2.250   unfinished         -           -",
        "BN-LSTM                         2.000        1.125        90         150",
        "LSTM                            3.000        2.375        90         300",
    ]


def test_a_run_reads_back_its_curves(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [0.5, 0.75], task="pmnist")
    run = read_run(tmp_path / "a")
    assert run.curve() == ([100, 200], [50.0, 75.0])
    assert run.curve("batch") == ([100, 200], [75.0, 100.0])
    with pytest.raises(CheckpointError, match="no readable run directory"):
        read_run(tmp_path)


def test_results_from_runs(tmp_path):
    make_run(tmp_path / "outputs" / "a", "bnlstm", [2.0, 1.5])
    make_run(tmp_path / "outputs" / "b", "lstm", [3.0, 2.5], finished=False)
    target = tmp_path / "results"
    target.mkdir()
    (target / "paper_curves.json").write_text(
        json.dumps({"curves": {"ptb": {"bnlstm": [[50, 3.0], [150, 2.0], [200, 1.8]]}}})
    )
    results.main(tmp_path / "outputs", target)
    text = (target / "README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| [ptb-bnlstm-seed0]")]
    assert [cell.strip() for cell in row.split("|")][2:-1] == [
        "1.375 bits per character", "1.32 after 50 epochs", "2", "1.500", "1.750", "200", "2 min",
        "300", "reference", "abc", "a machine, 2",
    ]  # fmt: skip
    (row,) = [line for line in text.splitlines() if line.startswith("| [ptb-lstm-seed0]")]
    assert "unfinished" in row
    assert "| ours | 2.250 | 1.750 |" in text
    assert "| the paper | 2.500 | 1.800 |" in text
    assert "/somewhere" not in "".join(
        file.read_text() for file in target.rglob("*") if file.suffix in (".yaml", ".json", ".md")
    )
    assert (target / "figures" / "ptb.png").stat().st_size > 10_000
    results.main(tmp_path / "nothing new", target)
    assert (target / "README.md").read_text() == text


def test_the_shipped_table_is_what_the_script_makes_of_the_shipped_files():
    folder = ROOT / "results"
    assert (folder / "README.md").read_text() == results.write(folder, figures=False)
