"""Checkpoint weights to a bundle's weights file, in one streamed pass.

Tensors are read in row blocks, transformed, and written; no tensor is ever in memory whole, so the
memory needed does not grow with the model. The file is plain safetensors, readable by any tool.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

import torch
from safetensors import safe_open
from torch import Tensor

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.errors import CheckpointError, ExportError
from gemma_deploy.exporters.quantization.scale_search import search_scales
from gemma_deploy.file_records import FileRecord
from gemma_deploy.graph_spec import DType, Precision
from gemma_deploy.quantization.codes import pack, quantize
from gemma_deploy.quantization.formats import StoredPart, WeightFormat
from gemma_deploy.residual_scaling import ResidualScaling

# Mapped readers find every tensor aligned when the data starts on a page.
_DATA_ALIGNMENT_BYTES = 4096
# Several copies of a block live at once (as read, checked, cast); larger ones are not faster.
_BLOCK_BYTES = 16 << 20
_NO_FORMATS: Final[Mapping[str, WeightFormat]] = MappingProxyType({})
_NOTHING_PREPARED: Final[Mapping[str, "Path | Tensor"]] = MappingProxyType({})
_NO_IMPORTANCE: Final[Mapping[str, Tensor]] = MappingProxyType({})
_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, as the weights file holds it.

    Attributes:
        name: Its name, in the file and as initializer of the graphs.
        source: The checkpoint's tensor it is made from; its own name if it is calibration's alone.
        format: What it is stored in.
        shape: As in the checkpoint; matrices are [out, in].
        is_norm: Whether it is a norm's weight w, stored as 1 + w.
        divisor: The power of two that it is stored divided by (`ResidualScaling`).
    """

    name: str
    source: str
    format: WeightFormat
    shape: tuple[int, ...]
    is_norm: bool
    divisor: float = 1.0

    @property
    def parts(self) -> tuple[StoredPart, ...]:
        """The tensors of the weights file that hold it: itself, and its scales if it has any."""
        return self.format.parts(self.name, self.shape)

    @property
    def size_bytes(self) -> int:
        """Size of all its parts."""
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A written weights file: where each part lies (bytes from the file's start), and the record."""

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


def plan_weights(
    checkpoint: Checkpoint,
    precision: Precision,
    formats: Mapping[str, WeightFormat] = _NO_FORMATS,
    scaling: ResidualScaling | None = None,
) -> tuple[StoredTensor, ...]:
    """Return what the weights file of a checkpoint holds, in order.

    Matrices take the weights' dtype where `formats` says nothing else, biases that of the
    activations, norms float32: a norm is applied in float32 whatever the activations are.

    Args:
        checkpoint: Where the weights come from.
        precision: Dtypes of what is not quantized.
        formats: How matrices are stored, by the checkpoint's names.
        scaling: What is divided by powers of two; None for nothing.

    Raises:
        RequestError: A format's blocks do not divide a matrix's rows.
    """
    plan = []
    for name, info in checkpoint.tensors.items():
        divisor = 1.0
        if scaling is not None:
            divisor = scaling.norm_divisor(name) if is_norm(name) else scaling.weight_divisor(name)
        plan.append(
            StoredTensor(
                name=stored_name(name),
                source=name,
                format=formats.get(name) or WeightFormat(_dense(name, info.shape, precision)),
                shape=info.shape,
                is_norm=is_norm(name),
                divisor=divisor,
            )
        )
        # So that blocks that do not fit are found before anything is written.
        _ = plan[-1].parts
    return tuple(plan)


def plan_cache_scales(
    scales: Mapping[str, Tensor], scaling: ResidualScaling | None
) -> tuple[StoredTensor, ...]:
    """Return how the weights file holds the scales of an int8 cache: as they are, in float32.

    Args:
        scales: From `measured_cache_scales`, which knows of no divisors.
        scaling: What values are divided by; None for nothing.
    """
    return tuple(
        StoredTensor(
            name=name,
            source=name,
            format=WeightFormat("float32"),
            shape=tuple(scale.shape),
            is_norm=False,
            divisor=1.0 if scaling is None else scaling.cache_divisor(name),
        )
        for name, scale in scales.items()
    )


def _dense(name: str, shape: tuple[int, ...], precision: Precision) -> DType:
    if is_norm(name):
        return "float32"
    return precision.weights if len(shape) == 2 else precision.activations


def write_weights(
    checkpoint: Checkpoint,
    plan: Sequence[StoredTensor],
    path: Path,
    on_bytes: Callable[[int], object] = lambda _: None,
    prepared: Mapping[str, Path | Tensor] = _NOTHING_PREPARED,
    importance: Mapping[str, Tensor] = _NO_IMPORTANCE,
) -> WeightsFile:
    """Stream a checkpoint's tensors into a safetensors file, hashing it on the way.

    Args:
        checkpoint: Where the weights come from.
        plan: What to write.
        path: The file to create.
        on_bytes: Called with the number of bytes written since the last call.
        prepared: What calibration has made, by the name of the tensor, not yet divided by its
            divisor: the tensor, or a safetensors file with its parts.
        importance: What errors of columns count, float32 [K], by the name of the int4 or int8 matrix
            whose scales are searched by it; others are rounded to nearest.

    Raises:
        CheckpointError: A weight is not finite, or the checkpoint cannot be read.
        ExportError: A weight is too large for the dtype it should be stored in, or the disk is full.
    """
    header, offsets = _header(plan)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(header)
        for tensor in plan:
            later: list[Tensor] = []
            made = prepared.get(tensor.name)
            for block, *scales in _blocks(checkpoint, tensor, made, importance.get(tensor.name)):
                write(_bytes_of(block))
                on_bytes(block.nbytes)
                later += scales
            for block in later:
                write(_bytes_of(block))
                on_bytes(block.nbytes)
        file.flush()
        os.fsync(file.fileno())
        size_bytes = file.tell()
    return WeightsFile(
        offsets=offsets, record=FileRecord(size_bytes=size_bytes, sha256=digest.hexdigest())
    )


def header_bytes(plan: Sequence[StoredTensor]) -> int:
    """Return the size of the file's head, give or take a page: it spells out offsets."""
    return len(_header(plan)[0]) + _DATA_ALIGNMENT_BYTES


def _header(plan: Sequence[StoredTensor]) -> tuple[bytes, dict[str, int]]:
    """Return the file's head, padded to the alignment, and each part's offset in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for part in (part for tensor in plan for part in tensor.parts):
        starts[part.name] = end
        end += part.size_bytes
        entries[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [starts[part.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT_BYTES)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def _blocks(
    checkpoint: Checkpoint,
    tensor: StoredTensor,
    prepared: Path | Tensor | None,
    importance: Tensor | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of rows of a tensor's parts."""
    if isinstance(prepared, Tensor):
        yield (prepared / tensor.divisor,)
        return
    if prepared is not None:
        yield from _prepared_blocks(tensor, prepared)
        return
    info = checkpoint.tensors[tensor.source]
    dtype = _TORCH_DTYPES[DTYPE_NAMES[info.dtype]]
    for start, stop in checkpoint.row_blocks(tensor.source, _BLOCK_BYTES):
        raw = bytearray((stop - start) * info.row_bytes)
        checkpoint.read_rows(tensor.source, start, stop, memoryview(raw))
        block = torch.frombuffer(raw, dtype=dtype).view(stop - start, *info.shape[1:])
        yield _transformed(block, tensor, importance)


def _prepared_blocks(tensor: StoredTensor, path: Path) -> Iterator[tuple[Tensor, ...]]:
    """Yield what calibration made; of a quantized tensor only the scales take the divisor."""
    with safe_open(path, framework="pt") as file:
        parts = [file.get_slice(part.name) for part in tensor.parts]
        num_rows = tensor.shape[0]
        step = max(1, num_rows * _BLOCK_BYTES // tensor.size_bytes)
        for start in range(0, num_rows, step):
            *codes, last = (part[start : start + step] for part in parts)
            divided = (last.float() / tensor.divisor).to(last.dtype)
            if not bool(torch.isfinite(divided).all()):
                raise _too_large_for_scales(tensor)
            if codes:
                # TensorRT takes no zero; this is the number next to it.
                divided[divided == 0] = torch.finfo(divided.dtype).smallest_normal * 2**-10
            yield *codes, divided


def _transformed(
    block: Tensor, tensor: StoredTensor, importance: Tensor | None
) -> tuple[Tensor, ...]:
    """Fold and cast or quantize rows, and refuse what is, or would become, infinite."""
    # Rounding keeps order, so the extremes (NaN counts as one) speak for the whole block, and are
    # found eight times as fast as isfinite looks at every element.
    extremes = torch.stack(torch.aminmax(block))
    if not bool(torch.isfinite(extremes).all()):
        raise CheckpointError(
            f"{tensor.source} holds NaN or infinity: the checkpoint is damaged; download it again"
        )
    if tensor.format.is_quantized:
        rows = _folded(block, tensor)
        searched = None
        if importance is not None:
            searched = search_scales(rows, importance, tensor.format).to(torch.float16)
        codes, scales = quantize(rows, tensor.format, searched)
        is_finite = bool(torch.isfinite(scales).all())
        parts: tuple[Tensor, ...] = (pack(codes, tensor.format), scales)
    else:
        dtype = _TORCH_DTYPES[cast(DType, tensor.format.scheme)]
        is_finite = bool(torch.isfinite(_folded(extremes, tensor).to(dtype)).all())
        parts = (_folded(block, tensor).to(dtype),)
    if not is_finite and tensor.format.is_quantized:
        raise _too_large_for_scales(tensor)
    if not is_finite:
        raise ExportError(
            f"{tensor.source} holds {extremes.abs().max().item():g}, too large for "
            f"{tensor.format}: export with --dtype bfloat16 or float32"
        )
    return parts


def _too_large_for_scales(tensor: StoredTensor) -> ExportError:
    return ExportError(
        f"{tensor.source} has weights that are too large for the float16 scales of {tensor.format}: keep "
        "it in 16 bits with --keep-fp16, and export with --dtype bfloat16 or float32"
    )


def _folded(block: Tensor, tensor: StoredTensor) -> Tensor:
    # Folded before any rounding: 1 + w in a narrow dtype would lose w's low bits.
    if tensor.is_norm or tensor.divisor != 1 or tensor.format.is_quantized:
        block = block.float()
    folded = block + 1.0 if tensor.is_norm else block
    return folded / tensor.divisor if tensor.divisor != 1 else folded


def _bytes_of(block: Tensor) -> memoryview:
    return block.contiguous().view(torch.uint8).flatten().numpy().data
