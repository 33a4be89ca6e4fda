"""Compile the CPU kernel on first use, and keep it for every later process.

The cache is keyed by the sources, the version of PyTorch, the compiler's flags and the instruction
set, so a home directory shared by unlike machines holds one library for each and loads the right
one. Only one process builds at a time; the others wait and find it done.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

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


class BuildError(Exception):
    """The kernel could not be built or loaded; the message says why, in one line."""


@functools.cache
def load() -> None:
    """Make `torch.ops.bnrnn_cpu` available, building it if need be.

    Raises:
        BuildError: no compiler, or it failed.
    """
    library = library_path()
    try:
        if not library.exists():
            _build(library)
    except (OSError, RuntimeError, ImportError) as error:
        raise BuildError(
            f"it takes a C++ compiler (c++, or what CXX names) to build: {_first_line(error)}"
        ) from error
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise BuildError(f"{library} cannot be loaded: delete it to have it built anew") from error


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
    """Where the library for this machine is or will be: in TORCH_EXTENSIONS_DIR or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    digest = hashlib.sha256()
    for source in sorted(_CSRC.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for fact in (torch.__version__, platform.machine(), *flags()):
        digest.update(fact.encode() + b"\0")
    return root / "bnrnn" / f"{_NAME}-{digest.hexdigest()[:16]}.so"


def _build(library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with _locked(library.with_suffix(".lock")):
        if library.exists():  # another process was faster
            return
        _log.info("Compiling the CPU kernel: once, half a minute or so")
        # Not at the top: it is slow to import, and needed once in a machine's life.
        from torch.utils import cpp_extension

        with tempfile.TemporaryDirectory(dir=library.parent) as folder, _quietly():
            cpp_extension.load(
                name=_NAME,
                sources=[str(source) for source in sorted(_CSRC.glob("*.cpp"))],
                extra_cflags=list(flags()),
                build_directory=folder,
                is_python_module=False,
                is_standalone=False,
                with_cuda=False,
            )
            os.replace(Path(folder, f"{_NAME}.so"), library)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock, which the system takes back from a process that dies."""
    import fcntl  # POSIX only: elsewhere ImportError, so the reference is used

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    complaints = [line for line in lines if "error:" in line or "not found" in line]
    return (complaints or lines or [type(error).__name__])[0][:200]
