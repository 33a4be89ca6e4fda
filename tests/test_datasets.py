"""Data sets compared with known facts, and every way in which their files can be wrong."""

import gzip
import hashlib
import http.server
import logging
import os
import pydoc_data.topics
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from bnrnn.datasets import (
    CharacterCorpus,
    load_mnist,
    load_ptb,
    load_pydocs,
    load_text,
    load_text8,
    ptb,
    text8,
)
from bnrnn.datasets import mnist as mnist_module
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.mnist import read_idx
from bnrnn.errors import DataError
from tests.conftest import DATA, missing_data


def real(folder: str) -> Path:
    if reason := missing_data(folder):
        pytest.skip(reason)
    return DATA / folder


def error_of(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- fetching -------------------------------------------------------------------------------------

CONTENT = b"the right content" * 1000
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Server:
    """Serves `files`; truncates the files in `cut` half way. `asked` lists the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/good": CONTENT, "/wrong": b"something else"}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                if self.path not in server.files:
                    self.send_error(404)
                    return
                content = server.files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(
                    content[: len(content) // 2] if self.path in server.cut else content
                )

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))

    def remote(self, *paths: str, name: str = "file.bin", hash: str = MD5) -> RemoteFile:
        return RemoteFile(name, tuple(self.address + path for path in paths), hash)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    server.thread.start()
    yield server
    server.http.shutdown()
    server.thread.join()
    server.http.server_close()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an address without a listener."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/file"


def test_fetch_downloads_into_a_new_folder_once_and_silently(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "data" / "set"
    for _ in range(2):
        path = fetch(server.remote("/good"), folder)
        assert path == folder / "file.bin"
        assert path.read_bytes() == CONTENT
    assert server.asked == ["/good"]
    assert os.listdir(folder) == ["file.bin"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", ["/missing", "/wrong", "/cut"])
def test_fetch_goes_on_to_the_next_mirror(server: Server, tmp_path: Path, bad: str):
    server.files["/cut"], server.cut = CONTENT, {"/cut"}
    path = fetch(server.remote(bad, "/good"), tmp_path / "set")
    assert path.read_bytes() == CONTENT
    assert server.asked == [bad, "/good"]
    assert os.listdir(tmp_path / "set") == ["file.bin"]


def test_fetch_that_fails_says_what_was_tried_and_leaves_nothing(
    server: Server, nobody: str, tmp_path: Path
):
    server.files["/cut"], server.cut = CONTENT, {"/cut"}
    remote = server.remote("/missing", "/wrong", "/cut")
    remote = RemoteFile(remote.name, (*remote.urls, nobody), remote.hash)
    message = error_of(fetch, remote, tmp_path / "set")
    assert f"{server.address}/missing (404 Client Error: Not Found)" in message
    assert f"{server.address}/wrong (wrong hash)" in message
    assert f"{server.address}/cut (" in message
    assert f"{nobody} (ConnectionError)" in message
    assert str(tmp_path / "set" / "file.bin") in message
    assert "data_dir to a folder that has set/file.bin" in message
    assert os.listdir(tmp_path / "set") == []


def test_fetch_takes_the_same_content_packed_otherwise(server: Server, tmp_path: Path):
    other = server.remote("/good", name="other.bin")
    assert fetch(server.remote("/missing"), tmp_path, other) == tmp_path / "other.bin"
    message = error_of(fetch, server.remote("/missing"), tmp_path / "set", server.remote("/wrong"))
    assert "/missing (404" in message
    assert "/wrong (wrong hash)" in message


def test_a_file_that_is_there_is_verified_and_never_replaced(server: Server, tmp_path: Path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    message = error_of(fetch, server.remote("/good"), tmp_path)
    assert str(path) in message
    assert MD5[4:12] in message
    assert hashlib.md5(b"mine").hexdigest()[:8] in message
    assert "data_dir" in message
    assert path.read_bytes() == b"mine"
    assert server.asked == []
    for algorithm in ("md5", "sha1", "sha256"):
        known = f"{algorithm}:{hashlib.new(algorithm, b'mine').hexdigest()}"
        assert fetch(RemoteFile("file.bin", (), known), tmp_path) == path


def test_fetch_into_a_folder_that_cannot_be(server: Server, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    message = error_of(fetch, server.remote("/good"), tmp_path / "file" / "set")
    assert "cannot write" in message
    assert "data_dir" in message
    (tmp_path / "file.bin").mkdir()
    assert "cannot read" in error_of(fetch, server.remote("/good"), tmp_path)


def test_fetch_into_a_read_only_folder(server: Server, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "cannot write" in error_of(fetch, server.remote("/good"), folder)


def test_the_home_folder_is_understood(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(server.remote("/good"), Path("~/data")) == tmp_path / "data" / "file.bin"


# --- MNIST ----------------------------------------------------------------------------------------


def test_real_mnist(tmp_path: Path):
    (tmp_path / "mnist").symlink_to(real("mnist"))
    data = load_mnist(tmp_path)
    assert data.train_images.shape == (50_000, 784)
    assert data.valid_images.shape == data.test_images.shape == (10_000, 784)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    training_file = np.concatenate([data.train_labels, data.valid_labels])
    assert np.bincount(training_file).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert np.bincount(data.test_labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert training_file[:5].tolist() == [5, 0, 4, 1, 9]
    # The known mean of the training images.
    mean = (5 * data.train_images.mean() + data.valid_images.mean()) / 6 / 255
    assert mean == pytest.approx(0.1307, abs=5e-5)


def idx(content: bytes, *sizes: int, type: int = 8) -> bytes:
    header = bytes([0, 0, type, len(sizes)])
    return header + b"".join(size.to_bytes(4, "big") for size in sizes) + content


def test_idx(tmp_path: Path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx(bytes(range(6)), 2, 3, 1)))
    assert read_idx(path, (2, 3, 1)).tolist() == [[[0], [1], [2]], [[3], [4], [5]]]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (idx(bytes(6), 2, 3, type=13), "magic number 00000d02, not 00000802"),
        (idx(bytes(6), 6), "magic number 00000801, not 00000802"),
        (idx(bytes(6), 3, 2), "shape (2, 3)"),
        (idx(bytes(5), 2, 3), "5 bytes of data, not 6"),
        (idx(bytes(7), 2, 3), "7 bytes of data, not 6"),
        (b"", "magic number"),
        (idx(b"", 2, 3)[:6], "shape"),
    ],
)
def test_idx_with_bad_content(tmp_path: Path, content: bytes, what: str):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    message = error_of(read_idx, path, (2, 3))
    assert what in message
    assert str(path) in message


def test_idx_with_bad_gzip(tmp_path: Path):
    path = tmp_path / "x.gz"
    good = gzip.compress(idx(np.random.default_rng(0).bytes(600), 200, 3))
    flipped = good[:300] + bytes([good[300] ^ 255]) + good[301:]
    for content in (good[:-1], good[:300], good[:5], b"not gzip", flipped):
        path.write_bytes(content)
        message = error_of(read_idx, path, (200, 3))
        assert f"{path} cannot be read or unpacked" in message
    path.unlink()
    assert "No such file" in error_of(read_idx, path, (200, 3))


def test_mnist_with_a_cut_file(tmp_path: Path):
    for file in real("mnist").iterdir():
        (tmp_path / "mnist").mkdir(exist_ok=True)
        (tmp_path / "mnist" / file.name).symlink_to(file)
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-100])
    message = error_of(load_mnist, tmp_path)
    assert str(path) in message
    assert "md5" in message


def test_mnist_is_fetched_from_its_mirrors(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
):
    for file in real("mnist").iterdir():
        server.files[f"/mnist/{file.name}"] = file.read_bytes()
    mirrors = (f"{server.address}/none/", f"{server.address}/mnist/")
    monkeypatch.setattr(mnist_module, "MIRRORS", mirrors)
    assert len(load_mnist(tmp_path).test_labels) == 10_000
    assert len(server.asked) == 8


# --- characters -----------------------------------------------------------------------------------


def sizes(corpus: CharacterCorpus) -> tuple[int, int, int]:
    return len(corpus.train), len(corpus.valid), len(corpus.test)


def whole(corpus: CharacterCorpus) -> str:
    return "".join(map(corpus.decode, (corpus.train, corpus.valid, corpus.test)))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("paper", (5_059_550, 396_412, 446_184)), ("stripped", (5_017_482, 393_042, 442_423))],
)
def test_real_ptb(
    tmp_path: Path, variant: Literal["paper", "stripped"], expected: tuple[int, int, int]
):
    (tmp_path / "ptb").symlink_to(real("ptb"))
    corpus = load_ptb(tmp_path, variant)
    assert sizes(corpus) == expected
    assert len(corpus.symbols) == 50
    assert list(corpus.symbols) == sorted(corpus.symbols)
    assert corpus.train.dtype == np.uint8
    start = {
        "paper": "no it was n't black monday \nbut",
        "stripped": "no it was n't black monday\nbut",
    }
    assert corpus.decode(corpus.test[:40]).startswith(start[variant])
    words = (real("ptb") / "ptb.valid.txt").read_text().split()
    assert corpus.decode(corpus.valid).split() == words
    assert corpus.name == f"Penn Treebank ({variant})"


def test_ptb_is_fetched_by_words_only(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
):
    for file in real("ptb").iterdir():
        server.files[f"/{file.name}"] = file.read_bytes()
    local = [server.remote(f"/{file.name}", name=file.name, hash=file.hash) for file in ptb.FILES]
    monkeypatch.setattr(ptb, "FILES", local)
    assert len(load_ptb(tmp_path, "paper").test) == 446_184
    assert sorted(server.asked) == ["/ptb.test.txt", "/ptb.train.txt", "/ptb.valid.txt"]


def test_real_text8_prefix(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "text8").symlink_to(real("text8"))
    corpus = load_text8(tmp_path)
    assert sizes(corpus) == (6_190_042, 343_891, 343_892)
    assert corpus.symbols == " abcdefghijklmnopqrstuvwxyz"
    assert corpus.decode(corpus.train[:12]) == " anarchism o"
    assert "6,877,825" in corpus.name
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "6,877,825" in record.getMessage()
    assert whole(corpus).encode() == (real("text8") / "text8.prefix").read_bytes()


SMALL = b" anarchism originated as a term of abuse" * 5  # 200 characters


@pytest.fixture
def small_text8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `load_text8` accept `SMALL` as text8; return the folder for it."""
    monkeypatch.setattr(text8, "LENGTH", len(SMALL))
    monkeypatch.setattr(text8, "SHA1", hashlib.sha1(SMALL).hexdigest())
    folder = tmp_path / "text8"
    folder.mkdir()
    return folder


def zipped(path: Path, content: bytes, member: str = "text8") -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path.read_bytes()


@pytest.mark.parametrize("name", text8.NAMES)
def test_text8_in_each_format(small_text8: Path, name: str, caplog: pytest.LogCaptureFixture):
    path = small_text8 / name
    if name == "text8.zip":
        zipped(path, SMALL)
    else:
        path.write_bytes(gzip.compress(SMALL) if name == "text8.gz" else SMALL)
    corpus = load_text8(small_text8.parent)
    assert sizes(corpus) == (180, 10, 10)
    assert whole(corpus).encode() == SMALL
    assert (corpus.name, corpus.whole) == ("text8", True)
    assert not caplog.records


def test_text8_that_is_short_is_a_prefix(small_text8: Path, caplog: pytest.LogCaptureFixture):
    (small_text8 / "text8").write_bytes(SMALL[:100])
    corpus = load_text8(small_text8.parent)
    assert (sizes(corpus), corpus.whole) == ((90, 5, 5), False)
    assert "only the first 100 of text8's 200 characters" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("text8", SMALL.replace(b"abuse", b"house"), "length or sha1"),
        ("text8", SMALL + b" ", "length or sha1"),
        ("text8", SMALL[:7] + b"A" + SMALL[8:100], "byte 7 is b'A'"),
        ("text8", SMALL[:180] + b"\n", "byte 180 is b'\\n'"),
        ("text8.prefix", SMALL[:9] + "é".encode() + SMALL[:90], "byte 9 is b'\\xc3'"),
        ("text8.prefix", b"abc", "too short"),
        ("text8.prefix", b"", "too short"),
        ("text8.gz", gzip.compress(SMALL, mtime=0)[:-9], "cannot be read or unpacked"),
        ("text8.gz", b"\x1f\x8b\x08\x00", "cannot be read or unpacked"),
        ("text8.zip", SMALL, "cannot be read or unpacked"),
        ("text8.zip", b"", "cannot be read or unpacked"),
    ],
)
def test_text8_that_is_none(small_text8: Path, name: str, content: bytes, what: str):
    (small_text8 / name).write_bytes(content)
    message = error_of(load_text8, small_text8.parent)
    assert what in message
    assert str(small_text8 / name) in message


