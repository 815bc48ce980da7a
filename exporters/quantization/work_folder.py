"""What an interrupted calibration keeps: `WorkFolder`."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma_deploy.errors import ExportError, warn
from gemma_deploy.json_files import read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES
from gemma_deploy.staging import Lock, locked, sync

OnProgress = Callable[[str, int, int], object]
"""(what is being done, done, total)."""

_KEY_FILE = "calibration.json"


class WorkFolder:
    """A folder of finished tensors, which belong to one checkpoint, text and choice of options.

    It is held, so that no other export works in it, until `close` or `remove`, or until the process
    ends, whatever ends it. Where folders cannot be locked (Windows, NFS), it is not held.

    Args:
        path: The folder; it is created, or taken up where a run of the same key left it. What a run
            of another key left is removed.
        key: Everything that the tensors depend on, as JSON can hold it.

    Raises:
        ExportError: There is something else at `path`, another export is at work there, or it cannot
            be written.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = ExitStack()
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if path.exists() and (not path.is_dir() or _is_foreign(path)):
            raise ExportError(
                f"{path}, where calibration keeps what it has done, holds something else: move it "
                "away, or choose another output"
            )
        with self._writing():
            self._hold()
            if _stated_digest(path) != digest:
                for entry in path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            (path / _KEY_FILE).write_text(json.dumps({"sha256": digest}), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove everything after work that is finished; keep it after an error."""
        if kind is None:
            self.remove()
        else:
            self.close()

    def close(self) -> None:
        """Let others work there; what is done is kept, and nothing where nothing is."""
        if any(self.path.glob("*.safetensors")):
            self._lock.close()
        else:
            self.remove()

    def find(self, name: str) -> Path | None:
        """Return the file of a finished group of tensors; None if it is not there, or damaged."""
        path = self.path / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt"):
                return path
        except (OSError, SafetensorError):
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Keep a group of tensors; the file appears whole or not at all.

        Raises:
            ExportError: It cannot be written.
        """
        path = self.path / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        with self._writing():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            sync(partial)
            return partial.replace(path)

    def remove(self) -> None:
        """Remove everything that is still there, and let go of the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        if self.path.exists():
            warn(
                f"{self.path}, which calibration needs no more, cannot be removed: remove it yourself"
            )

    def _hold(self) -> None:
        """Create the folder if it is not there, and lock it."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            place = self.path.resolve()  # a link cannot be locked
            found = place.stat()
            lock = self._lock.enter_context(locked(place))
            if lock is Lock.HELD:
                raise ExportError(
                    f"another export is at work in {self.path}, where calibration keeps what it has "
                    "done: wait for it to end, or choose another output"
                )
            # Whoever held it may have removed it before it was locked.
            if place.exists() and os.path.samestat(place.stat(), found):
                return
            self._lock.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as err:
            raise ExportError(
                f"{self.path}, where calibration keeps what it has done, cannot be written: {err}. "
                "Free space, or choose another output; what is done is kept"
            ) from err


def _is_foreign(path: Path) -> bool:
    return any(path.iterdir()) and not (path / _KEY_FILE).is_file()


def _stated_digest(path: Path) -> object:
    try:
        return read_json(
            path / _KEY_FILE, max_bytes=MAX_CONFIG_BYTES, error=ExportError, remedy="remove it"
        ).get("sha256")
    except ExportError:
        return None
