"""A corpus of questions as ids: types, vocabulary and cache files."""

import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bnrnn import progress
from bnrnn.datasets.cnn.questions import ENTITY, SPLITS, Question
from bnrnn.datasets.cnn.select import select_sentences
from bnrnn.errors import DataError

FORMAT_VERSION = 1  # of the files; increase it when they change
NIL, EOS, UNK, NUM = range(4)
SPECIALS = ("<nil>", "<eos>", "<unk>", "<num>")
PARTS = ("train", "valid", "test")  # our names for SPLITS
CHUNK = 1 << 20  # ids converted at a time
MAX_VOCABULARY = 1 << 28  # bytes for the distinct words: enough for two million short ones
WORD = 100  # bytes per word in addition to its characters: object, number and dict entry


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of ids of different lengths: `rows[k]` is (length,), with the type of `flat`.

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
        # This is still a view of the mapped file, without the cost of a numpy.memmap per row.
        return np.asarray(self.flat[self.offsets[index] : self.offsets[index + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class QuestionSplit:
    """n examples: passages, questions (without an end token), answers (n,) int64."""

    passages: Ragged
    questions: Ragged
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True, eq=False)
class QuestionCorpus:
    """Questions over one vocabulary: id k stands for `words[k]`; the first four are `SPECIALS`.

    entity_ids: (E,) int64, ascending: the ids of all `@entityN`. facts: for each of "train",
    "valid" and "test" a dict with "n"; "unknown_answers", the number of answers that are UNK; and,
    for four sentences, "recall", the fraction of passages that kept the answer. whole: False if
    only part of the published corpus was found.
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
        """Convert ids (n,) to n words."""
        return [self.words[k] for k in ids]


def write_corpus(
    folder: Path,
    questions: Iterable[tuple[str, Question]],
    source: str,
    four_sentences: bool = False,
) -> None:
    """Write a corpus of (split, question) pairs to `folder`, in one pass over `questions`.

    Words are first numbered in order of appearance. After the words of the training split are
    counted, the files are rewritten with the ids of the vocabulary. source: for messages.

    Raises:
        DataError: a split has no questions, or the words exceed `MAX_VOCABULARY` bytes.
        OSError: the files cannot be written.
    """
    provisional: dict[str, int] = {}
    memory = 0

    def numbered(words: Iterable[str]) -> array:
        nonlocal memory
        before = len(provisional)
        ids = array("i", [provisional.setdefault(word, len(provisional)) for word in words])
        new = islice(reversed(provisional), len(provisional) - before)
        memory += sum(WORD + sys.getsizeof(word) for word in new)
        if memory > MAX_VOCABULARY:
            raise DataError(
                f"{source} has too many different words, {len(provisional):,} so far; fetch it "
                "again, or set data_dir"
            )
        return ids

    with ExitStack() as stack:
        parts = {}
        for part, split in zip(PARTS, SPLITS, strict=True):
            files = [
                stack.enter_context(open(folder / f"{part}-{kind}.raw", "wb"))
                for kind in ("passages", "questions")
            ]
            parts[split] = _Part(*files)
        for split, question in progress.bar(questions, "parsing", unit=" questions"):
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
            raise DataError(f"{source} has no {split} questions; fetch it again, or set data_dir")

    words, table = _vocabulary(provisional, _counts(folder, parts, len(provisional)))
    facts: dict[str, dict[str, Any]] = {}
    for name, part in zip(PARTS, parts.values(), strict=True):
        for kind, lengths in part.lengths.items():
            _convert(folder / f"{name}-{kind}", int(sum(lengths)), table)
            offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths), dtype=np.int64)])
            np.save(folder / f"{name}-{kind}-offsets.npy", offsets)
        answers = table[np.asarray(part.answers)].astype(np.int64)
        np.save(folder / f"{name}-answers.npy", answers)
        facts[name] = {
            "n": len(answers),
            "unknown_answers": int((answers == UNK).sum()),
        }
        if four_sentences:
            facts[name]["recall"] = part.kept / len(answers)
    (folder / "words.txt").write_bytes("\n".join(words).encode())
    (folder / "facts.json").write_text(json.dumps(facts))


def read_corpus(folder: Path) -> QuestionCorpus:
    """Map the corpus that `write_corpus` wrote to `folder`; the caller sets its name.

    Raises:
        Exception: of any type, if a file is missing or damaged.
    """

    def split(part: str) -> QuestionSplit:
        rows = {}
        for kind in ("passages", "questions"):
            flat = np.load(folder / f"{part}-{kind}.npy", "r")
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


class _Part:
    """One split during parsing: provisional ids on disk, lengths and answers in memory."""

    def __init__(self, passages: BinaryIO, questions: BinaryIO) -> None:
        self.files = {"passages": passages, "questions": questions}
        self.lengths = {"passages": array("q"), "questions": array("q")}
        self.answers = array("i")
        self.kept = 0

    def append(self, kind: str, ids: array) -> None:
        self.files[kind].write(ids.tobytes())
        self.lengths[kind].append(len(ids))


def _counts(folder: Path, parts: Mapping[str, _Part], size: int) -> np.ndarray:
    """Count how often each provisional id occurs in the training split: (size,)."""
    counts = np.bincount(np.asarray(parts[SPLITS[0]].answers), minlength=size)
    for kind in ("passages", "questions"):
        for ids in _chunks(folder / f"{PARTS[0]}-{kind}.raw"):
            counts += np.bincount(ids, minlength=size)
    return counts


def _vocabulary(provisional: Mapping[str, int], counts: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the words by id, and the id of each provisional id: (provisional,) int32."""
    table = np.full(len(provisional), UNK, np.int32)
    kept = []
    for word, number in provisional.items():
        if word not in SPECIALS and counts[number] > (0 if ENTITY.fullmatch(word) else 1):
            kept.append((-int(counts[number]), word, number))
    # Break ties by the word, so that the order of the files does not matter.
    kept.sort()
    for position, (_, _, number) in enumerate(kept, len(SPECIALS)):
        table[number] = position
    return [*SPECIALS, *(word for _, word, _ in kept)], table


def _convert(path: Path, length: int, table: np.ndarray) -> None:
    """Convert `path`.raw (provisional ids) to `path`.npy, an array (length,) of int32."""
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