def test_text8_zips_that_are_none(small_text8: Path):
    path = small_text8 / "text8.zip"
    zipped(path, SMALL, member="other")
    assert "no item named 'text8'" in error_of(load_text8, small_text8.parent)
    content = bytearray(zipped(path, SMALL))
    content[50] ^= 255
    path.write_bytes(content)
    assert "cannot be read or unpacked" in error_of(load_text8, small_text8.parent)
    path.unlink()
    path.mkdir()
    assert "cannot read" in error_of(load_text8, small_text8.parent)


@pytest.mark.parametrize("served", ["text8.zip", "text8.gz"])
def test_text8_is_fetched_from_either_source(
    small_text8: Path, tmp_path: Path, server: Server, served: str, monkeypatch: pytest.MonkeyPatch
):
    content = zipped(tmp_path / "x", SMALL) if served == "text8.zip" else gzip.compress(SMALL)
    server.files[f"/{served}"] = content
    known = "sha256:" + hashlib.sha256(content).hexdigest()
    for constant, name in (("ZIP", "text8.zip"), ("GZIP", "text8.gz")):
        monkeypatch.setattr(text8, constant, server.remote(f"/{name}", name=name, hash=known))
    assert whole(load_text8(small_text8.parent)).encode() == SMALL
    assert os.listdir(small_text8) == [served]
    (small_text8 / served).unlink()
    server.files.clear()
    message = error_of(load_text8, small_text8.parent)
    assert "/text8.zip (404" in message
    assert "/text8.gz (404" in message
    assert os.listdir(small_text8) == []


