"""Damaged, hostile or non-regular data files: a one-line error, in little memory and time."""

import gzip
import hashlib
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bnrnn.datasets import (
    load_cnn,
    load_mnist,
    load_ptb,
    load_ptb_words,
    load_text,
    load_text8,
    mnist,
    ptb,
    read_question,
    text,
    text8,
)
from bnrnn.datasets.cnn import archive, corpus, questions, synthetic
from bnrnn.datasets.cnn.archive import read_archive
from bnrnn.datasets.fetch import RemoteFile
from bnrnn.datasets.mnist import read_idx
from bnrnn.errors import DataError

MEGABYTE = 1 << 20
QUESTION = b"http://x\n\n@entity1 met @entity2 .\n\nwho met @placeholder\n\n@entity2\n\n"
TEXT8 = b" anarchism originated as a term of abuse" * 5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Turn a hang into a failure."""

    def fail(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def error_of(call: Callable[[], object], memory: int = 40 * MEGABYTE) -> str:
    """Return the message of the DataError; fail if the call used more than `memory` bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory, f"{peak / MEGABYTE:.0f} MB"
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    assert "; " in message  # followed by advice
    return message


# --- every kind of file, with every kind of damage ------------------------------------------------


class Kind(NamedTuple):
    """A small file of a data set, and the function that loads it."""

    path: Path
    load: Callable[[], object]


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path


def question_members() -> dict[str, bytes]:
    return {f"cnn/questions/{split}/0.question": QUESTION for split in questions.SPLITS}


