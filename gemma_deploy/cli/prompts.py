"""Where `generate` takes its prompts from: arguments, a file, or stdin."""

import json
import sys
from pathlib import Path

import click

from gemma_deploy.errors import RequestError


def read_prompts(arguments: tuple[str, ...], file: str | None) -> list[str]:
    """Return the prompts of a command line.

    Args:
        arguments: Prompts given as arguments.
        file: A file with one prompt per line (`-` for stdin), or None.

    Returns:
        The arguments, else the file's prompts, else the whole of stdin as one prompt.

    Raises:
        click.UsageError: Both or none of them.
        RequestError: The file cannot be read, or a line is not what it should be.
    """
    if arguments and file is not None:
        raise click.UsageError("prompts come as arguments or from --file, not both")
    if arguments:
        return [_checked(text, f"prompt {i}") for i, text in enumerate(arguments)]
    if file is not None:
        return _read_file(file)
    if sys.stdin.isatty():
        raise click.UsageError(
            'no prompt: give one as an argument ("The for statement"), with --file, or on stdin'
        )
    text = _decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    if not text:
        raise RequestError("stdin is empty: expected a prompt")
    return [text]


def _read_file(name: str) -> list[str]:
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as err:
        raise RequestError(f"{name} cannot be read: {err.strerror}") from err
    is_json_lines = Path(name).suffix == ".jsonl"
    lines = _decode(raw, name).split("\n")
    prompts = [
        _prompt_of(line, f"{name}, line {number}") if is_json_lines else line.removesuffix("\r")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise RequestError(f"{name} holds no prompt: expected one per line")
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as err:
        raise RequestError(f'{place}: expected a JSON object such as {{"prompt": "..."}}') from err
    if not isinstance(prompt, str):
        raise RequestError(f"{place}: the prompt is {prompt!r}, expected a string")
    return _checked(prompt, place)


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise RequestError(f"{place} is not UTF-8 text: {err}") from err


def _checked(text: str, place: str) -> str:
    """Refuse half characters, which arguments in another encoding leave behind."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise RequestError(f"{place} is not valid UTF-8 text: {err.reason}") from err
    return text
