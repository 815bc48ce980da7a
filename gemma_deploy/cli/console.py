"""What the verbs print: results on stdout, progress and notices on stderr."""

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from gemma_deploy.cli.visible import visible, visible_cell, visible_speech
from gemma_deploy.errors import GemmaDeployWarning

Progress = Callable[[str, int, int], object]

# Of a log without a terminal: minutes of work are no silence, and hours are no flood.
_SECONDS_BETWEEN_LINES: Final = 30.0
_MOST_COUNTED_PARTS: Final = 1000


def say(text: str = "", *, mark: str = "", err: bool = False, **style: Any) -> None:
    """Write a line to stdout or stderr; what would command the terminal is escaped (`visible`).

    Everything that verbs print for people goes through here or through `speak`.

    Args:
        text: May come from files and names.
        mark: What the line begins with, styled already.
        err: Whether to write to stderr.
        **style: As `click.style` has it.
    """
    shown = visible(text)
    # Without a style, click would put an end of it behind the line all the same.
    line = mark + (click.style(shown, **style) if style else shown)
    click.echo(line, err=err)  # noqa: TID251 - here it is escaped


def speak(text: str, *, ends_line: bool = False) -> None:
    """Write a model's words to stdout: on a terminal as `visible_speech`, elsewhere as they are."""
    shown = visible_speech(text) if sys.stdout.isatty() else text
    click.echo(shown, nl=ends_line, color=True)  # noqa: TID251 - likewise


class VisibleFormatter(logging.Formatter):
    """Formats what is logged as `say` does."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return visible(super().format(record))


def notice(text: str) -> None:
    """Write a line for the person at the terminal (stderr)."""
    say(text, err=True)


def warn(*texts: str | None) -> None:
    """Write warnings to stderr, one a line; None is none."""
    for text in texts:
        if text is not None:
            say(f"Warning: {text}", fg="yellow", err=True)


@contextlib.contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Write what gemma-deploy warns of to stderr, each once; other warnings as Python does."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", GemmaDeployWarning)
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, GemmaDeployWarning):
                show_others(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                warn(f"{message}.")

        warnings.showwarning = show
        yield


def emit_json(value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write one JSON object to stdout; on one line unless `indent` is given.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    say(json.dumps(value, indent=indent, ensure_ascii=not is_unicode, allow_nan=False))


def emit_table(rows: Sequence[tuple[str, str]], *, title: str) -> None:
    """Write a title and aligned `name  value` lines to stdout."""
    shown = [(visible_cell(name), visible_cell(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0)
    say(title, bold=True)
    for name, value in shown:
        say(f"  {name:<{width}}  {value}".rstrip())


def emit_columns(rows: Sequence[Sequence[str]], *, title: str) -> None:
    """Write a title and the lines of a table to stdout."""
    say(title, bold=True)
    for line in column_lines([[visible_cell(cell) for cell in row] for row in rows]):
        say(f"  {line}")


def column_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines: names in the first column to the left, figures to the right.

    Args:
        rows: As many cells in each; the first row holds headings.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([name.ljust(widths[0]), *aligned]).rstrip()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that something without a measure is under way."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    # Text, of which rich reads no markup: a folder may be called [red].
    with Console(stderr=True).status(Text(f"{visible_cell(what)} ...")):
        yield


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Give a callback `(stage, done, total)` that shows how far a long task is.

    On a terminal it is a bar that disappears when the block ends, whatever ends it; elsewhere a line
    when a stage begins, and of a long one a line now and then, so that logs stay short.
    """
    if not sys.stderr.isatty():
        yield StageLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TaskProgressColumn())
    with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(visible_cell(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


class StageLines:
    """Progress as lines of a log: one for each stage, and more of those that take long."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `done` of `total` parts of a stage are done; write a line if one is due."""
        now = time.monotonic()
        known = self._stages.get(stage)
        if known is None or done < known.done:  # a stage may come a second time
            self._stages[stage] = _Stage(started=now, last_line=now, done=done)
            notice(f"{stage} ...")
            return
        known.done = done
        if done and now - known.last_line >= _SECONDS_BETWEEN_LINES:
            known.last_line = now
            notice(f"{stage}: {_how_far(done, total, now - known.started)}")


@dataclass(slots=True)
class _Stage:
    """When a stage began, when its last line was written (seconds of a steady clock), what is done."""

    started: float
    last_line: float
    done: int


def _how_far(done: int, total: int, elapsed_s: float) -> str:
    # Layers and rows are counted; nobody reads counts of bytes.
    share = f"{done} of {total}" if total <= _MOST_COUNTED_PARTS else f"{done / total:.0%}"
    text = f"{share}, {_duration(elapsed_s)} so far"
    return (
        text
        if done >= total
        else f"{text}, about {_duration(elapsed_s / done * (total - done))} left"
    )


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds, as `1:02:05` or `2:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
