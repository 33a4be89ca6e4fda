"""The `.question` files of the CNN question-answering corpus, from a folder or a .tgz archive.

The layout is that of DeepMind's generate_questions.py (github.com/google-deepmind/rc-data): URL,
passage, question, answer and entity map, separated by blank lines; one example per file.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bnrnn.datasets.cnn.archive import MAX_MEMBERS, MAX_UNPACKED, read_archive
from bnrnn.datasets.limits import read_file, reading
from bnrnn.errors import DataError

PLACEHOLDER = "@placeholder"
ENTITY = re.compile(r"@entity[0-9]+")
SPLITS = ("training", "validation", "test")
MAX_BYTES = 1 << 20  # of one file; DeepMind's generator drops articles over 2000 tokens (12 kB)
ADVICE = "fetch the corpus again, or set data_dir"

BLANKS = "\r\n\t "  # strip() without arguments would also remove U+0085 and U+2028


class Question(NamedTuple):
    """A passage, a question with one `@placeholder`, and the entity that replaces it.

    passage, question: lower-case tokens. answer: "@entityN". entities: "@entityN" -> its name in
    the article; empty in some releases.
    """

    url: str
    passage: list[str]
    question: list[str]
    answer: str
    entities: dict[str, str]


def tokens(line: str) -> list[str]:
    """Split a line into words at spaces; drop empty words and the line ending.

    Other Unicode separators occur inside the articles' words and do not split them.
    """
    return [word for word in line.strip(BLANKS).split(" ") if word]


def read_question(path: Path) -> Question:
    """Read a question from a user's file; its passage may lack the answer.

    Raises:
        DataError: the file cannot be read or is too large; see also `parse_question`.
    """
    advice = "set question to a .question file"
    content = read_file(path, MAX_BYTES, advice)
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES:,} bytes; {advice}")
    return parse_question(content, str(path), answer_in_passage=False, advice=advice)


def parse_question(
    text: str | bytes, name: str, answer_in_passage: bool = True, advice: str = ADVICE
) -> Question:
    """Parse the content of one question file; `name` and `advice` are for messages.

    answer_in_passage: refuse a passage without the answer. Published passages always contain it;
    a selection of their sentences may not.

    Raises:
        DataError: the content is not UTF-8; the number of fields is not four or five; the passage
            or question is empty; the question does not have exactly one `@placeholder`; the answer
            is not `@entityN` or not in the passage; or the entity map has a line that is not
            `@entityN:name` or repeats an entity.
    """

    def malformed(detail: str) -> DataError:
        return DataError(f"{name} {detail}; {advice}")

    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise malformed(f"is not UTF-8: byte {error.start} cannot be decoded") from error
    # Not splitlines(): it would split at U+0085 and U+2028, which occur within the articles.
    fields = text.replace("\r\n", "\n").split("\n\n")
    # If the entity map is empty, the blank line before it may be missing.
    if len(fields) not in (4, 5):
        raise malformed(f"has {len(fields)} fields, not the 5 of a question file")
    url, passage, question, answer = (field.strip(BLANKS) for field in fields[:4])
    if "\n" in url or "\n" in passage or "\n" in question or "\n" in answer:
        raise malformed("has a field of several lines")
    passage_words, question_words = tokens(passage), tokens(question)
    if not passage_words:
        raise malformed("has an empty passage")
    if not question_words:
        raise malformed("has an empty question")
    if (count := question_words.count(PLACEHOLDER)) != 1:
        raise malformed(f"has {count} times {PLACEHOLDER} in its question, not once")
    if not ENTITY.fullmatch(answer):
        raise malformed(f"has the answer {answer[:40]!r}, not an @entityN")
    if answer_in_passage and answer not in passage_words:
        raise malformed(f"has the answer {answer[:40]}, which its passage lacks")
    entities = {}
    for line in fields[4].split("\n") if len(fields) == 5 else ():
        if not line.strip(BLANKS):
            continue
        entity, colon, surface = line.partition(":")
        if not colon or not ENTITY.fullmatch(entity):
            raise malformed(f"has {line[:40]!r} in its entity map, not @entityN:name")
        if entity in entities:
            raise malformed(f"has {entity[:40]} twice in its entity map")
        entities[entity] = surface
    return Question(url, passage_words, question_words, answer, entities)


def format_question(question: Question) -> str:
    """Format a question file: five fields joined by blank lines, without a final newline."""
    return "\n\n".join(
        (
            question.url,
            " ".join(question.passage),
            " ".join(question.question),
            question.answer,
            "\n".join(f"{entity}:{name}" for entity, name in question.entities.items()),
        )
    )


def stream_questions(source: Path, advice: str = ADVICE) -> Iterator[tuple[str, Question]]:
    """Yield (split, question) for all questions of `SPLITS`, one at a time.

    source: a folder with `questions/<split>/*.question` or `cnn/questions/…`, read in order of
    name; or a gzipped tar of such a folder, read in its own order without unpacking it to disk.

    Raises:
        DataError: a file is malformed (see `parse_question`), the source cannot be read (see
            `read_archive`), or it has too many files.
    """
    files = _folder_files if os.path.isdir(source) else _archive_files
    for split, name, content in files(source, advice):
        if content is None:
            raise DataError(f"{name} has more than {MAX_BYTES:,} bytes; {advice}")
        yield split, parse_question(content, name)


def questions_folder(source: Path) -> Path | None:
    """Return `source/questions` or `source/cnn/questions`, the first with a folder of a split."""
    for folder in (source / "questions", source / "cnn" / "questions"):
        if any(os.path.isdir(folder / split) for split in SPLITS):
            return folder
    return None


def identity(source: Path, advice: str = ADVICE) -> str:
    """Hash the archive, or the names, sizes and modification times of a folder's question files.

    The content of a folder is not hashed: reading 400,000 small files takes about as long as
    parsing them.

    Raises:
        DataError: the source cannot be read.
    """
    if not os.path.isdir(source):
        with reading(source, advice, MAX_UNPACKED) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    for split, path in _question_paths(source, advice):
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; {advice}") from error
        name = os.path.basename(path).encode("utf-8", "surrogateescape")
        found.update(b"%s/%s\0%d %d\0" % (
            split.encode(), name, status.st_size, status.st_mtime_ns,
        ))  # fmt: skip
    return found.hexdigest()


# (split, name for messages, content; None: too large)
_File = tuple[str, str, bytes | None]


def _folder_files(source: Path, advice: str) -> Iterator[_File]:
    for split, path in _question_paths(source, advice):
        content = read_file(path, MAX_BYTES, advice)
        yield split, path, content if len(content) <= MAX_BYTES else None


def _archive_files(source: Path, advice: str) -> Iterator[_File]:
    def wanted(name: str) -> bool:
        return _split_of(name) is not None

    for name, content in read_archive(source, wanted, MAX_BYTES, advice):
        split = _split_of(name)
        assert split is not None
        yield split, f"{source}: {name[:200]}", content


def _question_paths(source: Path, advice: str) -> Iterator[tuple[str, str]]:
    """Yield (split, path) of a folder's question files, in order of name within each split."""
    root = questions_folder(source)
    if root is None:
        raise DataError(
            f"{source} has no questions/{SPLITS[0]} folder; unpack cnn.tgz there, or set data_dir"
        )
    for split in SPLITS:
        folder = root / split
        if not os.path.lexists(folder):
            continue
        names = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_question(entry.name):
                        names.append(entry.name)
                    if len(names) > MAX_MEMBERS:
                        raise DataError(f"{folder} has more than {MAX_MEMBERS:,} files; {advice}")
        except OSError as error:
            raise DataError(f"cannot read {folder}: {error.strerror}; {advice}") from error
        for name in sorted(names):
            yield split, os.path.join(folder, name)


def _split_of(name: str) -> str | None:
    """Return the split of a member "…/questions/<split>/<name>.question"; None for any other."""
    # pathlib would intern the names of 400,000 files.
    *_, folder, split, file = ("", "", *(part for part in name.split("/") if part not in ("", ".")))
    return split if folder == "questions" and split in SPLITS and _is_question(file) else None


def _is_question(name: str) -> bool:
    # macOS archives contain a hidden "._name" beside every file.
    return name.endswith(".question") and not name.startswith(".")
