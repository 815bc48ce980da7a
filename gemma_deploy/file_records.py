"""Size and hash of a file, as manifests state them: `FileRecord`."""

import hashlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma_deploy.json_files import open_regular
from gemma_deploy.safe_paths import safe_path

_HASH_BLOCK_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What the manifest says of one file: its size in bytes and SHA-256 (hex)."""

    size_bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Measure and hash a file for the manifest."""
    return FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: Path, on_bytes: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a regular file as hex; `on_bytes` hears of progress in bytes.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe or a device.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def wrong_file(
    folder: Path, files: Mapping[str, FileRecord], manifest: str, *, called: str
) -> str | None:
    """Return what is wrong with the first file that is missing or of another size; None if none is.

    Args:
        folder: Where the files are.
        files: What they should be, by path in the folder.
        manifest: Name of the file that says so.
        called: What the message calls it.

    Raises:
        UnsafePathError: A path that leaves the folder.
    """
    for name, record in files.items():
        path = safe_path(folder, name, manifest)
        size = file_size_bytes(path)
        if size != record.size_bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            return f"{path} {found}, {called} says {record.size_bytes:,} bytes"
    return None


def file_size_bytes(path: Path) -> int | None:
    """Return the size of a regular file; None for what is none, or cannot be looked at."""
    try:
        status = path.stat()
    except OSError:  # it is not there, or its name is longer than names can be
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def changed_files(
    folder: Path, files: Mapping[str, FileRecord], on_bytes: Callable[[int], object]
) -> list[str]:
    """Hash every file and return the paths whose SHA-256 is another; see `sha256_of`."""
    return [
        name
        for name, record in files.items()
        if sha256_of(folder / name, on_bytes) != record.sha256
    ]
