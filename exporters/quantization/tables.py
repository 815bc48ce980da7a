"""Quantizing the embedding table and the head: `quantize_tables`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk, check_finite, embedding_rows
from gemma_deploy.exporters.quantization.gptq import Gptq
from gemma_deploy.exporters.quantization.work_folder import OnProgress, WorkFolder
from gemma_deploy.quantization.codes import Quantized, dequantize, pack, quantize, unpack
from gemma_deploy.quantization.formats import WeightFormat, scales_name

TABLE_TOKENS: Final = 8192
"""Most tokens whose last hidden states say what the head reads."""
EMBEDDING_SHARE: Final = 0.1
"""Weight of a tied table's rows as embeddings, as a share of the mean square of what the head reads.

Looked up, a row counts by itself and all its elements alike; as head, by its product with hidden
states."""

_BLOCK_BYTES: Final = 16 << 20


def quantize_tables(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    formats: Mapping[str, WeightFormat],
    work: WorkFolder,
    on_progress: OnProgress,
) -> dict[str, Path]:
    """Quantize the tied table, or the head, by what the head reads.

    A table that only embeds has nothing to be calibrated on.

    Returns:
        The files that hold them, by name.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
    """
    is_tied = HEAD_WEIGHT not in checkpoint.tensors
    name = EMBEDDING_WEIGHT if is_tied else HEAD_WEIGHT
    if name not in formats:
        return {}
    path = work.find("table")
    if path is None:
        hessian = _head_hessian(checkpoint, token_rows, on_progress)
        if is_tied:
            hessian.diagonal().add_(EMBEDDING_SHARE * hessian.diagonal().mean())
        gptq = Gptq(hessian)
        tensors = _quantized_table(checkpoint, name, gptq, formats[name], on_progress)
        path = work.save("table", tensors)
    return {name: path}


def embedded(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    weight_format: WeightFormat | None,
    prepared: Path | None,
) -> Tensor:
    """Return the residual stream [R, S, D] that begins with a quantized table.

    Args:
        checkpoint: Where the table is.
        token_rows: int64 [R, S].
        weight_format: What the table is quantized to; None for not at all.
        prepared: The file with its codes; None where it is rounded to nearest.
    """
    tokens, index = torch.unique(token_rows, return_inverse=True)
    if prepared is not None and weight_format is not None:
        with safe_open(prepared, framework="pt") as file:
            codes, scales = (
                torch.cat([part[token : token + 1] for token in tokens.tolist()])
                for part in map(file.get_slice, (EMBEDDING_WEIGHT, scales_name(EMBEDDING_WEIGHT)))
            )
        rows = dequantize(Quantized(unpack(codes, weight_format), scales), weight_format)
    else:
        rows = embedding_rows(checkpoint, tokens)
        if weight_format is not None:
            rows = dequantize(quantize(rows, weight_format), weight_format)
    hidden: Tensor = rows[index] * checkpoint.config.hidden_size**0.5
    return hidden


def _head_hessian(checkpoint: Checkpoint, token_rows: Tensor, on_progress: OnProgress) -> Tensor:
    """Return the mean of h h^T over the last hidden states h, float32 [D, D]."""
    num_rows = max(1, TABLE_TOKENS // token_rows.shape[1])
    walk = LayerWalk(checkpoint, token_rows[:num_rows])
    num_layers = checkpoint.config.num_hidden_layers
    for index in range(num_layers):
        on_progress("reading the text", index, num_layers)
        walk.advance(walk.layer(index))
    on_progress("reading the text", num_layers, num_layers)
    with torch.no_grad():
        final = walk.last_norm()(walk.hidden).flatten(0, 1)
    hessian: Tensor = final.T @ final / len(final)
    return hessian


def _quantized_table(
    checkpoint: Checkpoint,
    name: str,
    gptq: Gptq,
    weight_format: WeightFormat,
    on_progress: OnProgress,
) -> dict[str, Tensor]:
    info = checkpoint.tensors[name]
    dtype = getattr(torch, DTYPE_NAMES[info.dtype])
    codes, scales = [], []
    for start, stop in checkpoint.row_blocks(name, _BLOCK_BYTES):
        on_progress("quantizing the table", start, info.num_rows)
        raw = bytearray((stop - start) * info.row_bytes)
        checkpoint.read_rows(name, start, stop, memoryview(raw))
        rows = torch.frombuffer(raw, dtype=dtype).view(stop - start, -1)
        check_finite(rows, name)
        quantized = gptq.quantize(rows.float(), weight_format)
        codes.append(pack(quantized.codes, weight_format))
        scales.append(quantized.scales)
    on_progress("quantizing the table", info.num_rows, info.num_rows)
    return {name: torch.cat(codes), scales_name(name): torch.cat(scales)}
