"""Triton's interpreter with all programs of a launch running concurrently, as on a GPU.

The interpreter runs one program after the other, so a barrier between programs would never end.
Here each program has a thread, and one thread runs at a time. At each load, store and atomic
operation it may switch to another thread, drawn at random. A missing or insufficient barrier causes
a wrong result; a barrier that no program can pass raises `DeadlockError`.
"""

import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl  # noqa: F401  (the interpreter patches it under this name)
from triton.runtime import interpreter

_builder: Any = interpreter.interpreter_builder
_MEMORY = ("create_masked_load", "create_masked_store", "create_load", "create_store")
_ATOMIC = "create_atomic_rmw"


class DeadlockError(Exception):
    """All programs wait for each other."""


class _Programs:
    """Runs the programs of one launch at a time."""

    def __init__(self, seed: int, switch: float) -> None:
        self.chance, self.switch = random.Random(seed), switch
        self.waiting: list[tuple[Any, Callable[[], None]]] = []  # those of the current launch
        self.alive: dict[Any, threading.Semaphore] = {}  # by index in the grid
        self.current: Any = None
        self.error: BaseException | None = None
        self.idle = 0  # atomic operations since the last load or store
        self.done = threading.Event()

    def run(self) -> None:
        todo, self.waiting = self.waiting, []
        self.alive = {index: threading.Semaphore(0) for index, _ in todo}
        self.idle = 0
        self.done.clear()
        threads = [threading.Thread(target=self._program, args=one, daemon=True) for one in todo]
        for thread in threads:
            thread.start()
        self._resume(self.chance.choice(list(self.alive)))
        self.done.wait()
        for thread in threads:
            thread.join()
        self.current = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _resume(self, index: Any) -> None:
        self.current = index
        _builder.set_grid_idx(*index)
        self.alive[index].release()

    def _program(self, index: Any, thunk: Callable[[], None]) -> None:
        self.alive[index].acquire()
        try:
            if self.error is None:
                thunk()
        except BaseException as error:
            self.error = self.error or error
        del self.alive[index]
        if self.alive:
            self._resume(self.chance.choice(list(self.alive)))
        else:
            self.done.set()

    def touch(self, atomic: bool) -> None:
        """The current program has accessed memory: maybe switch to another."""
        if self.current is None:
            return
        if self.error is not None:
            raise self.error
        self.idle = self.idle + 1 if atomic else 0
        if self.idle > 200 * (1 + len(self.alive)):
            raise DeadlockError("all programs wait for each other")
        if not atomic and self.chance.random() >= self.switch:
            return
        me = self.current
        mine, other = self.alive[me], self.chance.choice(list(self.alive))
        if other != me:
            self._resume(other)
            mine.acquire()
            if self.error is not None:
                raise self.error


@contextlib.contextmanager
def all_programs_at_once(seed: int = 0, switch: float = 0.1) -> Iterator[None]:
    """A context in which launches interleave their programs.

    Args:
        switch: the probability of switching at a load or store. An atomic operation always draws
            the next program.
    """
    programs = _Programs(seed, switch)
    executor: Any = interpreter.GridExecutor
    call_one_by_one = executor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        fn = self.fn

        @functools.wraps(fn)
        def later(**arguments: Any) -> None:
            index = _builder.grid_idx
            programs.waiting.append((index, lambda: fn(**arguments)))
            if index == tuple(n - 1 for n in _builder.grid_dim):
                programs.run()

        later.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
        self.fn = later
        try:
            return call_one_by_one(self, *args, **kwargs)
        finally:
            self.fn = fn
            programs.waiting = []

    def touching(name: str) -> Callable[..., Any]:
        method = getattr(_builder, name)

        def touch(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            programs.touch(name == _ATOMIC)
            return result

        return touch

    for name in (*_MEMORY, _ATOMIC):
        setattr(_builder, name, touching(name))
    executor.__call__ = call
    try:
        yield
    finally:
        executor.__call__ = call_one_by_one
        for name in (*_MEMORY, _ATOMIC):
            delattr(_builder, name)
