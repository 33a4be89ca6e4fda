"""Small runs of the programs in examples/ on real data, with `nn.LSTM` and with `BNLSTM`."""

import contextlib
import gc
import math
import warnings
from functools import partial

import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from examples import ctc, distributed, language_model, tagger
from tests.conftest import DATA, needs_data
from tests.processes import start_server

TEXT = DATA / "ptb" / "ptb.valid.txt"
NORMALISE = pytest.mark.parametrize("normalise", [[], ["--normalise"]], ids=["lstm", "bnlstm"])


def assert_falls(losses):
    quarter = len(losses) // 4
    assert all(map(math.isfinite, losses))
    assert sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])


@NORMALISE
@needs_data("ptb")
def test_the_language_model_learns(normalise):
    small = ["--characters=60000", "--hidden-size=64", "--steps=20", "--epochs=1", *normalise]
    losses, bits = language_model.main([f"--data={TEXT}", *small])
    assert_falls(losses)
    assert bits < math.log2(50)  # a uniform guess among the symbols of Penn Treebank


@NORMALISE
@needs_data("ptb")
def test_the_tagger_learns(normalise):
    small = ["--sentences=400", "--hidden-size=32", "--epochs=2", *normalise]
    losses, accuracy = tagger.main([f"--data={TEXT}", *small])
    assert_falls(losses)
    assert accuracy > 0.7


@NORMALISE
@needs_data("an4")
def test_ctc_learns(normalise):
    small = ["--utterances=64", "--hidden-size=32", "--batch-size=8", "--epochs=3", *normalise]
    losses, rate = ctc.main([f"--data={DATA / 'an4'}", *small])
    assert_falls(losses)
    assert 0 < rate <= 1


def test_edits_are_counted():
    assert ctc.edits([], [1, 2]) == 2
    assert ctc.edits([1, 2, 3], [1, 2, 3]) == 0
    assert ctc.edits([1, 4, 3], [1, 2, 3, 3]) == 2
    assert ctc.edits(list(b"kitten"), list(b"sitting")) == 3


def work_strictly(rank, args, *rest):
    """`distributed.work` with warnings as errors and its output in a file.

    A wrapped module that outlives its group can wait forever for the group's threads.
    """
    leave = torch.distributed.destroy_process_group

    def leave_after_modules():
        assert not any(type(left) is DistributedDataParallel for left in gc.get_objects())
        leave()

    torch.distributed.destroy_process_group = leave_after_modules
    with open(args.save / f"printed{rank}", "w") as file, contextlib.redirect_stdout(file):
        warnings.simplefilter("error")
        distributed.work(rank, args, *rest)


@pytest.mark.parametrize(
    ("normalise", "start"),
    [
        (["--normalise"], "forkserver"),  # which has already imported torch
        pytest.param(["--normalise"], "spawn", marks=pytest.mark.slow),
        pytest.param([], "spawn", marks=pytest.mark.slow),
    ],
    ids=["bnlstm", "bnlstm-as-it-is", "lstm-as-it-is"],
)
@needs_data("ptb")
def test_two_processes_learn_one_model_from_lines_of_different_lengths(
    normalise, start, tmp_path, monkeypatch
):
    start_server()
    monkeypatch.setattr(distributed, "spawn", partial(start_processes, start_method=start))
    monkeypatch.setattr(distributed, "work", work_strictly)
    small = ["--lines=500", "--longest=60", "--batch-size=16", f"--save={tmp_path}", *normalise]
    distributed.main([f"--data={TEXT}", *small])
    assert "bits per character" in (tmp_path / "printed0").read_text()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for rank in (first, second):
        assert_falls(rank["losses"])
    assert first["losses"] != second["losses"]  # they have different lines
    assert list(first["model"]) == list(second["model"])
    statistics = [name for name in first["model"] if ".statistics." in name]
    assert len(statistics) == (9 if normalise else 0)  # mean, var, num_batches for three terms
    for name, of_first in first["model"].items():
        of_second = second["model"][name]
        if name not in statistics:
            assert torch.equal(of_first, of_second), name
            continue
        assert of_first.shape == of_second.shape
        assert len(of_first) == 60
        for values in (of_first, of_second):
            assert values.isfinite().all(), name
            assert (values >= 0).all() or name.endswith("mean"), name
