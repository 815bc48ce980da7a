"""What the verbs print: results on stdout, progress and notices on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

Progress = Callable[[str, int, int], object]

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def notice(text: str) -> None:
    """Write a line for the person at the terminal (stderr)."""
    click.echo(text, err=True)


def emit_json(value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write one JSON object to stdout; on one line unless `indent` is given.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(value, indent=indent, ensure_ascii=not is_unicode, allow_nan=False))


def emit_table(rows: Sequence[tuple[str, str]], *, title: str) -> None:
    """Write a title and aligned `name  value` lines to stdout."""
    width = max(len(name) for name, _ in rows)
    click.secho(title, bold=True)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}".rstrip())


def emit_columns(rows: Sequence[Sequence[str]], *, title: str) -> None:
    """Write a title and the lines of a table to stdout."""
    click.secho(title, bold=True)
    for line in column_lines(rows):
        click.echo(f"  {line}")


def column_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines: names in the first column to the left, figures to the right.

    Args:
        rows: As many cells in each; the first row holds headings.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([name.ljust(widths[0]), *aligned]).rstrip()


def format_bytes(size_bytes: int) -> str:
    """Return a size for people, in binary units: `1.50 GiB`."""
    size = float(size_bytes)
    unit = 0
    while size >= 1024 and unit < len(_BINARY_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size_bytes} B" if unit == 0 else f"{size:.2f} {_BINARY_UNITS[unit]}"


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that something without a measure is under way."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Give a callback `(stage, done, total)` that shows how far a long task is.

    On a terminal it is a bar that disappears when the block ends, whatever ends it; elsewhere one
    line per stage, so that logs stay short.
    """
    if not sys.stderr.isatty():
        yield _stage_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _stage_lines() -> Progress:
    seen: set[str] = set()

    def show(stage: str, done: int, total: int) -> None:  # noqa: ARG001 - the callback's signature
        if stage not in seen:
            seen.add(stage)
            notice(f"{stage} ...")

    return show
