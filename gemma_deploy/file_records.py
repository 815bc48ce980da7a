"""Size and hash of a file, as manifests state them: `FileRecord`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
    """Return the SHA-256 of a file as hex; `on_bytes` hears of progress in bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
