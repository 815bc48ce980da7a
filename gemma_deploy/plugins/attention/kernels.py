"""Attention over a static KV cache as Triton kernels: `attend`, and `combine` for split keys.

The query heads that share a KV head are rows of one tile (row = token * GROUP + head in group), so
keys and values are read once. A tile walks only the keys that some row of it sees, in float32 online
softmax (https://arxiv.org/abs/2205.14135); where tiles are few, several programs walk a part each and
`combine` joins them (https://pytorch.org/blog/flash-decoding/). Which part is computed from `input_pos`
on the device: the grid depends on shapes alone, so a captured CUDA graph stays right as rows grow.

Everything is contiguous: query and output [B, S, N, H], caches [B, K, T, H], input_pos [B] int32 or
int64. S * N * H and T * H are below 2^31: offsets within a row of the batch have 32 bits. Query i of
row b sees keys j <= input_pos[b] + i, and with a window only j > input_pos[b] + i - sliding_window.
Memory outside of what a tile sees is never read.

Triton's interpreter and compiler have run these kernels; hardware has not yet.
"""

# Triton's functions are written in a language of its own, which has tensors for types, and names its
# compile-time constants in capitals.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803, PLR0913, PLR0917, D417

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_WINDOW = tl.constexpr(1 << 30)
_MAX_POSITION = tl.constexpr(1 << 29)


