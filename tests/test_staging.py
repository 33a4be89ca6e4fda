"""Downloads, caches and generated archives if the process is killed or the disk is full."""

import errno
import hashlib
import http.server
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bnrnn.datasets import load_cnn
from bnrnn.datasets.cache import cached_folder
from bnrnn.datasets.cnn import synthetic
from bnrnn.datasets.fetch import RemoteFile, fetch
from bnrnn.datasets.staging import clean, publish, staging
from bnrnn.errors import BnrnnError, DataError, OutputError

CONTENT = b"the right content" * 20_000
HASH = "md5:" + hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the address of a server with /good, /slow (stops half way) and /endless."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if self.path != "/endless":
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            half = len(CONTENT) // 2
            self.wfile.write(CONTENT[:half])
            if self.path == "/slow":
                self.wfile.flush()
                over.wait(60)
            try:
                self.wfile.write(CONTENT[half:])
                while self.path == "/endless":
                    self.wfile.write(CONTENT)
            except OSError:
                pass  # the client closed the connection

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as opened:
        thread = threading.Thread(target=opened.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{opened.server_address[1]}"
        over.set()
        opened.shutdown()
        thread.join()


def partial_folders(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


# --- killed processes -----------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from typing import Any
from tqdm import tqdm
from bnrnn.datasets import cache, fetch
from bnrnn.datasets.cnn import synthetic

def stop(*args):
    (args[0] / "half").write_bytes(b"x" * 1000) if args else None
    print("half way", flush=True)
    time.sleep(100)

what, address, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if what == "cache":
    cache.cached_folder("x", lambda: "0", stop, lambda folder: None)
elif what == "download":
    # The server stops half way; tqdm counts what is on disk.
    tqdm.update = lambda self, n: stop()
    fetch.fetch(fetch.RemoteFile("x.bin", (address + "/slow",), "md5:0"), folder)
else:
    synthetic.article = lambda *_: stop()
    synthetic.generate(folder / "x.tgz", 150)
"""


@contextmanager
def half_way(what: str, server: str, folder: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", CHILD, what, server, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "half way\n"
            yield child
        finally:
            child.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("what", ["cache", "download", "generated"])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(
    what: str, cache: Path, server: str, tmp_path: Path
):
    folder = cache if what == "cache" else tmp_path / "data"

    def again() -> None:
        if what == "cache":
            cached_folder("x", lambda: "0", lambda made: (made / "a").touch(), os.listdir)
        elif what == "download":
            fetch(RemoteFile("x.bin", (f"{server}/good",), HASH), folder)
        else:
            synthetic.ensure(folder / "x.tgz", 150)

    with half_way(what, server, folder):
        (living,) = partial_folders(folder)
        with half_way(what, server, folder):
            assert len(partial_folders(folder)) == 2
        again()
        assert partial_folders(folder) == [living]
    again()
    assert partial_folders(folder) == []
    assert len(os.listdir(folder)) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it looks for open files there")
def test_nothing_is_left_on_a_network_file_system(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It keeps a removed file, and so its folder, until the file is closed."""
    remove = os.rmdir

    def rmdir(path: str | Path, **options: Any) -> None:
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/self/fd/{number}").startswith(f"{path}/"):
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    cached_folder("x", lambda: "0", lambda made: (made / "a").touch(), os.listdir)
    assert partial_folders(cache) == []


def test_nothing_is_fetched_into_a_folder_that_is_only_read(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = RemoteFile("x.bin", (f"{server}/good",), HASH)
    path = fetch(file, tmp_path / "there")
    monkeypatch.setattr("bnrnn.runs.files._only_read", tmp_path)
    assert fetch(file, tmp_path / "there") == path
    with pytest.raises(DataError, match=r"missing/x\.bin: .* only read; add data_dir=DIR"):
        fetch(file, tmp_path / "missing")
    assert os.listdir(tmp_path) == ["there"]


def test_only_our_folders_are_removed(tmp_path: Path):
    others = ["x.partial", ".x", ".y.abc.partial", ".xy.abc.partial", "tmpabc", ".x.abc.part"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".x.1.partial").symlink_to(tmp_path / "x.partial")
    (tmp_path / ".x.2.partial").write_text("a file")
    (tmp_path / ".x.3.partial").mkdir()
    clean(tmp_path, "x")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".x.1.partial", ".x.2.partial"])
    assert os.listdir(tmp_path / "x.partial") == []
    clean(tmp_path / "nothing")


def test_cleaning_while_others_begin(tmp_path: Path):
    """Folders are created and removed concurrently; none that is in use disappears."""
    stop = threading.Event()

    def clean_up() -> None:
        while not stop.is_set():
            clean(tmp_path, "x")

    cleaner = threading.Thread(target=clean_up)
    cleaner.start()
    try:
        for k in range(50):
            with staging(tmp_path / "x") as made:
                (made / "x").write_text(str(k))
                publish(made / "x", tmp_path / "x")
            assert (tmp_path / "x").read_text() == str(k)
    finally:
        stop.set()
        cleaner.join()
    assert os.listdir(tmp_path) == ["x"]


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes; beyond it writes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, 50_000])
@pytest.mark.parametrize("what", ["cache", "download", "generated"])
def test_a_full_disk_is_one_line_and_the_next_start_works(
    what: str, size: int, cache: Path, server: str, tmp_path: Path
):
    data_dir = tmp_path / "data"
    archive = data_dir / "cnn_synthetic" / "cnn-synthetic-150.tgz"
    if what == "cache":
        synthetic.generate(archive, 150)

    def load() -> object:
        if what == "download":
            return fetch(RemoteFile("x.bin", (f"{server}/good",), HASH), data_dir)
        return load_cnn(data_dir, synthetic=150)

    error: type[BnrnnError] = DataError if what == "download" else OutputError
    with (
        full_disk(size),
        pytest.raises(error, match=r"cannot write .*: .*; free some space") as caught,
    ):
        load()
    assert str(caught.value).isprintable()
    folder = {"cache": cache, "download": data_dir, "generated": archive.parent}[what]
    assert os.listdir(folder) == []
    load()
    assert len(os.listdir(folder)) == 1


