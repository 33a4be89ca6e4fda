"""The command `bnrnn`: compose the settings, run the mode, and report an error in one line."""

import contextlib
import errno
import logging
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bnrnn.command import arguments, launch, terminal
from bnrnn.command.explain import explain
from bnrnn.errors import BnrnnError, ConfigError, MemoryLimitError, OutputError, printable
from bnrnn.runs.files import not_writable
from bnrnn.runs.interrupt import SCHEDULERS, Interrupted
from bnrnn.settings import compose
from bnrnn.settings.schema import Config

_BROKEN_PIPE = 141
_SMALLEST = 10**9  # bytes of address space; torch 2.13 and the other imports take 0.7e9

_sweeps: set[Path] = set()  # where Hydra writes its multirun.yaml
_jobs = 0  # jobs started; before the first, every error is about the settings
_wrong: set[str] = set()  # errors in settings that were printed: many jobs of a sweep have the same


def main() -> None:
    """Run the command; docs/security.md lists the exit codes."""
    global _jobs
    terminal.prepare()
    # Make Hydra raise its errors instead of printing them; they are then reported in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Figures go to files; the backend that a notebook sets for its shells works only inside it.
    os.environ["MPLBACKEND"] = "Agg"
    # If this module exists, TensorBoard uses its own stub of TensorFlow. Otherwise it imports
    # TensorFlow where that is installed, which takes seconds and prints to stderr.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    logging.raiseExceptions = False  # a closed pipe or full disk must not print tracebacks
    _jobs = 0
    _wrong.clear()
    code = 0
    launch.end_with_launcher()
    try:
        _check_folder()
        sys.argv[1:] = arguments.check(sys.argv[1:])
        _job()
        sys.stdout.flush()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except KeyboardInterrupt:  # before anything could be saved, or Ctrl-C pressed twice
        code = _fail("interrupted", 130)
    except BaseException as error:
        known = _explained(error)
        if known is None:
            raise
        code = _fail(str(known), known.exit_code)
    finally:
        _clean_sweeps()
    _exit(code)


def _check_folder() -> None:
    """
    Raises:
        ConfigError: the current folder was deleted.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the current folder cannot be used ({error.strerror}): change to another one"
        ) from error


def _explained(error: BaseException) -> BnrnnError | None:
    """Return the error to report, or None if `error` is a defect in bnrnn."""
    if isinstance(error, BnrnnError):
        return error
    if isinstance(error, BrokenPipeError):
        return None if sys.stdout is None else _closed_pipe(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        place = "standard output" if error.filename is None else error.filename
        return not_writable(place, error)
    if (memory := out_of_memory(error)) is not None:
        return memory
    if _jobs == 0:
        return ConfigError(explain(error, sys.argv[1:]))
    return None


def _closed_pipe(error: BrokenPipeError) -> BnrnnError:
    closed = OutputError("standard output is closed")
    closed.exit_code = _BROKEN_PIPE
    return closed


def out_of_memory(error: BaseException) -> MemoryLimitError | None:
    """Return a MemoryLimitError if memory ran out; on a CPU, torch has no class for this error."""
    text = str(error)
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w*)", text, re.IGNORECASE)
    if not (
        isinstance(error, MemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
        or "bad_alloc" in text
        or "Storage size calculation overflowed" in text
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    ):
        return None
    size = "" if asked is None else f" when allocating {_size(asked[1], asked[2])}"
    return MemoryLimitError(
        f"out of memory{size}: lower task.batch_size, model.hidden_size or task.length"
    )


def _size(number: str, unit: str) -> str:
    return f"{int(number) / 1e9:.3g} GB" if unit in ("", "bytes") else f"{number} {unit}"


def _fail(message: str, exit_code: int) -> int:
    try:
        here = launch.launched()
    except ConfigError:  # it is the error to report
        here = launch.Launch()
    if exit_code == ConfigError.exit_code:
        if message in _wrong:
            return exit_code
        _wrong.add(message)
    # If several processes run, only the first reports a wrong setting.
    if exit_code != _BROKEN_PIPE and (here.is_first or exit_code != ConfigError.exit_code):
        name = "bnrnn" if here.size == 1 else f"bnrnn, process {here.rank}"
        _report(f"{name}: error: {' '.join(message.split())}")
    return exit_code


def _report(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed; the exit code still says it
        print(printable(line), file=sys.stderr)


def _exit(code: int) -> None:
    """Exit with `code`, even if the buffered output can no longer be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # Otherwise flushing the buffer fails again when the interpreter exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            broken = isinstance(error, BrokenPipeError)
            code = code or (_BROKEN_PIPE if broken else OutputError.exit_code)
    if code:
        sys.exit(code)


