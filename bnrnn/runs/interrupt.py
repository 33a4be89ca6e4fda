"""Signals that ask a run to stop, noticed between steps instead of in the middle of one."""

import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")
SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal asked the run to stop; `signum` says which, `advice` what to do now."""

    advice = "stopped"

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """Remembers a signal while it is entered; a second one of the same kind acts at once.

    Ctrl-C, SIGTERM, and the two by which cluster schedulers announce the end of a job.

    Args:
        agree: of the numbers that all processes of the run have, which one: so that all stop in
            the same step.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.signum: int | None = None
        self._agree = agree
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for signum in (signal.SIGINT, signal.SIGTERM, *SCHEDULERS):
            self._before[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self._before[signum])

    def check(self) -> None:
        """
        Raises:
            Interrupted: a signal has come.
        """
        if signum := self._agree(self.signum or 0):
            raise Interrupted(signum)

    def guard(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, checking before each."""
        for item in items:
            self.check()
            yield item
