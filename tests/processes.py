"""Separate processes that start fast: they are forked from a server that has imported torch.

Signals, limits, locks and disk errors affect such a process as usual; only the start of the
interpreter is missing. A test of that start (closed streams, the locale, the memory of an import)
must start `python -m bnrnn` instead.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "bnrnn.command.cli", "bnrnn.command.modes", "torch.utils.tensorboard",
    "torch._dynamo",  # which every optimiser imports
]  # fmt: skip


def start_server() -> None:
    """Start the server if it is not running."""
    with pytest.MonkeyPatch.context() as patch:
        # If numpy and torch had started threads, the server could not be forked.
        patch.setenv("OMP_NUM_THREADS", "1")
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        forkserver.ensure_running()


class Forked:
    """`python -m bnrnn ARGUMENTS`, or `python -c CODE`; used like a `subprocess.Popen` with pipes.

    Args:
        folder: its working directory.
        environment: variables added to our environment.
        stdout: a file to write to instead of the pipe.
        limits: resource limits (soft and hard) by their `resource` number.
        new_session: make the process a session leader.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        code: str = "",
        environment: Mapping[str, str] | None = None,
        stdout: Path | None = None,
        limits: Mapping[int, int] | None = None,
        new_session: bool = False,
    ) -> None:
        start_server()
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self._process = _CONTEXT.Process(
            target=_run,
            args=(
                [writer for _, writer in pipes], code or [str(argument) for argument in arguments],
                str(folder), {**os.environ, **(environment or {})}, stdout, dict(limits or {}),
                new_session,
            ),
        )  # fmt: skip
        self._process.start()
        for _, writer in pipes:
            writer.close()
        self._printed = [b"", b""]
        self._readers = [
            threading.Thread(target=self._read, args=(number, reader), daemon=True)
            for number, (reader, _) in enumerate(pipes)
        ]
        for thread in self._readers:
            thread.start()

    def _read(self, number: int, reader: connection.Connection) -> None:
        with reader:
            while part := os.read(reader.fileno(), 1 << 16):
                self._printed[number] += part

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 100) -> tuple[str, str]:
        """Wait until it ends; return its standard output and standard error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("bnrnn", timeout, *self._printed)
        for thread in self._readers:
            thread.join(timeout)
        out, err = (part.decode() for part in self._printed)
        return out, err


def _run(
    pipes: list[connection.Connection],
    what: str | list[str],
    folder: str,
    environment: dict[str, str],
    stdout: Path | None,
    limits: dict[int, int],
    new_session: bool,
) -> None:
    if new_session:
        os.setsid()
    for descriptor, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    if stdout is not None:
        file = os.open(stdout, os.O_WRONLY)
        os.dup2(file, 1)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as in Python: a too large file is an error
    for number, most in limits.items():
        resource.setrlimit(number, (most, most))
    if isinstance(what, str):
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        return
    from bnrnn.command.cli import main

    sys.argv = ["bnrnn", *what]
    main()
