"""The CNN questions (Hermann et al., 2015), from the published archive or generated."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bnrnn.datasets.cache import cached_folder
from bnrnn.datasets.cnn import synthetic as generated
from bnrnn.datasets.cnn.corpus import (
    FORMAT_VERSION,
    PARTS,
    QuestionCorpus,
    read_corpus,
    write_corpus,
)
from bnrnn.datasets.cnn.questions import (
    ADVICE,
    identity,
    questions_folder,
    stream_questions,
)
from bnrnn.datasets.fetch import expand
from bnrnn.errors import DataError, printable

log = logging.getLogger(__name__)

PUBLISHED = {"train": 380_298, "valid": 3_924, "test": 3_198}
DRIVE_ID = "0BwmD_VLjROrfTTljRDVZMFJnVWM"
SHA256 = "9405beb90c9267e7769c86fa42720b7e479bcf38c64217c0d3f456ce8cd122ce"


def load_cnn(
    data_dir: Path,
    four_sentences: bool = False,
    synthetic: int | None = None,
) -> QuestionCorpus:
    """Load the CNN questions as ids; parse them once, then map them from the cache.

    They are read from `data_dir/cnn_qa/cnn.tgz`, or from a folder `questions` with `training`,
    `validation` and `test` in `data_dir/cnn_qa`, `data_dir/cnn_qa/cnn` or `data_dir/cnn`.
    synthetic: use this many generated questions instead (see `synthetic.generate`); they are kept
    in `data_dir/cnn_synthetic`.

    The vocabulary contains the words that occur more than once in passages, questions and answers
    of the training split, most frequent first, and every entity of that split; any other word is
    UNK. four_sentences: reduce passages with `select_sentences` first.

    Memory: parsing keeps the vocabulary, 40 bytes per question and 20 MB of buffers. Files are read
    one at a time and ids are written to disk; a folder takes another 0.1 kB per file name. Between
    2,000 and 20,000 generated questions the process grew by 9 MB, which gives about 0.2 GB for the
    whole corpus.
    Disk: the cache takes 4 bytes per token, 1.2 GB for the whole corpus, and twice that while it is
    being written.

    Raises:
        DataError: there are no questions, a file is malformed, the archive is damaged or hostile,
            or a split is empty.
        OutputError: the cache or the generated archive cannot be written.
    """
    data_dir = expand(data_dir)
    if synthetic is not None:
        source = data_dir / "cnn_synthetic" / f"cnn-synthetic-{synthetic}.tgz"
        advice = "delete it to have it generated again"
        generated.ensure(source, synthetic)
    else:
        source = _find(data_dir)
        advice = ADVICE
    kind = "cnn" + "-4" * four_sentences

    def build(folder: Path) -> None:
        write_corpus(folder, stream_questions(source, advice), str(source), four_sentences)

    def key() -> str:
        what = f"{kind} {FORMAT_VERSION} {identity(source, advice)}"
        return hashlib.sha256(what.encode()).hexdigest()

    corpus = cached_folder(kind, key, build, read_corpus)
    sizes = {part: corpus.facts[part]["n"] for part in PARTS}
    whole = synthetic is not None or sizes == PUBLISHED
    if not whole:
        log.warning(
            "%s holds %s questions, not the %s of the published corpus: results cannot be "
            "compared with those on the whole corpus",
            printable(source), _slashed(sizes), _slashed(PUBLISHED),
        )  # fmt: skip
    name = "CNN questions"
    if synthetic is not None:
        name = f"synthetic CNN-like questions ({sum(sizes.values()):,})"
    if four_sentences:
        name += ", four sentences"
    return replace(corpus, name=name, synthetic=synthetic is not None, whole=whole)


def _find(data_dir: Path) -> Path:
    archive = data_dir / "cnn_qa" / "cnn.tgz"
    if os.path.lexists(archive):
        return archive
    for folder in (data_dir / "cnn_qa", data_dir / "cnn"):
        if questions_folder(folder) is not None:
            return folder
    raise DataError(
        f"the CNN questions are not there: put cnn.tgz at {archive} (in a browser, "
        f"https://drive.google.com/uc?export=download&id={DRIVE_ID}, sha256 {SHA256}), or unpack "
        f"it in {archive.parent}, or set data_dir, or generate questions with "
        "data.synthetic=20000"
    )


def _slashed(sizes: Mapping[str, int]) -> str:
    return " / ".join(f"{sizes[part]:,}" for part in PARTS)
