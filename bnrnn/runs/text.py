"""Make names safe for a shell and for a file name."""

import os
import re
import shlex
import zlib
from pathlib import Path

from bnrnn.settings.compose import literal


def quoted(path: Path) -> str:
    """Quote `path` as a command-line value, for Hydra's grammar and then for a POSIX shell."""
    text = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    plain = re.fullmatch(r"[\w./-]+", text, re.ASCII)
    return text if plain else shlex.quote(literal(text))


def slug(text: str, most: int = 60) -> str:
    """Convert a text to a file name, or part of one, without folders: "γ 0.3" -> "gamma0.3".

    Args:
        most: bytes; in a longer text a checksum replaces the end.
    """
    name = re.sub(r"[^\w.-]+", "_", text.replace("γ ", "gamma").replace("'", ""))
    name = name.lstrip(".-") or "_"
    if len(name.encode()) > most:
        checksum = f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"
        name = f"{name.encode()[: most - 9].decode(errors='ignore')}_{checksum}"
    return name
