"""A folder of weights in the layout that this machine multiplies with: `PrepackedCache`."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from gemma_deploy.errors import ExportError, OutputExistsError, SessionError
from gemma_deploy.file_records import sha256_of
from gemma_deploy.json_files import read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES
from gemma_deploy.private_paths import others_access, others_access_above
from gemma_deploy.staging import Lock, locked, staged_folder

Loaded = TypeVar("Loaded")

MODEL_FILE: Final = "model.onnx"
DATA_FILE: Final = "weights.bin"
ENTRY_FILE: Final = "entry.json"
DEFAULT_MAX_BYTES: Final = 20 << 30

_NAME_CHARACTERS: Final = 32
# Whatever else lies in the folder is the user's: it may be one that holds more than the cache.
_ENTRY_NAME: Final = re.compile(rf"[0-9a-f]{{{_NAME_CHARACTERS}}}")
_LEFTOVER_NAME: Final = re.compile(rf"\.{_ENTRY_NAME.pattern}\.partial-.+")  # see `staged_folder`
_FREE_SPACE_RESERVE: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepackedEntry:
    """One graph in the cache.

    Attributes:
        folder: Where it lies.
        source: The graph it was made of.
        size_bytes: Space it takes.
        used_at_s: When it was last loaded or written, in seconds since 1970.
    """

    folder: Path
    source: str
    size_bytes: int
    used_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepackedCache:
    """Finds, keeps and forgets what was packed on this machine; of no value to any other.

    An entry is a folder `sha256(key)` with a model, its data and `entry.json`, which is what makes it
    an entry. It appears whole or not at all, and one process writes at a time. Where folders cannot be locked
    (Windows, some network file systems) nothing can be written.

    What is in the folder is run as it is, so a folder that other users can change is neither read nor
    written: see `others_access`.

    Attributes:
        folder: Made when something is written to it.
        max_bytes: Beyond it the least recently used entries are removed; the newest always stays.
    """

    folder: Path
    max_bytes: int = DEFAULT_MAX_BYTES

    def others_access(self, key: Mapping[str, str]) -> str | None:
        """Return how other users can change what is kept under a key, in words; None if they cannot."""
        place = self.folder.resolve()
        entry = place / self._folder_of(key).name
        reasons = (
            others_access_above(place),
            others_access(place),
            others_access(entry),
            *(others_access(path) for path in _listed(entry)),
        )
        return next((x for x in reasons if x is not None), None)

    def find(self, key: Mapping[str, str]) -> Path | None:
        """Return the folder of what was kept under a key; None if there is nothing whole.

        The model is hashed; its data, gigabytes of it, is compared by size and time of change.
        """
        folder = self._folder_of(key)
        try:
            entry = _read_record(folder)
            is_whole = (
                entry["key"] == dict(key)
                and entry["model_sha256"] == sha256_of(folder / MODEL_FILE)
                and entry["data"] == _data_record(folder)
            )
        except (OSError, LookupError, SessionError):
            return None
        if not is_whole:
            return None
        with contextlib.suppress(OSError):  # the folder may be readable only
            os.utime(folder / ENTRY_FILE)
        return folder

    def write(
        self,
        key: Mapping[str, str],
        make: Callable[[Path], Loaded],
        *,
        source: Path,
        need_bytes: int,
    ) -> Loaded | None:
        """Make an entry, in the place of a damaged one if there is one.

        Args:
            key: What the entry depends on.
            make: Writes the model and its data into the folder it is given; what it returns may hold
                the files open.
            source: The graph, for people who look at the cache.
            need_bytes: Space that is needed while it is made.

        Returns:
            What `make` returned; None if another process is writing to the cache, or has just
            written this.

        Raises:
            SessionError: Too little space, or the folder cannot be locked or written. Nothing is left
                behind.
        """
        try:
            for parent in reversed(self.folder.parents):
                if not parent.exists():  # nobody else may write there, whatever the umask allows
                    parent.mkdir(mode=0o755, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            with locked(self.folder.resolve()) as lock:  # a link cannot be locked
                if lock is Lock.IMPOSSIBLE:
                    raise SessionError(
                        f"the cache {self.folder} of prepacked weights cannot be locked: choose a "
                        "folder on a local disk (Windows locks none)"
                    )
                # Someone else may have finished it since it was looked for.
                if lock is Lock.HELD or self.find(key) is not None:
                    return None
                self._remove_leftovers()
                self._check_space(need_bytes)
                folder = self._folder_of(key)
                _remove(folder)  # it may be damaged
                with staged_folder(folder, force=True, replaceable=ENTRY_FILE) as staging:
                    made = make(staging)
                    _write_record(staging, key, source)
                    for path in (staging, *staging.iterdir()):  # whatever the umask allows
                        path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
                self._trim(keep=folder)
        except (OSError, ExportError, OutputExistsError) as err:
            raise SessionError(
                f"the cache {self.folder} of prepacked weights cannot be written: {err}"
            ) from err
        return made

    def discard(self, key: Mapping[str, str]) -> None:
        """Forget what was kept under a key; sessions that run it are not disturbed."""
        _remove(self._folder_of(key))

    def entries(self) -> list[PrepackedEntry]:
        """Return what is in the cache, the most recently used first."""
        found = [_read_entry(folder) for folder in self._folders()]
        return sorted((x for x in found if x is not None), key=lambda x: -x.used_at_s)

    def clear(self) -> int:
        """Remove every entry; return the bytes freed. Sessions that run them are not disturbed."""
        entries = self.entries()
        for entry in entries:
            _remove(entry.folder)
        if self.folder.is_dir():
            with locked(self.folder.resolve()) as lock:
                if lock is Lock.OURS:
                    self._remove_leftovers()
        return sum(x.size_bytes for x in entries if not x.folder.exists())

    def _folder_of(self, key: Mapping[str, str]) -> Path:
        text = json.dumps(dict(key), sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:_NAME_CHARACTERS]

    def _folders(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if _ENTRY_NAME.fullmatch(path.name) and not path.is_symlink():
                    yield path

    def _check_space(self, need_bytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < need_bytes + _FREE_SPACE_RESERVE:
            raise SessionError(
                f"the cache {self.folder} of prepacked weights needs {need_bytes:,} bytes and "
                f"{_FREE_SPACE_RESERVE:,} to spare; {free:,} are free: choose another folder, or "
                "`gemma-deploy cache clear`"
            )

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left; whoever writes holds the lock, and we hold it."""
        for path in self.folder.iterdir():
            if _LEFTOVER_NAME.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _trim(self, *, keep: Path) -> None:
        entries = self.entries()
        excess = sum(x.size_bytes for x in entries) - self.max_bytes
        for entry in reversed(entries):
            if excess > 0 and entry.folder != keep:
                _remove(entry.folder)
                excess -= entry.size_bytes


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _data_record(folder: Path) -> dict[str, int]:
    found = (folder / DATA_FILE).stat()
    return {"size_bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _write_record(folder: Path, key: Mapping[str, str], source: Path) -> None:
    record = {
        "key": dict(key),
        "source": str(source.absolute()),
        "model_sha256": sha256_of(folder / MODEL_FILE),
        "data": _data_record(folder),
        "made_at_s": int(time.time()),
    }
    (folder / ENTRY_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read_record(folder: Path) -> dict[str, Any]:
    return read_json(
        folder / ENTRY_FILE,
        max_bytes=MAX_CONFIG_BYTES,
        error=SessionError,
        remedy="remove it: it is made again",
    )


def _read_entry(folder: Path) -> PrepackedEntry | None:
    """Read what there is to say of an entry; None for a folder that is none."""
    record = folder / ENTRY_FILE
    try:
        used_at_s = record.stat().st_mtime
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return None
    try:
        source = str(_read_record(folder)["source"])
    except (LookupError, SessionError):
        source = "damaged"
    return PrepackedEntry(folder=folder, source=source, size_bytes=size_bytes, used_at_s=used_at_s)


def _remove(folder: Path) -> None:
    """Remove an entry, its record first: half of one must never be found."""
    with contextlib.suppress(OSError):
        (folder / ENTRY_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
