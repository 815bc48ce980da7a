"""`gemma-deploy cache`: the prepacked weights on this machine."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_columns, emit_json, say
from gemma_deploy.cli.prepacked_option import AUTO, ENVIRONMENT_VARIABLE, OFF, cache_folder

if TYPE_CHECKING:
    from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache

_folder_option = click.option(
    "--prepacked-cache",
    "folder",
    metavar="DIR|auto",
    default=AUTO,
    show_default=True,
    envvar=ENVIRONMENT_VARIABLE,
    show_envvar=True,
    # With `off` in the environment there may still be something in the user's folder.
    callback=lambda _context, _parameter, value: cache_folder(AUTO if value == OFF else value),
    help="The cache's folder, as generate and chat have it.",
)


@click.group(
    "cache",
    short_help="List or remove the prepacked weights that --prepacked-cache keeps.",
    epilog="""\b
Examples:
  gemma-deploy cache list
  gemma-deploy cache clear
""",
)
def command() -> None:
    """List or remove the prepacked weights that --prepacked-cache keeps on this machine."""


@command.command("list")
@_folder_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def list_entries(*, folder: Path, as_json: bool) -> None:
    """List what is in the cache, the most recently used first."""
    entries = _cache(folder).entries()
    if as_json:
        listed = [
            {
                "path": str(entry.folder),
                "source": entry.source,
                "size_bytes": entry.size_bytes,
                "used_at_s": entry.used_at_s,
            }
            for entry in entries
        ]
        emit_json({"folder": str(folder), "entries": listed}, indent=1)
        return
    if not entries:
        say(f"{folder}: empty")
        return
    rows = [("graph", "size", "last used")]
    for entry in entries:
        used_at = datetime.fromtimestamp(entry.used_at_s).astimezone()
        rows.append((entry.source, format_bytes(entry.size_bytes), f"{used_at:%Y-%m-%d %H:%M}"))
    total_bytes = sum(entry.size_bytes for entry in entries)
    emit_columns(rows, title=f"{folder}: {format_bytes(total_bytes)}")


@command.command("clear")
@_folder_option
def clear(*, folder: Path) -> None:
    """Remove everything in the cache. Programs that are running with it are not disturbed."""
    freed_bytes = _cache(folder).clear()
    say(f"{folder}: {format_bytes(freed_bytes)} freed")


def _cache(folder: Path) -> "PrepackedCache":
    from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache

    return PrepackedCache(folder=folder)
