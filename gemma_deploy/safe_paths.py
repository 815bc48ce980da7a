"""Paths that a manifest or a graph states: followed only where they stay inside the bundle."""

import errno
from pathlib import Path, PurePosixPath, PureWindowsPath

from gemma_deploy.errors import UnsafePathError
from gemma_deploy.quoting import shortened


def safe_path(folder: Path, name: str | bytes, source: str) -> Path:
    """Return `folder / name` if that stays inside the folder, symbolic links followed.

    Args:
        folder: The bundle.
        name: A relative path as a manifest or graph states it; of a graph it is bytes where it is
            not UTF-8, and then refused.
        source: Where the path stands, for the message.

    Raises:
        UnsafePathError: The path is absolute, climbs out, or leads out through a link.
    """
    if isinstance(name, bytes) or not _leads_inside(folder, name):
        raise UnsafePathError(
            f"{source} names {shortened(name, 300)}, which leads out of the bundle {folder}: refused. Only use "
            "bundles from sources you trust, or export again"
        )
    return folder / name


def _leads_inside(folder: Path, name: str) -> bool:
    is_relative = not PurePosixPath(name).is_absolute() and not PureWindowsPath(name).anchor
    return (
        bool(name)
        and is_relative
        and ".." not in PurePosixPath(name.replace("\\", "/")).parts
        and _resolves_inside(folder, name)
    )


def _resolves_inside(folder: Path, name: str) -> bool:
    try:
        return not _is_loop(folder / name) and (folder / name).resolve().is_relative_to(
            folder.resolve()
        )
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop; ValueError: a zero byte
        return False


def _is_loop(path: Path) -> bool:
    """Tell whether links lead in circles: from Python 3.13 on `resolve` no longer says so."""
    try:
        path.stat()
    except OSError as err:
        return err.errno == errno.ELOOP
    return False
