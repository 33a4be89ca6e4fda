"""Figure 3b: bits per character on test sequences longer than those in training."""

import contextlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from bnrnn.datasets import even_batches
from bnrnn.errors import DataError
from bnrnn.evaluate import normalizes
from bnrnn.nn.statistics import batch_statistics
from bnrnn.runs.analysis import Lengths
from bnrnn.tasks import Batch, CharacterTask, Progress


def lengths(
    model: nn.Module,
    task: CharacterTask,
    lengths: Sequence[int],
    batch_size: int,
    device: torch.device,
    progress: Progress = iter,
) -> Lengths:
    """Cut the test string into non-overlapping slices of each length, and score the slices.

    A slice of length L has L - 1 predictions and starts from the learned initial state. The rest of
    the string after the last whole slice is not scored.

    Args:
        model: has population statistics; this function sets it to evaluation mode.
        lengths: each 2 or more.
        batch_size: slices per batch; the paper's code: 100. At least 3 for a model that
            normalises, so that no batch has only one slice.

    Returns:
        bpc: test bits per character for each length, with "population" statistics and, for a
        model that normalises, with the statistics of each "batch".

    Raises:
        DataError: the test string is too short for a length.
    """
    text = task.corpus.test
    kinds = ["population", "batch"] if normalizes(model) else ["population"]
    for length in lengths:
        # A single slice has no batch statistics.
        if length * len(kinds) > len(text):
            needs = "two slices, for batch statistics" if len(kinds) == 2 else "one slice"
            raise DataError(
                f"the test string of {task.corpus.name} has {len(text)} characters, too few for "
                f"{needs}, of {length}: lower lengths.lengths"
            )
    jobs = [
        (kind, length, part)
        for length in lengths
        for kind in kinds
        for part in even_batches(len(text) // length, batch_size)
    ]
    sums = {(kind, length): Counter[str]() for kind in kinds for length in lengths}
    model.eval()
    for kind, length, part in progress(jobs):
        rows = text[part.start * length : part.stop * length].reshape(-1, length)
        characters = torch.from_numpy(rows.T.astype(np.int64))
        batch = Batch(characters[:-1], characters[1:])
        with batch_statistics(model) if kind == "batch" else contextlib.nullcontext():
            sums[kind, length].update(task.score(model, [batch], device))  # type: ignore[arg-type]
    return Lengths(
        lengths=list(lengths),
        batch_size=batch_size,
        characters=len(text),
        bpc={
            kind: [round(task.metrics(dict(sums[kind, length]))["bpc"], 5) for length in lengths]
            for kind in kinds
        },
    )
