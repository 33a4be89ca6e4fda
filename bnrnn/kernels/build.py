"""Compile the CPU kernel on first use, and keep it for every later process.

The cache is keyed by the sources, the version of PyTorch, the compiler's flags and the instruction
set, so a home directory shared by unlike machines holds one library for each and loads the right
one. Only one process builds at a time; the others wait and find it done. A library is loaded only
if nobody else can have written it (`bnrnn.kernels.trust`) and its checksum, kept beside it, is
right: half a library would kill the process.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch

from bnrnn.kernels.trust import UntrustedError, read_trusted, trusted_folder

_log = logging.getLogger(__name__)

_CSRC = Path(__file__).with_name("csrc")
_NAME = "bnrnn_cpu"
_FLAGS = (
    "-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip
# From the widest on; by PyTorch's name for each, but for its "default".
_INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
# The start of the name of a folder that is built in; older versions had the second.
_BUILDING = ("building-", "tmp")
_PATIENCE = 600  # seconds that another process may take to build
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class BuildError(Exception):
    """The kernel could not be built or loaded; the message says why, in one line."""


@functools.cache
def load() -> None:
    """Make `torch.ops.bnrnn_cpu` available, building it if need be.

    Raises:
        BuildError: it cannot be had: no compiler, or it failed; no folder to keep the library in
            that is safe from others.
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
        why = _first_line(error.__cause__ or error)  # PyTorch's own says only which file
        raise BuildError(f"{library} cannot be loaded: delete it ({why})") from error


def instruction_sets() -> list[str]:
    """What the kernel can be built for here, the widest first.

    By what PyTorch found this machine to have, or ATEN_CPU_CAPABILITY allows, not by the compiler's
    idea of "native".
    """
    names = list(_INSTRUCTIONS)
    found = torch.backends.cpu.get_cpu_capability().lower()
    return names[names.index(found) :] if found in names else ["baseline"]


def flags() -> tuple[str, ...]:
    """The compiler's, for the widest instruction set there is, or for BNRNN_KERNEL_ISA.

    Raises:
        BuildError: BNRNN_KERNEL_ISA is no set that this machine has.
    """
    sets = instruction_sets()
    wanted = os.environ.get("BNRNN_KERNEL_ISA") or sets[0]
    if wanted not in sets:
        raise BuildError(f"BNRNN_KERNEL_ISA is {wanted!r}: here it is one of {', '.join(sets)}")
    return _FLAGS + _INSTRUCTIONS[wanted]


def library_path() -> Path:
    """Where the library for this machine is or will be: in TORCH_EXTENSIONS_DIR or ~/.cache.

    Raises:
        BuildError: there is no home folder, or BNRNN_KERNEL_ISA is wrong.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root or Path.home() / ".cache") / "bnrnn"
    except RuntimeError as error:  # a user that the system does not know
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
    """Is the library there, and as it was built?"""
    try:
        content, checksum = read_trusted(library), read_trusted(_checksum_of(library))
    except FileNotFoundError:
        return False
    return hashlib.sha256(content).hexdigest().encode() == checksum


def _checksum_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _build(library: Path) -> None:
    with _locked(library.parent):
        if _is_whole(library):  # another process was faster
            return
        for left in library.parent.iterdir():
            if left.name.startswith(_BUILDING):  # of a builder that was killed: we have the lock
                shutil.rmtree(left, ignore_errors=True)
        _log.info("Compiling the CPU kernel: once, half a minute or so")
        with tempfile.TemporaryDirectory(
            dir=library.parent, prefix=_BUILDING[0], ignore_cleanup_errors=True
        ) as folder:
            built = _compile(Path(folder))
            checksum = Path(folder, "checksum")
            checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
            for source, target in ((built, library), (checksum, _checksum_of(library))):
                source.chmod(0o755)  # regardless of the umask, nobody else may write to it
                _flush(source)
                source.replace(target)
            _flush(library.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    lock = filelock.FileLock(folder / "build.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        _log.info("Waiting for another process, which compiles the CPU kernel")
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
        BuildError: no compiler, or it failed.
    """
    try:
        # Not at the top: it is slow to import, and needed once in a machine's life.
        from torch.utils import cpp_extension

        with _quietly():
            cpp_extension.load(
                name=_NAME,
                sources=[str(source) for source in sorted(_CSRC.glob("*.cpp"))],
                extra_cflags=list(flags()),
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
            f"it takes a C++ compiler (c++, or what CXX names) to build: {line}"
        ) from error
    return folder / f"{_NAME}.so"


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Find ninja, and keep PyTorch's log to errors: who called says what failed, in a line."""
    path, torch_log = os.environ.get("PATH", ""), logging.getLogger("torch.utils.cpp_extension")
    level = torch_log.level
    if shutil.which("ninja") is None:  # it is beside the Python of a virtual environment
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    torch_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        os.environ["PATH"] = path
        torch_log.setLevel(level)


def _first_line(error: BaseException) -> str:
    """The compiler's first complaint, if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [
        line for line in lines if any(s in line for s in ("No space left", "error:", "not found"))
    ]
    return (complaints or lines or [type(error).__name__])[0][:200]
