"""Texts that need no download: the Python manual, and any file of the user's."""

import os
import platform
from pathlib import Path

from bnrnn.datasets.characters import CharacterCorpus, build_corpus, split
from bnrnn.datasets.fetch import expand
from bnrnn.errors import DataError


def load_pydocs() -> CharacterCorpus:
    """The Python language reference that ships with CPython, about 465,000 characters, 90/5/5.

    It differs a little from one Python version to the next.

    Raises:
        DataError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without pydoc_data: install its whole standard library, or choose "
            "another task"
        ) from error
    text = "\n".join(topics[topic] for topic in sorted(topics))
    return build_corpus(f"pydocs (Python {platform.python_version()})", split(text))


def load_text(path: Path) -> CharacterCorpus:
    """A UTF-8 text file, 90/5/5 in order; any kind of line end is read as a newline.

    Raises:
        DataError: it is not a file, cannot be read, is not UTF-8, or is too short to split.
    """
    path = expand(path)
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise DataError(f"{path} {what}; set task.path to a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded; convert it or set "
            "task.path to another file"
        ) from error
    if not text:
        raise DataError(f"{path} is empty; set task.path to a text file with content")
    return build_corpus(str(path), split(text.replace("\r\n", "\n").replace("\r", "\n")))
