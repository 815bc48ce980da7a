"""The attention kernels on torch tensors: what the op runs on a GPU. Needs Triton.

Has not run on hardware yet.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from gemma_deploy.plugins.attention.schedule import (
    COMBINE_BLOCK_H,
    COMBINE_BLOCK_PARTS,
    COMBINE_NUM_WARPS,
    HEAD_DIMS,
    MAX_GROUP,
    SHARED_LIMIT_BYTES,
    CallShape,
    KernelDType,
    KernelShape,
    Tile,
    choose_tile,
    plan_launch,
)

_DTYPES: dict[torch.dtype, KernelDType] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def are_supported(query: Tensor, key_cache: Tensor) -> bool:
    """Tell whether the kernels cover a call's dtypes, shapes and device, and Triton is here.

    Args:
        query: [B, S, N, H].
        key_cache: [B, K, T, H]; the value cache is alike.
    """
    return (
        query.dtype in _DTYPES
        and key_cache.dtype == query.dtype
        and query.shape[3] in HEAD_DIMS
        and query.shape[2] // key_cache.shape[1] <= MAX_GROUP
        and query.numel() > 0
        and _has_triton()
        and _device_facts(query.device)[0] in SHARED_LIMIT_BYTES
    )


def attend_on_gpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    softcap: float,
    sliding_window: int,
) -> Tensor:
    """Attend from [B, S, N, H] to [B, K, T, H], where `are_supported` says yes.

    Waits for nothing, and may be captured into a CUDA graph.

    Args:
        query: [B, S, N, H], rotated.
        key_cache: [B, K, T, H], holding this step's keys.
        value_cache: [B, K, T, H], holding this step's values.
        input_pos: int32 or int64 [B], tokens cached before this step.
        scale: Factor on attention scores.
        softcap: c in c * tanh(score / c); 0 for none.
        sliding_window: Keys a query sees, its own included; 0 for all.

    Returns:
        [B, S, N, H] in the query's dtype.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, capacity = key_cache.shape[1:3]
    capability, num_multiprocessors = _device_facts(query.device)
    shape = KernelShape(
        head_dim=head_dim,
        group=num_heads // num_kv_heads,
        dtype=_DTYPES[query.dtype],
        has_softcap=softcap > 0,
    )
    call = CallShape(
        batch=batch, num_tokens=num_tokens, num_kv_heads=num_kv_heads, capacity=capacity
    )
    wide = choose_tile("wide", shape, capability)
    launch = plan_launch(
        shape,
        call,
        sliding_window=sliding_window,
        wide_block_m=wide.block_m,
        num_multiprocessors=num_multiprocessors,
    )
    tile = choose_tile(launch.tile_name, shape, capability)
    with torch.cuda.device(query.device):
        return run_kernels(
            query.contiguous(),
            key_cache.contiguous(),
            value_cache.contiguous(),
            input_pos.contiguous(),
            (scale, softcap, sliding_window),
            tile=tile,
            num_parts=launch.num_parts,
        )


def run_kernels(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    input_pos: Tensor,
    attributes: tuple[float, float, int],
    *,
    tile: Tile,
    num_parts: int,
) -> Tensor:
    """Launch the kernels on contiguous tensors, cut as told; see `attend_on_gpu`.

    Args:
        query: As there.
        key_cache: As there.
        value_cache: As there.
        input_pos: As there.
        attributes: scale, softcap, sliding_window.
        tile: How `attend` is cut.
        num_parts: Parts into which each tile's keys are split.
    """
    from gemma_deploy.plugins.attention.kernels import attend, combine

    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, capacity = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_rows, heads = num_tokens * group, batch * num_kv_heads
    output = torch.empty_like(query)
    # Parts without keys write no output; whatever lies there is not read.
    scratch_rows = heads * num_parts * num_rows if num_parts > 1 else 0
    partial_output = query.new_empty((scratch_rows, head_dim), dtype=torch.float32)
    partial_lse = query.new_empty(scratch_rows, dtype=torch.float32)
    attend[-(-num_rows // tile.block_m), num_parts, heads](
        query,
        key_cache,
        value_cache,
        input_pos,
        output,
        partial_output,
        partial_lse,
        *attributes,
        num_tokens,
        capacity,
        num_kv_heads,
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_H=1 << (head_dim - 1).bit_length(),
        HAS_SOFTCAP=attributes[1] > 0,
        SKIPS_MASKS=tile.skips_masks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    if num_parts > 1:
        combine[num_rows, -(-head_dim // COMBINE_BLOCK_H), heads](
            partial_output,
            partial_lse,
            output,
            num_tokens,
            num_kv_heads,
            num_parts,
            HEAD_DIM=head_dim,
            GROUP=group,
            BLOCK_PARTS=COMBINE_BLOCK_PARTS,
            BLOCK_H=COMBINE_BLOCK_H,
            num_warps=COMBINE_NUM_WARPS,
            enable_fp_fusion=True,
        )
    return output


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability times 10, and how many multiprocessors it has."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count