# Called just in time, Triton would compile anew for integers that are 1 or divisible by 16.
@triton.jit(do_not_specialize=["sliding_window", "num_tokens", "capacity", "num_kv_heads"])
def attend(
    query,
    key_cache,
    value_cache,
    input_pos,
    output,
    partial_output,
    partial_lse,
    scale,
    softcap,
    sliding_window,
    num_tokens,
    capacity,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SKIPS_MASKS: tl.constexpr,
):
    """Attend from one tile of rows to one part of the keys they see.

    Grid: (tiles of BLOCK_M rows, parts, B * K). With one part, `output` is written and the partial
    pointers are not touched; with several, each writes partial_output [B, K, parts, S * GROUP, H]
    and partial_lse [B, K, parts, S * GROUP] (log2 of the sum of exp2 of scores; -inf for a part
    without keys, whose partial_output is not written), both float32.

    Args:
        scale, softcap, sliding_window: As in the op; 0 for no window. softcap is read only with
            HAS_SOFTCAP.
        num_tokens, capacity, num_kv_heads: S, T, K.
        BLOCK_H: The power of two not below HEAD_DIM.
        SKIPS_MASKS: Give keys that every row sees a loop of their own, without masks. Pays where
            tiles are large; for one token, one loop without restarts of its pipeline is better.
    """
    num_rows = num_tokens * GROUP
    # Tiles that see the most keys start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    part, head = tl.program_id(1), tl.program_id(2)
    batch, kv_head = head // num_kv_heads, head % num_kv_heads
    # TensorRT times engines on arbitrary data: sums of whatever is here must not wrap around and lead
    # outside of the cache.
    start = tl.minimum(tl.maximum(tl.load(input_pos + batch), 0), _MAX_POSITION).to(tl.int32)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = tl.minimum(rows // GROUP, num_tokens - 1)
    dims = tl.arange(0, BLOCK_H)
    is_inside = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    first_query_head = batch.to(tl.int64) * num_tokens * num_kv_heads * GROUP + kv_head * GROUP
    row_offsets = (tokens * num_kv_heads * GROUP + rows % GROUP) * HEAD_DIM
    query_offsets = first_query_head * HEAD_DIM + row_offsets[:, None] + dims[None, :]
    queries = tl.load(query + query_offsets, mask=is_inside, other=0.0)

    window = tl.where(sliding_window > 0, sliding_window, _NO_WINDOW)
    low, high, all_low, all_high = _seen_keys(
        tile, start, window, num_tokens, capacity, GROUP, BLOCK_M
    )
    part_keys = tl.cdiv(tl.cdiv(high - low, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    low += part * part_keys
    high = tl.minimum(low + part_keys, high)

    last_key = start + tokens
    first_key = last_key - window + 1
    head_offset = head.to(tl.int64) * capacity * HEAD_DIM
    keys, values = key_cache + head_offset, value_cache + head_offset
    accumulator = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    masked_high = high
    if SKIPS_MASKS:
        # Whole blocks: first those that the window cuts, then those all rows see, then the rest.
        masked_high = low + tl.cdiv(tl.maximum(all_low - low, 0), BLOCK_N) * BLOCK_N
        masked_high = tl.minimum(masked_high, high)
    accumulator, running_max, running_sum = _walk(
        accumulator, running_max, running_sum, queries, keys, values, low, masked_high, high,
        first_key, last_key, scale, softcap, HEAD_DIM, BLOCK_N, BLOCK_H, HAS_SOFTCAP, True,
    )  # fmt: skip
    if SKIPS_MASKS:
        num_free = tl.maximum(tl.minimum(all_high, high) - masked_high, 0) // BLOCK_N * BLOCK_N
        free_high = masked_high + num_free
        accumulator, running_max, running_sum = _walk(
            accumulator, running_max, running_sum, queries, keys, values, masked_high, free_high,
            high, first_key, last_key, scale, softcap, HEAD_DIM, BLOCK_N, BLOCK_H, HAS_SOFTCAP,
            False,
        )  # fmt: skip
        accumulator, running_max, running_sum = _walk(
            accumulator, running_max, running_sum, queries, keys, values, free_high, high, high,
            first_key, last_key, scale, softcap, HEAD_DIM, BLOCK_N, BLOCK_H, HAS_SOFTCAP, True,
        )  # fmt: skip

    # A row without keys (in this part) has sum 0: its output is 0, its log-sum-exp -inf.
    accumulator = accumulator / tl.where(running_sum > 0, running_sum, 1.0)[:, None]
    if tl.num_programs(1) == 1:
        tl.store(output + query_offsets, accumulator.to(output.dtype.element_ty), mask=is_inside)
    else:
        part_row = (head.to(tl.int64) * tl.num_programs(1) + part) * num_rows
        lse = running_max + tl.log2(running_sum)
        tl.store(partial_lse + part_row + rows, lse, mask=rows < num_rows)
        if low < high:
            offsets = part_row * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
            tl.store(partial_output + offsets, accumulator, mask=is_inside)


@triton.jit
def _seen_keys(
    tile,
    start,
    window,
    num_tokens,
    capacity,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return [low, high), the keys that a row of a tile sees, and [all_low, all_high), that all see."""
    first_token = start + tile * BLOCK_M // GROUP
    last_token = start + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_tokens - 1)
    low = tl.maximum(first_token - window + 1, 0)
    high = tl.minimum(last_token + 1, capacity)
    return low, high, tl.maximum(last_token - window + 1, 0), first_token + 1


@triton.jit
def _walk(
    accumulator,
    running_max,
    running_sum,
    queries,
    keys,
    values,
    low,
    high,
    end,
    first_key,
    last_key,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take the keys [low, high) of one KV head into the running softmax, in blocks of BLOCK_N.

    Without IS_MASKED the range is whole blocks that every row sees. With it, each row sees
    first_key <= key <= last_key, and nothing at `end` or beyond is read.
    """
    dims = tl.arange(0, BLOCK_H)
    # exp(scale * x) = exp2(factor * x); with a cap, x is tanh(score / cap) and the factor the cap's.
    factor = (softcap if HAS_SOFTCAP else scale) * _LOG2_E
    for block in tl.range(low, high, BLOCK_N):
        slots = block + tl.arange(0, BLOCK_N)
        offsets = slots[:, None] * HEAD_DIM + dims[None, :]
        if IS_MASKED:
            is_read = (slots < end)[:, None] & (dims < HEAD_DIM)[None, :]
            key_block = tl.load(keys + offsets, mask=is_read, other=0.0)
            value_block = tl.load(values + offsets, mask=is_read, other=0.0)
        elif HEAD_DIM == BLOCK_H:
            key_block = tl.load(keys + offsets)
            value_block = tl.load(values + offsets)
        else:
            key_block = tl.load(keys + offsets, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            value_block = tl.load(values + offsets, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(key_block), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1); exact at both ends, where exp is 0 or inf.
            scores = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2_E * scale / softcap)) + 1.0)
        if IS_MASKED:
            is_seen = (slots[None, :] >= first_key[:, None]) & (slots[None, :] <= last_key[:, None])
            scores = tl.where(is_seen & (slots < end)[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * factor)
        # A row that has not seen a key yet keeps -inf as its maximum; -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if IS_MASKED else new_max
        weights = tl.exp2(scores * factor - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(
            weights.to(value_block.dtype), value_block, accumulator, input_precision="ieee"
        )
        running_max = new_max
    return accumulator, running_max, running_sum


@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads", "num_parts"])
def combine(
    partial_output,
    partial_lse,
    output,
    num_tokens,
    num_kv_heads,
    num_parts,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Join the parts of one row, for BLOCK_H of its dims.

    Grid: (S * GROUP, cdiv(H, BLOCK_H), B * K).
    """
    num_rows = num_tokens * GROUP
    row, head = tl.program_id(0), tl.program_id(2)
    dims = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = head.to(tl.int64) * num_parts * num_rows + row
    accumulator = tl.zeros([BLOCK_H], tl.float32)
    running_max = tl.full([], float("-inf"), tl.float32)
    running_sum = tl.full([], 0.0, tl.float32)
    for block in range(0, num_parts, BLOCK_PARTS):
        parts = block + tl.arange(0, BLOCK_PARTS)
        lse = tl.load(
            partial_lse + first + parts * num_rows, mask=parts < num_parts, other=float("-inf")
        )
        offsets = (first + parts * num_rows)[:, None] * HEAD_DIM + dims[None, :]
        # Parts without keys have written nothing: what lies there is not read.
        is_written = (lse > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
        partial = tl.load(partial_output + offsets, mask=is_written, other=0.0)
        new_max = tl.maximum(running_max, tl.max(lse, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(lse - shift)
        decay = tl.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weights, 0)
        accumulator = accumulator * decay + tl.sum(weights[:, None] * partial, 0)
        running_max = new_max
    # As in `attend`: a row without keys is 0.
    accumulator = accumulator / tl.where(running_sum > 0, running_sum, 1.0)
    batch, kv_head = head // num_kv_heads, head % num_kv_heads
    token = batch.to(tl.int64) * num_tokens + row // GROUP
    query_head = token * num_kv_heads * GROUP + kv_head * GROUP + row % GROUP
    offsets = query_head * HEAD_DIM + dims
    tl.store(output + offsets, accumulator.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
