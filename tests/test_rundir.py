"""The run that `resume=auto` resumes or `run=auto` selects, and the errors of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.find import find_runs, read_run

TINY = [
    "task=text", "model=lstm", "model.hidden_size=4", "task.length=20", "task.batch_size=8",
    "validate_every=3", "log_every=1", "calibration_batches=2",
]  # fmt: skip


def write_text(path, words):
    path.write_text("\n".join(" ".join(words[k % len(words) :]) for k in range(300)))
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "a.txt", ["time", "step", "gate", "cell", "state", "batch"])


@pytest.fixture
def train(bnrnn_here, text):
    def train(*arguments, path=text, exit_code=0):
        done = bnrnn_here(*TINY, f"task.path={path}", *arguments)
        assert done.returncode == exit_code, done.stderr
        return done

    return train


def finished():
    return {
        file.parent: json.loads(file.read_text())["steps"]
        for file in Path("outputs/text/lstm").glob("*/result.json")
    }


def test_a_finished_run_of_as_many_steps_is_preferred_to_a_newer_shorter_one(train):
    train("max_steps=6")
    (run,) = finished()
    train("max_steps=3")
    assert sorted(finished().values()) == [3, 6]
    assert f"{run.name} is finished" in train("max_steps=6", "resume=auto").stderr
    assert f"{run.name} is finished" in train("max_steps=5", "resume=auto").stderr
    train("max_steps=8", "resume=auto")
    assert finished()[run] == 8
    assert sorted(finished().values()) == [3, 8]


def test_more_steps_than_a_file_can_count_are_refused(train):
    done = train("max_epochs=9007199254740992", exit_code=2)
    assert "max_epochs must be 281474976710656 or less for epochs of 32 steps" in done.stderr
    assert not Path("outputs").exists() or not list(Path("outputs").rglob("*.json"))


@pytest.mark.parametrize("how", ["patience=null", "patience=100", "patience=null auto"])
def test_a_run_that_its_patience_stopped_goes_on_with_more(how, train, bnrnn_here):
    worse = ["optimizer.lr=50", "validate_every=1", "max_steps=12"]
    train(*worse, "outputs=whole")
    train(*worse, "patience=1")
    (run,) = finished()
    assert finished()[run] < 12
    assert "is finished" in bnrnn_here(f"resume={run}").stderr
    assert "is finished" in bnrnn_here(f"resume={run}", "max_steps=1").stderr
    assert "is finished" in train(*worse, "patience=1", "resume=auto").stderr
    patience, auto = how.split()[0], how.endswith("auto")
    if auto:
        train(*worse, patience, "resume=auto")
    else:
        assert bnrnn_here(f"resume={run}", patience).returncode == 0
    assert finished() == {run: 12}
    (whole,) = find_runs(Path("whole"))
    again = read_run(run)
    assert again.state == "finished"
    assert again.values("bpc", "train", None) == whole.values("bpc", "train", None)


def test_a_run_stopped_by_its_patience_that_goes_on_and_stops_is_not_finished(train, bnrnn_here):
    train("optimizer.lr=50", "validate_every=1", "max_steps=12", "patience=1")
    (run,) = finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnrnn.train.clip_gradients", lambda *args: torch.tensor(float("nan")))
        assert bnrnn_here(f"resume={run}", "patience=null").returncode == 5
    assert read_run(run).state == "failed"


def test_a_run_saved_beyond_the_steps_asked_for_is_not_resumed(train):
    """The checkpoint counts: a run that a signal stopped early may have no records at all."""
    train("max_steps=6", "log_every=50", "validate_every=50")
    (run,) = finished()
    (run / "result.json").unlink()
    (run / "metrics.jsonl").write_text("")
    content = torch.load(run / "last.pt", weights_only=True)
    content["training"]["loop"]["records"] = 0
    torch.save(content, run / "last.pt")
    train("max_steps=2", "log_every=50", "validate_every=50", "resume=auto")
    assert list(finished().values()) == [2]


def test_run_auto_is_the_finished_run_that_went_furthest(train, bnrnn_here):
    train("max_steps=6")
    (run,) = finished()
    train("max_steps=3")
    train("max_steps=3", "mode=evaluate", "run=auto")
    assert len(list(run.glob("evaluate/*/result.json"))) == 1


def test_an_unfinished_run_is_not_cut_short(train):
    train("max_steps=6")
    (run,) = finished()
    (run / "result.json").unlink()
    done = train(f"resume={run}", "max_steps=3", exit_code=2)
    assert "is at step 6 already, beyond the 3" in done.stderr
    assert "max_steps=6 tests it as it is" in done.stderr
    assert not (run / "result.json").exists()
    train("resume=auto", "max_steps=3")
    assert len(list(run.parent.iterdir())) == 2
    assert list(finished().values()) == [3]
    train(f"resume={run}", "max_steps=6")
    assert finished()[run] == 6


def test_a_run_that_another_process_has_just_begun_is_not_begun_twice(train):
    train("max_steps=3")
    (run,) = finished()
    for file in run.iterdir():
        if file.name not in ("config.yaml", "bnrnn.log"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    with RunDirectory(run):
        done = train("max_steps=3", "resume=auto", exit_code=6)
    assert "another process is training in" in done.stderr
    train("max_steps=3", "resume=auto")
    # No process trains in the old folder any more, and its run had not begun, so it is removed.
    # (The new one may have its name, if all this took less than a second.)
    assert list(run.parent.iterdir()) == list(finished())


def test_another_text_is_another_run(train, tmp_path, text):
    other = write_text(tmp_path / "b.txt", ["time", "batch", "gate", "step", "cell", "state"])
    train("max_steps=3", "resume=auto")
    (run,) = finished()
    train("max_steps=3", "resume=auto", path=other)
    assert len(finished()) == 2
    done = train("max_steps=6", f"resume={run}", path=other, exit_code=4)
    assert "was trained on other data than these" in done.stderr
    moved = text.rename(tmp_path / "moved.txt")
    train("max_steps=6", f"resume={run}", path=moved)
    assert finished()[run] == 6


def test_a_finished_run_that_cannot_go_on_stays_finished(train, tmp_path, text):
    train("max_steps=3")
    (run,) = finished()
    moved = text.rename(tmp_path / "moved.txt")
    train(f"resume={run}", "max_steps=6", exit_code=3)
    assert finished() == {run: 3}
    assert not (run / "failed.json").exists()
    train(f"resume={run}", "max_steps=6", path=moved)
    assert finished() == {run: 6}


def test_an_unfinished_run_that_fails_says_so_until_it_goes_on(train, tmp_path, text):
    train("max_steps=3")
    (run,) = finished()
    (run / "result.json").unlink()
    train(f"resume={run}", "max_steps=6", path=tmp_path / "none.txt", exit_code=3)
    assert json.loads((run / "failed.json").read_text())["exit_code"] == 3
    train(f"resume={run}", "max_steps=6")
    assert not (run / "failed.json").exists()
    assert finished() == {run: 6}


def test_a_result_names_all_the_versions_and_machines_it_comes_from(train, monkeypatch):
    places = [("aaa", "a CPU"), ("bbb", "a CPU"), ("bbb", "a GPU")]
    for number, (commit, machine) in enumerate(places, start=1):
        monkeypatch.setattr("bnrnn.train.commit", lambda name=commit: name)
        monkeypatch.setattr("bnrnn.train.machine", lambda _, name=machine: name)
        train(f"max_steps={number}", "resume=auto")
    (run,) = finished()
    result = json.loads((run / "result.json").read_text())
    assert (result["commits"], result["machines"]) == (["aaa", "bbb"], ["a CPU", "a GPU"])
