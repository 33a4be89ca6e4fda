"""Compile the CPU kernel on first use and cache it for later processes.

The cache is keyed by the sources, the version of PyTorch, the compiler's flags and the instruction
set. A home directory shared by different machines therefore holds one library for each, and each
machine loads the right one. Only one process builds at a time; the others wait for its result. A
library is loaded only if no other user can have written it (`bnrnn.kernels.trust`) and it matches
the checksum stored beside it, because loading a truncated library would kill the process.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch

from bnrnn import cpus
from bnrnn.disk import sync
from bnrnn.kernels.trust import UntrustedError, read_trusted, trusted_folder

_log = logging.getLogger(__name__)

_CSRC = Path(__file__).with_name("csrc")
_NAME = "bnrnn_cpu"
_FLAGS = (
    "-O2", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip
# Widest first. The names are PyTorch's, except that it calls the baseline "default".
_INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
# They come first: the others then share the other cores.
_SLOWEST_TO_COMPILE = ("recurrence.cpp", "bindings.cpp", "products.cpp")
_BUILDING = "building-"  # name prefix of build folders
_PATIENCE = 600  # seconds to wait for another process that builds
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class BuildError(Exception):
    """The kernel could not be built or loaded; the message gives the reason in one line."""


@functools.cache
def load() -> None:
    """Make `torch.ops.bnrnn_cpu` available, building it if necessary.

    Raises:
        BuildError: there is no compiler, compilation failed, or there is no cache folder that is
            safe from other users.
    """
    if os.name != "posix":
        raise BuildError("it is for POSIX systems")
    library = library_path()
    try:
        library = trusted_folder(library.parent) / library.name
        if not _is_whole(library):
            _build(library)
    except UntrustedError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(
            f"{error.filename or library.parent}: {error.strerror or error}; "
            "TORCH_EXTENSIONS_DIR names another folder"
        ) from error
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        if _forbids_execution(library.parent):
            raise BuildError(
                f"the file system of {library.parent} forbids execution (noexec): "
                "TORCH_EXTENSIONS_DIR names another folder"
            ) from error
        why = _first_line(error.__cause__ or error)  # PyTorch's own error only names the file
        raise BuildError(f"{library} cannot be loaded: delete it ({why})") from error


def instruction_sets() -> list[str]:
    """The instruction sets that the kernel can be built for on this machine, widest first.

    PyTorch's detection decides, limited by ATEN_CPU_CAPABILITY, not the compiler's "native".
    """
    names = list(_INSTRUCTIONS)
    found = torch.backends.cpu.get_cpu_capability().lower()
    return names[names.index(found) :] if found in names else ["baseline"]


def flags() -> tuple[str, ...]:
    """The compiler's flags for the widest instruction set, or for BNRNN_KERNEL_ISA if set.

    With BNRNN_KERNEL_PROFILE the kernel measures the time of each part, see `bench/profile.py`.

    Raises:
        BuildError: this machine does not have the set that BNRNN_KERNEL_ISA names.
    """
    sets = instruction_sets()
    wanted = os.environ.get("BNRNN_KERNEL_ISA") or sets[0]
    if wanted not in sets:
        raise BuildError(f"BNRNN_KERNEL_ISA is {wanted!r}: here it is one of {', '.join(sets)}")
    profile = ("-DBNRNN_PROFILE",) if os.environ.get("BNRNN_KERNEL_PROFILE") else ()
    return (*_FLAGS, *_INSTRUCTIONS[wanted], *profile)


def library_path() -> Path:
    """The path of the library for this machine, in TORCH_EXTENSIONS_DIR or ~/.cache.

    Raises:
        BuildError: there is no home folder, or BNRNN_KERNEL_ISA is invalid.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root or Path.home() / ".cache") / "bnrnn"
    except RuntimeError as error:  # the system does not know this user
        raise BuildError(
            "there is no home folder to keep it in: set TORCH_EXTENSIONS_DIR to a folder"
        ) from error
    digest = hashlib.sha256()
    for source in sorted(_CSRC.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for fact in (torch.__version__, platform.machine(), *flags()):
        digest.update(fact.encode() + b"\0")
    return folder / f"{_NAME}-{digest.hexdigest()[:16]}.so"


def _is_whole(library: Path) -> bool:
    """Whether the library exists and matches its checksum."""
    try:
        content, checksum = read_trusted(library), read_trusted(_checksum_of(library))
    except FileNotFoundError:
        return False
    return hashlib.sha256(content).hexdigest().encode() == checksum


def _forbids_execution(folder: Path) -> bool:
    no_execution = getattr(os, "ST_NOEXEC", 0)  # known on Linux
    return os.statvfs(folder).f_flag & no_execution != 0


def _checksum_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _build(library: Path) -> None:
    with _locked(library.parent):
        if _is_whole(library):  # another process has built it
            return
        for left in library.parent.iterdir():
            if left.name.startswith(_BUILDING):  # left by a killed process: we hold the lock
                shutil.rmtree(left, ignore_errors=True)
        _log.info("Compiling the CPU kernel (once, about 15 seconds)")
        with tempfile.TemporaryDirectory(
            dir=library.parent, prefix=_BUILDING, ignore_cleanup_errors=True
        ) as folder:
            built = _compile(Path(folder))
            checksum = Path(folder, "checksum")
            checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
            for source, target in ((built, library), (checksum, _checksum_of(library))):
                source.chmod(0o755)  # regardless of the umask, only we may write to it
                sync(source)
                source.replace(target)
            sync(library.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when a process dies."""
    lock = filelock.FileLock(folder / "build.lock", timeout=0)
    # Where the file system has no locks, filelock warns that the file's existence is the lock.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        try:
            lock.acquire()
        except filelock.Timeout:
            _log.info("Waiting for another process that compiles the CPU kernel")
            try:
                lock.acquire(timeout=_PATIENCE)
            except filelock.Timeout as error:
                raise BuildError(
                    f"another process has been compiling it for {_PATIENCE // 60} minutes"
                ) from error
    try:
        yield
    finally:
        lock.release()


def _compile(folder: Path) -> Path:
    """
    Returns:
        The library, in `folder`.

    Raises:
        BuildError: there is no compiler, or compilation failed.
    """
    try:
        # Imported here because it is slow, and needed only once per machine.
        from torch.utils import cpp_extension

        slowest = [_CSRC / name for name in _SLOWEST_TO_COMPILE]
        sources = slowest + sorted(set(_CSRC.glob("*.cpp")).difference(slowest))
        with _compiling():
            cpp_extension.load(
                name=_NAME,
                sources=[str(source) for source in sources],
                extra_cflags=list(flags()),
                extra_ldflags=_link_flags(cpp_extension.get_cxx_compiler()),
                build_directory=str(folder),
                is_python_module=False,
                is_standalone=False,
                with_cuda=False,
            )
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        line = _first_line(error)
        if "No space left" in line:
            raise BuildError(f"the disk is full: {line}") from error
        raise BuildError(
            f"it takes a C++ compiler (c++, or the one that CXX names) to build: {line}"
        ) from error
    return folder / f"{_NAME}.so"


def _link_flags(compiler: str) -> list[str]:
    """PyTorch has loaded GCC's OpenMP runtime, but not that of clang."""
    asked = [*shlex.split(compiler), "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return ["-fopenmp"] if "clang" in version else []


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Set what PyTorch takes from the environment: ninja's place and the number of compilers.

    PyTorch's log and warnings are silenced meanwhile: the caller reports a failure in one line.
    """
    torch_log = logging.getLogger("torch.utils.cpp_extension")
    level, path, jobs = torch_log.level, os.environ.get("PATH", ""), os.environ.get("MAX_JOBS")
    if shutil.which("ninja") is None:  # in a virtual environment it is in Python's folder
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    if jobs is None:  # more than one per processor, ninja's default, delays the slowest
        os.environ["MAX_JOBS"] = str(cpus.available())
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        os.environ["PATH"] = path
        if jobs is None:
            del os.environ["MAX_JOBS"]
        torch_log.setLevel(level)


def _first_line(error: BaseException) -> str:
    """The compiler's first error message, if there is one, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [
        line for line in lines if any(s in line for s in ("No space left", "error:", "not found"))
    ]
    return (complaints or lines or [type(error).__name__])[0][:200]
