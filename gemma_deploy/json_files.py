"""The one reader of files that others wrote: whole, of bounded size, and JSON objects of bounded depth.

Bytes come from regular files only: opening a pipe would wait for whoever writes to it.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, Final

from gemma_deploy.errors import GemmaDeployError
from gemma_deploy.limits import MAX_JSON_DEPTH, MAX_JSON_DIGITS
from gemma_deploy.quoting import shortened, shortened_text

_TOO_DEEP: Final = f"objects and lists are nested deeper than {MAX_JSON_DEPTH}"
_ESCAPED_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
# What only some systems have: not to wait for a pipe's writer; no translation of line ends.
_OPEN_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to be read.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
    """
    descriptor = os.open(path, _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, max_bytes: int, error: type[GemmaDeployError], remedy: str) -> bytes:
    """Return the contents of a regular file.

    Args:
        path: The file.
        max_bytes: The most that such a file may have.
        error: What is raised.
        remedy: What to do about it, as the end of a sentence.

    Raises:
        GemmaDeployError: `error`: it cannot be read, is no regular file, or is too large.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(max_bytes + 1)
    except OSError as err:
        raise error(f"{path} cannot be read: {err.strerror or err}; {remedy}") from err
    if len(raw) > max_bytes:
        raise error(
            f"{path} is larger than {max_bytes:,} bytes, which no such file needs: it is damaged or "
            f"another file; {remedy}"
        )
    return raw


def read_json(
    path: Path, *, max_bytes: int, error: type[GemmaDeployError], remedy: str
) -> dict[str, Any]:
    """Return the JSON object in a file; see `read_bytes` and `parse_json`."""
    raw = read_bytes(path, max_bytes=max_bytes, error=error, remedy=remedy)
    return parse_json(raw, str(path), error=error, remedy=remedy)


def parse_json(
    raw: bytes | str, place: str, *, error: type[GemmaDeployError], remedy: str
) -> dict[str, Any]:
    """Return the JSON object that a text is.

    What it holds is valid Unicode, no more than `MAX_JSON_DEPTH` deep, and says nothing twice, so
    that all programs read the same in it. Numbers can still be NaN and infinite: `typed` refuses
    them where a number counts.

    Args:
        raw: The text, with or without a byte order mark; bytes are UTF-8.
        place: What an error calls it.
        error: What is raised.
        remedy: What to do about it, as the end of a sentence.

    Raises:
        GemmaDeployError: `error`: it is anything else.
    """
    try:
        text = (raw if isinstance(raw, str) else raw.decode()).removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=_unambiguous, parse_int=_int)
        _check_depth(value)
        if _ESCAPED_SURROGATE.search(text):
            _check_unicode(value)
    except (ValueError, RecursionError) as err:
        reason = _TOO_DEEP if isinstance(err, RecursionError) else shortened_text(str(err), 200)
        raise error(f"{place} cannot be read as JSON: {reason}; {remedy}") from err
    if not isinstance(value, dict):
        raise error(f"{place} holds a {type(value).__name__}, expected a JSON object; {remedy}")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; readers take a name that it gives two values differently.

    Values are compared as JSON spells them: to Python, 1 is also 1.0 and true.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        for name, item in pairs:
            if item is not value[name] and json.dumps(item) != json.dumps(value[name]):
                raise ValueError(f"{shortened(name)} is there twice, with different values")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_unicode(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        raise ValueError(
            "a string holds half a character (a lone surrogate, \\ud800 to \\udfff)"
        ) from err
