"""Which files of a checkpoint are its licence: they travel with the weights they are about."""

import fnmatch
from typing import Final

LICENCE_PATTERNS: Final = (
    "licen[cs]e*",
    "notice*",
    "*terms_of_use*",
    "*use_policy*",
    "copying*",
)
"""What licence files are called, in lower case; their names come in any case."""


def is_licence(name: str) -> bool:
    """Tell whether a file of this name (no folder) states a licence or terms of use."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in LICENCE_PATTERNS)