# --- downloads ------------------------------------------------------------------------------------


def test_a_download_that_never_ends_is_stopped(server: str, tmp_path: Path):
    remote = RemoteFile("x.bin", (f"{server}/endless",), HASH, 3_000_000)
    with pytest.raises(DataError, match=r"/endless \(more than 3,000,000 bytes\)"):
        fetch(remote, tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_the_umask(
    umask: int, cache: Path, server: str, tmp_path: Path
):
    before = os.umask(umask)
    try:
        downloaded = fetch(RemoteFile("x.bin", (f"{server}/good",), HASH), tmp_path)
        load_cnn(tmp_path, synthetic=150)
    finally:
        os.umask(before)
    (cached,) = cache.iterdir()
    generated = next((tmp_path / "cnn_synthetic").iterdir())
    for path in (downloaded, generated, *cached.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE(cached.stat().st_mode) == 0o777 & ~umask


def test_a_download_to_a_file_system_without_modes(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such as FAT, which refuses them."""

    def refused(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "chmod", refused)
    assert fetch(RemoteFile("x.bin", (f"{server}/good",), HASH), tmp_path).exists()


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "empty", "missing", "another", "pipe", "zeros"]
)
def test_any_damage_to_any_file_of_the_cache_is_found(damage: str, cache: Path, tmp_path: Path):
    builds = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "a").write_bytes(bytes(range(256)) * 100)
        (folder / "b").write_bytes(b"b")

    def load() -> bytes:
        return cached_folder("x", lambda: "0", build, lambda folder: (folder / "a").read_bytes())

    for name in ("a", "b", "sums.json"):
        load()
        (path,) = cache.iterdir()
        assert sorted(os.listdir(path)) == ["a", "b", "sums.json"]
        file, count = path / name, len(builds)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        match damage:
            case "flipped":
                file.write_bytes(content)
            case "cut":
                os.truncate(file, file.stat().st_size - 1)
            case "empty":
                os.truncate(file, 0)
            case "missing":
                file.unlink()
            case "another":
                (path / "c").write_bytes(b"")
            case "pipe":
                file.unlink()
                os.mkfifo(file)
            case "zeros":
                os.truncate(file, 1 << 30)
        assert load() == bytes(range(256)) * 100
        assert len(builds) == count + 1
    assert partial_folders(cache) == []


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_in_the_way_of_the_cache_is_replaced(make, cache: Path):
    def load() -> list[str]:
        return cached_folder("x", lambda: "0", lambda folder: (folder / "a").touch(), os.listdir)

    load()
    (path,) = cache.iterdir()
    (path / "a").unlink()
    (path / "sums.json").unlink()
    path.rmdir()
    make(path)
    assert sorted(load()) == ["a", "sums.json"]
    assert os.listdir(cache) == [path.name]


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import pwd

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "BNRNN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="set HOME, or a path without ~"):
        load_cnn(Path("~/data"), synthetic=150)
    with pytest.raises(BnrnnError, match="BNRNN_CACHE_DIR"):
        load_cnn(tmp_path / "data", synthetic=150)
    assert os.listdir(tmp_path) == ["data"]
