"""How far a long prompt is read, shown until the first token is there."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from gemma_deploy.cli.console import StageLines

# What is read in one step has nothing to show in between, and is mostly quick.
_SHORTEST_SHOWN_TOKENS: Final = 512


@contextlib.contextmanager
def reading_progress() -> Iterator[Callable[[int, int], object]]:
    """Give a callback `(done, total)` for prompts that are read; it is mute for short ones.

    On a terminal it is a bar, which disappears when all is read, or when the block ends: text may
    follow on the same terminal. Elsewhere it is a line of a log, and more now and then.
    """
    if not sys.stderr.isatty():
        lines = StageLines()
        yield lambda done, total: _log(lines, done, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    with contextlib.ExitStack() as shown:
        bars: Bars | None = None
        task: Any = None

        def show(done: int, total: int) -> None:
            nonlocal bars, task
            if done == total:
                shown.close()
                bars = None
            elif bars is not None:
                bars.update(task, completed=done)
            elif total > _SHORTEST_SHOWN_TOKENS:
                columns = (
                    TextColumn("reading the prompt"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("tokens"),
                    TimeElapsedColumn(),
                )
                bars = shown.enter_context(
                    Bars(*columns, console=Console(stderr=True), transient=True)
                )
                task = bars.add_task("", total=total, completed=done)

        yield show


def _log(lines: StageLines, done: int, total: int) -> None:
    if total > _SHORTEST_SHOWN_TOKENS and done < total:
        lines("reading the prompt", done, total)
