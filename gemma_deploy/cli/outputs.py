"""Files and folders that verbs write: checked before the work, announced, written."""

from pathlib import Path

import click

from gemma_deploy.cli.console import notice


def announce_new_folders(output: Path) -> None:
    """Say which folders above an output are not there and will be made: a path may be mistyped."""
    missing = [folder for folder in output.absolute().parents if not folder.exists()]
    if missing:
        others = f", with {missing[-1]} above it" if len(missing) > 1 else ""
        notice(f"Note: the folder {missing[0]} does not exist and will be made{others}.")


def check_output_file(option: str, path: Path | None, *suffixes: str) -> None:
    """Refuse a file that cannot be written, or whose ending says nothing of what it will hold.

    Args:
        option: What it was given with, for the message.
        path: Where to write; None for nowhere.
        *suffixes: What it may end in; none for anything.

    Raises:
        click.UsageError: Another ending, or a folder that does not exist.
    """
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise click.UsageError(
            f"{option} is {path}; expected a file that ends in {' or '.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise click.UsageError(f"{option} is {path}; the folder {path.parent} does not exist")


def write_output(path: Path, text: str) -> None:
    """Write a text file and say so.

    Raises:
        click.ClickException: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise click.ClickException(f"{path} cannot be written: {err.strerror}") from err
    notice(f"wrote {path}")
