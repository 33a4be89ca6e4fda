"""Errors that a user can cause: one line for the person, one exit code for the script.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a defect in bnrnn: please report it, with the traceback |
| 2 | the command or its settings are wrong; nothing was started |
| 3 | data are missing, could not be fetched, or are not what they should be |
| 4 | a checkpoint or run directory cannot be used |
| 5 | training stopped because a loss or gradient was not finite |
| 6 | nothing can be written: disk full, read-only folder |
| 7 | out of memory |
| 8 | another process of the run has ended, or hangs |
| 130, 143 | stopped by Ctrl-C or SIGTERM; the checkpoint is saved |
| 138, 140 | stopped by SIGUSR1 or SIGUSR2 of a scheduler; the checkpoint is saved |
| 141 | nobody reads what is printed: a closed pipe |
"""

import re


def printable(text: object) -> str:
    """`str(text)` in one line that is safe to print anywhere.

    Paths, names in archives and words of other people's files may hold characters that a terminal
    acts on (control characters, changes of direction) and bytes that are not text in this locale.
    They become escapes: `\\x1b`, `\\u202e`, `\\xff`.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def readable(text: str) -> str:
    """The same for a text of several lines: line breaks and tabs stay."""
    parts = re.split("([\n\t])", text)
    return "".join(part if part in "\n\t" else printable(part) for part in parts)


def _escaped(character: str) -> str:
    # A byte that the file system's encoding could not decode.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class BnrnnError(Exception):
    """What is wrong, which setting or file, what to do: in one line, printable."""

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
