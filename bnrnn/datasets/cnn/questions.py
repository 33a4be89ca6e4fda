"""The `.question` files of the CNN question-answering corpus, from a folder or a .tgz archive.

The layout is that of DeepMind's generate_questions.py (github.com/google-deepmind/rc-data): URL,
passage, question, answer and entity map, joined by blank lines; one example a file.
"""

import gzip
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from bnrnn.errors import DataError

PLACEHOLDER = "@placeholder"
ENTITY = re.compile(r"@entity[0-9]+")
SPLITS = ("training", "validation", "test")
MAX_BYTES = 1 << 20  # of one file: the generator drops articles over 2000 tokens, some 12 kB
ADVICE = 'fetch the corpus afresh, or leave such files out with on_error="skip"'

BLANKS = "\r\n\t "  # strip() alone would take U+0085 or U+2028 off the ends as well

OnError = Literal["raise", "skip"]


class Question(NamedTuple):
    """A passage, a question with one `@placeholder`, and the entity that stands there.

    passage, question: tokens, lower case. answer: "@entityN". entities: "@entityN" -> its name in
    the article, empty in some releases.
    """

    url: str
    passage: list[str]
    question: list[str]
    answer: str
    entities: dict[str, str]


class QuestionError(DataError):
    """A `.question` file that is not one; `reason`: the kind of defect, the same for all of it."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name} {detail}; {ADVICE}")
        self.reason = reason


def tokens(line: str) -> list[str]:
    """The words of a line, split at single spaces; no empty ones, no line end on the last one.

    Only at spaces: the articles have other Unicode separators inside their words.
    """
    return [word for word in line.strip(BLANKS).split(" ") if word]


def parse_question(text: str | bytes, name: str, answer_in_passage: bool = True) -> Question:
    """The question in the content of one file; `name` is for messages.

    answer_in_passage: refuse a passage without the answer. The published files never have one;
    a selection of sentences may.

    Raises:
        QuestionError: bytes that are not UTF-8, not four or five fields, an empty passage or
            question, not exactly one `@placeholder`, an answer that is not `@entityN` or not in
            the passage, or an entity map with lines that are not `@entityN:name` or repeat one.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise QuestionError(
                name, "not UTF-8", f"is not UTF-8: byte {error.start} cannot be decoded"
            ) from error
    # Not splitlines(): the articles contain U+0085 and U+2028, which are no line ends here.
    fields = text.replace("\r\n", "\n").split("\n\n")
    # The entity map may be empty, and then the blank line before it may be lost.
    if len(fields) not in (4, 5):
        raise QuestionError(
            name, "fields", f"has {len(fields)} fields, not the 5 of a question file"
        )
    url, passage, question, answer = (field.strip(BLANKS) for field in fields[:4])
    if "\n" in url or "\n" in passage or "\n" in question or "\n" in answer:
        raise QuestionError(name, "fields", "has a field of several lines")
    passage_words, question_words = tokens(passage), tokens(question)
    if not passage_words:
        raise QuestionError(name, "empty passage", "has an empty passage")
    if not question_words:
        raise QuestionError(name, "empty question", "has an empty question")
    if (count := question_words.count(PLACEHOLDER)) != 1:
        raise QuestionError(
            name, "placeholder", f"has {count} times {PLACEHOLDER} in its question, not once"
        )
    if not ENTITY.fullmatch(answer):
        raise QuestionError(name, "answer", f"has the answer {answer[:40]!r}, not an @entityN")
    if answer_in_passage and answer not in passage_words:
        raise QuestionError(
            name, "answer not in passage", f"has the answer {answer}, which its passage lacks"
        )
    entities = {}
    for line in fields[4].split("\n") if len(fields) == 5 else ():
        if not line.strip(BLANKS):
            continue
        entity, colon, surface = line.partition(":")
        if not colon or not ENTITY.fullmatch(entity):
            raise QuestionError(
                name, "entity map", f"has {line[:40]!r} in its entity map, not @entityN:name"
            )
        if entity in entities:
            raise QuestionError(name, "entity map", f"has {entity} twice in its entity map")
        entities[entity] = surface
    return Question(url, passage_words, question_words, answer, entities)


