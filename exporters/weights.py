"""Checkpoint weights to a bundle's weights file, in one streamed pass.

Tensors are read in row blocks, transformed, and written; no tensor is ever in memory whole, so the
memory needed does not grow with the model. The file is plain safetensors, readable by any tool.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.errors import CheckpointError, ExportError
from gemma_deploy.file_records import FileRecord
from gemma_deploy.graph_spec import DTYPE_BYTES, DType, Precision

# Mapped readers find every tensor aligned when the data starts on a page.
_DATA_ALIGNMENT_BYTES = 4096
# Several copies of a block live at once (as read, checked, cast); larger ones are not faster.
_BLOCK_BYTES = 16 << 20
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of the weights file.

    Attributes:
        name: Its name, in the file and as initializer of the graphs.
        source: The checkpoint's tensor it is made from.
        dtype: What it is stored in.
        shape: As in the checkpoint; matrices are [out, in].
        is_norm: Whether it is a norm's weight w, stored as 1 + w.
    """

    name: str
    source: str
    dtype: DType
    shape: tuple[int, ...]
    is_norm: bool

    @property
    def size_bytes(self) -> int:
        """Size in the weights file."""
        return torch.Size(self.shape).numel() * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A written weights file: where each tensor lies (bytes from the file's start), and the record."""

    offsets: dict[str, int]
    record: FileRecord


def stored_name(source: str) -> str:
    """Return the name in the weights file of a checkpoint's tensor.

    Norm weights become `*.scale`, so that 1 + w is never taken for w.
    """
    return source.removesuffix(".weight") + ".scale" if is_norm(source) else source


def is_norm(source: str) -> bool:
    """Tell whether a checkpoint's tensor is the weight of an RMSNorm."""
    return source.removesuffix(".weight").endswith("norm")


def plan_weights(checkpoint: Checkpoint, precision: Precision) -> tuple[StoredTensor, ...]:
    """Return what the weights file of a checkpoint holds, in order.

    Matrices take the weights' dtype, biases that of the activations, norms float32: a norm is
    applied in float32 whatever the activations are.
    """
    return tuple(
        StoredTensor(
            name=stored_name(name),
            source=name,
            dtype=_stored_dtype(name, len(info.shape), precision),
            shape=info.shape,
            is_norm=is_norm(name),
        )
        for name, info in checkpoint.tensors.items()
    )


def _stored_dtype(name: str, rank: int, precision: Precision) -> DType:
    if is_norm(name):
        return "float32"
    return precision.weights if rank == 2 else precision.activations


def write_weights(
    checkpoint: Checkpoint,
    plan: Sequence[StoredTensor],
    path: Path,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> WeightsFile:
    """Stream a checkpoint's tensors into a safetensors file, hashing it on the way.

    Args:
        checkpoint: Where the weights come from.
        plan: What to write.
        path: The file to create.
        on_bytes: Called with the number of bytes written since the last call.

    Raises:
        CheckpointError: A weight is not finite, or the checkpoint cannot be read.
        ExportError: A weight is too large for the dtype it should be stored in.
    """
    header, offsets = _header(plan)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(header)
        digest.update(header)
        for block in _blocks(checkpoint, plan):
            file.write(block)
            digest.update(block)
            on_bytes(len(block))
        file.flush()
        os.fsync(file.fileno())
        size_bytes = file.tell()
    return WeightsFile(
        offsets=offsets, record=FileRecord(size_bytes=size_bytes, sha256=digest.hexdigest())
    )


def _header(plan: Sequence[StoredTensor]) -> tuple[bytes, dict[str, int]]:
    """Return the file's head, padded to the alignment, and each tensor's offset in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for tensor in plan:
        starts[tensor.name] = end
        end += tensor.size_bytes
        entries[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT_BYTES)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def _blocks(checkpoint: Checkpoint, plan: Sequence[StoredTensor]) -> Iterator[memoryview]:
    for tensor in plan:
        info = checkpoint.tensors[tensor.source]
        for start, stop in checkpoint.row_blocks(tensor.source, _BLOCK_BYTES):
            raw = bytearray((stop - start) * info.row_bytes)
            checkpoint.read_rows(tensor.source, start, stop, memoryview(raw))
            block = torch.frombuffer(raw, dtype=_TORCH_DTYPES[DTYPE_NAMES[info.dtype]])
            yield _bytes_of(_transformed(block, tensor))


def _transformed(block: Tensor, tensor: StoredTensor) -> Tensor:
    """Fold and cast a block, and refuse what is, or would become, infinite."""
    # Rounding keeps order, so the extremes (NaN counts as one) speak for the whole block, and are
    # found eight times as fast as isfinite looks at every element.
    extremes = torch.stack(torch.aminmax(block))
    if not bool(torch.isfinite(extremes).all()):
        raise CheckpointError(
            f"{tensor.source} holds NaN or infinity: the checkpoint is damaged; download it again"
        )
    if not bool(torch.isfinite(_folded(extremes, tensor)).all()):
        raise ExportError(
            f"{tensor.source} holds {extremes.abs().max().item():g}, too large for {tensor.dtype}: "
            "export with --dtype bfloat16 or float32"
        )
    return _folded(block, tensor)


def _folded(block: Tensor, tensor: StoredTensor) -> Tensor:
    # Folded before any rounding: 1 + w in a narrow dtype would lose w's low bits.
    folded = block.float() + 1.0 if tensor.is_norm else block
    return folded.to(_TORCH_DTYPES[tensor.dtype])


def _bytes_of(block: Tensor) -> memoryview:
    return block.view(torch.uint8).numpy().data
