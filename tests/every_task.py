"""Trains every task for a few steps in float64; `python -m tests.every_task FOLDER NAME...`."""

import logging
import sys
from pathlib import Path

import numpy as np
import torch

from bnrnn.command.modes import run_mode
from bnrnn.datasets import WordCorpus
from bnrnn.datasets.mnist import MNIST
from bnrnn.settings.compose import compose_config
from bnrnn.tasks import base, pixels, words

SMALL = [
    "model.hidden_size=6", "max_steps=4", "validate_every=2", "log_every=2",
    "calibration_batches=2", "test_calibration_batches=3", "max_valid_batches=2", "threads=1",
]  # fmt: skip
TEXT = ["task=pydocs", "task.length=9", "task.batch_size=14", "task.stream_length=2000"]
READER = ["task=cnn4", "data.synthetic=300", "task.batch_size=14"]
FRAMES = ["task=frames", "data.synthetic=60", "task.batch_size=14", "model.num_layers=2"]
WORDS = ["task=ptb_words", "task.length=5", "task.batch_size=14", "task.eval_batch_size=8"]
TASKS = {
    "characters": [*TEXT, "model=bnlstm"],
    "noise": [
        *TEXT, "model=bn_zoneout", "model.recurrent_dropout=0.1", "model.hidden_dropout=0.1",
        "model.weight_dropout=0.1", "model.input_dropout=0.1", "model.output_dropout=0.1",
        "model.num_layers=2", "model.dropout=0.1",
    ],
    "layers": [*TEXT, "model=lnlstm"],
    "stabilised": [*TEXT, "model=stabilised", "model.learned_state=true"],
    "sum": ["task=ptb_characters", *TEXT[1:], "task.corpus=pydocs", "model=characters_bn_sum"],
    "pixels": ["task=mnist", "model=bnlstm", "task.batch_size=14", "task.init_noise=0.1"],
    "words": [*WORDS, "model=words_medium_bnlstm", "model.learned_state=true"],
    "words by sequence": [*WORDS, "model=words_small_bn_input", "model.input_norm=sequence"],
    "questions": [*READER, "model=attentive_bne_star_star", "model.dropout=0.2"],
    "questions without padding": [*READER, "model=attentive_bnlstm", "model.count_padding=false"],
    "frames": [*FRAMES, "model=speech_bn"],
    "frames one by one": [*FRAMES, "model=speech_bn_frame", "task.loss=utterance"],
}  # fmt: skip


def images(_: Path) -> MNIST:
    generator = np.random.default_rng(0)

    def part(n: int) -> tuple[np.ndarray, np.ndarray]:
        return generator.integers(0, 256, (n, 12), np.uint8), generator.integers(0, 10, n)

    return MNIST(*part(60), *part(30), *part(31))


def text(_: Path) -> WordCorpus:
    generator = np.random.default_rng(0)
    parts = (generator.integers(0, 20, n).astype(np.uint16) for n in (900, 200, 150))
    return WordCorpus("words", [str(k) for k in range(20)], *parts)


def main(folder: Path, *names: str) -> None:
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    pixels.PIXELS, pixels.load_mnist, words.load_ptb_words = 12, images, text

    def to(batch: base.Batch, device: torch.device) -> base.Batch:
        return batch.map(lambda x: x.double() if x.is_floating_point() else x)

    base.Batch.to = to
    for name in names:
        outputs = folder / name.replace(" ", "_")
        run_mode(compose_config(
            *TASKS[name], *SMALL, f"outputs={outputs}", f"data_dir={folder / 'data'}",
            "statistics=synchronised",
        ))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(sys.argv[2:] or TASKS))