def format_question(question: Question) -> str:
    """The content of its file: five fields joined by blank lines, no newline at the end."""
    return "\n\n".join(
        (
            question.url,
            " ".join(question.passage),
            " ".join(question.question),
            question.answer,
            "\n".join(f"{entity}:{name}" for entity, name in question.entities.items()),
        )
    )


def stream_questions(
    source: Path, on_error: OnError = "raise", skipped: Mapping[str, Counter[str]] | None = None
) -> Iterator[tuple[str, Question]]:
    """(split, question) for all questions of `SPLITS`, one at a time.

    source: a folder with `questions/<split>/*.question` or `cnn/questions/…`, read in the order of
    the names; or a gzipped tar of such a folder, read in its own order and never unpacked.
    on_error: for malformed files; "skip" counts them in `skipped`, by split and reason.

    Raises:
        QuestionError: see `parse_question`.
        DataError: the source cannot be read, the archive is damaged, or one of its members is a
            link or is outside the archive.
    """
    files = _folder_files if os.path.isdir(source) else _archive_files
    for split, name, content in files(source):
        try:
            if content is None:
                raise QuestionError(name, "size", f"has more than {MAX_BYTES} bytes")
            question = parse_question(content, name)
        except QuestionError as error:
            if on_error == "raise":
                raise
            if skipped is not None:
                skipped[split][error.reason] += 1
            continue
        yield split, question


def questions_folder(source: Path) -> Path | None:
    """`source/questions` or `source/cnn/questions`, whichever has the folder of a split."""
    for folder in (source / "questions", source / "cnn" / "questions"):
        if any(os.path.isdir(folder / split) for split in SPLITS):
            return folder
    return None


# (split, name for messages, content; None: too large)
_File = tuple[str, str, bytes | None]


def _folder_files(source: Path) -> Iterator[_File]:
    root = questions_folder(source)
    if root is None:
        raise DataError(
            f"{source} has no questions/{SPLITS[0]} folder; unpack cnn.tgz there, or set data_dir"
        )
    for split in SPLITS:
        folder = root / split
        if not os.path.isdir(folder):
            continue
        try:
            with os.scandir(folder) as entries:
                names = sorted(
                    entry.name for entry in entries if _is_question(entry.name) and entry.is_file()
                )
        except OSError as error:
            raise _unreadable(folder, error) from error
        for name in names:
            path = os.path.join(folder, name)
            try:
                with open(path, "rb") as file:
                    content = file.read(MAX_BYTES + 1)
            except OSError as error:
                raise _unreadable(path, error) from error
            yield split, path, content if len(content) <= MAX_BYTES else None


def _archive_files(source: Path) -> Iterator[_File]:
    try:
        # gzip and a plain stream rather than "r|gz": tarfile's own reader neither checks the sum
        # nor notices that the file is cut off between two members.
        with gzip.open(source) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps every header it has seen: half a gigabyte for the whole corpus.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                split = _split_of(source, member)
                if split is None:
                    continue
                name = f"{source}: {member.name}"
                if member.size > MAX_BYTES:
                    yield split, name, None
                elif (file := archive.extractfile(member)) is not None:
                    yield split, name, file.read()
            while rest := unpacked.read(1 << 16):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("a header in the middle is not one")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{source} cannot be read or unpacked ({error}); fetch it afresh, or set data_dir"
        ) from error


def _split_of(source: Path, member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    hostile = None
    if path.is_absolute() or ".." in path.parts:
        hostile = "is outside the archive"
    elif member.issym() or member.islnk():
        hostile = "is a link"
    if hostile:
        raise DataError(
            f"{source} is refused: its member {member.name!r} {hostile}; fetch it afresh, or set "
            "data_dir"
        )
    if not member.isreg() or not _is_question(path.name) or path.parts[-3:-2] != ("questions",):
        return None
    return path.parts[-2] if path.parts[-2] in SPLITS else None


def _is_question(name: str) -> bool:
    # macOS packs a hidden "._name" beside every file.
    return name.endswith(".question") and not name.startswith(".")


def _unreadable(path: Path | str, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror}; make it readable or set data_dir")
