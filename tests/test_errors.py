"""Error messages are one line without characters that a terminal interprets."""

import pickle

import pytest

from bnrnn import errors
from bnrnn.errors import BnrnnError, printable


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain: ~/ünï/数.txt 'it's' \\ $x^{$", "plain: ~/ünï/数.txt 'it's' \\ $x^{$"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("two\nlines\r\tand\x00", "two\\nlines\\r\\tand\\x00"),
        ("bell \x07 delete \x7f C1 \x9b", "bell \\x07 delete \\x7f C1 \\x9b"),
        ("\u202egpj.exe\u2028\u2066\ufeff", "\\u202egpj.exe\\u2028\\u2066\\ufeff"),
        ("language tag \U000e0041", "language tag \\U000e0041"),
        (
            b"not UTF-8: \xff\xc3.txt".decode("utf-8", "surrogateescape"),
            "not UTF-8: \\xff\\xc3.txt",
        ),
        ("half \ud800", "half \\ud800"),
        ("", ""),
    ],
)
def test_printable(text: str, printed: str):
    assert printable(text) == printed
    assert printable(text).isprintable()
    printed.encode("utf-8")


def test_every_message_is_printable():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) >= 6
    for kind in kinds:
        assert issubclass(kind, BnrnnError)
        error = kind("cannot read a\x1b[31m\nb: try \udcff")
        assert str(error) == "cannot read a\\x1b[31m\\nb: try \\xff"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