def make_mnist(data_dir: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> Path:
    files, folder = {}, data_dir / "mnist"
    folder.mkdir()
    for name, (file, _, _, shape) in mnist.FILES.items():
        small = (4, *shape[1:])
        header = struct.pack(f">HBB{len(small)}I", 0, 8, len(small), *small)
        content = gzip.compress(header + np.random.default_rng(0).bytes(int(np.prod(small))))
        (folder / file).write_bytes(content)
        files[name] = (file, len(content), hashlib.md5(content).hexdigest(), small)
    monkeypatch.setattr(mnist, "FILES", files)
    monkeypatch.setattr(mnist, "VALID_SIZE", 2)
    return folder / files[part][0]


def make_ptb(data_dir: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> Path:
    files, folder = [], data_dir / "ptb"
    folder.mkdir()
    for file in ptb.FILES:
        content = b" no it was n't black monday \n" * 9
        (folder / file.name).write_bytes(content)
        known = "md5:" + hashlib.md5(content).hexdigest()
        files.append(RemoteFile(file.name, (), known, len(content)))
    monkeypatch.setattr(ptb, "FILES", files)
    return folder / f"ptb.{part}.txt"


def make_text8(data_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    monkeypatch.setattr(text8, "LENGTH", len(TEXT8))
    monkeypatch.setattr(text8, "SHA1", hashlib.sha1(TEXT8).hexdigest())
    path = data_dir / "text8" / name
    path.parent.mkdir()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr("text8", TEXT8)
    else:
        path.write_bytes(gzip.compress(TEXT8) if name.endswith(".gz") else TEXT8)
    return path


def make(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    name, _, part = kind.partition(" ")
    if name == "mnist":
        return Kind(make_mnist(folder, monkeypatch, part), lambda: load_mnist(folder))
    if name == "ptb":
        return Kind(make_ptb(folder, monkeypatch, part), lambda: load_ptb(folder, "paper"))
    if name == "words":
        return Kind(make_ptb(folder, monkeypatch, part), lambda: load_ptb_words(folder))
    if name == "text8":
        return Kind(make_text8(folder, monkeypatch, part), lambda: load_text8(folder))
    if name == "text":
        path = folder / "text.txt"
        path.write_text("one two, thrée\n" * 20, "utf-8")
        return Kind(path, lambda: load_text(path))
    if name == "question":
        path = folder / "my.question"
        path.write_bytes(QUESTION)
        return Kind(path, lambda: read_question(path))
    if name == "synthetic":
        path = folder / "cnn_synthetic" / "cnn-synthetic-150.tgz"
        synthetic.generate(path, 150)
        return Kind(path, lambda: load_cnn(folder, synthetic=150))
    if part == "archive":
        path = tgz(folder / "cnn_qa" / "cnn.tgz", question_members())
        return Kind(path, lambda: load_cnn(folder))
    paths = [folder / member for member in question_members()]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes(QUESTION)
    return Kind(paths[-1], lambda: load_cnn(folder))


KINDS = (
    *(f"mnist {part}" for part in mnist.FILES),
    *(f"ptb {part}" for part in ("train", "valid", "test")),
    "words train",
    *(f"text8 {name}" for name in text8.NAMES),
    "text", "question", "synthetic", "cnn archive", "cnn folder",
)  # fmt: skip
# Any part of a text is a valid text, and so is a text with another character.
UNDETECTABLE = {
    ("text8 text8", "cut"), ("text8 text8.prefix", "cut"), ("text", "cut"),
}  # fmt: skip


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def enlarge(path: Path) -> None:
    """Make the file 4 TB of zeros that take no disk space."""
    os.truncate(path, 4 << 40)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def listen(path: Path) -> None:
    # The address of a Unix socket has at most 107 characters.
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.open(path.parent, os.O_RDONLY)
        opened.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def forbid(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read anything")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, ""),
    "flipped": (flip, ""),
    "empty": (empty, ""),
    "enormous": (enlarge, ""),
    "folder": (replace_by(Path.mkdir), "it is not a file but a folder"),
    "pipe": (replace_by(os.mkfifo), "it is not a file but a named pipe"),
    "loop": (replace_by(lambda p: p.symlink_to(p)), "Too many levels of symbolic links"),
    "dangling": (replace_by(lambda p: p.symlink_to("nothing")), "No such file"),
    "device": (replace_by(lambda p: p.symlink_to("/dev/zero")), "it is not a file but a device"),
    "socket": (replace_by(listen), "it is not a file but a socket"),
    "unreadable": (forbid, "Permission denied"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named(
    kind: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if (kind, damage) in UNDETECTABLE:
        pytest.skip("what is left is as good as the whole")
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    path, load = make(kind, data_dir, monkeypatch)
    load()  # the complete file is valid
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    act, what = DAMAGES[damage]
    act(path)
    if (kind, damage) == ("cnn archive", "folder"):
        what = "has no questions/training folder"
    message = error_of(load)
    assert str(path) in message
    assert what in message


def test_the_command_prints_it_and_exits_with_3(bnrnn_here, tmp_path: Path):
    (tmp_path / "text\x1b[2J.txt").symlink_to("/dev/zero")
    done = bnrnn_here("mode=data", "task=text", f"task.path='{tmp_path}/text\x1b[2J.txt'")
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "text\\x1b[2J.txt: it is not a file but a device; set task.path" in line


@pytest.mark.parametrize("name", [b"\xc3\xbcn\xc3\xaf.txt", b"not UTF-8 \xff.txt"])
def test_paths_beyond_the_locale(name: bytes, tmp_path: Path):
    """In a process with an ASCII locale, the text is read and messages are printable."""
    os.symlink("/dev/zero", os.path.join(os.fsencode(tmp_path), b"bad " + name))
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as opened:
        opened.write(b"one two three\n" * 20)
    code = """
import sys
from pathlib import Path
from bnrnn.datasets import load_text
from bnrnn.errors import DataError
path = Path(sys.argv[1])
sys.stdout.reconfigure(errors="strict")
print(load_text(path).name)
try:
    load_text(path.with_name("bad " + path.name))
except DataError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    first, second = done.stdout.decode("ascii").splitlines()
    shown = "".join(chr(b) if b < 128 else f"\\x{b:02x}" for b in name)
    assert first == f"{tmp_path}/{shown}"
    assert f"{tmp_path}/bad {shown}: it is not a file but a device" in second


# --- compressed files -----------------------------------------------------------------------------


def members_of(content: bytes, times: int) -> bytes:
    """Make a gzip file of `times` members with the same content; this is fast."""
    return gzip.compress(content, 9) * times


BOMB = members_of(b" " * (8 * MEGABYTE), 16)  # 128 MB


def test_text8_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, load = make("text8 text8.gz", tmp_path, monkeypatch)
    monkeypatch.setattr(text8, "LENGTH", MEGABYTE)
    path.write_bytes(BOMB)
    assert "its length or sha1 differs" in error_of(load, 4 * MEGABYTE)


def test_mnist_bomb(tmp_path: Path):
    path = tmp_path / "images.gz"
    header = struct.pack(">HBB3I", 0, 8, 3, 1000, 28, 28)
    path.write_bytes(gzip.compress(header) + members_of(bytes(8 * MEGABYTE), 16))
    message = error_of(lambda: read_idx(path, (1000, 28, 28)), 4 * MEGABYTE)
    assert "holds at least 784001 bytes of data, not 784000" in message


def zip_of(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        opened.writestr("text8", content)
    return bytearray(buffer.getvalue())


def lying_size() -> bytes:
    """A zip file whose list of members states 200 bytes for a member of 64 MB."""
    content = zip_of(b" " * (64 * MEGABYTE))
    at = content.index(b"PK\1\2")
    content[at + 24 : at + 28] = struct.pack("<I", 200)
    return bytes(content)


def lying_zip64() -> bytes:
    """A zip file whose list of members states 2**60 bytes, in a zip64 field."""
    content = zip_of(TEXT8)
    at, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    extra = struct.pack("<HHQ", 1, 8, 1 << 60)
    content[at + 24 : at + 28] = b"\xff" * 4
    content[at + 30 : at + 32] = struct.pack("<H", len(extra))
    content[end + 12 : end + 16] = struct.pack("<I", end - at + len(extra))
    content[end:end] = extra
    return bytes(content)


def lying_list() -> bytes:
    """A zip file whose list of members, all empty, has 64 MB."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *(0,) * 16)
    entries = entry * (64 * MEGABYTE // len(entry))
    return entries + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, len(entries), 0, 0)


def encrypted() -> bytes:
    content = zip_of(TEXT8)
    for at in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        content[at] |= 1
    return bytes(content)


ZIPS = {
    "bomb": (lambda: bytes(zip_of(b" " * (64 * MEGABYTE))), "67,108,864 bytes, not 200"),
    "bzip2": (lambda: bytes(zip_of(TEXT8, zipfile.ZIP_BZIP2)), "neither stored"),
    "lzma": (lambda: bytes(zip_of(TEXT8, zipfile.ZIP_LZMA)), "neither stored"),
    "size": (lying_size, "cannot be read or unpacked"),
    "zip64": (lying_zip64, "1,152,921,504,606,846,976 bytes, not 200"),
    "list": (lying_list, "cannot be read or unpacked"),
    "nested": (lambda: bytes(zip_of(bytes(zip_of(TEXT8)))), "is not text8"),
    "encrypted": (encrypted, "password required"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_zips(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, load = make("text8 text8.zip", tmp_path, monkeypatch)
    build, what = ZIPS[name]
    path.write_bytes(build())
    if name == "list":
        monkeypatch.setattr(text8, "LENGTH", 100 * MEGABYTE)
    message = error_of(load, 4 * MEGABYTE)
    assert str(path) in message
    assert what in message


def test_a_zip_with_a_stored_member_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, load = make("text8 text8.zip", tmp_path, monkeypatch)
    path.write_bytes(zip_of(TEXT8, zipfile.ZIP_STORED))
    load()


# --- archives -------------------------------------------------------------------------------------


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def record(key: str, value: bytes | str) -> bytes:
    """Make a record of a pax header; its length includes the length field."""
    value = value if isinstance(value, bytes) else value.encode()
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    content = b"".join(records)
    return header("pax", kind, len(content)) + padded(content)


def file(name: str = "cnn/questions/training/0.question", content: bytes = QUESTION) -> bytes:
    return header(name, size=len(content)) + padded(content)


END = bytes(2 * tarfile.BLOCKSIZE)
ZEROS = 128 * MEGABYTE
NAME = "cnn/questions/training/0.question"

# The headers of archives; a long run of zeros follows each.
BOMBS = {
    "pax header": header("x", tarfile.XHDTYPE, ZEROS),
    "global pax header": header("x", tarfile.XGLTYPE, ZEROS),
    "Solaris header": header("x", tarfile.SOLARIS_XHDTYPE, ZEROS),
    "long name": header("x", tarfile.GNUTYPE_LONGNAME, ZEROS),
    "long name of a link": header("x", tarfile.GNUTYPE_LONGLINK, ZEROS),
    "question": header(NAME, size=ZEROS),
    "other file": header("cnn/other", size=ZEROS),
    "after the end": END,
}


@pytest.mark.parametrize("name", BOMBS)
def test_archives_are_no_bombs(name: str, tmp_path: Path):
    path = tmp_path / "cnn_qa" / "cnn.tgz"
    path.parent.mkdir()
    zeros = members_of(bytes(8 * MEGABYTE), ZEROS // (8 * MEGABYTE))
    path.write_bytes(gzip.compress(BOMBS[name]) + zeros + gzip.compress(END))
    assert path.stat().st_size < 2 * MEGABYTE
    assert str(path) in error_of(lambda: load_cnn(tmp_path), 3 * MEGABYTE)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "sparse map": (pax(record("GNU.sparse.map", "a")) + file(), "a sparse file"),
    "sparse 1.0": (
        pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0")) + file(),
        "a sparse file",
    ),
    "old sparse": (header(NAME, tarfile.GNUTYPE_SPARSE), "is neither a file nor a folder"),
    "device": (header(NAME, tarfile.CHRTYPE), "is neither a file nor a folder"),
    "disk": (header("cnn/x", tarfile.BLKTYPE), "is neither a file nor a folder"),
    "pipe": (header("cnn/x", tarfile.FIFOTYPE), "is neither a file nor a folder"),
    "unknown type": (header("cnn/x", b"Z"), "is neither a file nor a folder"),
    "link": (header("cnn/x", tarfile.SYMTYPE), "is a link"),
    "hard link": (header("cnn/x", tarfile.LNKTYPE), "is a link"),
    "absolute": (file("/cnn/questions/training/0.question"), "is outside the archive"),
    "absolute by pax": (pax(record("path", "/etc/x")) + file(), "is outside the archive"),
    "parent": (file("cnn/../../x"), "is outside the archive"),
    "folder": (header("../x", tarfile.DIRTYPE), "is outside the archive"),
    "control characters": (file("../\x1b[2J\x07\n\u202ex"), "member '../\\x1b[2J\\x07\\n\\u202ex'"),
    "not UTF-8": (
        pax(record("path", b"../\xff\x9b")) + file(), "member '../\\udcff\\udc9b' is outside"
    ),
    "long name": (
        header("x", tarfile.GNUTYPE_LONGNAME, 60_000) + padded(b"/" + b"n" * 59_999) + file(),
        "is outside the archive",
    ),
    "many headers": (pax(record("path", "x")) * 1200, "it is cut off"),
    "many long names": (
        (header("x", tarfile.GNUTYPE_LONGNAME, 1) + padded(b"x")) * 1200, "it is cut off"
    ),
    "too many members": (header("d", tarfile.DIRTYPE) * 2000 + END, "more than 1,500 members"),
    "endless file": (header(NAME, size=(1 << 63) - 1), "when unpacked"),
    "negative size": (header(NAME, size=-512) + END, "a negative size"),
    "negative size by pax": (pax(record("size", "-512")) + file(), "a size that is not a number"),
    "size of many digits": (pax(record("size", "9" * 5000)) + file(), "a size that is not a num"),
    "size not a number": (pax(record("size", "a")) + file(), "a size that is not a number"),
    "record without length": (pax(b"path=x\n") + file(), "a damaged pax header"),
    "record too long": (pax(b"99 path=x\n") + file(), "a damaged pax header"),
    "record of length 0": (pax(b"0 path=x\n") + file(), "a damaged pax header"),
    "record without key": (pax(b"9 path x\n") + file(), "a damaged pax header"),
    "record without end": (pax(b"8 path=x\n") + file(), "a damaged pax header"),
    "check sum": (bytes([file()[0] ^ 1]) + file()[1:] + END, "bad checksum"),
    "no end": (file(), "it is cut off"),
    "after the end": (file() + END + file(), "something follows the end of the archive"),
    "another archive in it": (file("cnn.tgz", gzip.compress(file() + END)) + END, "no training"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 1500)
    path = tmp_path / "cnn_qa" / "cnn.tgz"
    path.parent.mkdir()
    content, what = HOSTILE[name]
    path.write_bytes(gzip.compress(content))
    message = error_of(partial(load_cnn, tmp_path), 3 * MEGABYTE)
    assert str(path) in message
    assert what in message


def test_the_unpacked_archive_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "MAX_UNPACKED", 100_000)
    path = tmp_path / "x.tgz"
    for content in (file() * 200, file() + END + bytes(200_000), file("x", bytes(200_000)) + END):
        path.write_bytes(gzip.compress(content))
        what = error_of(lambda: list(read_archive(path, lambda _: True, MEGABYTE, "go")))
        assert "more than 100,000 bytes when unpacked" in what


def test_different_words_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "MAX_VOCABULARY", 2 * MEGABYTE)
    members = {}
    for k in range(50):
        words = " ".join(f"{k}-{i}" for i in range(1000))
        content = QUESTION.replace(b"met", words.encode(), 1)
        members[f"questions/training/{k:02}.question"] = content
    tgz(tmp_path / "cnn_qa" / "cnn.tgz", members)
    message = error_of(lambda: load_cnn(tmp_path), 8 * MEGABYTE)
    assert "cnn.tgz has too many different words" in message


def test_files_of_a_folder_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, load = make("cnn folder", tmp_path, monkeypatch)
    monkeypatch.setattr(questions, "MAX_MEMBERS", 5)
    for k in range(6):
        path.with_name(f"{k}.question").write_bytes(QUESTION)
    assert f"{path.parent} has more than 5 files" in error_of(load)


def test_folders_that_link_to_each_other_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, load = make("cnn folder", tmp_path, monkeypatch)
    for split in questions.SPLITS:
        for name in ("a", "b"):
            (tmp_path / "cnn" / "questions" / split / name).symlink_to("..")
    load()


@pytest.mark.parametrize("form", ["ustar", "gnu", "pax", "v7", "oldgnu"])
def test_archives_of_the_tar_command_are_read(form: str, tmp_path: Path):
    if shutil.which("tar") is None:
        pytest.skip("there is no tar here")
    names = ["a.question", "ünï.question", "not UTF-8 \udcff.question"]
    if form != "v7":
        names += [
            "n" * (98 if form == "ustar" else 150),
            "/".join("d" * 60 for _ in range(3)) + "/x",
        ]
    contents = {}
    for k, name in enumerate(names):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contents["./" + name] = bytes([k]) * (511 + k)
        path.write_bytes(contents["./" + name])
        os.utime(path, ns=(1, 1))  # pax writes extended headers for fractions of a second
    packed = tmp_path / "x.tgz"
    command = ["tar", f"--format={form}", "-czf", packed, "-C", tmp_path / "tree", "."]
    subprocess.run(command, check=True)
    assert dict(read_archive(packed, lambda _: True, 1000, "")) == contents
    short = dict(read_archive(packed, lambda name: "a.q" in name, 5, ""))
    assert short == {"./a.question": None}


def test_archives_with_any_attributes_are_read(tmp_path: Path):
    """Attributes as in macOS archives, and a global header as in git's."""
    content = (
        pax(record("comment", "x" * 300), kind=tarfile.XGLTYPE)
        + pax(record("mtime", "1.5"), record("LIBARCHIVE.xattr.a", b"\xff\0=\n" * 100))
        + file("cnn/a")
        + pax(record("path", "b" * 200), record("size", "3"))
        + header("short")
        + padded(b"abc")
        + header("d", tarfile.DIRTYPE, 4096)
        + file("c", b"")
        + END
        + bytes(10_240)
    )
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(content))
    expected = {"cnn/a": QUESTION, "b" * 200: b"abc", "c": b""}
    assert dict(read_archive(path, lambda _: True, 1000, "")) == expected


# --- texts and questions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a" * 300 + b"\0" + b"b" * 300, "its character 300 is NUL"),
        ("é".encode() * 600_000 + b"\xff", "byte 1200000 cannot be decoded"),
        (b"a" * 1_048_575 + "é".encode()[:1], "byte 1048575 cannot be decoded"),
        (b"a" * 1_048_575 + b"\xc3a", "byte 1048575 cannot be decoded"),
        ("abc".encode("utf-16-le") * 100, "is NUL"),
        (b"a" * 2_000_001, "has 2,000,001 bytes, more than 2,000,000"),
    ],
)
def test_texts_that_are_none(
    content: bytes, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "MAX_BYTES", 2_000_000)
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    message = error_of(lambda: load_text(path))
    assert f"{path} " in message
    assert what in message


def test_a_text_is_read_the_same_wherever_the_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "text.txt"
    path.write_bytes(("\ufeff" + "é\r\n数\r\r\n\ufeff\U0001f600\n" * 20).encode())
    expected = "é\n数\n\n\ufeff\U0001f600\n" * 20
    for chunk in (1, 2, 3, 4, 5, 7, 1000):
        monkeypatch.setattr(text, "CHUNK", chunk)
        found = load_text(path)
        assert "".join(map(found.decode, (found.train, found.valid, found.test))) == expected


def test_a_text_takes_a_few_bytes_a_character(tmp_path: Path):
    path = tmp_path / "text.txt"
    # With one character beyond U+FFFF, a Python string takes four bytes per character.
    path.write_bytes(b"abcdefgh" * MEGABYTE + "\U0001f600".encode())
    tracemalloc.start()
    found = load_text(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.train) == (8 * MEGABYTE + 1) * 90 // 100
    assert peak < 32 * MEGABYTE


@pytest.mark.parametrize("later", [b"abc" * 101, b"abd" * 100, b"abc" * 99])
def test_a_text_that_changes_while_it_is_read(
    later: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc" * 100)

    def change(symbols: str) -> np.dtype:
        path.write_bytes(later)
        return np.dtype(np.uint8)

    monkeypatch.setattr(text, "index_type", change)
    assert "changed while it was read" in error_of(lambda: load_text(path))


def test_text_names_are_printable(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"a\x1b[31m\xff.txt")
    path.write_text("one two three\n" * 20)
    assert load_text(path).name == f"{tmp_path}/a\\x1b[31m\\xff.txt"


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 300, "x/" * 3000])
def test_paths_that_cannot_be(path: str, tmp_path: Path):
    for load in (load_text, read_question, load_mnist, load_text8, load_cnn):
        with pytest.raises(DataError) as caught:
            load(tmp_path / "nothing" / path)
        assert str(caught.value).isprintable()


def test_questions_that_are_none(tmp_path: Path):
    path = tmp_path / "\x1b]0;x\x07.question"
    path.write_bytes(QUESTION * 100_000)
    message = error_of(lambda: read_question(path))
    assert "\\x1b]0;x\\x07.question has more than 1,048,576 bytes; set question to" in message
    path.write_bytes(QUESTION.replace(b"@entity2\n\n", b"\x1b[2J\n\n"))
    assert "has the answer '\\x1b[2J', not an @entityN" in error_of(lambda: read_question(path))
    path.write_bytes(QUESTION.replace(b"@entity2\n\n", b"@entity" + b"2" * 500_000 + b"\n\n"))
    tgz(tmp_path / "cnn_qa" / "cnn.tgz", {"questions/training/\x1b[2J.question": path.read_bytes()})
    message = error_of(lambda: load_cnn(tmp_path))
    assert "questions/training/\\x1b[2J.question has the answer @entity222" in message
