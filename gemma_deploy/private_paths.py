"""Whether what lies at a path can be changed by other users: `others_access`."""

import os
import stat
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = 0


def others_access(path: Path) -> str | None:
    """Return how users other than this one and root can change a file or folder, in words, or None.

    It belongs to this user or to root, nobody else may write it, and it is no symbolic link. Nothing is
    said of what is not there, nor on Windows, whose rights are others.
    """
    if sys.platform == "win32":
        return None
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        return f"{path} cannot be looked at: {err.strerror}"
    reason = None
    if stat.S_ISLNK(found.st_mode):
        reason = "is a symbolic link"
    elif found.st_uid not in (os.geteuid(), _ROOT):
        reason = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = f"may be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None if reason is None else f"{path} {reason}"


def others_access_above(folder: Path) -> str | None:
    """Return how other users can put another folder in the place of this one, in words, or None.

    Args:
        folder: A resolved path, of a folder that is there or not.
    """
    for parent in folder.parents:
        reason = others_access(parent)
        # In /tmp and its like nobody renames what is not theirs.
        if reason is not None and not _is_sticky(parent):
            return reason
    return None


def _is_sticky(folder: Path) -> bool:
    found = folder.stat()
    return bool(found.st_mode & stat.S_ISVTX) and found.st_uid in (os.geteuid(), _ROOT)
