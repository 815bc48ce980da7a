"""Taking turns: `Turns` for the threads of one model, `SharedIterator` for those of one iterator."""

import contextlib
import inspect
import threading
from collections.abc import Generator, Iterator
from typing import Self, TypeVar

from gemma_deploy.errors import RequestError

Item = TypeVar("Item")


class Turns:
    """A lock that a thread cannot take again while another one waits for it.

    A loop that gives a plain lock back and takes it again at once may keep all others out. A thread
    that holds the lock may take it again.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextlib.contextmanager
    def taken(self) -> Generator[None]:
        """Hold the lock for the length of a `with` block."""
        if self._owner == threading.get_ident():
            yield
            return
        # Whoever is the next to run holds `_next`; the others line up for that.
        with self._next:
            self._lock.acquire()
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._lock.release()


class SharedIterator(Iterator[Item]):
    """An iterator that several threads may ask: each item goes to one of them.

    Args:
        items: What makes the items; nobody else may iterate over it.
        what: What an error calls it.
    """

    def __init__(self, items: Generator[Item], what: str) -> None:
        self._items = items
        self._what = what
        self._lock = threading.RLock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        with self._lock:
            if self._is_running():
                raise RequestError(
                    f"{self._what} was asked for more by something that it calls itself "
                    "(is_cancelled or on_progress): ask from outside"
                )
            return next(self._items)

    def close(self) -> None:
        """End it, when the item that another thread waits for is there.

        What it calls itself cannot end it.
        """
        with self._lock:
            if not self._is_running():
                self._items.close()

    def _is_running(self) -> bool:
        return inspect.getgeneratorstate(self._items) == inspect.GEN_RUNNING