@hydra.main(version_base="1.3", config_path="pkg://bnrnn.conf", config_name="config")
def _job(cfg: DictConfig) -> None:
    """Run one command, or one job of a sweep."""
    global _jobs
    _jobs += 1
    choices = HydraConfig.get().runtime.choices
    here = launch.launched()
    # With several processes, an error ends the sweep: a process that continued alone would hang.
    single = HydraConfig.get().mode == RunMode.RUN or here.size > 1
    if not here.is_first:
        logging.root.setLevel(logging.ERROR)
    try:
        named = cfg.resume not in (None, "auto") or cfg.run not in (None, "auto")
        if cfg.scale is not None and choices["reproduce"] is None and not named:
            raise ConfigError(f"scale={cfg.scale} needs reproduce=NAME, such as reproduce=ptb")
        config = _config(cfg)
        if not sys.argv[1:]:
            _announce(config)
        _run_mode()(config)
    except Interrupted as interrupted:
        # Ctrl-C ends the whole sweep, not only this job.
        if here.is_first:
            _report(f"bnrnn: {interrupted}: {interrupted.advice}")
        if interrupted.signum in SCHEDULERS:
            launch.hand_over(interrupted.signum)
        sys.exit(128 + interrupted.signum)
    except Exception as error:
        known = _explained(error)
        if known is None:
            raise
        if single:
            sys.exit(_fail(str(known), known.exit_code))
        # Hydra continues the sweep, and raises this again at its end.
        if isinstance(known, ConfigError):
            _fail(str(known), known.exit_code)
        else:
            logging.getLogger(__name__).error("%s", known)
        raise known from error


def _announce(config: Config) -> None:
    """Log what `bnrnn` without arguments does, before torch is imported and a kernel compiled."""
    log = logging.getLogger(__name__)
    task, model = config.task.name, config.model.name
    log.info(
        "Training %s (model=%s) on task=%s for %d epochs, a few minutes on two cores",
        config.model.title or model, model, task, config.max_epochs or config.task.max_epochs,
    )  # fmt: skip
    log.info(
        "The run goes to %s; after Ctrl-C, bnrnn resume=auto resumes it; see bnrnn --help",
        Path(config.outputs, task, model),
    )


def _run_mode() -> Callable[[Config], None]:
    """Import torch and return the function that runs a mode.

    The import takes seconds, and --help and wrong settings do not need it.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _SMALLEST:
        # Below this limit, importing torch fails without even raising an exception.
        raise MemoryLimitError(
            f"out of memory: PyTorch alone needs {_SMALLEST / 1e9:g} GB of address space, "
            f"and the limit is {limit / 1e9:.2g} GB: raise it (ulimit -v)"
        )
    from bnrnn.command.modes import run_mode

    return run_mode


def _config(cfg: DictConfig) -> Config:
    try:
        return compose.from_hydra(cfg)
    except BnrnnError:
        raise
    except Exception as error:  # OmegaConf raises many classes of exceptions
        raise ConfigError(explain(error, sys.argv[1:])) from error


_composed_mode = Hydra.get_mode


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Replace `Hydra.get_mode`, which composes all settings again to find `hydra.mode`.

    This function calls the original only if an argument may set `hydra.mode`.
    """
    words = (*sys.argv[1:], *overrides)
    may_sweep = ("reproduce=", "experiment=", "hydra.searchpath", "--config-dir")
    if any(word.startswith(may_sweep) for word in words):
        return _composed_mode(self, config_name, overrides)
    return None


_hydras_return_value = JobReturn.return_value


def _return_value(self: JobReturn) -> Any:
    """Replace the getter of `JobReturn.return_value`, which prints a line before it raises.

    The job has reported the error already, and `main` reports it again at the end of the sweep.
    """
    if self.status == JobStatus.FAILED and isinstance(self._return_value, BnrnnError):
        raise self._return_value
    return _hydras_return_value.__get__(self)


def _sweep_dir(outputs: str) -> str:
    """Return the folder where Hydra writes multirun.yaml, and a Slurm launcher its own files."""
    folder = Path(outputs).expanduser() / "sweeps"
    _sweeps.add(folder)
    return str(folder)


def _clean_sweeps() -> None:
    for folder in _sweeps:
        try:
            (folder / "multirun.yaml").unlink(missing_ok=True)
            folder.rmdir()
        except OSError:  # not empty
            continue
    _sweeps.clear()


# At import, because the processes of a parallel launcher import this module and call `_job`.
compose.register()
Hydra.get_mode = _mode
JobReturn.return_value = _hydras_return_value.getter(_return_value)
OmegaConf.register_new_resolver("bnrnn.sweep_dir", _sweep_dir, replace=True)
