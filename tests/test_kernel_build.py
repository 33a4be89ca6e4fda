"""The compiled kernel is built once, by one process, or a line gives the reason why not. No library
is loaded that another user may have written."""

import errno
import json
import logging
import os
import pwd
import resource
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from bnrnn.kernels import BuildError, build, cpu, operators
from tests.processes import Forked

STRANGER = 12345  # the id of another user
TINY = ["task=text", "task.path=book.txt", "max_steps=2", "model.hidden_size=4", "threads=1",
        "calibration_batches=2", "task.length=5", "task.batch_size=8",
        "test_calibration_batches=2"]  # fmt: skip
USE = """
import torch, bnrnn
lstm = bnrnn.BNLSTM(3, 4)
lstm(torch.randn(5, 2, 3))
print(lstm.active_kernel())
"""
COMPARE = """
import torch, bnrnn
fast, reference = (bnrnn.BNLSTM(7, 50, kernel=kernel) for kernel in ("cpu", "reference"))
fast.load_state_dict(reference.state_dict())
x = torch.randn(9, 20, 7)
torch.testing.assert_close(fast(x), reference(x))
"""


@pytest.fixture(autouse=True)
def book(tmp_path):
    """The text file of TINY."""
    (tmp_path / "book.txt").write_text("the gate of a cell lets in what the cell keeps\n" * 100)


def in_a_clean_cache(folder, *arguments, code="", new_session=False, **environment):
    environment = {"TORCH_EXTENSIONS_DIR": str(folder / "cache"), **environment}
    return Forked(folder, *arguments, code=code, new_session=new_session, environment=environment)


@pytest.fixture
def library():
    """The library that this process uses."""
    build.load()
    return build.library_path()


@pytest.mark.parametrize("compiler", ["stand-in", pytest.param("c++", marks=pytest.mark.slow)])
def test_two_processes_build_at_once_in_a_clean_cache(tmp_path, library, compiler):
    linked = tmp_path / "linked"
    script = tmp_path / "compiler"
    content = ["#!/bin/sh", "for word; do", '  [ "$before" = -o ] && out=$word', "  before=$word",
               "done", f'case "$out" in *.so) echo >> {linked};; esac']  # fmt: skip
    if compiler == "stand-in":  # it copies the existing library
        content += ['case "$out" in', '*.o) echo "$out:" > "$out.d"; exec touch "$out";;',
                    f'*.so) exec cp {library} "$out";;', "esac"]  # fmt: skip
    script.write_text("\n".join([*content, 'exec c++ "$@"\n']))
    script.chmod(0o755)
    both = [in_a_clean_cache(tmp_path, code=USE, CXX=str(script)) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "cpu\n", "")
    assert linked.read_text() == "\n"  # linked once
    built = [path.suffix for path in (tmp_path / "cache" / "bnrnn").iterdir()]
    assert sorted(built) == [
        ".lock",
        ".sha256",
        ".so",
    ]


@pytest.fixture
def no_compiler(tmp_path):
    return {"CXX": str(tmp_path / "no-such-compiler")}


def test_without_a_compiler_the_reference_serves(tmp_path, no_compiler):
    process = in_a_clean_cache(tmp_path, code=USE, **no_compiler)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "reference\n")
    (line,) = err.splitlines()
    assert line.startswith("Kernel 'cpu' cannot run this, so a slower one does: it takes a C++")
    assert "no-such-compiler" in line


