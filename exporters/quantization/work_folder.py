"""What an interrupted calibration keeps: `WorkFolder`."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma_deploy.errors import ExportError

OnProgress = Callable[[str, int, int], object]
"""(what is being done, done, total)."""

_KEY_FILE = "calibration.json"


class WorkFolder:
    """A folder of finished tensors, which belong to one checkpoint, text and choice of options.

    Args:
        path: The folder; it is created with the first that is saved, or taken up where a run of the
            same key left it. What a run of another key left is removed.
        key: Everything that the tensors depend on, as JSON can hold it.

    Raises:
        ExportError: There is something else at `path`, or it cannot be written.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self._digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if path.exists() and (not path.is_dir() or _is_foreign(path)):
            raise ExportError(
                f"{path}, where calibration keeps what it has done, holds something else: move it "
                "away, or choose another output"
            )
        with self._writing():
            if path.exists() and _stated_digest(path) != self._digest:
                shutil.rmtree(path)

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
            self.path.mkdir(parents=True, exist_ok=True)
            stated = json.dumps({"sha256": self._digest})
            (self.path / _KEY_FILE).write_text(stated, encoding="utf-8")
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            return partial.replace(path)

    def remove(self) -> None:
        """Remove everything, if anything was saved."""
        if self.path.exists():
            shutil.rmtree(self.path)

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
        return json.loads((path / _KEY_FILE).read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):
        return None
