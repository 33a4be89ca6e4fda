"""CNN question answering (Hermann et al., 2015): vocabulary, selection of sentences, cached ids."""

import json
import logging
import math
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from bnrnn.datasets import cnn_synthetic
from bnrnn.datasets.cache import cached_folder
from bnrnn.datasets.fetch import expand
from bnrnn.datasets.questions import (
    ENTITY,
    PLACEHOLDER,
    SPLITS,
    OnError,
    Question,
    parse_question,
    questions_folder,
    stream_questions,
    tokens,
)
from bnrnn.errors import DataError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
NIL, EOS, UNK, NUM = range(4)
SPECIALS = ("<nil>", "<eos>", "<unk>", "<num>")
PARTS = ("train", "valid", "test")  # our names of SPLITS
PUBLISHED = {"train": 380_298, "valid": 3_924, "test": 3_198}
DRIVE_ID = "0BwmD_VLjROrfTTljRDVZMFJnVWM"
SHA256 = "9405beb90c9267e7769c86fa42720b7e479bcf38c64217c0d3f456ce8cd122ce"
CHUNK = 1 << 20  # ids converted at a time
SENTENCE_ENDS = (".", "?", "!")
_STOP = """
a about after against all also an and any are as at be because been before being but by can could
did do does for from had has have he her hers him his how i if in into is it its just may more
most n't no not of on one or other our out over said says she should so some such than that the
their them then there they this those to too up us was we were what when where which while who
whom why will with would you your 's
"""
STOP_WORDS = frozenset(_STOP.split())


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of ids of different length: `rows[k]` is (length,), of the type of `flat`.

    flat: (sum of lengths,) int32, mapped from the cache file. offsets: (n + 1,) int64.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"row {index} of {n}")
        index = int(index) % n
        # Still a view of the mapped file, without the cost of a numpy.memmap a row.
        return np.asarray(self.flat[self.offsets[index] : self.offsets[index + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class QuestionSplit:
    """n examples: passages, questions (without end mark), answers (n,) int64."""

    passages: Ragged
    questions: Ragged
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True, eq=False)
class QuestionCorpus:
    """Questions over one vocabulary: id k stands for `words[k]`; the first four are `SPECIALS`.

    entity_ids: (E,) int64, ascending: the ids of all `@entityN`. facts: for "train", "valid" and
    "test" a dict with "n"; "skipped" (malformed files by reason); "unknown_answers" (how many
    answers are UNK); and "recall" for four sentences: the share of passages that kept the answer.
    whole: False where only a part of the published corpus is at hand.
    """

    name: str
    words: tuple[str, ...]
    entity_ids: np.ndarray
    train: QuestionSplit
    valid: QuestionSplit
    test: QuestionSplit
    synthetic: bool
    facts: dict[str, dict[str, Any]]
    whole: bool = True

    def decode(self, ids: np.ndarray) -> list[str]:
        """ids (n,) -> n words."""
        return [self.words[k] for k in ids]


def load_cnn(
    data_dir: Path,
    four_sentences: bool = False,
    synthetic: int | None = None,
    on_error: OnError = "raise",
    numbers: bool = False,
) -> QuestionCorpus:
    """The CNN questions, as ids; parsed once and then mapped from the cache.

    They are `data_dir/cnn_qa/cnn.tgz`, or a folder `questions` with `training`, `validation` and
    `test`, in `data_dir/cnn_qa`, `data_dir/cnn_qa/cnn` or `data_dir/cnn`. synthetic: instead, that
    many generated questions (`cnn_synthetic.generate`), kept in `data_dir/cnn_synthetic`.

    The vocabulary has the words that occur more than once in passages, questions and answers of
    the training split, commonest first, and every entity of that split; all else is UNK.
    numbers: ASCII digits become NUM. four_sentences: passages are cut by `select_sentences` first.
    on_error: "raise" or "skip" for malformed files.

    Memory: parsing keeps the vocabulary, 40 bytes a question and 20 MB of buffers; files are read
    one at a time, ids go to disk, and a folder takes 0.1 kB a file name more. From 2,000 to 20,000
    generated questions the process grew by 9 MB: some 0.2 GB for the whole corpus.
    On disk the cache takes 4 bytes a token: 1.2 GB for the whole corpus, twice that while it is
    written.

    Raises:
        DataError: there are none, a file is malformed, the archive is damaged or hostile, or a
            split has no question.
        OutputError: the cache, or the synthetic archive, cannot be written.
    """
    data_dir = expand(data_dir)
    if synthetic is not None:
        source = data_dir / "cnn_synthetic" / f"cnn-synthetic-{synthetic}.tgz"
        cnn_synthetic.ensure(source, synthetic)
    else:
        source = _find(data_dir)
    kind = "cnn" + "-4" * four_sentences + "-num" * numbers + "-skip" * (on_error == "skip")
    key = source if source.is_file() else questions_folder(source) or source

    def build(folder: Path) -> None:
        skipped = {split: Counter[str]() for split in SPLITS}
        found = stream_questions(source, SPLITS, on_error, skipped)
        _build(str(source), found, folder, skipped, four_sentences, numbers)

    corpus = cached_folder(kind, [key], FORMAT_VERSION, build, lambda folder: _load(folder, "r"))
    sizes = {part: corpus.facts[part]["n"] for part in PARTS}
    whole = synthetic is not None or sizes == PUBLISHED
    if not whole:
        log.warning(
            "%s holds %s questions, not the %s of the published corpus: results do not compare "
            "with those on the whole", source, _slashed(sizes), _slashed(PUBLISHED),
        )  # fmt: skip
    name = "CNN questions"
    if synthetic is not None:
        name = f"synthetic CNN-like questions ({sum(sizes.values()):,})"
    if four_sentences:
        name += ", four sentences"
    return replace(corpus, name=name, synthetic=synthetic is not None, whole=whole)


def question_corpus(
    name: str,
    train: Iterable[Question],
    valid: Iterable[Question],
    test: Iterable[Question],
    numbers: bool = False,
) -> QuestionCorpus:
    """A corpus in memory of questions at hand, by the rules of `load_cnn`.

    Raises:
        DataError: a part is empty.
    """
    parts = zip(SPLITS, (train, valid, test), strict=True)
    found = ((split, question) for split, questions in parts for question in questions)
    with tempfile.TemporaryDirectory() as folder:
        _build(name, found, Path(folder), {}, False, numbers)
        return replace(_load(Path(folder), None), name=name)


def split_sentences(words: list[str]) -> list[list[str]]:
    """Cut after each "." "?" or "!" that stands alone."""
    sentences, start = [], 0
    for position, word in enumerate(words, 1):
        if word in SENTENCE_ENDS or position == len(words):
            sentences.append(words[start:position])
            start = position
    return sentences


def select_sentences(passage: list[str], question: list[str], n: int = 4) -> list[str]:
    """The n sentences of the passage that match the question best, in their order.

    The score of a sentence is the number of different content words it shares with the question
    over the root of the number it has: the cosine of the two sets of words, but for a factor that
    is the same for all sentences. Content words are neither `STOP_WORDS` nor punctuation nor the
    placeholder; entities are. Of equals the earlier is better; sentences that share nothing fill
    up, so a passage of at most n sentences stays whole. The authors' selector is not published;
    an early draft of the paper speaks of string matching and a normalised score, n = 4.
    """
    sentences = split_sentences(passage)
    wanted = _content(question)

    def score(position: int) -> float:
        words = _content(sentences[position])
        return len(words & wanted) / math.sqrt(max(1, len(words)))

    # sorted() is stable, in reverse too.
    best = sorted(range(len(sentences)), key=score, reverse=True)[:n]
    return [word for position in sorted(best) for word in sentences[position]]


def four_sentence_items(path: Path) -> list[Question]:
    """Items of a four-sentence selection: lines "1 …" to "4 …" are the passage, "5 …" the question,
    a tab, the answer, a tab and a number; `url` and `entities` are empty.

    Raises:
        DataError: the file cannot be read, or is not of that form.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; check the file") from error
    items: list[Question] = []
    passage: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number},"
        kind, _, rest = line.partition(" ")
        if kind in ("1", "2", "3", "4"):
            passage += tokens(rest)
            continue
        fields = rest.split("\t")
        if kind != "5" or len(fields) != 3:
            raise DataError(
                f"{place} is neither a sentence, 1 to 4, nor a question with its answer, 5; use a "
                "file of four-sentence items"
            )
        text = "\n\n".join(("", " ".join(passage), fields[0], fields[1], ""))
        items.append(parse_question(text, place, answer_in_passage=False))
        passage = []
    if passage or not items:
        raise DataError(f"{path} does not end with a question; use a file of four-sentence items")
    return items


def _find(data_dir: Path) -> Path:
    archive = data_dir / "cnn_qa" / "cnn.tgz"
    if os.path.exists(archive):
        return archive
    for folder in (data_dir / "cnn_qa", data_dir / "cnn"):
        if questions_folder(folder) is not None:
            return folder
    raise DataError(
        f"the CNN questions are not there: put cnn.tgz at {archive} (in a browser, "
        f"https://drive.google.com/uc?export=download&id={DRIVE_ID}, sha256 {SHA256}), or unpack "
        f"it in {archive.parent}, or set data_dir, or ask for synthetic questions"
    )


def _slashed(sizes: Mapping[str, int]) -> str:
    return " / ".join(f"{sizes[part]:,}" for part in PARTS)


def _content(words: Iterable[str]) -> set[str]:
    return {
        word
        for word in words
        if word not in STOP_WORDS and word != PLACEHOLDER and re.search(r"\w", word)
    }


class _Part:
    """One split while it is parsed: provisional ids on disk, lengths and answers in memory."""

    def __init__(self, passages: BinaryIO, questions: BinaryIO) -> None:
        self.files = {"passages": passages, "questions": questions}
        self.lengths = {"passages": array("q"), "questions": array("q")}
        self.answers = array("i")
        self.kept = 0

    def append(self, kind: str, ids: array) -> None:
        self.files[kind].write(ids.tobytes())
        self.lengths[kind].append(len(ids))


def _build(
    source: str,
    questions: Iterable[tuple[str, Question]],
    folder: Path,
    skipped: Mapping[str, Counter[str]],
    four_sentences: bool,
    numbers: bool,
) -> None:
    """Fill `folder` in one pass over `questions`.

    Words are numbered as they come; once the training split is counted, the files of these numbers
    are rewritten with the ids of the vocabulary.
    """
    provisional: dict[str, int] = {}

    def numbered(words: Iterable[str]) -> array:
        return array("i", [provisional.setdefault(word, len(provisional)) for word in words])

    with ExitStack() as stack:
        parts = {}
        for part, split in zip(PARTS, SPLITS, strict=True):
            files = [
                stack.enter_context(open(folder / f"{part}-{kind}.raw", "wb"))
                for kind in ("passages", "questions")
            ]
            parts[split] = _Part(*files)
        for split, question in tqdm(
            questions, desc="parsing", unit=" questions", disable=None, dynamic_ncols=True
        ):
            part = parts[split]
            passage = question.passage
            if four_sentences:
                passage = select_sentences(passage, question.question)
                part.kept += question.answer in passage
            part.append("passages", numbered(passage))
            part.append("questions", numbered(question.question))
            part.answers.extend(numbered([question.answer]))
    for split, part in parts.items():
        if not part.answers:
            raise DataError(f"{source} has no {split} questions; fetch it afresh, or set data_dir")

    words, table = _vocabulary(provisional, _counts(folder, parts, len(provisional)), numbers)
    facts: dict[str, dict[str, Any]] = {}
    for name, (split, part) in zip(PARTS, parts.items(), strict=True):
        for kind, lengths in part.lengths.items():
            _convert(folder / f"{name}-{kind}", int(sum(lengths)), table)
            offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths), dtype=np.int64)])
            np.save(folder / f"{name}-{kind}-offsets.npy", offsets)
        answers = table[np.asarray(part.answers)].astype(np.int64)
        np.save(folder / f"{name}-answers.npy", answers)
        facts[name] = {
            "n": len(answers),
            "skipped": dict(skipped.get(split, {})),
            "unknown_answers": int((answers == UNK).sum()),
        }
        if four_sentences:
            facts[name]["recall"] = part.kept / len(answers)
    (folder / "words.txt").write_bytes("\n".join(words).encode())
    (folder / "facts.json").write_text(json.dumps(facts))


def _counts(folder: Path, parts: Mapping[str, _Part], size: int) -> np.ndarray:
    """(size,) how often each provisional id occurs in the training split."""
    counts = np.bincount(np.asarray(parts[SPLITS[0]].answers), minlength=size)
    for kind in ("passages", "questions"):
        for ids in _chunks(folder / f"{PARTS[0]}-{kind}.raw"):
            counts += np.bincount(ids, minlength=size)
    return counts


def _vocabulary(
    provisional: Mapping[str, int], counts: np.ndarray, numbers: bool
) -> tuple[list[str], np.ndarray]:
    """The words by id, and the id of each provisional one: (provisional,) int32."""
    table = np.full(len(provisional), UNK, np.int32)
    kept = []
    for word, number in provisional.items():
        if numbers and word.isascii() and word.isdigit():
            table[number] = NUM
        elif word not in SPECIALS and counts[number] > (0 if ENTITY.fullmatch(word) else 1):
            kept.append((-int(counts[number]), word, number))
    # By the word among equals: the order of the files does not matter.
    kept.sort()
    for position, (_, _, number) in enumerate(kept, len(SPECIALS)):
        table[number] = position
    return [*SPECIALS, *(word for _, word, _ in kept)], table


def _convert(path: Path, length: int, table: np.ndarray) -> None:
    """`path`.raw of provisional ids -> `path`.npy, an array (length,) of int32."""
    raw = path.with_name(path.name + ".raw")
    with open(path.with_name(path.name + ".npy"), "wb") as file:
        header = {"descr": table.dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for ids in _chunks(raw):
            file.write(table[ids].tobytes())
    raw.unlink()


def _chunks(path: Path) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK * 4):
            yield np.frombuffer(chunk, np.int32)


def _load(folder: Path, mapped: Any) -> QuestionCorpus:
    """mapped: "r" to map the flat arrays, None to read them."""

    def split(part: str) -> QuestionSplit:
        rows = {}
        for kind in ("passages", "questions"):
            flat = np.load(folder / f"{part}-{kind}.npy", mapped)
            offsets = np.load(folder / f"{part}-{kind}-offsets.npy")
            if offsets[-1] != len(flat):
                raise ValueError("damaged")
            rows[kind] = Ragged(flat, offsets)
        return QuestionSplit(**rows, answers=np.load(folder / f"{part}-answers.npy"))

    words = tuple((folder / "words.txt").read_bytes().decode().split("\n"))
    entities = [k for k, word in enumerate(words) if ENTITY.fullmatch(word)]
    facts = json.loads((folder / "facts.json").read_text())
    train, valid, test = map(split, PARTS)
    return QuestionCorpus("", words, np.array(entities, np.int64), train, valid, test, False, facts)