def test_a_run_without_a_compiler(tmp_path, no_compiler):
    process = in_a_clean_cache(tmp_path, *TINY, **no_compiler)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert err.count("a slower one does") == 1
    (result,) = tmp_path.glob("outputs/text/bnlstm/*/result.json")
    assert json.loads(result.read_text())["kernel"] == "reference"

    process = in_a_clean_cache(tmp_path, *TINY, "kernel=cpu", **no_compiler)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(
        "bnrnn: error: kernel 'cpu' cannot run this: it takes a C++ compiler"
    )
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(build._CSRC.glob("*.cpp")), ids=lambda path: path.stem)
def test_the_kernel_compiles_for_arm(source, tmp_path):
    """With vectors of 16 bytes, as on every processor without AVX2."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for ARM: Debian's g++-aarch64-linux-gnu is one")
    from torch.utils.cpp_extension import include_paths

    headers = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command = [compiler, *build._FLAGS, "-fPIC", *headers, "-c", source, "-o", tmp_path / "object"]
    subprocess.run(command, check=True)


@pytest.mark.slow  # it compiles the kernel again
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_the_kernel_that_clang_compiles(tmp_path):
    process = in_a_clean_cache(tmp_path, code=COMPARE, CXX="clang++")
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")


def test_a_cached_library_is_for_one_instruction_set(monkeypatch):
    keys = set()
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert not any("native" in flag for flag in build.flags())
        keys.add(build.library_path())
    assert len(keys) == 3


def test_an_instruction_set_that_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build.instruction_sets() == ["avx2", "baseline"]
    widest = build.library_path()
    assert "-mavx2" in build.flags()
    monkeypatch.setenv("BNRNN_KERNEL_ISA", "avx2")
    assert build.library_path() == widest
    monkeypatch.setenv("BNRNN_KERNEL_ISA", "baseline")
    assert not any(flag.startswith("-m") for flag in build.flags())
    assert build.library_path() != widest
    for missing in ("avx512", "native"):
        monkeypatch.setenv("BNRNN_KERNEL_ISA", missing)
        with pytest.raises(BuildError, match=f"'{missing}': here it is one of avx2, baseline"):
            build.load.__wrapped__()


# ------------------------------------------- in this process, with a compiler that is not one


class Cache:
    """A separate cache that records compilations and loads."""

    def __init__(self, root):
        self.root = root
        self.folder = root / "bnrnn"
        self.content = b"a library " * 1000
        self.compiled = 0
        self.loaded = []

    @property
    def library(self):
        return build.library_path()

    @property
    def checksum(self):
        return self.library.with_suffix(".sha256")

    def compile(self, folder):
        self.compiled += 1
        built = Path(folder, "bnrnn_cpu.so")
        built.write_bytes(self.content)
        return built

    def load(self, path):
        self.loaded.append((Path(path), Path(path).read_bytes()))

    def refused(self):
        """Assert that nothing is loaded, and return the line that gives the reason."""
        with pytest.raises(BuildError) as caught:
            build.load()
        assert self.loaded == []
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message


@pytest.fixture
def cache(tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache.root))
    monkeypatch.setattr(build, "load", build.load.__wrapped__)  # without functools.cache
    monkeypatch.setattr(operators, "load", lambda: build.load())  # the same
    monkeypatch.setattr(build, "_compile", cache.compile)
    monkeypatch.setattr(torch.ops, "load_library", cache.load)
    cpu._unavailability.cache_clear()
    yield cache
    cpu._unavailability.cache_clear()


@pytest.fixture
def full(cache):
    """A cache that contains the library, as if another process had built it."""
    build.load()
    cache.loaded.clear()
    return cache


@pytest.fixture
def give_away(monkeypatch):
    """A function that makes a path belong to another user, even if root runs the tests."""

    def give(path):
        if os.geteuid() == 0:
            os.lchown(path, STRANGER, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: STRANGER)

    return give


def test_what_is_built_is_loaded_and_kept(cache):
    mask = os.umask(0)
    try:
        build.load()
    finally:
        os.umask(mask)
    build.load()
    assert cache.compiled == 1
    assert cache.loaded == [(cache.library, cache.content)] * 2
    for path in (cache.root, cache.folder, cache.library, cache.checksum):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0


@pytest.mark.parametrize("what", ["root", "folder"])
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o1770])
def test_a_folder_that_others_can_write_to_is_refused(full, what, mode):
    place = getattr(full, what)
    place.chmod(mode)
    if what == "root" and mode & stat.S_ISVTX:  # as in /tmp: others cannot move or delete our files
        build.load()
    else:
        assert f"others can write to {place}: chmod go-w it" in full.refused()


@pytest.mark.parametrize("what", ["root", "folder"])
def test_a_folder_of_another_user_is_refused(full, what, give_away):
    give_away(getattr(full, what))
    assert "belongs to another user" in full.refused()


def test_a_folder_behind_a_link_that_another_user_made_is_refused(full, monkeypatch, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(full.root)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(link))
    build.load()
    full.loaded.clear()
    if os.geteuid() == 0:
        os.lchown(link, STRANGER, -1)
        assert f"{link} belongs to another user" in full.refused()
    link.unlink()
    tmp_path.joinpath("theirs").mkdir()
    tmp_path.joinpath("theirs").chmod(0o777)
    full.root.rename(tmp_path / "theirs" / "cache")
    link.symlink_to(tmp_path / "theirs" / "cache")
    assert f"others can write to {tmp_path / 'theirs'}" in full.refused()


@pytest.mark.parametrize("what", ["library", "checksum"])
def test_a_file_that_others_could_have_written_is_refused(full, what, give_away):
    file = getattr(full, what)
    file.chmod(0o666)
    assert f"others can write to {file}" in full.refused()
    file.chmod(0o644)
    build.load()
    full.loaded.clear()
    give_away(file)
    assert "belongs to another user" in full.refused()


@pytest.mark.parametrize("what", ["library", "checksum"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_no_file_is_refused(full, tmp_path, what, kind):
    file = getattr(full, what)
    file.rename(tmp_path / "elsewhere")
    if kind == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    assert f"{file} is not a regular file: delete it" in full.refused()


def test_a_lock_that_is_a_link_does_no_harm(cache, tmp_path):
    cache.folder.mkdir(parents=True, mode=0o755)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (cache.folder / "build.lock").symlink_to(victim)
    assert "build.lock: Too many levels of symbolic links" in cache.refused()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("damage", ["cut in half", "empty", "a bit", "checksum", "no checksum"])
def test_a_damaged_library_is_built_anew(full, damage):
    content = full.content
    if damage == "cut in half":
        full.library.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        full.library.write_bytes(b"")
    elif damage == "a bit":
        full.library.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "checksum":
        full.checksum.write_text("0" * 64)
    else:
        full.checksum.unlink()
    full.content = b"another library"
    build.load()
    assert full.compiled == 2
    assert full.loaded == [(full.library, b"another library")]


def test_a_library_that_cannot_be_loaded_is_an_error_of_the_build(full, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(full.root))
    with pytest.raises(BuildError, match=r"\.so cannot be loaded: delete it \(.*ELF"):
        build.load.__wrapped__()


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="the flag is known on Linux only")
def test_a_file_system_that_forbids_execution(full, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,mode=755", "tmpfs", str(full.root)]
    whole = {path.name: path.read_bytes() for path in (full.library, full.checksum)}
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount one")
    try:
        full.folder.mkdir(mode=0o755)
        for name, content in whole.items():
            (full.folder / name).write_bytes(content)
            (full.folder / name).chmod(0o755)
        monkeypatch.undo()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(full.root))
        with pytest.raises(BuildError) as caught:
            build.load.__wrapped__()
    finally:
        subprocess.run(["umount", str(full.root)], check=True)
    assert str(caught.value) == (
        f"the file system of {full.folder} forbids execution (noexec): "
        "TORCH_EXTENSIONS_DIR names another folder"
    )


def test_a_cache_on_a_file_system_without_locks(cache, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    build.load()
    build.load()
    assert cache.compiled == 1
    assert cache.loaded == 2 * [(cache.library, cache.content)]


def test_litter_of_dead_builders_goes_at_the_next_build(cache):
    cache.folder.mkdir(parents=True, mode=0o755)
    (cache.folder / "building-dead").mkdir()
    (cache.folder / "building-dead" / "half.o").write_bytes(b"half")
    (cache.folder / "another-library.so").write_bytes(b"of another version")
    build.load()
    left = {path.name for path in cache.folder.iterdir()}
    assert left == {"another-library.so", "build.lock", cache.library.name, cache.checksum.name}


def test_a_build_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def compile(folder):
        cache.compile(folder)
        raise BuildError("no")

    monkeypatch.setattr(build, "_compile", compile)
    assert cache.refused() == "no"
    assert [path.name for path in cache.folder.iterdir()] == ["build.lock"]


def put_file(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("")


def put_fifo(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place)


def put_link_loop(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(place.name)


@pytest.mark.parametrize("what", ["root", "folder"])
@pytest.mark.parametrize("put", [put_file, put_fifo, put_link_loop])
def test_what_is_no_folder_is_refused_in_a_line(cache, what, put):
    put(getattr(cache, what))
    message = cache.refused()
    assert str(cache.folder) in message
    assert "TORCH_EXTENSIONS_DIR" in message


def test_a_folder_that_cannot_be_written_to(cache, monkeypatch):
    if not Path("/sys").is_dir():
        pytest.skip("no /sys, in which not even root can make a folder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/sys")
    assert "/sys/bnrnn: " in cache.refused()


def test_a_whole_library_in_a_read_only_folder_is_loaded(full, monkeypatch):
    monkeypatch.setattr("filelock.FileLock", None)  # nothing is written, so no lock is needed
    build.load()
    assert full.loaded == [(full.library, full.content)]


def test_a_full_disk(cache, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(cache.content) // 2, limits[1]))
    try:
        message = cache.refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"{cache.folder}: File too large; TORCH_EXTENSIONS_DIR")
    assert [path.name for path in cache.folder.iterdir()] == ["build.lock"]


def test_a_user_without_a_home(cache, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "no home folder" in cache.refused()


def test_a_process_waits_for_one_that_builds_and_not_for_ever(cache, monkeypatch, caplog):
    monkeypatch.setattr(build, "_PATIENCE", 0.2)
    monkeypatch.setattr(build, "_is_whole", lambda library: False)
    with caplog.at_level(logging.INFO):

        def compile(folder):
            assert "another process has been compiling" in cache.refused()
            return cache.compile(folder)

        monkeypatch.setattr(build, "_compile", compile)
        build.load()
    assert "Waiting for another process" in caplog.text
    assert cache.compiled == 1


def test_a_run_where_the_cache_is_not_safe(full, bnrnn_here, tmp_path):
    full.folder.chmod(0o777)
    done = bnrnn_here(*TINY)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a slower one does: others can write to") == 1
    (result,) = tmp_path.glob("outputs/text/bnlstm/*/result.json")
    assert json.loads(result.read_text())["kernel"] == "reference"
    done = bnrnn_here(*TINY, "kernel=cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "bnrnn: error: kernel 'cpu' cannot run this: others can write to"
    )
    assert full.loaded == []


# ------------------------------------------------------------ other processes, real libraries


@pytest.fixture
def real_library(tmp_path, library):
    """A copy of the library in a separate cache."""
    folder = tmp_path / "cache" / "bnrnn"
    folder.mkdir(parents=True, mode=0o755)
    for file in (library, library.with_suffix(".sha256")):
        shutil.copy(file, folder)
    return folder / library.name


def test_a_planted_library_is_not_loaded(tmp_path, real_library, no_compiler):
    real_library.parent.chmod(0o1777)
    process = in_a_clean_cache(tmp_path, code=USE, **no_compiler)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "reference\n")
    (line,) = err.splitlines()
    assert f"others can write to {real_library.parent}" in line


def test_half_a_library_does_not_kill_the_process(tmp_path, real_library, no_compiler):
    with real_library.open("r+b") as file:
        file.truncate(real_library.stat().st_size // 2)
    process = in_a_clean_cache(tmp_path, code=USE, **no_compiler)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "reference\n"), err


@pytest.mark.parametrize("compiler", ["false", "true", "/", "sh -c 'exit 3'"])
def test_a_compiler_that_fails(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=r"^it takes a C\+\+ compiler \(.*\) to build: .+$"):
        build.load.__wrapped__()
    assert [path.name for path in (tmp_path / "cache" / "bnrnn").iterdir()] == ["build.lock"]


@pytest.fixture
def hanging(tmp_path):
    """A compiler that never finishes compiling, and the file that it creates when it starts."""
    began, compiler = tmp_path / "began", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) touch {began}; exec sleep 100;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    return str(compiler), began


def wait_for(path, process):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_after_a_kill_the_next_process_builds(tmp_path, hanging, no_compiler, monkeypatch):
    compiler, began = hanging
    killed = in_a_clean_cache(tmp_path, code=USE, CXX=compiler, new_session=True)
    wait_for(began, killed)
    killed.send_signal(signal.SIGKILL)  # its compiler keeps running
    killed.communicate()
    folder = tmp_path / "cache" / "bnrnn"
    assert list(folder.glob("building-*"))

    cache = Cache(tmp_path / "cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache.root))
    monkeypatch.setattr(build, "_compile", cache.compile)
    monkeypatch.setattr(torch.ops, "load_library", cache.load)
    build.load.__wrapped__()
    assert cache.compiled == len(cache.loaded) == 1
    assert not list(folder.glob("building-*"))


def test_ctrl_c_while_the_compiler_hangs(tmp_path, hanging):
    compiler, began = hanging
    # A shell starts background jobs with SIGINT ignored, and the child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = in_a_clean_cache(tmp_path, *TINY, CXX=compiler, new_session=True)
    signal.signal(signal.SIGINT, before)
    wait_for(began, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)  # an orphan of the compiler may hold its pipe
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith(("bnrnn: error: interrupted", "bnrnn: SIGINT: "))
    assert "Traceback" not in err
    assert not list((tmp_path / "cache" / "bnrnn").glob("building-*"))


def test_help_touches_no_cache(tmp_path, no_compiler):
    done = subprocess.run(
        [sys.executable, "-m", "bnrnn", "--help"],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), **no_compiler},
        capture_output=True, text=True, timeout=100, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "max_steps" in done.stdout
    assert not (tmp_path / "cache").exists()