def test_pydocs():
    corpus = load_pydocs()
    topics = pydoc_data.topics.topics
    text = whole(corpus)
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert text.startswith(topics[min(topics)] + "\n")
    assert text.endswith(topics[max(topics)])
    assert set(text) == set(corpus.symbols)
    assert sizes(corpus)[1] == pytest.approx(len(text) / 20, abs=1)
    assert sizes(corpus)[2] == pytest.approx(len(text) / 20, abs=1)


def test_text_is_read_with_any_line_ends_and_bom(tmp_path: Path):
    path = tmp_path / "my text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "één\r\ntwo\rthree\n\U0001f600…".encode() * 10)
    corpus = load_text(path)
    text = "één\ntwo\nthree\n\U0001f600…" * 10
    assert whole(corpus) == text
    assert corpus.symbols == "".join(sorted(set(text)))
    assert sizes(corpus) == (144, 8, 8)
    assert corpus.name == str(path)


@pytest.mark.parametrize(
    ("symbols", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)],
)
def test_any_number_of_symbols(tmp_path: Path, symbols: int, dtype: type):
    path = tmp_path / "text.txt"
    text = "".join(map(chr, range(0x10000, 0x10000 + symbols)))
    path.write_bytes(text.encode())
    corpus = load_text(path)
    assert corpus.symbols == text
    assert corpus.train.dtype == corpus.encode(text).dtype == dtype
    assert np.array_equal(corpus.encode(text), np.arange(symbols))
    assert whole(corpus) == text


