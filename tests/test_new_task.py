"""A task from outside the package is trained, resumed and reported without changing the package."""

import json

import pytest
from hydra.core.config_store import ConfigStore

from bnrnn.report import compare
from bnrnn.report.groups import order
from bnrnn.runs.find import find_runs
from bnrnn.tasks import _BUILDERS
from tests import new_task

SMALL = [
    "task=noisy", "model.hidden_size=8", "calibration_batches=2", "optimizer.lr=0.01",
    "validate_every=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr("bnrnn.tasks._BUILDERS", dict(_BUILDERS))
    new_task.add()
    yield
    del ConfigStore.instance().repo["task"]["noisy.yaml"]


def test_a_task_from_outside_is_trained_resumed_and_reported(bnrnn_here, tmp_path):
    whole = bnrnn_here(*SMALL, "model=bnlstm", "outputs=whole")
    assert whole.returncode == 0, whole.stderr
    for model, title in (("bnlstm", "model.title='My own BN'"), ("lstm", "model.title=Plain")):
        done = bnrnn_here(*SMALL, f"model={model}", title, "max_steps=8")
        assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "noisy" / "bnlstm").iterdir()
    assert json.loads((run / "run.json").read_text())["metric"] == {
        "name": "frame_error", "title": "frame error rate", "lower_is_better": True, "unit": "%",
        "factor": 100.0, "decimals": 1,
    }  # fmt: skip
    done = bnrnn_here(f"resume={run}", "max_steps=null")
    assert done.returncode == 0, done.stderr

    # The same numbers as the uninterrupted run.
    (uninterrupted,) = find_runs(tmp_path / "whole")
    resumed, plain = sorted(
        find_runs(tmp_path / "outputs"), key=lambda run: run.subject.model_title
    )
    assert (resumed.step, resumed.state) == (18, "finished")
    assert resumed.final("test") == uninterrupted.final("test")
    assert resumed.curve("batch") == uninterrupted.curve("batch")

    done = bnrnn_here("mode=report")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "outputs" / "report" / "report.md").read_text()
    assert "\n### Noisy frames\n" in text
    assert "| model | ours, frame error rate, % | seeds | steps |" in text
    shown = f"{resumed.final('test'):.1f}"
    assert f"| My own BN | {shown} test | 1 | 18 |" in text
    assert f"| Plain | {plain.final('test'):.1f} test | 1 | 8 |" in text
    assert f"| {shown} % frame error rate |" in text
    assert "![Validation against training steps, Noisy frames](figures/frames-noisy.png)" in text

    runs = sorted(find_runs(tmp_path / "outputs"), key=order)
    assert compare.table(runs).splitlines()[0] == (
        "frames-noisy: validation and test, frame error rate, %; population statistics"
    )
