"""Text for a terminal, in which nothing commands the terminal: control characters as escapes.

A file's names and texts, and a model's words, may hold escape sequences, which a terminal obeys: it
takes another title, hides lines, or types for its user.
"""

import re
from typing import Final

_CONTROLS: Final = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
_RETURN: Final = r"\r(?!\n)"
# Marks, embeddings, overrides and isolates: they let a name read as another one.
_DIRECTIONS: Final = "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_IN_SPEECH: Final = re.compile(f"[{_CONTROLS}]|{_RETURN}")
_IN_TEXT: Final = re.compile(f"[{_CONTROLS}{_DIRECTIONS}]|{_RETURN}")
_IN_CELL: Final = re.compile(f"[{_CONTROLS}{_DIRECTIONS}\\t\\n\\r]")


def visible(text: str) -> str:
    r"""Return a message with control characters as `\u001b`; lines and tabs stay."""
    return _IN_TEXT.sub(_escape, text)


def visible_cell(text: str) -> str:
    """Return one line: as `visible`, line ends and tabs escaped, too."""
    return _IN_CELL.sub(_escape, text)


def visible_speech(text: str) -> str:
    """Return a model's words: as `visible`, what orders writing from right to left as it is."""
    return _IN_SPEECH.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    # In JSON, where they stand inside of strings only, it means the same.
    return f"\\u{ord(match[0]):04x}"
