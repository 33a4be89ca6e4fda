"""Errors that a user can cause: one line for the user and one exit code for scripts.

Each class is one exit code; docs/security.md lists them all.
"""

import re


def printable(text: object) -> str:
    """`str(text)` as one line that is safe to print anywhere.

    Paths, names in archives and words in untrusted files may contain characters that a terminal
    interprets (control characters, changes of text direction) and bytes that are not valid text in
    this locale. They are replaced by escapes: `\\x1b`, `\\u202e`, `\\xff`.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def readable(text: str) -> str:
    """Like `printable`, for text of several lines: it keeps line breaks and tabs."""
    parts = re.split("([\n\t])", text)
    return "".join(part if part in "\n\t" else printable(part) for part in parts)


def _escaped(character: str) -> str:
    # A surrogate stands for a byte that the file system's encoding could not decode.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class BnrnnError(Exception):
    """One printable line: what is wrong, with which setting or file, and what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(BnrnnError):
    exit_code = 2


class DataError(BnrnnError):
    exit_code = 3


class CheckpointError(BnrnnError):
    exit_code = 4


class NonFiniteError(BnrnnError):
    exit_code = 5


class OutputError(BnrnnError):
    exit_code = 6


class MemoryLimitError(BnrnnError):
    exit_code = 7


class PeerError(BnrnnError):
    exit_code = 8
