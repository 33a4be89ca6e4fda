"""Any text file, and the Python manual that every Python carries."""

from pathlib import Path

from bnrnn.datasets.cache import Arrays, cached_arrays
from bnrnn.datasets.corpus import CharacterCorpus, corpus_from_arrays, index_splits, split_in_order
from bnrnn.errors import DataError

_FORMAT_VERSION = 1


def load_text(path: Path) -> CharacterCorpus:
    """A UTF-8 file, split 90/5/5 in order; line ends are read as newlines.

    Raises:
        DataError: it is missing, empty, no UTF-8, or too short to split.
    """
    if not path.is_file():
        raise DataError(f"path={path}: no such file")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"path={path}: the file is empty")
        return corpus_from_arrays(
            path.name, cached_arrays("text", [path], _FORMAT_VERSION, lambda: _parse(path))
        )
    except OSError as error:
        raise DataError(f"path={path}: cannot be read: {error.strerror}") from error


def _parse(path: Path) -> Arrays:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"path={path}: not UTF-8 at byte {error.start}; convert it, for instance with iconv"
        ) from error
    return index_splits(split_in_order(f"path={path}", text))


def load_pydocs() -> CharacterCorpus:
    """The language reference as `pydoc` shows it, about 465,000 characters, split 90/5/5.

    The text differs a little between versions of Python.

    Raises:
        DataError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics: use task=text path=FILE or another Python"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics))
    return corpus_from_arrays("Python manual", index_splits(split_in_order("pydocs", text)))
