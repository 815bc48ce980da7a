"""Where `generate` takes its prompts from: arguments, a file, or stdin."""

import sys
from pathlib import Path

import click

from gemma_deploy.errors import RequestError
from gemma_deploy.json_files import parse_json
from gemma_deploy.quoting import shortened
from gemma_deploy.text_files import decode_text, plain_text, read_bounded, read_text


def read_prompts(
    arguments: tuple[str, ...], file: str | None, prompt_file: Path | None = None
) -> list[str]:
    """Return the prompts of a command line.

    Wherever they come from, byte order marks are dropped and CR LF is LF.

    Args:
        arguments: Prompts given as arguments.
        file: A file with one prompt per line (`-` for stdin), or None.
        prompt_file: A file that is one prompt, or None.

    Returns:
        The arguments, else the files' prompts, else the whole of stdin as one prompt.

    Raises:
        click.UsageError: Several or none of them.
        RequestError: The file cannot be read, or a line is not what it should be.
    """
    if arguments and file is not None:
        raise click.UsageError("prompts come as arguments or from --file, not both")
    if prompt_file is not None:
        if arguments or file is not None:
            raise click.UsageError("--prompt-file is one prompt: give no arguments and no --file")
        return [_whole(read_text(prompt_file), str(prompt_file))]
    if arguments:
        return [argument_text(text, f"prompt {i}") for i, text in enumerate(arguments, 1)]
    if file is not None:
        return _read_file(file)
    if sys.stdin.isatty():
        raise click.UsageError(
            'no prompt: give one as an argument ("The for statement"), with --file, or on stdin'
        )
    return [_whole(_stdin_text(), "stdin")]


def argument_text(text: str, place: str) -> str:
    """Return an argument's text.

    Args:
        text: The argument.
        place: What an error calls it.

    Raises:
        RequestError: It has bytes that were not to be decoded in the locale's encoding.
    """
    if not _is_unicode(text):
        raise RequestError(
            f"{place} is not valid {sys.getfilesystemencoding().upper()} text, which this locale has "
            "arguments in. If it is UTF-8, set LC_ALL=C.UTF-8 or PYTHONUTF8=1; or give it in a file, "
            "saved as UTF-8"
        )
    return plain_text(text)


def _whole(text: str, place: str) -> str:
    """Return a text that is one prompt: without the line end that editors put behind it."""
    prompt = text.removesuffix("\n")
    if not prompt:
        raise RequestError(f"{place} is empty: expected a prompt")
    return prompt


def _read_file(name: str) -> list[str]:
    text = _stdin_text() if name == "-" else read_text(Path(name))
    is_json_lines = Path(name).suffix.lower() == ".jsonl"
    prompts = [
        _prompt_of(line, f"{name}, line {number}") if is_json_lines else plain_text(line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not prompts:
        raise RequestError(f"{name} holds no prompt: expected one per line")
    return prompts


def _stdin_text() -> str:
    return decode_text(read_bounded(sys.stdin.buffer, "stdin"), "stdin")


def _prompt_of(line: str, place: str) -> str:
    remedy = 'write lines such as {"prompt": "..."}'
    raw = parse_json(line, place, error=RequestError, remedy=remedy)
    if "prompt" not in raw:
        raise RequestError(f"{place} has no prompt; {remedy}")
    prompt = raw["prompt"]
    if not isinstance(prompt, str):
        raise RequestError(f"{place}: the prompt is {shortened(prompt)}, expected a string")
    return plain_text(prompt)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
