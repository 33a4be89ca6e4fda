"""Signals that stop a run between steps instead of in the middle of one."""

import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")
SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal stopped the run. `signum`: its number; `advice`: what the user can do now."""

    advice = "stopped"

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """Remembers a signal in a `with` block; a second signal of the same kind acts immediately.

    The signals are SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal was closed), and the two by which
    cluster schedulers announce the end of a job. An ignored SIGHUP, as under nohup, stays ignored.

    Args:
        agree: combines the signal numbers of all processes of the run to one, so that all stop at
            the same step.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.signum: int | None = None
        self._agree = agree
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
        for signum in (signal.SIGINT, signal.SIGTERM, *hung_up, *SCHEDULERS):
            # None: a handler that is not Python's, such as faulthandler's.
            self._before[signum] = signal.signal(signum, self._remember) or signal.SIG_DFL
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if signum != signal.SIGHUP:  # it comes twice: from the kernel and from the shell
            signal.signal(signum, self._before[signum])

    def check(self) -> None:
        """Stop if a signal has arrived.

        Raises:
            Interrupted: a signal has arrived.
        """
        if signum := self._agree(self.signum or 0):
            raise Interrupted(signum)

    def guard(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`; call `check` before each."""
        for item in items:
            self.check()
            yield item
