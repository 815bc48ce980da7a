"""Ctrl-C as a wish to stop: the step that runs is finished, and what was generated is kept."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def cancel_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C inside the block into an answer; a second one raises as usual.

    Yields:
        A function that tells whether Ctrl-C was pressed, to be given to a generation.
    """
    is_cancelled = False

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_cancelled
        if is_cancelled:
            raise KeyboardInterrupt
        is_cancelled = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: is_cancelled
    finally:
        signal.signal(signal.SIGINT, previous)
