"""Taking turns: `Turns` for the threads of one model, `SharedIterator` for those of one iterator."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Self, TypeVar

from gemma_deploy.errors import RequestError

Item = TypeVar("Item")


class Turns:
    """A lock that a thread cannot take again while another one waits for it.

    A loop that gives a plain lock back and takes it again at once may keep all others out. A thread
    that holds the lock may take it again. Ctrl-C may come at any time and leaves no lock taken.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._lock = threading.RLock()

    def is_held(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # as threading.Condition asks

    @contextlib.contextmanager
    def taken(self) -> Generator[None]:
        """Hold the lock for the length of a `with` block."""
        if self.is_held():
            yield
            return
        try:
            # Whoever is the next to run holds `_next`; the others line up for that.
            with self._next:
                self._lock.acquire()
            # Ctrl-C cannot come between the end of this block and its release.
            with self._lock:
                self._lock.release()
                yield
        except BaseException:
            while self.is_held():  # it came before the block
                self._lock.release()
            raise


class SharedIterator(Iterator[Item]):
    """An iterator that several threads may ask: each item goes to one of them.

    Args:
        items: What makes the items; nobody else may iterate over it.
        what: What an error calls it.
        is_inside: Whether this thread is in a callback of something that runs. It may not wait here for
            another thread then, which may wait for that.
    """

    def __init__(
        self,
        items: Generator[Item],
        what: str,
        is_inside: Callable[[], bool] = lambda: False,
    ) -> None:
        self._items = items
        self._what = what
        self._is_inside = is_inside
        self._lock = threading.RLock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if not self._lock.acquire(blocking=not self._is_inside()):
            raise self._asked_inside()
        try:
            if self._is_running():
                raise self._asked_inside()
            return next(self._items)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End it, when the item that another thread waits for is there.

        What it calls itself cannot end it.
        """
        if not self._lock.acquire(blocking=not self._is_inside()):
            return
        try:
            if not self._is_running():
                self._items.close()
        finally:
            self._lock.release()

    def _asked_inside(self) -> RequestError:
        return RequestError(
            f"{self._what} was asked for more by something that it calls itself, or another call that "
            "runs (is_cancelled or on_progress): ask from outside"
        )

    def _is_running(self) -> bool:
        return inspect.getgeneratorstate(self._items) == inspect.GEN_RUNNING
