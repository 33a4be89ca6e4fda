"""The terminal: streams that always work, and text that is safe to print."""

import io
import logging
import os
import sys

from bnrnn.errors import readable


def prepare() -> None:
    """Make printing safe: open closed streams on /dev/null, escape unencodable characters."""
    for descriptor in range(3):  # so that no file opened later gets such a number
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Formatter(logging.Formatter):
    """Format log messages, for the terminal or a file, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def say(text: str = "") -> None:
    """Print a result."""
    print(readable(text))
