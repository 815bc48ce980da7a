"""One tensor of a safetensors file: where it lies, and how its bytes are read: `StoredTensor`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.errors import CheckpointError

FLOAT_BYTES: Final[Mapping[str, int]] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})
"""The float dtypes that are read, as safetensors spells them, and an element's size."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor of a checkpoint is stored.

    Attributes:
        name: Canonical name, e.g. `model.layers.0.mlp.up_proj.weight`.
        stored_name: Its name in the file.
        dtype: As safetensors spells it, e.g. `F32`, `F16`, `BF16`.
        shape: Dimensions; matrices are [out, in].
        file: The safetensors file that holds it.
        offset: Its first byte, counted from the file's start.
        size_bytes: Its length.
    """

    name: str
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int

    @property
    def num_rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Size of one row (an index of the first dimension) in bytes."""
        return self.size_bytes // self.num_rows

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of the tensor.

        Raises:
            CheckpointError: As `read_into`.
        """
        raw = bytearray(stop - start)
        self.read_into(start, memoryview(raw))
        return bytes(raw)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill memory of the caller with the tensor's bytes from `start` on.

        Raises:
            CheckpointError: If the file ends early or cannot be read (it changed since it was
                opened).
        """
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset + start)
                _read_fully(stream, target)
        except (OSError, EOFError) as err:
            raise CheckpointError(
                f"{self.file} could not be read to the end of {self.name}: {err}. It changed since it "
                "was opened, or its disk fails: copy or download the checkpoint again"
            ) from err


def widened(raw: bytes | bytearray, dtype: str) -> Floats:
    """Return bytes that hold one of `FLOAT_BYTES` as float32 [n]."""
    if dtype == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _read_fully(stream: Any, target: memoryview) -> None:
    """Fill `target`; an unbuffered read may return less than asked for."""
    while target:
        count = stream.readinto(target)
        if not count:
            raise EOFError(f"the file ends {len(target)} bytes early")
        target = target[count:]