def test_encode_and_decode(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("hello, world; " * 10)
    corpus = load_text(path)
    assert corpus.symbols == " ,;dehlorw"
    assert corpus.encode("hello").tolist() == [5, 4, 6, 6, 7]
    assert corpus.decode([5, 4, 6, 6, 7]) == "hello"
    assert corpus.decode(np.array([5, 4], np.uint8)) == "he"
    assert corpus.decode(corpus.encode("")) == ""
    long = "hello, world; " * 100_000
    assert corpus.decode(corpus.encode(long)) == long
    for unknown in ("a", "z", "!", "\n", "\U0001f600", "\udcff"):
        message = error_of(corpus.encode, long + unknown)
        assert f"{unknown!r} at position 1400000" in message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"abc", "too short"),
        (b"good \xff bad" * 10, "byte 5 "),
        (b"\xef\xbb\xbfgood \xff bad", "byte 8 "),
        ("text in UTF-16".encode("utf-16"), "byte 0 "),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, content: bytes, what: str):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    message = error_of(load_text, path)
    assert what in message
    assert str(path) in message


def test_text_that_is_no_file(tmp_path: Path):
    assert "is not a file" in error_of(load_text, tmp_path)
    assert "does not exist" in error_of(load_text, tmp_path / "missing.txt")
    assert "task.path" in error_of(load_text, tmp_path / "missing.txt")
